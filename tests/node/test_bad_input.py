"""What a person can get wrong: one clear line, the fix, the documented exit code, and nothing half-written."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from shoal.node.exit_codes import ExitCode
from shoal.protocol.identity import Identity
from shoal.protocol.invite import Invite
from tests.node.small_runs import run_here, shoal, write_run

Capture = pytest.CaptureFixture[str]


def changed(manifest: Path, old: str, new: str) -> Path:
    text = manifest.read_text()
    assert old in text
    manifest.write_text(text.replace(old, new, 1))
    return manifest


def line_of(manifest: Path, text: str) -> str:
    return f"line {next(n for n, line in enumerate(manifest.read_text().splitlines(), 1) if text in line)}"


# --- run.toml --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("stages = 2", "stagess = 2", ("model.stagess", "stages")),
        ("[optimizer]", "[optimiser]", ("optimiser", "optimizer")),
        ("hidden_size = 32", "hiden_size = 32", ("model.config.hiden_size", "did you mean hidden_size?")),
        ('name = "adamw"', 'name = "adamv"', ("optimizer.name", "adamw")),
        ("microbatch = 2", "microbatch = 3", ("batch.microbatch", "must divide")),
        ("committee = 3", "committee = 2", ("participation.committee",)),
        ("learning_rate = 1e-2", 'learning_rate = "fast"', ("optimizer.learning_rate",)),
        ("seed = 7", "seed = ", ("not valid TOML",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_in_a_run_file_is_told_with_its_line(
    tmp_path: Path, capfd: Capture, old: str, new: str, words: tuple[str, ...]
) -> None:
    manifest = changed(write_run(tmp_path), old, new)
    answer = run_here(capfd, "check", manifest)
    answer.is_error(ExitCode.BAD_MANIFEST, str(manifest), line_of(manifest, new), *words)


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [('"llama"', '"lama"', '"llama"'), ("stages = 2", "stages = 9", "9 stages"), ("= false", "= true", "tie")],
)
def test_a_model_that_cannot_be_built_is_refused(tmp_path: Path, capfd: Capture, old: str, new: str, word: str) -> None:
    run_here(capfd, "check", changed(write_run(tmp_path), old, new)).is_error(ExitCode.BAD_MANIFEST, word)


def test_a_run_file_that_is_not_there_is_named(tmp_path: Path, capfd: Capture) -> None:
    for command in ("check", "bootstrap"):
        run_here(capfd, command, tmp_path / "nowhere.toml").is_error(ExitCode.BAD_MANIFEST, "nowhere.toml", "no such")


def test_data_that_cannot_be_read_is_named_and_bootstrap_leaves_nothing(tmp_path: Path, capfd: Capture) -> None:
    manifest = write_run(tmp_path)
    (tmp_path / "words.txt").unlink()
    run_here(capfd, "check", manifest).is_error(ExitCode.DATA_UNREADABLE, "words.txt", "no such file")
    answer = run_here(capfd, "bootstrap", manifest, "--dir", tmp_path / "node")
    answer.is_error(ExitCode.DATA_UNREADABLE, "words.txt")
    assert not (tmp_path / "node").exists()


def test_data_too_short_for_one_sample_is_refused(tmp_path: Path, capfd: Capture) -> None:
    manifest = write_run(tmp_path)
    (tmp_path / "words.txt").write_text("short")
    run_here(capfd, "check", manifest).is_error(ExitCode.DATA_UNREADABLE, "33")


def test_data_that_is_not_the_pinned_one_is_refused(tmp_path: Path, capfd: Capture) -> None:
    manifest = changed(write_run(tmp_path), "[batch]", f'sha256 = "{"0" * 64}"\n[batch]')
    run_here(capfd, "check", manifest).is_error(ExitCode.DATA_MISMATCH, "sha256")


# --- invites ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def invite(tmp_path_factory: pytest.TempPathFactory) -> Invite:
    """A well-formed invite to a port where nobody listens."""
    peer = Identity.create(tmp_path_factory.mktemp("identity") / "key").peer
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    return Invite("ab" * 32, peer, (f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer}",))


def test_an_invite_that_was_cut_changed_or_never_was_one_is_refused(
    tmp_path: Path, capfd: Capture, invite: Invite
) -> None:
    text = invite.encode()
    other = "3" if text[40] != "3" else "4"
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for wrong in (
        text[:-5],
        text + "z",
        text[:40] + other + text[41:],
        "hello",
        "",
        "x" * 5000,
        str(binary),
        str(tmp_path),
        text.replace("shoal1-", "shoal2-"),
    ):
        run_here(capfd, "join", wrong, "--dir", tmp_path / "node").is_error(ExitCode.BAD_INVITE)
    assert not (tmp_path / "node").exists()


@pytest.mark.process
def test_a_bootstrap_that_does_not_answer_is_told_in_bounded_time(
    tmp_path: Path, capfd: Capture, invite: Invite
) -> None:
    start = time.monotonic()
    answer = run_here(capfd, "join", invite.encode(), "--dir", tmp_path / "node", "--quiet")
    answer.is_error(ExitCode.BOOTSTRAP_UNREACHABLE, invite.maddrs[0])
    assert time.monotonic() - start < 30
    assert list((tmp_path / "node" / "run").iterdir()) == [], "its sockets are gone"
    answer = run_here(capfd, "export", tmp_path / "out", "--invite", invite.encode())
    answer.is_error(ExitCode.BOOTSTRAP_UNREACHABLE, invite.maddrs[0])
    assert not (tmp_path / "out").exists()


# --- this machine ----------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_listen_port_that_is_taken_is_told(tmp_path: Path, capfd: Capture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        address = f"/ip4/127.0.0.1/tcp/{port}"
        manifest = write_run(tmp_path)
        answer = run_here(capfd, "bootstrap", manifest, "--dir", tmp_path / "node", "--quiet", "--listen", address)
        answer.is_error(ExitCode.PORT_IN_USE, str(port), "--listen")


@pytest.mark.process
def test_a_metrics_port_that_is_taken_is_told(tmp_path: Path, capfd: Capture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        manifest = write_run(tmp_path)
        listen = ("--listen", "/ip4/127.0.0.1/tcp/0")
        answer = run_here(
            capfd, "bootstrap", manifest, "--dir", tmp_path / "node", "--quiet", *listen, "--metrics-port", str(port)
        )
        answer.is_error(ExitCode.PORT_IN_USE, str(port))
    assert not (tmp_path / "node" / "node.json").exists(), "status must not find a node that is not there"


@pytest.mark.parametrize("address", ["nonsense", "/ip4/127.0.0.1/udp/4001/quic", "/ip4/203.0.113.5/tcp/4001"])
def test_a_listen_address_that_this_machine_has_not_is_refused(tmp_path: Path, capfd: Capture, address: str) -> None:
    manifest = write_run(tmp_path)
    answer = run_here(capfd, "bootstrap", manifest, "--dir", tmp_path / "node", "--quiet", "--listen", address)
    answer.is_error(ExitCode.USAGE, address)


def test_an_identity_that_is_damaged_or_open_to_others_is_refused_and_kept(tmp_path: Path, capfd: Capture) -> None:
    manifest = write_run(tmp_path)
    key = tmp_path / "node" / "identity.key"
    key.parent.mkdir()
    key.write_bytes(b"not a key")
    key.chmod(0o600)
    run_here(capfd, "bootstrap", manifest, "--dir", key.parent).is_error(ExitCode.IDENTITY_BROKEN, str(key))
    assert key.read_bytes() == b"not a key"
    key.unlink()
    Identity.create(key)
    key.chmod(0o644)
    run_here(capfd, "bootstrap", manifest, "--dir", key.parent).is_error(ExitCode.IDENTITY_BROKEN, "0644", "chmod 600")


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path, capfd: Capture) -> None:
    manifest = write_run(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    run_here(capfd, "bootstrap", manifest, "--dir", file).is_error(ExitCode.DIRECTORY_UNWRITABLE, str(file), "--dir")
    if os.geteuid() != 0:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        run_here(capfd, "bootstrap", manifest, "--dir", locked / "x").is_error(ExitCode.DIRECTORY_UNWRITABLE)


def test_a_device_that_is_not_here_is_named() -> None:
    from shoal.node.exit_codes import ShoalError
    from shoal.node.hardware import choose

    for device in ("cuda:99", "toaster", "meta"):
        with pytest.raises(ShoalError, match=device) as refused:
            choose(device)
        assert refused.value.exit_code is ExitCode.DEVICE_UNAVAILABLE


def test_data_of_a_volunteer_that_is_not_there_is_named_before_anything_starts(
    tmp_path: Path, capfd: Capture, invite: Invite
) -> None:
    answer = run_here(capfd, "join", invite.encode(), "--dir", tmp_path / "node", "--data", tmp_path / "nowhere")
    answer.is_error(ExitCode.DATA_UNREADABLE, "--data", "nowhere")
    assert not (tmp_path / "node").exists()


def test_a_changed_run_file_needs_a_new_directory(tmp_path: Path, capfd: Capture) -> None:
    from shoal.node.coordinator import prepare
    from shoal.node.settings import NodeSettings

    manifest = write_run(tmp_path)
    prepare(manifest, NodeSettings(tmp_path / "node"))
    changed(manifest, "seed = 7", "seed = 8")
    answer = run_here(capfd, "bootstrap", manifest, "--dir", tmp_path / "node")
    answer.is_error(ExitCode.BAD_MANIFEST, str(tmp_path / "node"), "--dir")


def test_status_and_export_without_a_node_say_so(tmp_path: Path, capfd: Capture) -> None:
    run_here(capfd, "status", "--dir", tmp_path).is_error(ExitCode.NODE_NOT_RUNNING, str(tmp_path))
    answer = run_here(capfd, "export", tmp_path / "out", "--dir", tmp_path)
    answer.is_error(ExitCode.NODE_NOT_RUNNING, str(tmp_path), "--invite")
    (tmp_path / "node.json").write_text('{"pid": 1, "url": "http://127.0.0.1:1"}')
    run_here(capfd, "status", "--dir", tmp_path).is_error(ExitCode.NODE_NOT_RUNNING)
    (tmp_path / "node.json").write_text("[1, 2")
    run_here(capfd, "status", "--dir", tmp_path).is_error(ExitCode.NODE_NOT_RUNNING)


def test_a_defect_shows_its_traceback_and_has_its_own_code(
    tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("shoal.node.coordinator.examine", broken)
    answer = run_here(capfd, "check", write_run(tmp_path))
    assert answer.code == ExitCode.INTERNAL
    assert "Traceback" in answer.err and "ZeroDivisionError" in answer.err


@pytest.mark.process
def test_the_command_as_a_process_ends_with_the_same_two_lines(tmp_path: Path) -> None:
    done = shoal("check", tmp_path / "nowhere.toml")
    assert (done.returncode, done.stdout) == (ExitCode.BAD_MANIFEST, "")
    assert [line[:7] for line in done.stderr.splitlines()] == ["shoal: ", "  fix: "]
