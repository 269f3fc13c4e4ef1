"""The boards fit the terminal, tell the story in plain words, and never lie about who is alive."""

from __future__ import annotations

import io
import math

import pytest
from rich.cells import cell_len
from rich.console import Console

from shoal.monitoring.view import (
    NodeBoard,
    SwarmBoard,
    bar,
    bytes_text,
    count_text,
    duration_text,
    sparkline,
)
from shoal.protocol import events as e
from shoal.protocol.events import Reason, Stamped

SIZES = [(80, 24), (120, 40), (60, 16), (200, 50), (116, 24)]


def drawn(renderable, width: int, height: int) -> list[str]:
    console = Console(width=width, height=height, file=io.StringIO(), record=True, force_terminal=True)
    console.print(renderable)
    return console.export_text().rstrip("\n").split("\n")


def commit(round_: int, *, loss: float = 3.0, step: int | None = None, servers=(1, 1)) -> e.EntryDecided:
    return e.EntryDecided(round_, 0, "commit", step or round_, "d", 4, servers, 64, loss, 64 * round_)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_swarm_fits_the_terminal(story, width, height):
    lines = drawn(story.board.render(story.end_s), width, height)
    assert len(lines) < height
    assert max(cell_len(line.rstrip()) for line in lines) <= width


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40)])
def test_nothing_in_the_table_is_cut_off_at_the_usual_sizes(story, width, height):
    lines = drawn(story.board.render(story.end_s), width, height)
    assert not [line for line in lines if "…" in line]


def test_the_board_shows_the_run(story):
    text = "\n".join(drawn(story.board.render(story.end_s), 80, 24))
    for expected in ("stdlib-tiny", "27/40", "5.26 → 2.530", "37.6 samples/s", "servers per stage 2 + 2", "5 peers"):
        assert expected in text


def test_the_log_tells_what_happened_in_plain_words(story):
    text = "\n".join(drawn(story.board.render(story.end_s), 80, 24))
    for expected in (
        "killed dapper-lynx",
        "brave-heron takes over the lead of round 14",
        "stage 1 repaired 3 microbatches of round 14",
        "2 microbatches of round 14 sent to another server (unreachable)",
        "the swarm goes on without dapper-lynx (unreachable)",
        "eager-finch caught up to step 20 in 2.1 s (12.8 MB from 2 peers)",
        "the swarm admits eager-finch to stage 1",
    ):
        assert text.count(expected) == 1, expected


def test_the_killed_one_is_shown_as_killed_and_has_no_role(story):
    (row,) = [line for line in drawn(story.board.render(story.end_s), 80, 24) if line.split()[:1] == ["dapper-lynx"]]
    assert row.split()[1] == "killed"


def test_a_restarted_node_is_alive_again():
    board = SwarmBoard("run", rounds=4)
    board.started("a", 0.0)
    board.killed("a", 1.0)
    assert "0 peers" in "\n".join(drawn(board.render(2.0), 80, 24))
    board.started("a", 3.0)
    assert "1 peer" in "\n".join(drawn(board.render(4.0), 80, 24))


def test_plain_text_has_one_line_per_step_whoever_told_it(tell_story):
    lines = tell_story(27).board.plain_lines(final=True)
    assert [line.split("step ")[1].split("/")[0].strip() for line in lines if " samples/s" in line] == [
        str(r) for r in range(1, 28)
    ]
    assert sum("killed dapper-lynx" in line for line in lines) == 1
    assert all("\x1b" not in line and "\n" not in line for line in lines)


def test_plain_text_gives_every_line_once(tell_story):
    board = tell_story(27).board
    first = board.plain_lines()
    assert first and board.plain_lines() == [] and board.plain_lines(final=True) == []


def test_plain_text_says_a_count_only_when_its_round_is_over():
    board = SwarmBoard("run", rounds=4)
    board.feed("a", Stamped(0.0, commit(1)))
    board.feed("a", Stamped(1.0, e.HoleRepaired(2, 1, 0, 3)))
    assert not [line for line in board.plain_lines() if "repaired" in line]
    board.feed("b", Stamped(1.1, e.HoleRepaired(2, 1, 0, 4)))
    board.feed("b", Stamped(1.1, e.HoleRepaired(2, 1, 0, 4)))
    board.feed("a", Stamped(2.0, commit(3)))
    assert [line for line in board.plain_lines() if "repaired" in line] == [
        "[ 0:01] stage 0 repaired 2 microbatches of round 2"
    ]


def test_steps_not_log_entries_are_the_progress():
    board = SwarmBoard("run", rounds=10)
    board.feed("a", Stamped(0.0, commit(30, step=5)))
    assert "5/10" in "\n".join(drawn(board.render(1.0), 80, 24))


def test_an_older_entry_told_late_changes_nothing():
    board = SwarmBoard("run", rounds=10)
    board.feed("a", Stamped(5.0, commit(3, loss=1.0)))
    board.feed("b", Stamped(6.0, commit(2, loss=9.0)))
    assert board.step == 3 and len(board.plain_lines()) == 1


def test_what_the_swarm_waits_for_stands_at_the_top_until_it_is_over():
    board = SwarmBoard("run", rounds=10)
    board.feed("a", Stamped(0.0, commit(1)))
    board.feed("a", Stamped(1.0, e.WaitingForQuorum(2, 1, 3)))
    board.feed("a", Stamped(1.0, e.StageUncovered(2, 1)))
    text = "\n".join(drawn(board.render(9.0), 120, 24))
    assert "1 of 3 committee members answer, for 0:08" in text and "no server for stage 1, for 0:08" in text
    board.feed("a", Stamped(10.0, commit(2)))
    assert "wait " not in "\n".join(drawn(board.render(11.0), 120, 24))


def test_a_big_swarm_is_summed_up_at_the_end_of_the_table():
    board = SwarmBoard("run", rounds=10, stages=4)
    for i in range(100):
        board.feed(f"node-{i:03}", Stamped(0.0, e.LifecycleChanged("", "working")))
    lines = drawn(board.render(1.0), 80, 24)
    assert len(lines) < 24 and any("more" in line and "working" in line for line in lines)


def test_markup_in_names_and_details_is_not_interpreted():
    board = SwarmBoard("[bold]run[/bold]")
    board.feed("a[/x]", Stamped(0.0, e.Problem(Reason.INTERNAL, "[red]boo[/nothing]", "fix [it]")))
    text = "\n".join(drawn(board.render(1.0), 80, 24))
    assert "[bold]run[/bold]" in text and "[red]boo[/nothing] → fix [it]" in text


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_node_board_fits_the_terminal(story, width, height):
    board = NodeBoard("stdlib-tiny", rounds=40, url="http://127.0.0.1:9464")
    for node, stamped in story.events:
        if node == "amber-otter":
            board.feed(stamped)
    lines = drawn(board.render(story.end_s), width, height)
    assert len(lines) < max(height, 16) and max(cell_len(line.rstrip()) for line in lines) <= width
    text = "\n".join(lines)
    if width >= 80:
        for expected in (
            "amber-otter",
            "working",
            "serving stage 0, feeding, leading the round",
            "864 samples · 27 steps",
        ):
            assert expected in text
        assert "Ctrl-C finishes the work in hand" in text and "all well" in text


def test_the_node_board_says_what_is_wrong_and_how_to_fix_it():
    board = NodeBoard("run")
    board.feed(Stamped(0.0, e.Problem(Reason.UNREACHABLE, "no bootstrap peer answers", "check your network")))
    text = "\n".join(drawn(board.render(1.0), 80, 24))
    assert "no bootstrap peer answers" in text and "→ check your network" in text and "all well" not in text
    assert "all well" in "\n".join(drawn(board.render(1000.0), 80, 24))


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("joining", "looking for the swarm"),
        ("paused", "paused"),
        ("draining", "then leaving"),
        ("left", "left the run"),
    ],
)
def test_the_node_board_says_what_it_does_in_every_state(state, expected):
    board = NodeBoard("run")
    board.feed(Stamped(0.0, e.LifecycleChanged("", state)))
    assert expected in "\n".join(drawn(board.render(1.0), 80, 24))


def test_the_node_board_shows_how_far_the_state_has_come():
    board = NodeBoard("run")
    board.feed(Stamped(0.0, e.LifecycleChanged("joining", "syncing")))
    board.feed(Stamped(0.0, e.SyncStarted(1, 0, 17)))
    board.feed(Stamped(0.5, e.ChunkFetched("p", 4_200_000)))
    assert "fetching stage 1 at step 17, 4.2 MB so far" in "\n".join(drawn(board.render(1.0), 80, 24))


def test_units_are_aligned():
    texts = [bytes_text(n) for n in (0, 999, 1000, 12_345, 999_949, 999_951, 1.5e9, 9.9e13, 3e15)]
    assert {len(text) for text in texts[:-1]} == {8}
    assert texts[:6] == ["     0 B", "   999 B", "  1.0 kB", " 12.3 kB", "999.9 kB", "  1.0 MB"]
    assert [count_text(n) for n in (0, 9_999, 10_000, 999_949, 999_950)] == ["0", "9,999", "10.0k", "999.9k", "1.0M"]
    assert [duration_text(s) for s in (-1, 7.9, 724, 3753)] == ["0:00", "0:07", "12:04", "1:02:33"]


def test_sparkline_falls_with_the_loss_and_survives_odd_values():
    assert sparkline([3, 2, 1], 10) == "█▅▁" or sparkline([3, 2, 1], 10) == "█▄▁"
    assert len(sparkline(list(range(1000)), 12)) == 12
    assert sparkline([], 10) == "" and sparkline([math.nan], 10) == "" and sparkline([2.0, 2.0], 10) == "▁▁"


def test_bar_is_exactly_as_wide_as_asked():
    assert {bar(done, 40, 17).cell_len for done in range(50)} == {17}
    assert bar(40, 40, 17).plain == "━" * 17 and bar(0, 40, 3).plain == "───"
