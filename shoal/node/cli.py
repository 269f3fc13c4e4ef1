"""The command line. Heavy libraries are imported by the commands that need them, so that --help is quick."""

from __future__ import annotations

import asyncio
import errno
import http.client
import json
import sys
import traceback
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import typer

from shoal import __version__
from shoal.node.exit_codes import ExitCode, ShoalError
from shoal.node.settings import LISTEN, NodeSettings, default_directory, running_directories, volunteer_directory

app = typer.Typer(
    name="shoal",
    help="Decentralized volunteer training: join a run, coordinate one, watch it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

MAX_INVITE_FILE_BYTES = 8192
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Directory = Annotated[Path | None, typer.Option("--dir", help="The node's directory: identity, state, events.")]
Listen = Annotated[list[str] | None, typer.Option("--listen", help="TCP multiaddr to listen on (repeatable).")]
AnnounceOption = Annotated[
    list[str] | None, typer.Option("--announce", help="Public multiaddr to tell others, behind a forwarded port.")
]
MetricsPort = Annotated[
    int, typer.Option("--metrics-port", min=0, max=65535, help="Port of /metrics and /status on 127.0.0.1; 0: any.")
]
Device = Annotated[str, typer.Option("--device", help='"auto", "cpu" or "cuda:N".')]
Threads = Annotated[int, typer.Option("--threads", min=0, help="Processor threads for computing; 0: as torch likes.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No live view.")]
Plain = Annotated[bool, typer.Option("--plain", help="One line per event of note instead of the live view.")]


def _version(show: bool) -> None:
    if show:
        typer.echo(f"shoal {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Options that stand before the command."""


@app.command()
def check(
    manifest: Annotated[Path, typer.Argument(help="The run's file.")] = Path("run.toml"), as_json: Json = False
) -> None:
    """Check a run.toml: keys, values, data, model, and what it will cost."""
    from shoal.node.coordinator import examine

    report = examine(manifest)
    typer.echo(json.dumps(report.to_json()) if as_json else report.text())


@app.command()
def bootstrap(
    manifest: Annotated[Path, typer.Argument(help="The run's file.")] = Path("run.toml"),
    directory: Directory = None,
    listen: Listen = None,
    announce: AnnounceOption = None,
    metrics_port: MetricsPort = 0,
    quiet: Quiet = False,
    plain: Plain = False,
) -> None:
    """Start a run: its first peer, which coordinates it, and the invite for everybody else."""
    from shoal.node.coordinator import prepare
    from shoal.node.live import run_node

    settings = NodeSettings(
        directory=directory or default_directory("coordinator"),
        listen=tuple(listen or (LISTEN,)),
        announce=tuple(announce or ()),
        metrics_port=metrics_port,
        device="cpu",
    )
    signed = prepare(manifest, settings)
    raise typer.Exit(run_node(settings, manifest=signed, folder=manifest.parent, quiet=quiet, plain=plain))


@app.command()
def join(
    invite: Annotated[str, typer.Argument(help='The invite ("shoal1-…"), or a file that holds it.')],
    directory: Directory = None,
    listen: Listen = None,
    announce: AnnounceOption = None,
    metrics_port: MetricsPort = 0,
    device: Device = "auto",
    threads: Threads = 0,
    data: Annotated[Path | None, typer.Option("--data", help="Your copy of the run's training data.")] = None,
    linger: Annotated[float, typer.Option("--linger", min=0, help="Seconds to stay for others after the end.")] = 60.0,
    quiet: Quiet = False,
    plain: Plain = False,
) -> None:
    """Join a run and work until it ends, or until Ctrl-C, which leaves in order."""
    from shoal.node.live import run_node
    from shoal.protocol.invite import Invite

    if data is not None and not data.exists():
        raise ShoalError(ExitCode.DATA_UNREADABLE, f"--data {data}: no such file", "name your copy of the run's data")
    known = Invite.decode(read_invite(invite))
    settings = NodeSettings(
        directory=directory or volunteer_directory(known.run),
        listen=tuple(listen or (LISTEN,)),
        announce=tuple(announce or ()),
        metrics_port=metrics_port,
        device=device,
        threads=threads,
        data=data,
        linger_s=linger,
    )
    raise typer.Exit(run_node(settings, invite=known, quiet=quiet, plain=plain))


def read_invite(text: str) -> str:
    """The invite itself: what is given, or the first line of the file that it names."""
    path = Path(text)
    try:
        if text.startswith("shoal1-") or not path.is_file():
            return text.strip()
        with path.open("rb") as file:
            return file.read(MAX_INVITE_FILE_BYTES).decode("ascii", "replace").strip()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return text.strip()  # certainly no file
        raise ShoalError(ExitCode.BAD_INVITE, f"{text}: cannot be read ({error.strerror})") from None


@app.command()
def status(directory: Directory = None, as_json: Json = False) -> None:
    """What the node in a directory does now."""
    settings = NodeSettings(directory=directory or _only_running())
    snapshot = _ask_node(settings)
    if as_json:
        typer.echo(json.dumps(snapshot))
        return
    from shoal.node.live import print_status

    print_status(snapshot)


def _only_running() -> Path:
    """The default directory whose node runs. Raises ShoalError unless there is exactly one."""
    running = running_directories()
    if len(running) == 1:
        return running[0]
    if not running:
        raise ShoalError(ExitCode.NODE_NOT_RUNNING, "no node runs in the default directories")
    names = ", ".join(map(str, running))
    raise ShoalError(ExitCode.USAGE, f"several nodes run here: {names}", "name one of them with --dir")


def _ask_node(settings: NodeSettings) -> dict[str, Any]:
    try:
        url = json.loads(settings.running.read_text())["url"]
        with urllib.request.urlopen(f"{url}/status", timeout=5) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        raise ShoalError(ExitCode.NODE_NOT_RUNNING, f"no running node answers in {settings.directory}") from None


@app.command()
def export(
    target: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write the Hugging Face directory.")],
    directory: Directory = None,
    invite: Annotated[str | None, typer.Option("--invite", help="Export from the swarm, without a node here.")] = None,
    as_json: Json = False,
) -> None:
    """Write the newest committed model as a Hugging Face directory."""
    from shoal.node.exporting import export_run

    source = NodeSettings(directory=directory or default_directory("coordinator"))
    result = asyncio.run(export_run(target, source, read_invite(invite) if invite else None, show=not as_json))
    typer.echo(json.dumps(result) if as_json else f"step {result['step']} exported to {result['export_dir']}")


@app.command()
def demo(
    mode: Annotated[str, typer.Argument(help='Which demo: "pipeline".')] = "pipeline",
    rounds: Annotated[int, typer.Option("--rounds", min=2, max=1000)] = 40,
    volunteers: Annotated[int, typer.Option("--volunteers", min=1, max=16)] = 4,
    stages: Annotated[int, typer.Option("--stages", min=1, max=6)] = 2,
    kill: Annotated[bool, typer.Option("--kill/--no-kill", help="Kill a volunteer midway, replace it later.")] = True,
    directory: Annotated[Path | None, typer.Option("--dir", help="Keep all files of the demo here.")] = None,
    as_json: Json = False,
) -> None:
    """Train a small language model across processes on this machine, kill one, and compare with one machine."""
    if mode != "pipeline":
        raise ShoalError(ExitCode.USAGE, f'there is no demo "{mode}"', 'the demo of this version is "pipeline"')
    from shoal.node.demo import DemoSettings, run_demo

    raise typer.Exit(run_demo(DemoSettings(rounds, volunteers, stages, kill, directory), as_json=as_json))


def main() -> None:
    """Entry point: run a command; a foreseen error is two lines and its exit code, never a traceback."""
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
    except Exception as error:
        from shoal.node.errors import explain

        known = explain(error)
        if known is None:
            traceback.print_exc()
            known = ShoalError(ExitCode.INTERNAL, f"a defect of shoal itself ({type(error).__name__})")
        typer.echo(str(known), err=True)
        sys.exit(known.exit_code)


if __name__ == "__main__":
    main()
