"""`ingestor check` about the replicated buffer, with real NATS servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from ingestor.service.buffer_check import check_buffer
from ingestor.service.checks import CheckResult, Severity
from ingestor.settings import Settings
from tests.nats_servers import ALWAYS, Cluster, api, buffer_settings, connected, linked, running_cluster


async def findings(settings: Settings, cluster: Cluster) -> list[CheckResult]:
    """Return the findings, with the monitoring port of the first server."""
    return [each async for each in check_buffer(settings, monitoring_port=cluster.servers[0].http_port)]


async def test_three_copies(tmp_path: Path) -> None:
    """A missing stream is no problem and is not created; three copies in step are fine."""
    async with running_cluster(tmp_path, 3) as cluster:
        settings = buffer_settings(cluster)
        first, disks = await findings(settings, cluster)
        assert first.severity is disks.severity is Severity.OK
        assert "is missing" in first.text
        async with connected(cluster) as client:
            assert (await api(client, "STREAM.NAMES"))["streams"] in (None, [])
        async with linked(settings):
            copies, disks = await findings(settings, cluster)
        assert (copies.severity, disks.severity) == (Severity.OK, Severity.OK)
        assert "3 copies in step" in copies.text


@pytest.mark.parametrize(("sync", "severity"), [(ALWAYS, Severity.OK), ("sync_interval: 2m", Severity.WARNING)])
async def test_one_copy(sync: str, severity: Severity, tmp_path: Path) -> None:
    """One copy is a warning, as is a server that acknowledges before it has written."""
    async with running_cluster(tmp_path, sync=sync) as cluster:
        settings = buffer_settings(cluster)
        async with linked(settings):
            copies, disks = await findings(settings, cluster)
        assert copies.severity is Severity.WARNING
        assert "fewer than three" in copies.text
        assert disks.severity is severity


async def test_a_stream_with_other_settings(tmp_path: Path) -> None:
    """Each setting that endangers batches is named, and stays as it is."""
    async with running_cluster(tmp_path) as cluster:
        settings = buffer_settings(cluster)
        other = {"name": "ingestor", "subjects": ["ingestor.batch.*"], "storage": "memory", "max_age": 10**12}
        async with connected(cluster) as client:
            await api(client, "STREAM.CREATE.ingestor", other)
            texts = [each.text for each in await findings(settings, cluster) if each.severity is Severity.WARNING]
            assert any(text.startswith("storage is memory") for text in texts)
            assert any(text.startswith("max_age is ") for text in texts)
            assert (await api(client, "STREAM.INFO.ingestor"))["config"]["storage"] == "memory"


async def test_no_server_answers(tmp_path: Path) -> None:
    """Servers that are down are a problem, with the address."""
    async with running_cluster(tmp_path) as cluster:
        settings = buffer_settings(cluster)
        cluster.end()
        (finding,) = await findings(settings, cluster)
    assert finding.severity is Severity.PROBLEM
    assert cluster.servers[0].url in finding.text
