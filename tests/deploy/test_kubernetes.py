"""The Kubernetes manifests are valid, restricted, and agree with the program that they run."""

from __future__ import annotations

import asyncio
import copy
import datetime as dt
import json
import re
import ssl
import zoneinfo
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import trustme
import typer
import yaml
from websockets.asyncio.client import connect

import ingestor
from ingestor.buffer.reserve import BALLAST
from ingestor.cli import app
from ingestor.errors import EXIT_CONFIGURATION
from ingestor.settings import SECRETS, load_settings, unknown_variables, variable, written_default
from ingestor.simulator.server import TOKEN
from ingestor.store.follower import LEAVE_SECONDS
from ingestor.web.server import CLOSE_TIMEOUT
from tests.clocks import HANG_SECONDS
from tests.commands import start
from tests.deploy import kubernetes
from tests.deploy.kubernetes import (
    DIRECTORY,
    OVERLAYS,
    WITH_RELAY,
    Manifest,
    container,
    daemon,
    environment,
    in_bytes,
    of_kind,
    overlay,
    selects,
    templates,
    unrestricted,
)
from tests.http import Window
from tests.processes import DaemonProcess
from tests.relays import new_token
from tests.servers import TestServer, execute_all, with_parts

VERSION = "1.32"
OLDEST = "1.29"
OPERATOR = "monitoring.coreos.com/"
"""The operator's two objects have no schema in Kubernetes, and are checked one by one."""

COMMANDS = {
    "daemon": ["run"],
    "migrate": ["migrate"],
    "maintain": ["maintain"],
    "backfill": ["backfill"],
    "report": ["gaps"],
    "relay": ["relay"],
}
OWNERS = {"migrate", "maintain"}
"""The commands that need the login which owns the tables."""

CREDENTIALS = {
    "daemon": {"ingestor-stream", "ingestor-database"},
    "backfill": {"ingestor-stream", "ingestor-database"},
    "report": {"ingestor-database"},
    "migrate": {"ingestor-owner"},
    "maintain": {"ingestor-owner"},
    "relay": {"ingestor-relay", "ingestor-relay-tls"},
}
FILES = ("_FILE", "_TLS_CERT", "_TLS_KEY")
"""The ends of the names of variables that name a file of a secret."""

RELAY = {"app.kubernetes.io/name": "ingestor", "app.kubernetes.io/component": "relay"}
DAEMON = {"app.kubernetes.io/name": "ingestor", "app.kubernetes.io/component": "daemon"}

AT_REST = 90 * 2**20
"""Bytes of memory that a daemon takes with nothing in its buffer, measured; and again as much for surprises."""

every_overlay = pytest.mark.parametrize("name", OVERLAYS)


def commands(name: str) -> dict[str, list[str]]:
    """Return the command of each component of an overlay."""
    return {component: words for component, words in COMMANDS.items() if component != "relay" or name == WITH_RELAY}


def problem(manifest: Manifest, version: str = VERSION) -> str:
    """Return what Kubernetes' own schema has against a manifest."""
    try:
        kubernetes_validate.validate(manifest, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error)
    return ""


def _damaged(manifest: Manifest, change: Callable[[Any], object]) -> Manifest:
    copied = copy.deepcopy(manifest)
    change(copied)
    return copied


@every_overlay
def test_each_object_fits_the_schema_of_its_kind(name: str) -> None:
    """Every field is known, and has a value of its type."""
    found = {
        f"{manifest['kind']} {manifest['metadata']['name']}": problem(manifest)
        for manifest in overlay(name)
        if not manifest["apiVersion"].startswith(OPERATOR)
    }
    assert len(found) == (17 if name == WITH_RELAY else 14)
    assert not {what: why for what, why in found.items() if why}


def test_the_oldest_cluster_knows_it_all() -> None:
    """Nothing here is newer than what the README promises."""
    assert f"Kubernetes {OLDEST} or newer" in (DIRECTORY / "README.md").read_text(encoding="utf-8")
    assert [problem(manifest, OLDEST) for manifest in overlay("overlays/two-instances")] == [""] * 14
    assert [problem(manifest, OLDEST) for manifest in overlay(WITH_RELAY)] == [""] * 17


@every_overlay
def test_every_object_says_whose_it_is(name: str) -> None:
    """Each object has the common label, and what runs or is reached says of which component it is."""
    for manifest in overlay(name):
        labels = manifest["metadata"].get("labels", {})
        assert labels.get("app.kubernetes.io/name") == "ingestor", manifest["kind"]
        if manifest["kind"] in {"StatefulSet", "Deployment", "Job", "CronJob", "Service", "PodDisruptionBudget"}:
            assert labels["app.kubernetes.io/component"] in COMMANDS, manifest["metadata"]["name"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda each: each["spec"]["template"]["spec"].update(terminationGracePeriod=50), "terminationGracePeriod"),
        (lambda each: each["spec"].update(replicas="1"), "'1' is not of type"),
        (lambda each: each["spec"].pop("selector"), "'selector' is a required property"),
        (lambda each: each["spec"]["template"]["spec"]["containers"][0].update(readynessProbe={}), "readynessProbe"),
    ],
)
def test_the_schema_refuses_a_mistake(change: Callable[[Any], object], words: str) -> None:
    """A misspelt, a missing and a mistyped field would be found."""
    assert words in problem(_damaged(daemon(overlay("overlays/plain")), change))


@every_overlay
def test_pods_are_restricted(name: str) -> None:
    """No pod may do more than the restricted profile allows, and the namespace enforces it."""
    found = templates(overlay(name))
    assert found.keys() == commands(name).keys()
    assert {component: freedom for component, template in found.items() for freedom in unrestricted(template)} == {}
    (namespace,) = of_kind(overlay(name), "Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda spec: spec.update(hostNetwork=True), "hostNetwork"),
        (lambda spec: spec["securityContext"].pop("seccompProfile"), "seccompProfile"),
        (lambda spec: spec["securityContext"].update(runAsUser=0), "root"),
        (lambda spec: spec["securityContext"].pop("runAsNonRoot"), "root"),
        (lambda spec: spec.pop("automountServiceAccountToken"), "service account"),
        (lambda spec: spec["volumes"].append({"name": "etc", "hostPath": {"path": "/etc"}}), "volume hostPath"),
        (lambda spec: spec.update(initContainers=[{"name": "init"}]), "privileges"),
        (lambda spec: spec["containers"][0]["securityContext"].update(privileged=True), "privileges"),
        (lambda spec: spec["containers"][0]["securityContext"]["capabilities"].update(add=["NET_RAW"]), "capabilities"),
        (lambda spec: spec["containers"][0]["securityContext"].pop("readOnlyRootFilesystem"), "root file system"),
        (lambda spec: spec["containers"][0]["securityContext"].update(runAsUser=0), "runAsUser of a container"),
        (lambda spec: spec["containers"][0]["ports"][0].update(hostPort=9464), "hostPort"),
    ],
)
def test_a_freedom_would_be_seen(change: Callable[[Any], object], words: str) -> None:
    """Each rule of the profile is looked at."""
    template = _damaged(templates(overlay("overlays/plain"))["daemon"], lambda each: change(each["spec"]))
    assert words in list(unrestricted(template))


@every_overlay
def test_every_setting_is_known_and_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings read every variable of the pods, the same in all pods."""
    for component, template in templates(overlay(name)).items():
        with monkeypatch.context() as patch:
            variables = environment(overlay(name), template, pod="ingestor-1")
            for variable, value in variables.items():
                patch.setenv(variable, value)
            loaded = load_settings()
            # The tests' own variables (INGESTOR_TEST_…) are there as well.
            assert variables.keys() & set(unknown_variables()) == set(), component
        if component == "daemon":
            assert loaded.instance == "ingestor-1"
            assert loaded.http_host == "0.0.0.0"
        assert [source["configMapRef"]["name"] for source in container(template)["envFrom"]] == list(
            of_kind(overlay(name), "ConfigMap")
        ), component
        assert template["spec"]["enableServiceLinks"] is False, "or INGESTOR_PORT and others would come of the Service"


@pytest.mark.parametrize(
    ("name", "variable", "value"),
    [
        ("overlays/plain", "INGESTOR_RETENTION", "off"),
        ("overlays/timescale", "INGESTOR_COLUMNSTORE_AFTER", "14d"),
        ("overlays/two-instances", "INGESTOR_STOP_TIMEOUT", "20s"),
    ],
)
def test_overlays_add_settings(name: str, variable: str, value: str) -> None:
    """An overlay's settings come beside those of the base, and what a setting says is the program's default."""
    (settings,) = of_kind(overlay(name), "ConfigMap").values()
    assert settings["data"][variable] == value == written_default(variable[9:].lower())


def test_a_changed_setting_is_a_changed_template() -> None:
    """The name of the ConfigMap depends on its content, so a change of a setting rolls the daemon out again."""
    names = [name for each in OVERLAYS[:2] for name in of_kind(overlay(each), "ConfigMap")]
    assert len(set(names)) == 2
    assert all(name.startswith("ingestor-settings-") for name in names)


@every_overlay
def test_commands_are_real(name: str) -> None:
    """Each container runs a command that takes its options, from the image of this version."""
    command_line = typer.main.get_command(app)
    for component, template in templates(overlay(name)).items():
        each = container(template)
        assert each["command"] == ["ingestor"]
        assert each["args"] == COMMANDS[component]
        words = list(each["args"])
        command = getattr(command_line, "commands")[words[0]]  # noqa: B009 - mypy does not know that it is a group
        command.make_context(words[0], words[1:])
        assert each["image"].removeprefix("registry.example.org/") == f"ingestor:{ingestor.__version__}"


@every_overlay
def test_sizes_fit_the_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grace period, volume and memory have room for what the settings allow."""
    template = templates(overlay(name))["daemon"]
    for each, value in environment(overlay(name), template, pod="ingestor-0").items():
        monkeypatch.setenv(each, value)
    loaded = load_settings()
    assert template["spec"]["terminationGracePeriodSeconds"] >= 2 * loaded.stop_timeout + 10
    memory = container(template)["resources"]["limits"]["memory"]
    assert in_bytes(memory) >= AT_REST + 2 * loaded.memory_max_bytes + AT_REST
    (claim,) = daemon(overlay(name))["spec"]["volumeClaimTemplates"]
    assert in_bytes(claim["spec"]["resources"]["requests"]["storage"]) >= 2 * loaded.spool_max_bytes + 16 * BALLAST
    (mount,) = (each for each in container(template)["volumeMounts"] if each["name"] == claim["metadata"]["name"])
    assert loaded.spool_dir.is_relative_to(mount["mountPath"])
    assert not mount.get("readOnly")


@every_overlay
def test_memory_is_requested_in_full_and_the_processor_not_limited(name: str) -> None:
    """No pod is evicted for the memory that it may use, and none is throttled."""
    for template in templates(overlay(name)).values():
        resources = container(template)["resources"]
        assert resources["limits"] == {"memory": resources["requests"]["memory"]}
        assert resources["requests"]["cpu"]


@every_overlay
def test_probes_and_service_find_the_port(name: str) -> None:
    """The probes ask the paths that there are, at the port that the daemon listens on, and so does the Service."""
    each = container(templates(overlay(name))["daemon"])
    assert each["ports"] == [{"name": "http", "containerPort": int(written_default("http_port"))}]
    probes = {kind: each[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert probes == {
        "startup": {"path": "/healthz", "port": "http"},
        "liveness": {"path": "/healthz", "port": "http"},
        "readiness": {"path": "/readyz", "port": "http"},
    }
    service = of_kind(overlay(name), "Service")["ingestor"]["spec"]
    assert service["publishNotReadyAddresses"] is True
    assert service["clusterIP"] == "None"
    assert [port["targetPort"] for port in service["ports"]] == ["http"]
    assert selects({"matchLabels": service["selector"]}, DAEMON)
    assert daemon(overlay(name))["spec"]["serviceName"] == "ingestor"


@every_overlay
def test_secrets_are_files_of_the_right_login(name: str, tmp_path: Path) -> None:
    """Each pod has the secrets that its command needs, as files where its settings look, and no others."""
    made = {
        (secret["metadata"]["name"], key) for secret in kubernetes.secrets(tmp_path) for key in secret.get("data", {})
    }
    assert {secret for secret, _ in made} == set().union(*CREDENTIALS.values())
    for component, template in templates(overlay(name)).items():
        (volume,) = (each for each in template["spec"]["volumes"] if each["name"] == "secrets")
        (mount,) = (each for each in container(template)["volumeMounts"] if each["name"] == "secrets")
        assert "subPath" not in mount, "a file by subPath is never updated"
        assert mount["readOnly"] is True
        assert volume["projected"]["defaultMode"] == 0o440
        files = {}
        for source in volume["projected"]["sources"]:
            if "secret" in source:
                for item in source["secret"]["items"]:
                    files[f"{mount['mountPath']}/{item['path']}"] = (source["secret"]["name"], item["key"])
        assert set(files.values()) <= made
        assert {secret for secret, _ in files.values()} == CREDENTIALS[component]
        assert ("ingestor-owner" in CREDENTIALS[component]) is (component in OWNERS)
        variables = environment(overlay(name), template, pod="ingestor-0")
        assert {value for variable, value in variables.items() if variable.endswith(FILES)} == files.keys()


@every_overlay
def test_no_secret_is_in_a_manifest(name: str) -> None:
    """The default manifests have neither a Secret nor a variable that holds one."""
    assert of_kind(overlay(name), "Secret") == {}
    for template in templates(overlay(name)).values():
        variables = environment(overlay(name), template, pod="ingestor-0")
        assert not variables.keys() & {variable(each) for each in SECRETS}
    assert "://" not in yaml.safe_dump([each for each in overlay(name) if each["kind"] != "PrometheusRule"])


def test_secrets_reach_pods_that_run(tmp_path: Path) -> None:
    """A Secret keeps its name when its content changes, and Git knows none of the files."""
    made = of_kind(kubernetes.secrets(tmp_path), "Secret")
    own = {"ingestor-stream", "ingestor-database", "ingestor-owner"}
    assert made.keys() == own | {"ingestor-relay", "ingestor-relay-tls"}
    assert [problem(secret) for secret in made.values()] == [""] * 5
    assert made["ingestor-relay-tls"]["type"] == "kubernetes.io/tls"
    for folder in (DIRECTORY / "secrets", DIRECTORY / "secrets/relay"):
        assert {path.name for path in folder.iterdir()} >= {".gitignore", "kustomization.yaml"}
    namespaces = of_kind(overlay("overlays/plain"), "Namespace").keys()
    assert {secret["metadata"]["namespace"] for secret in made.values()} == namespaces


@every_overlay
def test_pods_outlive_a_restart_and_not_each_other(name: str) -> None:
    """Name and spool stay; a daemon starts though another one is not ready; what waits is deleted by a person only."""
    spec = daemon(overlay(name))["spec"]
    assert spec["podManagementPolicy"] == "Parallel"
    assert spec["updateStrategy"] == {"type": "RollingUpdate"}
    assert spec["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"] == DAEMON
    (claim,) = spec["volumeClaimTemplates"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]


@every_overlay
def test_a_node_can_be_drained(name: str) -> None:
    """The budget matches the daemons, and always lets one go, ready or not."""
    (budget,) = of_kind(overlay(name), "PodDisruptionBudget").values()
    assert selects(budget["spec"]["selector"], DAEMON)
    assert budget["spec"]["maxUnavailable"] == 1
    assert "minAvailable" not in budget["spec"]
    assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    for component, template in templates(overlay(name)).items():
        if component != "daemon":
            assert not selects(budget["spec"]["selector"], template["metadata"]["labels"])


def test_two_instances_never_share_a_node() -> None:
    """The second instance needs a node of its own; the other overlays have one instance."""
    assert [daemon(overlay(name))["spec"]["replicas"] for name in OVERLAYS] == [1, 1, 2, 1, 1]
    affinity = templates(overlay("overlays/two-instances"))["daemon"]["spec"]["affinity"]
    (term,) = affinity["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "kubernetes.io/hostname"
    assert selects(term["labelSelector"], DAEMON)


@every_overlay
def test_pods_reach_what_they_need_and_no_more(name: str) -> None:
    """Everything is denied but names and the database for all, the internet for two, and Prometheus' visits."""
    policies = of_kind(overlay(name), "NetworkPolicy")
    denial = policies.pop("ingestor-default-deny")["spec"]
    assert denial.keys() == {"podSelector", "policyTypes"}
    assert set(denial["policyTypes"]) == {"Ingress", "Egress"}
    matched = {
        policy: {
            component
            for component, template in templates(overlay(name)).items()
            if selects(manifest["spec"]["podSelector"], template["metadata"]["labels"])
        }
        for policy, manifest in policies.items()
    }
    relay = name == WITH_RELAY
    assert matched == {
        "ingestor-database": set(commands(name)),
        "ingestor-provider": {component for component, secrets in CREDENTIALS.items() if "ingestor-stream" in secrets},
        "ingestor-metrics": {"daemon"},
        **({"ingestor-relay": {"relay"}} if relay else {}),
    }
    assert all(selects(denial["podSelector"], each["metadata"]["labels"]) for each in templates(overlay(name)).values())
    ports = {
        policy: [port["port"] for rule in _rules(manifest) for port in rule["ports"]]
        for policy, manifest in policies.items()
    }
    assert ports == {
        "ingestor-database": [53, 53, 5432],
        "ingestor-provider": [443],
        "ingestor-metrics": ["http"],
        **({"ingestor-relay": ["stream", "http"]} if relay else {}),
    }
    (visitors,) = policies["ingestor-metrics"]["spec"]["ingress"]
    assert visitors["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]


def test_only_clients_reach_the_stream_of_a_relay() -> None:
    """Pods with the label of clients reach the stream, in any namespace; Prometheus reaches the metrics."""
    clients, metrics = of_kind(overlay(WITH_RELAY), "NetworkPolicy")["ingestor-relay"]["spec"]["ingress"]
    (who,) = clients["from"]
    assert who == {"namespaceSelector": {}, "podSelector": {"matchLabels": {"ingestor-relay-client": "true"}}}
    assert f"{next(iter(who['podSelector']['matchLabels']))}: " in (DIRECTORY / "README.md").read_text(encoding="utf-8")
    assert metrics["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]


def test_a_relay_is_replaced_without_a_pause() -> None:
    """A new pod is ready before the old one ends; ports, probes, grace period and memory are those of the program."""
    (deployment,) = of_kind(overlay(WITH_RELAY), "Deployment").values()
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    template = templates(overlay(WITH_RELAY))["relay"]
    assert deployment["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"] == RELAY
    each = container(template)
    ports = {"stream": int(written_default("relay_port")), "http": int(written_default("relay_http_port"))}
    assert {port["name"]: port["containerPort"] for port in each["ports"]} == ports
    probes = {kind: each[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert probes == {
        "startup": {"path": "/healthz", "port": "http"},
        "liveness": {"path": "/healthz", "port": "http"},
        "readiness": {"path": "/readyz", "port": "http"},
    }
    service = of_kind(overlay(WITH_RELAY), "Service")["ingestor-relay"]["spec"]
    assert {port["targetPort"]: port["port"] for port in service["ports"]} == ports
    assert selects({"matchLabels": service["selector"]}, RELAY)
    assert not selects({"matchLabels": service["selector"]}, DAEMON)
    assert template["spec"]["terminationGracePeriodSeconds"] >= 2 * CLOSE_TIMEOUT + LEAVE_SECONDS + 10
    clients = int(written_default("relay_max_clients"))
    assert in_bytes(each["resources"]["limits"]["memory"]) >= 80 * 2**20 + clients * 2**19


async def test_the_relays_pod_comes_up_alone(database: str, server: TestServer, tmp_path: Path) -> None:
    """With a pod's environment, a login in market_relay and a certificate, the relay is ready and serves a client."""
    template, login = templates(overlay(WITH_RELAY))["relay"], server.new_name()
    variables = environment(overlay(WITH_RELAY), template, pod="ingestor-relay-0")
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    url = with_parts(server.url, database=database.rsplit("/", 1)[1], user=login, password="follower")
    contents = {
        "INGESTOR_DATABASE_URL_FILE": url.encode(),
        "INGESTOR_RELAY_TLS_CERT": b"".join(each.bytes() for each in certificate.cert_chain_pems),
        "INGESTOR_RELAY_TLS_KEY": certificate.private_key_pem.bytes(),
    }
    for key, content in contents.items():
        file = tmp_path / Path(variables[key]).name
        file.write_bytes(content)
        file.chmod(0o440)
        variables[key] = str(file)
    given = {key.removeprefix("INGESTOR_"): value for key, value in variables.items()}
    await server.run(f"CREATE ROLE {login} LOGIN PASSWORD 'follower' IN ROLE market_relay")
    process = await start(*container(template)["args"], **{**given, "RELAY_PORT": "0", "RELAY_HTTP_PORT": "0"})
    try:
        assert process.stderr is not None
        text = ""
        async with asyncio.timeout(HANG_SECONDS):
            while "relay_following" not in text:
                line = await process.stderr.readline()
                assert line, text
                text += line.decode()
        ((scheme, port),) = re.findall(r'"(wss?)://0\.0\.0\.0:(\d+)/ws"', text)
        assert scheme == "wss"
        paths = [
            container(template)[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")
        ]
        (health,) = re.findall(r'"http://0\.0\.0\.0:(\d+)/"', text)
        async with Window(f"http://127.0.0.1:{health}/") as window:
            answers = [(await window.client.get(path)).status_code for path in (*paths, "/metrics")]
        assert answers == [200] * 4
        async with connect(f"wss://127.0.0.1:{port}/ws", ssl=context, proxy=None) as stream:
            login_message = {"type": "authenticate", "data": {"token": await new_token(database)}}
            await stream.send(json.dumps(login_message))
            assert json.loads(await stream.recv())["type"] == "authenticated"
        process.terminate()
        await asyncio.wait_for(process.communicate(), HANG_SECONDS)
        assert process.returncode == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await execute_all(database, f"REVOKE market_relay FROM {login}")
        await server.run(f"DROP ROLE {login}")


def _rules(policy: Manifest) -> list[Manifest]:
    return [*policy["spec"].get("egress", []), *policy["spec"].get("ingress", [])]


@every_overlay
def test_jobs_do_not_repeat_what_a_person_must_see(name: str) -> None:
    """The migration gives up if operator action is required; an open gap is a failed Job, once; runs never overlap."""
    (job,) = of_kind(overlay(name), "Job").values()
    rule = job["spec"]["podFailurePolicy"]["rules"][0]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {
        "containerName": container(job["spec"]["template"])["name"],
        "operator": "In",
        "values": [EXIT_CONFIGURATION],
    }
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never", "or Kubernetes refuses such a rule"
    assert job["spec"]["ttlSecondsAfterFinished"] > 0
    crons = {each.removeprefix("ingestor-"): manifest for each, manifest in of_kind(overlay(name), "CronJob").items()}
    assert crons.keys() == {"maintain", "backfill", "report"}
    for component, cron in crons.items():
        spec, run = cron["spec"], cron["spec"]["jobTemplate"]["spec"]
        assert spec["concurrencyPolicy"] == "Forbid"
        _, hour, *rest = spec["schedule"].split()
        assert len(rest) == 3
        assert hour == "*" or _once_a_day(int(hour), zoneinfo.ZoneInfo(spec["timeZone"])), "clocks change at that hour"
        assert run["activeDeadlineSeconds"] < 86_400
        assert run["template"]["spec"]["restartPolicy"] == "Never"
        assert (run["backoffLimit"] == 0) is (component in {"backfill", "report"}), "exit status 1 is an answer there"


def _once_a_day(hour: int, zone: zoneinfo.ZoneInfo) -> bool:
    """Whether no day of two years lacks this hour or has it twice: a CronJob would not run then, or run twice."""
    days = (dt.datetime(2026, 1, 1, hour, 30, tzinfo=zone) + dt.timedelta(days=day) for day in range(731))
    # An hour that is missing or doubled has two readings, of which `fold` chooses.
    return all(day.utcoffset() == day.replace(fold=1).utcoffset() for day in days)


def test_a_schedule_at_which_clocks_change_would_be_seen() -> None:
    """In New Zealand the hour from two to three is missing in September, and comes twice in April."""
    zone = zoneinfo.ZoneInfo("Pacific/Auckland")
    assert [hour for hour in range(24) if not _once_a_day(hour, zone)] == [2]


async def test_the_pod_comes_up_alone(tmp_path: Path) -> None:
    """With a pod's environment and nothing else there, the daemon is started and alive, not ready, and seen."""
    manifests = overlay("example")
    variables = environment(manifests, templates(manifests)["daemon"], pod="ingestor-0")
    elsewhere = {
        "INGESTOR_TOKEN_FILE": TOKEN,
        "INGESTOR_DATABASE_URL_FILE": "postgresql://ingestor:password@127.0.0.1:1/market",
    }
    for key, content in elsewhere.items():
        file = tmp_path / Path(variables[key]).name
        file.write_text(f"{content}\n")
        file.chmod(0o440)
        variables[key] = str(file)
    variables |= {
        "INGESTOR_SPOOL_DIR": str(tmp_path / "volume" / "spool"),
        "INGESTOR_STREAM_URL": "ws://127.0.0.1:1/ws",
    }
    process = DaemonProcess(tmp_path / "log", **{key.removeprefix("INGESTOR_"): variables[key] for key in variables})
    process.start()
    try:
        async with asyncio.timeout(HANG_SECONDS):
            while not (found := re.search(r'"url": ?"http://0\.0\.0\.0:(\d+)/"', process.tail())):
                assert process.is_running, process.tail()
                await asyncio.sleep(0.02)
        each = container(templates(manifests)["daemon"])
        monitor = of_kind(manifests, "ServiceMonitor")["ingestor"]
        paths = [each[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")]
        async with Window(f"http://127.0.0.1:{found[1]}/") as window:
            answers = [await window.client.get(path) for path in (*paths, monitor["spec"]["endpoints"][0]["path"])]
        assert [answer.status_code for answer in answers] == [200, 200, 503, 200]
        assert process.stop() == 0
    finally:
        process.end()


def test_the_namespace_can_be_another_one(tmp_path: Path) -> None:
    """A kustomization of one's own may put everything elsewhere."""
    copied = tmp_path / "own"
    copied.mkdir()
    target = Path("../" * (len(copied.resolve().parents) - 1)) / str(DIRECTORY.resolve()).lstrip("/")
    (copied / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {
                "namespace": "elsewhere",
                "resources": [f"../{target}/overlays/two-instances"],
                "components": [f"../{target}/components/{each}" for each in ("relay", "monitoring")],
            }
        )
    )
    made = kubernetes.rendered(copied)
    assert of_kind(made, "Namespace").keys() == {"elsewhere"}
    assert {each["metadata"]["namespace"] for each in made if each["kind"] != "Namespace"} == {"elsewhere"}
    assert {"ServiceMonitor", "PrometheusRule", "Deployment"} <= {each["kind"] for each in made}


def test_the_operator_finds_the_metrics() -> None:
    """The ServiceMonitor leads to the daemon's port, and its job has the name that rules and dashboards go by."""
    assert {each["kind"] for each in overlay("example") if each["apiVersion"].startswith(OPERATOR)} == {
        "ServiceMonitor",
        "PrometheusRule",
    }
    monitor = of_kind(overlay("example"), "ServiceMonitor")["ingestor"]
    service = of_kind(overlay("example"), "Service")["ingestor"]
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert monitor["spec"].keys() == {"jobLabel", "selector", "endpoints"}
    assert selects(monitor["spec"]["selector"], service["metadata"]["labels"])
    assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "ingestor"
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint.keys() == {"port", "path", "interval", "scrapeTimeout", "relabelings"}
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert endpoint["path"] == "/metrics"


def test_the_operator_finds_relays() -> None:
    """The relays' ServiceMonitor leads to their port, and gives them the job that rules and dashboards go by."""
    monitor = of_kind(overlay("example"), "ServiceMonitor")["ingestor-relay"]
    service = of_kind(overlay(WITH_RELAY), "Service")["ingestor-relay"]
    assert selects(monitor["spec"]["selector"], service["metadata"]["labels"])
    assert not selects(monitor["spec"]["selector"], DAEMON)
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert endpoint["path"] == "/metrics"
    jobs = {rule["replacement"] for rule in endpoint["relabelings"] if rule["targetLabel"] == "job"}
    assert jobs == {"ingestor-relay"}


def test_the_operator_has_the_same_rules() -> None:
    """The PrometheusRule is what the command makes of Prometheus' rules; else run python -m tests.deploy.kubernetes."""
    rules = kubernetes.RULES.read_text(encoding="utf-8")
    written = kubernetes.PROMETHEUS_RULE.read_text(encoding="utf-8")
    assert written == kubernetes.prometheus_rule(rules)
    (rule,) = of_kind(overlay("example"), "PrometheusRule").values()
    assert rule["spec"] == yaml.safe_load(rules)
    assert rule["spec"].keys() == {"groups"}
    assert rule["spec"]["groups"]
