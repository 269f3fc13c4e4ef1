"""The check that no process outlives its test can fail: it sees children, orphans and daemons, and ends them."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from tests.conftest import end_all, live_children

ORPHAN = "import subprocess, sys; subprocess.Popen(['sleep', '600']); print('started', flush=True); sys.stdin.read()"


def test_a_child_that_stays_is_seen_named_and_killed() -> None:
    process = subprocess.Popen(["sleep", "600"])
    seen = {child for child in live_children() if child.pid == process.pid}
    assert seen
    assert end_all(seen, within_s=0.05) == [f"{process.pid} sleep: sleep 600"]
    assert process.poll() is not None


def test_a_grandchild_is_seen_after_its_parent_was_killed() -> None:
    before = live_children()
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"started\n"
        parent.kill()
    left = live_children() - before
    assert [child.name() for child in left] == ["sleep"]
    assert len(end_all(left, within_s=0.05)) == 1


def test_a_process_that_left_its_session_is_seen() -> None:
    before = live_children()
    subprocess.run(["setsid", "--fork", "sleep", "600"], check=True, timeout=5)
    left = live_children() - before
    assert len(left) == 1
    assert len(end_all(left, within_s=0.05)) == 1


def test_a_child_that_ends_in_time_is_no_complaint() -> None:
    process = subprocess.Popen(["sleep", "0.1"])
    assert end_all({psutil.Process(process.pid)}, within_s=5) == []


def test_the_seed_is_the_one_that_the_header_prints(seed: int, request: pytest.FixtureRequest) -> None:
    text = request.config.getoption("--seed")
    assert text == "random" or int(text) == seed
