"""Routing in virtual time: shares follow speed; a hung or failing server loses its work until it heals."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.swarm.pipeline.router import FIRST_GUESS_S, MAX_PENALTY_S, Router

# What a call started at `now` does: ("ok" | "fail", seconds it takes); seconds = inf: it never answers.
Behaviour = Callable[[float], tuple[str, float]]


def steady(seconds: float) -> Behaviour:
    return lambda _: ("ok", seconds)


def simulate(
    router: Router,
    servers: dict[str, Behaviour],
    *,
    workers: int,
    until: float,
    start: float = 0.0,
    give_up: float = 1e9,
) -> list[tuple[float, str]]:
    """`workers` keep one call each in flight; returns (start, server) of every call. A server computes one call at a
    time, in arrival order. A failed call is given up after `give_up` seconds at the latest, as the feeder's deadline
    does."""
    free = dict.fromkeys(servers, start)
    calls: list[tuple[float, str]] = []
    queue: list[tuple[float, int, str, str, int]] = [(start, -i, "idle", "", 0) for i in range(workers)]
    heapq.heapify(queue)
    serial = 0
    while queue and queue[0][0] < until:
        now, _, outcome, peer, ticket = heapq.heappop(queue)
        if outcome == "ok":
            router.succeeded(peer, ticket, now)
        elif outcome == "fail":
            router.failed(peer, ticket, now)
        choice = router.choose(now)
        assert choice is not None
        ticket = router.start(choice, now)
        calls.append((now, choice))
        outcome, seconds = servers[choice](now)
        if outcome == "ok" and seconds < math.inf:
            free[choice] = max(free[choice], now) + seconds
            seconds = free[choice] - now
        if seconds > give_up:
            outcome, seconds = "fail", give_up
        serial += 1
        if seconds < math.inf:
            heapq.heappush(queue, (now + max(seconds, 1e-3), serial, outcome, choice, ticket))
    for *_, peer, ticket in queue:
        router.cancelled(peer, ticket)
    return calls


def shares(calls: list[tuple[float, str]], since: float = 0.0) -> dict[str, float]:
    count = Counter(peer for at, peer in calls if at >= since)
    return {peer: n / count.total() for peer, n in count.items()}


@settings(max_examples=40)
@given(
    seconds=st.lists(st.floats(0.02, 0.4), min_size=2, max_size=5),
    workers=st.integers(1, 8),
)
def test_work_is_shared_in_proportion_to_speed(seconds: list[float], workers: int) -> None:
    servers = {f"s{i}": s for i, s in enumerate(seconds)}
    calls = simulate(Router(servers), {p: steady(s) for p, s in servers.items()}, workers=workers, until=60.0)
    total = sum(1 / s for s in seconds)
    got = shares(calls, since=10.0)
    for peer, s in servers.items():
        assert got[peer] == pytest.approx(1 / s / total, rel=0.15, abs=0.01)


def test_work_is_interleaved_and_not_sent_in_bursts() -> None:
    calls = simulate(Router(["a", "b"]), {"a": steady(0.1), "b": steady(0.1)}, workers=2, until=20.0)
    late = [peer for at, peer in calls if at > 5.0]
    assert all(late[i : i + 6].count("a") == 3 for i in range(0, len(late) - 6, 2))


def test_servers_without_measurable_duration_share_the_work_too() -> None:
    router, count = Router(["a", "b"]), Counter[str]()
    for _ in range(100):
        peer = router.choose(0.0)
        assert peer is not None
        count[peer] += 1
        router.succeeded(peer, router.start(peer, 0.0), 0.0)
    assert 40 <= count["a"] <= 60


@pytest.mark.parametrize("workers", [2, 8])
def test_a_hung_server_stops_getting_work(workers: int) -> None:
    def hangs_after_ten(now: float) -> tuple[str, float]:
        return ("ok", 0.05) if now < 10.0 else ("ok", math.inf)

    servers = {"hung": hangs_after_ten, "a": steady(0.1), "b": steady(0.1)}
    calls = simulate(Router(servers), servers, workers=workers, until=100.0, give_up=20.0)
    late = Counter(peer for at, peer in calls if at > 12.0)
    assert late["hung"] <= 0.05 * late.total()
    assert shares(calls, since=12.0)["a"] == pytest.approx(shares(calls, since=12.0)["b"], rel=0.1)


@given(waits=st.lists(st.floats(0, 5), min_size=1, max_size=10), known=st.none() | st.floats(0.001, 3))
def test_an_estimate_never_improves_while_a_call_hangs(waits: list[float], known: float | None) -> None:
    router, now = Router(["a"]), 0.0
    if known is not None:
        router.succeeded("a", router.start("a", 0.0), known)
        now = known
    router.start("a", now)
    began, before = now, router.estimate_s("a", now)
    for wait in waits:
        now += wait
        after = router.estimate_s("a", now)
        assert after >= before and after >= now - began
        before = after


def test_a_quick_failure_does_not_make_a_server_look_fast() -> None:
    router = Router(["a", "b"])
    router.failed("a", router.start("a", 0.0), 0.001)
    assert router.estimate_s("a", 0.001) >= FIRST_GUESS_S
    router.failed("b", router.start("b", 0.0), 7.0)
    assert router.estimate_s("b", 7.0) >= 7.0


def test_a_failed_server_is_probed_once_after_its_penalty() -> None:
    router = Router(["bad", "good"])
    router.failed("bad", router.start("bad", 0.0), 0.0, penalty_s=1.0)
    for now in (0.0, 0.5, 0.99):
        for _ in range(5):
            assert router.choose(now) == "good"
            router.succeeded("good", router.start("good", now), now + 0.05)
    chosen = []
    for _ in range(20):
        peer = router.choose(1.01)
        assert peer is not None
        chosen.append(peer)
        router.start(peer, 1.01)
    assert chosen.count("bad") == 1, "one probe, until it answers"


def test_a_server_that_answers_its_probe_is_back_and_does_not_catch_up_on_what_it_missed() -> None:
    def away(now: float) -> tuple[str, float]:
        return ("fail", 0.01) if 10.0 < now < 40.0 else ("ok", 0.1)

    servers = {"away": away, "a": steady(0.1), "b": steady(0.1)}
    calls = simulate(Router(servers), servers, workers=6, until=200.0)
    assert shares(calls, since=120.0)["away"] == pytest.approx(1 / 3, rel=0.1)
    back = next(at for at, peer in calls if at >= 40.0 and peer == "away")
    burst = shares([c for c in calls if back <= c[0] < back + 5.0])
    assert burst["away"] < 0.45 and burst["a"] > 0.2, "nobody else is left idle while it catches up"


def test_a_newcomer_gets_its_share_and_not_everything() -> None:
    router, old = Router(["a", "b"]), {"a": steady(0.1), "b": steady(0.1)}
    simulate(router, old, workers=6, until=100.0)
    router.update(["a", "b", "new"])
    calls = simulate(router, {**old, "new": steady(0.1)}, workers=6, start=100.0, until=110.0)
    assert shares(calls)["new"] == pytest.approx(1 / 3, rel=0.25)


def test_while_a_probe_hangs_and_the_others_are_banned_the_probe_is_not_repeated() -> None:
    router = Router(["probed", "banned"])
    router.failed("probed", router.start("probed", 0.0), 0.0, penalty_s=1.0)
    router.failed("banned", router.start("banned", 0.0), 0.0, penalty_s=50.0)
    assert router.choose(2.0) == "probed"
    router.start("probed", 2.0)
    assert router.choose(3.0) == "banned"


def test_penalties_double_to_a_bound_and_calls_that_fail_together_count_once() -> None:
    router = Router(["a", "slow"])
    router.succeeded("slow", router.start("slow", -1e6), 0.0)

    def back(now: float) -> float:
        """When `a` is usable again: it is always better than the slow one."""
        return next(now + k / 10 for k in range(1000) if router.choose(now + k / 10) == "a")

    tickets = [router.start("a", 0.0) for _ in range(8)]
    for ticket in tickets:
        router.failed("a", ticket, 1.0)
    assert back(1.0) == pytest.approx(2.0, abs=0.11), "one outage, one penalty"
    now, penalties = 2.1, []
    for _ in range(9):
        router.failed("a", router.start("a", now), now)
        penalties.append(round(back(now) - now))
        now = back(now)
    assert penalties == [2, 4, 8, 16, 32, 60, 60, 60, 60] and MAX_PENALTY_S == 60.0


def test_a_server_may_fail_for_days_without_harm() -> None:
    router = Router(["a"])
    for i in range(3000):
        assert router.choose(float(i)) == "a", "the only server is tried again, banned or not"
        router.failed("a", router.start("a", float(i)), i + 0.5)


@settings(max_examples=60)
@given(
    moves=st.lists(
        st.tuples(st.sampled_from(["start", "ok", "fail", "cancel", "wait", "update"]), st.integers(0, 15)), max_size=60
    ),
    avoid=st.sets(st.sampled_from("abcd")),
)
def test_whatever_happens_avoided_servers_are_not_chosen_and_somebody_else_is(
    moves: list[tuple[str, int]], avoid: set[str]
) -> None:
    router, now, open_calls, servers = Router("abcd"), 0.0, [], set("abcd")
    for kind, number in moves:
        if kind == "start":
            choice = router.choose(now, sorted(avoid))
            assert (choice in servers - avoid) if servers - avoid else choice is None
            if choice is not None:
                open_calls.append((choice, router.start(choice, now)))
        elif kind == "wait":
            now += number / 3
        elif kind == "update":
            servers = {p for i, p in enumerate("abcd") if number >> i & 1}
            router.update(sorted(servers))
        elif open_calls:
            call = open_calls.pop(number % len(open_calls))
            if kind == "ok":
                router.succeeded(*call, now)
                router.succeeded(*call, now)  # a repeated answer changes nothing
            elif kind == "fail":
                router.failed(*call, now)
            else:
                router.cancelled(*call)


def test_an_update_keeps_what_is_known_and_forgets_who_left() -> None:
    router = Router(["a", "b"])
    router.succeeded("a", router.start("a", 0.0), 3.0)
    router.failed("b", router.start("b", 3.0), 3.1, penalty_s=10.0)
    router.update(["b", "a", "c"])
    assert router.estimate_s("a", 3.1) == 3.0
    assert router.choose(3.1, ["a", "c"]) == "b" and router.choose(3.1, ["a"]) == "c", "b is still banned"
    router.update(["c"])
    assert router.choose(3.1) == "c"
    router.update(["a", "c"])
    assert router.estimate_s("a", 3.1) == FIRST_GUESS_S
    router.failed("gone", router.start("gone", 4.0), 5.0)  # answers of servers that left are nobody's business


def test_a_cancelled_call_says_nothing_about_the_server() -> None:
    router = Router(["a", "b"])
    router.cancelled("a", router.start("a", 0.0))
    assert router.estimate_s("a", 100.0) == FIRST_GUESS_S
    assert {router.choose(100.0, ["b"]), router.choose(100.0, ["a"])} == {"a", "b"}
