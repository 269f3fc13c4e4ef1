"""An independent client of a shoal node: py-libp2p and `docs/wire.md`, nothing of shoal or hivemind.

    python tests/interop/pylibp2p_client.py /ip4/127.0.0.1/tcp/PORT/p2p/PEERID [METHOD]

Dials the node, identifies it, pings it, makes one call with the header {} and no body, and prints one JSON object:
{"peer", "agent", "protocols", "ping_ms", "kind", "header", "body_bytes"}. It runs in its own process, because py-libp2p
and hivemind cannot be imported together. Exits with 1 and a line on stderr when anything is not as documented.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import struct
import sys
from typing import Any

import multiaddr
import trio
from libp2p import new_host
from libp2p.crypto.rsa import create_new_key_pair
from libp2p.identity.identify.identify import parse_identify_response
from libp2p.peer.peerinfo import info_from_p2p_addr

DEADLINE_S = 30
LARGEST_BODY = 1 << 20


# --- docs/wire.md, from the document alone ---------------------------------------------------------------------------
def pack_request(header: bytes, body: bytes) -> bytes:
    message = b"SHOA" + struct.pack(">BBHIQ", 1, 0, 0, len(header), len(body)) + header + body
    return message + hashlib.sha256(message).digest()


async def read_answer(stream: Any) -> tuple[str, dict[str, Any], bytes]:
    prefix = await read_exactly(stream, 20)
    magic, version, kind, zero, header_bytes, body_bytes = struct.unpack(">4sBBHIQ", prefix)
    if (magic, version, zero) != (b"SHOA", 1, 0) or kind not in (1, 2):
        raise ValueError(f"not an answer: {prefix.hex()}")
    if header_bytes > 262_144 or body_bytes > LARGEST_BODY:
        raise ValueError("the answer is too large")
    header = await read_exactly(stream, header_bytes)
    body = await read_exactly(stream, body_bytes)
    if await read_exactly(stream, 32) != hashlib.sha256(prefix + header + body).digest():
        raise ValueError("the digest is wrong")
    return {1: "reply", 2: "refusal"}[kind], json.loads(header), body


async def read_exactly(stream: Any, count: int) -> bytes:
    data = b""
    while len(data) < count:
        chunk = await stream.read(count - len(data))
        if not chunk:
            raise ValueError(f"the stream ended after {len(data)} of {count} bytes")
        data += chunk
    return data


# --- what libp2p itself offers ---------------------------------------------------------------------------------------
async def identify(stream: Any) -> Any:
    """One varint-delimited protobuf."""
    length = shift = 0
    while True:
        (byte,) = await read_exactly(stream, 1)
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    prefix = bytearray()
    value = length
    while value >= 0x80:
        prefix.append(value & 0x7F | 0x80)
        value >>= 7
    prefix.append(value)
    return parse_identify_response(bytes(prefix) + await read_exactly(stream, length))


async def ping_ms(stream: Any) -> float:
    payload = secrets.token_bytes(32)
    start = trio.current_time()
    await stream.write(payload)
    if await read_exactly(stream, 32) != payload:
        raise ValueError("the ping came back changed")
    return 1000 * (trio.current_time() - start)


async def main(address: str, method: str) -> dict[str, Any]:
    info = info_from_p2p_addr(multiaddr.Multiaddr(address))
    host = new_host(key_pair=create_new_key_pair(bits=2048))
    with trio.fail_after(DEADLINE_S):
        async with host.run(listen_addrs=[]):
            await host.connect(info)
            stream = await host.new_stream(info.peer_id, ["/ipfs/id/1.0.0"])
            identity = await identify(stream)
            await stream.close()
            stream = await host.new_stream(info.peer_id, ["/ipfs/ping/1.0.0"])
            milliseconds = await ping_ms(stream)
            await stream.close()
            stream = await host.new_stream(info.peer_id, [f"/shoal/1/{method}"])
            await stream.write(pack_request(b"{}", b""))
            kind, header, body = await read_answer(stream)
            await stream.close()
            return {
                "peer": host.get_id().to_base58(),
                "agent": identity.agent_version,
                "protocols": sorted(identity.protocols),
                "ping_ms": round(milliseconds, 3),
                "kind": kind,
                "header": header,
                "body_bytes": len(body),
            }


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: pylibp2p_client.py /ip4/…/tcp/…/p2p/PEERID [METHOD]")
    try:
        print(json.dumps(trio.run(main, sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else "status")))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
