"""A peer that we did not write, py-libp2p in its own process, talks to a node: identify, ping, one status call."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from shoal.protocol.events import Reason
from shoal.protocol.p2p import P2PTransport
from shoal.protocol.transport import Empty, Message, Method, Refused, Reply, Request
from tests.protocol.p2p_nodes import Nodes

CLIENT = Path(__file__).parents[1] / "interop" / "pylibp2p_client.py"
DEADLINE_S = 60.0

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.process,
    pytest.mark.skipif(
        importlib.util.find_spec("libp2p") is None, reason="py-libp2p is not installed: pip install 'shoal[interop]'"
    ),
]


class Status(Message):
    round: int
    phase: str


STATUS = Method("status", Empty, Status, max_reply_bytes=1 << 20)
SECRET = Method("secret", Empty, Status)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def node() -> AsyncIterator[P2PTransport]:
    nodes = Nodes()
    yield await nodes.start("node")
    await nodes.close()


async def run_client(node: P2PTransport, method: str) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(CLIENT),
        f"{node.visible_addresses()[0]}/p2p/{node.peer}",
        method,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(DEADLINE_S):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    answer: dict[str, Any] = json.loads(out)
    return answer


async def test_an_independent_libp2p_peer_identifies_pings_and_reads_the_status(node: P2PTransport) -> None:
    senders = []

    async def status(request: Request[Empty]) -> Reply[Status]:
        senders.append(request.sender)
        return Reply(Status(round=7, phase="working"), bytes(100_000))

    async def secret(request: Request[Empty]) -> Reply[Status]:
        raise Refused(Reason.NOT_MEMBER, "who are you?")

    node.serve(STATUS, status)
    node.serve(SECRET, secret)
    await node.ready()
    answer, refused = await asyncio.gather(run_client(node, "status"), run_client(node, "secret"))
    assert answer["agent"].startswith("p2pd/")
    assert {"/ipfs/id/1.0.0", "/ipfs/ping/1.0.0", "/shoal/1/status"} <= set(answer["protocols"])
    assert 0 < answer["ping_ms"] < 10_000
    assert (answer["kind"], answer["header"]) == ("reply", {"round": 7, "phase": "working"})
    assert answer["body_bytes"] == 100_000
    assert senders == [answer["peer"]]
    assert (refused["kind"], refused["header"]) == ("refusal", {"reason": "not_member", "detail": "who are you?"})


async def test_the_client_shares_no_code_with_the_node() -> None:
    source = CLIENT.read_text()
    assert "import shoal" not in source and "from shoal" not in source and "hivemind.p2p" not in source
