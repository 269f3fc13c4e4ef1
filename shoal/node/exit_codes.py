"""Exit codes, and the one error that ends a command: what happened, what to do, and the number a script sees.

Every command ends with a code of this closed enum. `ShoalError` is raised wherever a person can do something about a
failure; the command line prints its two lines and exits with its code, without a traceback. `docs/exit-codes.md` is
printed by `python -m shoal.node.exit_codes`; a test fails when a code lacks its help, its fix or its line there.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class ExitCode(enum.IntEnum):
    """What a process of shoal tells the shell. Numbers are stable: scripts and service managers act on them."""

    OK = 0
    PROMISE_BROKEN = 1
    USAGE = 2

    # 10-19: something the person gave is wrong
    BAD_MANIFEST = 10
    BAD_INVITE = 11
    DATA_UNREADABLE = 12
    DATA_MISMATCH = 13
    IDENTITY_BROKEN = 14
    DEVICE_UNAVAILABLE = 15

    # 20-29: the network, or the other side of it
    BOOTSTRAP_UNREACHABLE = 20
    MANIFEST_REFUSED = 21
    NOT_ADMITTED = 22
    NO_QUORUM = 23
    PORT_IN_USE = 24
    NODE_NOT_RUNNING = 25

    # 30-39: the disk
    NO_SPACE = 30
    DIRECTORY_LOCKED = 31
    DIRECTORY_UNWRITABLE = 32
    SNAPSHOT_DAMAGED = 33
    EXPORT_REFUSED = 34

    # 40-49: the node itself
    DAEMON_DIED = 40
    DRAIN_TIMED_OUT = 41

    INTERNAL = 70
    INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a code means and what to do about it: one line each, without a final full stop."""

    help: str
    fix: str


EXPLANATIONS: dict[ExitCode, Explanation] = {
    ExitCode.OK: Explanation(
        "the command did what it was asked to do, or the node left the run in order", "nothing to fix"
    ),
    ExitCode.PROMISE_BROKEN: Explanation(
        "a demo or a check ran to its end and a promise did not hold; the output names which",
        "report it with the output and the directory that the command names",
    ),
    ExitCode.USAGE: Explanation(
        "the command line has an unknown command or option, or a value of the wrong kind",
        "run the command with --help",
    ),
    ExitCode.BAD_MANIFEST: Explanation(
        "run.toml cannot be read, or something in it is wrong; the message names the line and the nearest valid key",
        "correct that line, then run: shoal check run.toml",
    ),
    ExitCode.BAD_INVITE: Explanation(
        "the invite is not one, is cut short, was changed on its way, or is past its lifetime",
        "copy the whole invite again, in one piece, or ask the coordinator for a new one",
    ),
    ExitCode.DATA_UNREADABLE: Explanation(
        "the training data cannot be opened, or is too short for one sample",
        "check data.path in run.toml (it is relative to that file), its permissions and its length",
    ),
    ExitCode.DATA_MISMATCH: Explanation(
        "this machine's copy of the training data is not the one that the run names",
        "fetch the coordinator's copy of the data, or serve a stage without feeding",
    ),
    ExitCode.IDENTITY_BROKEN: Explanation(
        "the identity file is damaged, of the wrong kind, or readable by others",
        "restore it from a copy, set its mode to 0600, or move it away to get a new identity",
    ),
    ExitCode.DEVICE_UNAVAILABLE: Explanation(
        "the device that was asked for does not exist here, or has too little memory for the stage",
        "choose another device, or leave the option out to let shoal choose",
    ),
    ExitCode.BOOTSTRAP_UNREACHABLE: Explanation(
        "none of the addresses in the invite answered in time",
        "check that the bootstrap peer runs and that its port is reachable from here, or ask for a new invite",
    ),
    ExitCode.MANIFEST_REFUSED: Explanation(
        "the manifest that the bootstrap peer sent does not match the invite: its hash or its signature is wrong",
        "do not join with this invite; ask the coordinator, over another channel, for a new one",
    ),
    ExitCode.NOT_ADMITTED: Explanation(
        "the run did not admit this peer: its token is missing, spent or expired, it is banned, or the run is full",
        "ask the coordinator for an invite with a fresh token",
    ),
    ExitCode.NO_QUORUM: Explanation(
        "no majority of the committee answered within the time allowed; nothing was committed without it",
        "bring committee peers back, or let the coordinator sign a reform of the run",
    ),
    ExitCode.PORT_IN_USE: Explanation(
        "another program listens on the port that was asked for",
        "stop that program, choose another port, or use port 0 to take any free one",
    ),
    ExitCode.NODE_NOT_RUNNING: Explanation(
        "no running node answers in this directory",
        "start one with shoal join or shoal bootstrap, or name its directory with --dir",
    ),
    ExitCode.NO_SPACE: Explanation(
        "the disk is too full for a snapshot, an export or the run log; the half-written file was removed",
        "free some space or choose another --dir, then start again: the node goes on from its last snapshot",
    ),
    ExitCode.DIRECTORY_LOCKED: Explanation(
        "another node already runs in this directory", "stop that node, or choose another directory with --dir"
    ),
    ExitCode.DIRECTORY_UNWRITABLE: Explanation(
        "the directory cannot be made or written to",
        "check its owner and permissions, or choose another directory with --dir",
    ),
    ExitCode.SNAPSHOT_DAMAGED: Explanation(
        "no snapshot in the directory is whole: the hashes of its files do not match",
        "point --dir at another copy, or join again and fetch the state from other peers",
    ),
    ExitCode.EXPORT_REFUSED: Explanation(
        "the model cannot be exported: there is no committed state yet, or the target exists and is not an export",
        "wait for the first snapshot, or name a directory that does not exist yet",
    ),
    ExitCode.DAEMON_DIED: Explanation(
        "the node's own libp2p daemon stopped and could not be started again",
        "look for the reason in the node's log (memory is the usual one), then start the node again",
    ),
    ExitCode.DRAIN_TIMED_OUT: Explanation(
        "the node was asked to leave and did not finish its work within the deadline; the run repairs what it held",
        "nothing is lost; start it again whenever you like",
    ),
    ExitCode.INTERNAL: Explanation(
        "a defect of shoal itself; the traceback is in the node's log", "report it with that log and the command line"
    ),
    ExitCode.INTERRUPTED: Explanation(
        "the command was interrupted (Ctrl-C) before it was done", "run it again; a node goes on from its last snapshot"
    ),
}


class ShoalError(Exception):
    """A failure that a person can do something about. Raised anywhere below the command line, printed only by it.

    `message` says what happened, with the concrete names (file, line, address); `fix` says what to do and is the code's
    general fix unless the raiser knows better. Both are one line: line breaks and control characters, which could come
    from outside, are replaced by spaces.
    """

    def __init__(self, exit_code: ExitCode, message: str, fix: str | None = None) -> None:
        super().__init__(exit_code, message, fix)
        self.exit_code = exit_code
        self.message = _one_line(message)
        self.fix = _one_line(EXPLANATIONS[exit_code].fix if fix is None else fix)

    def __str__(self) -> str:
        return f"shoal: {self.message}\n  fix: {self.fix}"


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def markdown() -> str:
    """The whole text of docs/exit-codes.md."""
    lines = [
        "# Exit codes",
        "",
        "Every command of shoal ends with one of these. A failure prints two lines on standard error,",
        "`shoal: what happened` and `  fix: what to do`, and no traceback. This page is printed by",
        "`python -m shoal.node.exit_codes`; a test holds the two together.",
        "",
        "| code | name | what it means | what to do |",
        "| ---: | --- | --- | --- |",
    ]
    lines += [f"| {int(code)} | `{code.name}` | {why.help} | {why.fix} |" for code, why in EXPLANATIONS.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
