"""Events survive a kill, a torn line costs one event, and the file stays bounded."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from shoal.monitoring.eventfile import (
    EventFile,
    EventFileError,
    decode_line,
    encode_line,
    follow,
    read_events,
    rotated,
)
from shoal.protocol import events as e
from shoal.protocol.events import EVENT_TYPES, Reason, Stamped


def step(i: int) -> Stamped:
    return Stamped(float(i), e.StepApplied(i, i, 0, "prepared", 0.25))


def steps(events) -> list[int]:
    return [stamped.event.step for stamped in events]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "node" / "events.jsonl"


def test_a_story_reads_back_as_it_was_written(path, story):
    file = EventFile(path)
    for _, stamped in story.events:
        file(stamped)
    file.close()
    finite = [s for _, s in story.events if not (isinstance(s.event, e.EntryDecided) and math.isnan(s.event.loss))]
    back = [s for s in read_events(path) if not (isinstance(s.event, e.EntryDecided) and math.isnan(s.event.loss))]
    assert back == finite
    assert len(list(read_events(path))) == len(story.events)
    assert {type(s.event).__name__ for s in back} < set(EVENT_TYPES)


def test_lines_are_strict_json_whatever_the_floats():
    for value in (math.nan, math.inf, -math.inf, 0.1):
        line = encode_line(Stamped(1.0, e.ReplicaDrift(1, 0, value)))
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        back = decode_line(line).event
        assert isinstance(back, e.ReplicaDrift)
        assert back.max_abs == value or (math.isnan(value) and math.isnan(back.max_abs))


def test_reasons_come_back_typed(path):
    file = EventFile(path)
    file(Stamped(1.0, e.CallFailed("p", "m", Reason.TORN_STREAM)))
    (back,) = read_events(path)
    assert isinstance(back.event, e.CallFailed) and back.event.reason is Reason.TORN_STREAM


def test_an_event_is_on_disk_before_the_sink_returns(path):
    file = EventFile(path)
    file(step(1))
    assert steps(read_events(path)) == [1]


def test_a_killed_writer_loses_nothing(path):
    program = f"""
        import os, signal
        from shoal.monitoring.eventfile import EventFile
        from shoal.protocol.events import Stamped, StepApplied
        file = EventFile({str(path)!r})
        for i in range(500):
            file(Stamped(float(i), StepApplied(i, i, 0, "prepared", 0.25)))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], timeout=30, check=False)
    assert done.returncode == -signal.SIGKILL
    assert steps(read_events(path)) == list(range(500))


@pytest.mark.parametrize("torn", [b'{"at_s":', b"\xff", b'{"at_s":1.0,"event":"StepApplied"'])
def test_a_torn_last_line_costs_one_event_and_a_restart_mends_it(path, torn):
    file = EventFile(path)
    file(step(1))
    file.close()
    with open(path, "ab") as raw:
        raw.write(torn)
    assert steps(read_events(path)) == [1]
    file = EventFile(path)
    file(step(2))
    file.close()
    assert steps(read_events(path)) == [1, 2]


def test_a_damaged_line_in_the_middle_is_named(path):
    path.parent.mkdir()
    path.write_bytes(encode_line(step(1)) + b"garbage\n" + encode_line(step(2)))
    with pytest.raises(EventFileError, match=r"events\.jsonl, line 2 is damaged"):
        list(read_events(path))


@pytest.mark.parametrize(
    "line", [b"[]", b"null", b'{"event":"Nothing","at_s":1}', b'{"event":"StepApplied","at_s":1}', b"{" * 100_000]
)
def test_what_is_no_event_is_a_value_error(line):
    with pytest.raises(ValueError, match="not an event"):
        decode_line(line)


def test_the_file_rotates_at_its_bound_and_reads_on_across_it(path):
    size = len(encode_line(step(10)))
    file = EventFile(path, max_bytes=10 * size)
    for i in range(10, 25):
        file(step(i))
    assert path.stat().st_size <= 10 * size and rotated(path).stat().st_size <= 10 * size
    assert steps(read_events(path)) == list(range(10, 25))
    for i in range(25, 99):
        file(step(i))
    assert os.listdir(path.parent) == ["events.jsonl", "events.jsonl.1"] or len(os.listdir(path.parent)) == 2
    assert steps(read_events(path)) == list(range(80, 99))


def test_a_reopened_file_counts_what_it_already_holds(path):
    size = len(encode_line(step(10)))
    for i in range(10, 25):
        file = EventFile(path, max_bytes=10 * size)
        file(step(i))
        file.close()
    assert path.stat().st_size <= 10 * size and steps(read_events(path)) == list(range(10, 25))


def test_a_follower_gets_every_event_once_across_rotation(path):
    follower = follow(path)
    assert follower.poll() == []
    file = EventFile(path, max_bytes=10 * len(encode_line(step(10))))
    got = []
    for i in range(10, 99):
        file(step(i))
        if i % 7 == 0:
            got += steps(follower.poll())
    got += steps(follower.poll())
    assert got == list(range(10, 99)) and follower.damaged == 0
    assert follower.poll() == []


def test_a_follower_waits_for_the_rest_of_a_line(path):
    path.parent.mkdir()
    line = encode_line(step(1))
    follower = follow(path)
    path.write_bytes(line[:20])
    assert follower.poll() == []
    path.write_bytes(line + line[:5])
    assert steps(follower.poll()) == [1]


def test_a_follower_counts_damage_and_goes_on(path):
    path.parent.mkdir()
    path.write_bytes(b"garbage\n" + encode_line(step(2)))
    follower = follow(path)
    assert steps(follower.poll()) == [2] and follower.damaged == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_drops_events_but_does_not_stop_the_node():
    file = EventFile("/dev/full")
    file(step(1))
    assert file.dropped == 1 and file.error is not None
