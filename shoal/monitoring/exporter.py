"""The node's own small web server: `/metrics` for Prometheus, `/status` for `shoal status`, `/healthz`.

Read-only: GET and nothing else. It listens on this machine unless told otherwise, and then answers only requests that
call it by a loopback name: a web page that points its own domain at 127.0.0.1 (DNS rebinding) gets a refusal.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

StatusSource = Callable[[], dict[str, Any]]
_Next = Callable[[web.Request], Awaitable[web.StreamResponse]]

OTHER_PORT = "choose another port (0 takes any free one)"
CLOSE_S = 2.0  # how long open requests may take to end


class ExporterError(Exception):
    """The web server cannot listen. The message is one line and ends with the fix."""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_of(header: str) -> str:
    """The name in a Host header, without the port: "localhost:9", "127.0.0.1", "[::1]:9"."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


class Exporter:
    """A running web server; make one with `start`."""

    def __init__(self, runner: web.AppRunner, host: str, port: int) -> None:
        self._runner = runner
        self.host = host
        self.port = port

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @classmethod
    async def start(cls, host: str, port: int, registry: CollectorRegistry, status: StatusSource) -> Exporter:
        """Listen on host:port (0: any free port, see `.port`) in the running loop.

        Raises ExporterError when the port is taken or not allowed. `status` is called once per request to /status."""
        app = web.Application(client_max_size=1024)
        if _is_loopback(host):
            app.middlewares.append(_only_loopback_names)

        async def metrics(request: web.Request) -> web.Response:
            encode, content_type = choose_encoder(request.headers.get("Accept", ""))
            return web.Response(body=encode(registry), headers={"Content-Type": content_type})

        async def status_page(_: web.Request) -> web.Response:
            return web.json_response(status(), dumps=_dumps)

        async def healthz(_: web.Request) -> web.Response:
            return web.Response(text="ok\n")

        for path, handler in (("/metrics", metrics), ("/status", status_page), ("/healthz", healthz)):
            app.router.add_get(path, handler, allow_head=False)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=CLOSE_S)
        try:
            await runner.setup()
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            await runner.cleanup()
            raise ExporterError(_explain(host, port, error)) from error
        except BaseException:
            await runner.cleanup()
            raise
        return cls(runner, host, int(runner.addresses[0][1]))

    async def close(self) -> None:
        """Stop listening and drop open connections, within a few seconds. Safe to call twice."""
        async with asyncio.timeout(2 * CLOSE_S):
            await self._runner.cleanup()


@web.middleware
async def _only_loopback_names(request: web.Request, handler: _Next) -> web.StreamResponse:
    if not _is_loopback(_host_of(request.headers.get("Host", ""))):
        return web.Response(status=403, text="this server answers only to 127.0.0.1, ::1 and localhost\n")
    return await handler(request)


def _dumps(value: dict[str, Any]) -> str:
    return json.dumps(value, allow_nan=False)


def _explain(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use; stop the program that has it, or {OTHER_PORT}"
    if error.errno == errno.EACCES:
        return f"not allowed to listen on port {port} on {host}; {OTHER_PORT}"
    if error.errno in (errno.EADDRNOTAVAIL, None) or "getaddrinfo" in str(error):
        return f"{host} is not an address of this machine; listen on 127.0.0.1"
    return f"cannot listen on port {port} on {host} ({error.strerror or error}); {OTHER_PORT}"
