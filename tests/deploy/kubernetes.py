"""The Kubernetes manifests as they are applied: rendered, and picked apart for the tests.

`python -m tests.deploy.kubernetes` writes the operator's PrometheusRule again, from Prometheus' rules.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import yaml

from tests.tools import need

Manifest: TypeAlias = dict[str, Any]

ROOT = Path(__file__).parents[2] / "deploy"
DIRECTORY = ROOT / "kubernetes"
RULES = ROOT / "prometheus" / "ingestor.rules.yaml"
PROMETHEUS_RULE = DIRECTORY / "components" / "monitoring" / "prometheus-rule.yaml"

WITH_RELAY = "overlays/relay"
OVERLAYS = ("overlays/plain", "overlays/timescale", "overlays/two-instances", WITH_RELAY, "example")
"""The directories that are there to be applied. The example has the component of monitoring."""

OLDEST_KUSTOMIZE = (5, 0)
"""In kubectl since 1.27. Debian 12's package is older than Kustomize's components."""

HEAD = """\
# Generated from deploy/prometheus/ingestor.rules.yaml by `python -m tests.deploy.kubernetes`: edit that file, not this.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: ingestor
  namespace: ingestor
  labels:
    app.kubernetes.io/name: ingestor
    app.kubernetes.io/component: daemon
spec:
"""

# The volumes and capabilities of a restricted container: the profile of Kubernetes' Pod Security Standards.
_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_HOST = ("hostNetwork", "hostPID", "hostIPC")


@functools.cache
def kubectl() -> str:
    """Return the path of a kubectl that can render; else the test is skipped, or fails."""
    path = need("kubectl", package="kubectl, or kubernetes-client of Debian 13")
    said = subprocess.run([path, "version", "--client"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"Kustomize Version: v(\d+)\.(\d+)", said)
    if found is not None and (int(found[1]), int(found[2])) >= OLDEST_KUSTOMIZE:
        return path
    reason = f"{path} is older than 1.27: install the package kubectl, or kubernetes-client of Debian 13"
    if os.environ.get("INGESTOR_TEST_ALL_TOOLS"):
        pytest.fail(reason)
    pytest.skip(reason)


def rendered(directory: Path) -> list[Manifest]:
    """Return what `kubectl apply -k` would send."""
    done = subprocess.run([kubectl(), "kustomize", str(directory)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr.lower(), done.stderr
    return list(yaml.safe_load_all(done.stdout))


@functools.cache
def overlay(name: str) -> tuple[Manifest, ...]:
    """Return the manifests of one of `OVERLAYS`, rendered once for all tests: no test may change them."""
    return tuple(rendered(DIRECTORY / name))


def secrets(directory: Path) -> list[Manifest]:
    """Return the Secrets, the relay's too, of files made in a copy in `directory`: their content is their name."""
    copy = directory / "secrets"
    shutil.copytree(DIRECTORY / "secrets", copy, ignore=shutil.ignore_patterns("token", "*-url", "tls.*"))
    for folder in (copy, copy / "relay"):
        for line in (folder / ".gitignore").read_text().split():
            (folder / line.removeprefix("/")).write_text(f"the {line}")
    return [*rendered(copy), *rendered(copy / "relay")]


def of_kind(manifests: tuple[Manifest, ...] | list[Manifest], kind: str) -> dict[str, Manifest]:
    """Return the manifests of a kind by their names."""
    return {manifest["metadata"]["name"]: manifest for manifest in manifests if manifest["kind"] == kind}


def daemon(manifests: tuple[Manifest, ...]) -> Manifest:
    """Return the StatefulSet."""
    (found,) = of_kind(manifests, "StatefulSet").values()
    return found


def templates(manifests: tuple[Manifest, ...]) -> dict[str, Manifest]:
    """Return every pod template by its component."""
    found = {}
    for manifest in manifests:
        match manifest["kind"]:
            case "CronJob":
                template = manifest["spec"]["jobTemplate"]["spec"]["template"]
            case "StatefulSet" | "Deployment" | "Job":
                template = manifest["spec"]["template"]
            case _:
                assert "template" not in manifest.get("spec", {}), f"{manifest['kind']} has pods without a check"
                continue
        component = template["metadata"]["labels"]["app.kubernetes.io/component"]
        assert component not in found
        found[component] = template
    return found


def container(template: Manifest) -> Manifest:
    """Return the one container of a pod."""
    (found,) = template["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def environment(manifests: tuple[Manifest, ...], template: Manifest, *, pod: str) -> dict[str, str]:
    """Return the variables that a container sees, in a pod of this name."""
    maps, variables = of_kind(manifests, "ConfigMap"), {}
    for source in container(template).get("envFrom", []):
        variables.update(maps[source["configMapRef"]["name"]]["data"])
    for entry in container(template).get("env", []):
        if "value" in entry:
            variables[entry["name"]] = entry["value"]
        else:
            assert entry["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}
            variables[entry["name"]] = pod
    assert all(isinstance(value, str) for value in variables.values())
    return variables


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    """Whether a label selector matches."""
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for wish in selector.get("matchExpressions", []):
        assert wish["operator"] == "In", "only this operator is understood here"
        if labels.get(wish["key"]) not in wish["values"]:
            return False
    return True


def unrestricted(template: Manifest) -> Iterator[str]:
    """Yield what a pod may do beyond the profile `restricted`, and what this project asks for on top of it."""
    spec = template["spec"]
    pod = spec.get("securityContext", {})
    yield from (name for name in _HOST if spec.get(name))
    if pod.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "seccompProfile"
    if pod.get("runAsNonRoot") is not True or not pod.get("runAsUser") or not pod.get("fsGroup"):
        yield "root"
    if spec.get("automountServiceAccountToken") is not False:
        yield "service account"
    for volume in spec.get("volumes", []):
        yield from (f"volume {kind}" for kind in volume.keys() - {"name"} - _VOLUMES)
    for each in [*spec["containers"], *spec.get("initContainers", []), *spec.get("ephemeralContainers", [])]:
        yield from _unrestricted(each)


def _unrestricted(container: Manifest) -> Iterator[str]:
    own = container.get("securityContext", {})
    if own.get("privileged") or own.get("allowPrivilegeEscalation") is not False:
        yield "privileges"
    if own.get("capabilities") != {"drop": ["ALL"]}:
        yield "capabilities"
    if own.get("readOnlyRootFilesystem") is not True:
        yield "root file system"
    yield from (f"{name} of a container" for name in ("runAsNonRoot", "runAsUser", "seccompProfile") if name in own)
    if any("hostPort" in port for port in container.get("ports", [])):
        yield "hostPort"


def prometheus_rule(rules: str) -> str:
    """Return Prometheus' rules as an object of its operator, comments included."""
    return HEAD + "".join(f"  {line}" if line.strip() else line for line in rules.splitlines(keepends=True))


def in_bytes(quantity: str) -> int:
    """Return Kubernetes' quantity of bytes, of which the manifests use two units."""
    match = re.fullmatch(r"(\d+)(Mi|Gi)", quantity)
    if match is None:
        pytest.fail(f"{quantity} is no quantity in Mi or Gi")
    return int(match[1]) * {"Mi": 2**20, "Gi": 2**30}[match[2]]


if __name__ == "__main__":
    PROMETHEUS_RULE.write_text(prometheus_rule(RULES.read_text(encoding="utf-8")), encoding="utf-8")
