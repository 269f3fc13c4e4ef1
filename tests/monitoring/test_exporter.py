"""The node's web server answers three GETs on this machine and nothing else."""

from __future__ import annotations

import asyncio
import math

import aiohttp
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from shoal.monitoring.exporter import Exporter, ExporterError
from shoal.monitoring.metrics import Metrics
from shoal.monitoring.projection import Projection
from shoal.protocol import events as e
from shoal.protocol.events import Stamped

WAIT_S = 10.0


def run(scenario):
    """Run a scenario(exporter, session, metrics) against a fresh exporter."""

    async def go():
        metrics, projection = Metrics(process=False), Projection()
        for sink in (metrics, projection):
            sink(Stamped(1.0, e.NodeStarted("peer", "otter", "run1", "pipeline", "0.1")))
        exporter = await Exporter.start("127.0.0.1", 0, metrics.registry, lambda: projection.snapshot().to_json())
        try:
            async with aiohttp.ClientSession() as session, asyncio.timeout(WAIT_S):
                return await scenario(exporter, session, metrics)
        finally:
            await exporter.close()

    return asyncio.run(go())


async def get(session, url, **kwargs):
    async with session.get(url, **kwargs) as reply:
        return reply.status, reply.headers.get("Content-Type", ""), await reply.text()


def test_any_free_port_is_taken_and_reported():
    async def scenario(exporter, session, metrics):
        assert 0 < exporter.port < 65536 and exporter.url == f"http://127.0.0.1:{exporter.port}"
        assert await get(session, f"{exporter.url}/healthz") == (200, "text/plain; charset=utf-8", "ok\n")

    run(scenario)


def test_metrics_parse_as_prometheus_text():
    async def scenario(exporter, session, metrics):
        metrics(Stamped(2.0, e.CallFailed("p", "m", e.Reason.DEADLINE)))
        status, kind, text = await get(session, f"{exporter.url}/metrics")
        assert status == 200 and kind.startswith("text/plain")
        found = {s.name: s.value for f in text_string_to_metric_families(text) for s in f.samples
                 if s.labels.get("reason", "deadline") == "deadline"}  # fmt: skip
        assert found["shoal_calls_failed_total"] == 1 and found["shoal_node_info"] == 1

    run(scenario)


def test_metrics_parse_as_openmetrics_when_asked_for():
    async def scenario(exporter, session, metrics):
        accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
        status, kind, text = await get(session, f"{exporter.url}/metrics", headers=accept)
        assert status == 200 and kind.startswith("application/openmetrics-text")
        assert "shoal_node" in {f.name.removesuffix("_info") for f in parse_openmetrics(text)}

    run(scenario)


def test_status_is_the_snapshot_as_json():
    async def scenario(exporter, session, metrics):
        async with session.get(f"{exporter.url}/status") as reply:
            data = await reply.json()
        assert data["name"] == "otter" and data["loss"] is None

    run(scenario)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"])
def test_only_get_is_answered(method):
    async def scenario(exporter, session, metrics):
        for path in ("metrics", "status", "healthz"):
            async with session.request(method, f"{exporter.url}/{path}") as reply:
                assert reply.status == 405

    run(scenario)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:9464", "127.0.0.1.evil.example", "10.0.0.7", "", "[::2]:1"]
)
def test_a_foreign_host_header_is_refused(host):
    async def scenario(exporter, session, metrics):
        for path in ("metrics", "status", "healthz", "nothing"):
            status, _, text = await get(session, f"{exporter.url}/{path}", headers={"Host": host})
            assert status == 403 and "shoal_" not in text

    run(scenario)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9464", "[::1]:80"])
def test_loopback_names_are_answered(host):
    async def scenario(exporter, session, metrics):
        assert (await get(session, f"{exporter.url}/healthz", headers={"Host": host}))[0] == 200

    run(scenario)


def test_other_paths_are_not_found():
    async def scenario(exporter, session, metrics):
        assert (await get(session, f"{exporter.url}/../etc/passwd"))[0] == 404

    run(scenario)


def test_a_port_in_use_is_one_line_with_the_fix():
    async def scenario(exporter, session, metrics):
        with pytest.raises(ExporterError) as caught:
            await Exporter.start("127.0.0.1", exporter.port, metrics.registry, dict)
        message = str(caught.value)
        assert str(exporter.port) in message and "in use" in message and "another port" in message
        assert "\n" not in message

    run(scenario)


def test_an_address_of_another_machine_is_explained():
    async def go():
        with pytest.raises(ExporterError, match=r"not an address of this machine.*127\.0\.0\.1"):
            await Exporter.start("192.0.2.1", 0, Metrics(process=False).registry, dict)

    asyncio.run(go())


def test_close_frees_the_port_and_leaves_no_task_behind():
    async def go():
        registry = Metrics(process=False).registry
        first = await Exporter.start("127.0.0.1", 0, registry, dict)
        async with aiohttp.ClientSession() as session:
            await get(session, f"{first.url}/healthz")
            async with asyncio.timeout(WAIT_S):
                await first.close()  # a keep-alive connection is open
                await first.close()
        again = await Exporter.start("127.0.0.1", first.port, registry, dict)
        await again.close()
        return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    assert asyncio.run(go()) == []


def test_a_status_that_fails_is_an_error_page_without_details():
    async def go():
        exporter = await Exporter.start("127.0.0.1", 0, Metrics(process=False).registry, lambda: {"loss": math.nan})
        try:
            async with aiohttp.ClientSession() as session:
                status, _, text = await get(session, f"{exporter.url}/status")
                assert status == 500 and "Traceback" not in text
                assert (await get(session, f"{exporter.url}/healthz"))[0] == 200
        finally:
            await exporter.close()

    asyncio.run(go())
