"""Metrics follow the events, every event moves one, and no label grows with the number of peers."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest

from shoal.monitoring.metrics import (
    LABEL_HELP,
    LABEL_VALUES,
    NO_METRIC,
    Metrics,
    bounded,
    describe,
    method_class,
    stage_label,
)
from shoal.protocol import events as e
from shoal.protocol.events import EVENT_TYPES, Event, Phase, Reason, Stamped

PEER = "12D3KooWunboundedpeeridentity"
DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def sample(cls: type[Event], **changes: Any) -> Event:
    """An event with plausible values; numbers are not zero, so that counting them shows."""
    by_type: dict[str, Any] = {
        "str": "sent", "int": 3, "float": 2.5, "bool": True, "Reason": Reason.DEADLINE, "Phase": Phase.REDUCE,
        "tuple[int, ...]": (2, 1), "tuple[str, ...]": (PEER,), "int | None": 1,
    }  # fmt: skip
    values = {f.name: PEER if f.name == "peer" else by_type[str(f.type)] for f in dataclasses.fields(cls)}
    if cls is e.EntryDecided:
        values["kind"] = "commit"
    return cls(**{**values, **changes})


def values(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for metric in metrics.registry.collect()
        for s in metric.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = [v for (n, given), v in values(metrics).items() if n == name and labels.items() <= dict(given).items()]
    assert len(found) == 1, f"{name}{labels}: {len(found)} samples"
    return found[0]


@pytest.mark.parametrize("cls", EVENT_TYPES.values(), ids=EVENT_TYPES)
def test_every_event_moves_a_metric_or_says_why_not(cls):
    metrics = Metrics(process=False)
    before = values(metrics)
    metrics(Stamped(1000.0, sample(cls)))
    assert (values(metrics) != before) == (cls not in NO_METRIC)


def test_the_list_of_events_without_a_metric_is_small_and_explained():
    assert len(NO_METRIC) <= 3 and all(len(why) > 20 for why in NO_METRIC.values())


def test_no_label_holds_a_peer_id_after_every_event():
    metrics = Metrics(process=False)
    for cls in EVENT_TYPES.values():
        metrics(Stamped(1.0, sample(cls)))
    assert not [key for key in values(metrics) if PEER in str(key)]


def test_names_and_labels_keep_the_conventions():
    specs = Metrics().specs
    assert len({spec.name for spec in specs}) == len(specs) > 50
    for spec in specs:
        assert re.fullmatch(r"shoal(_[a-z0-9]+)+", spec.name), spec
        assert spec.help and spec.help.endswith("."), spec
        assert spec.name.endswith("_total") == (spec.kind == "counter"), spec
        assert spec.kind != "histogram" or spec.name.endswith(("_seconds", "_bytes")), spec
        assert not re.search(r"_(ms|msec|millis|kb|mb|mib|sec|count|sum|bucket)(_|$)", spec.name), spec
        assert set(spec.labels) <= set(LABEL_HELP) - {"run", "mode"}, spec


def test_what_is_exported_is_what_is_described():
    metrics = Metrics()
    exported = {(m.name + "_total" if m.type == "counter" else m.name): m.type for m in metrics.registry.collect()}
    assert exported == {spec.name: spec.kind for spec in metrics.specs}


def test_every_sample_has_run_and_mode_and_only_declared_labels():
    metrics = Metrics()
    for cls in EVENT_TYPES.values():
        metrics(Stamped(1.0, sample(cls)))
    metrics(Stamped(1.0, e.NodeStarted(PEER, "otter", "abc", "pipeline", "0.1")))
    declared = {spec.name: {*spec.labels, "run", "mode"} for spec in metrics.specs}
    for metric in metrics.registry.collect():
        name = metric.name + "_total" if metric.type == "counter" else metric.name
        for s in metric.samples:
            assert not s.name.endswith("_created")
            assert set(s.labels) - {"le"} == declared[name], s
            assert (s.labels["run"], s.labels["mode"]) == ("abc", "pipeline")


def test_unbounded_values_become_other():
    metrics = Metrics(process=False)
    for i in range(50):
        metrics(Stamped(1.0, e.BytesMoved(f"way{i}", f"method.{i}", f"codec{i}", 10)))
        metrics(Stamped(1.0, e.ForwardServed(1, 1, 1000 + i, 8, 0.1)))
        metrics(Stamped(1.0, sample(e.EntryDecided, kind=f"kind{i}")))
        metrics(Stamped(1.0, e.LifecycleChanged("", f"state{i}")))
        metrics(Stamped(1.0, e.StepApplied(1, 1, 0, f"source{i}", 0.1)))
        metrics(Stamped(1.0, e.NodeStarted(PEER, f"name{i}", "run", f"mode{i}", "1")))
    assert value(metrics, "shoal_traffic_bytes_total", direction="other", method="other", codec="other") == 500
    assert value(metrics, "shoal_forward_served_total", stage="other") == 50
    assert value(metrics, "shoal_entries_total", kind="other") == 50
    assert value(metrics, "shoal_steps_applied_total", source="other") == 50
    assert value(metrics, "shoal_lifecycle_state", state="other") == 1
    assert value(metrics, "shoal_node_info", mode="other") == 1
    assert not re.search(r"(method\.|codec|kind|state|source|way|mode)\d", str(values(metrics)))


def test_every_listed_label_has_help():
    assert set(LABEL_VALUES) <= set(LABEL_HELP)
    assert bounded("codec", "fp16") == "fp16" and bounded("codec", "rot13") == "other"
    assert (stage_label(0), stage_label(63), stage_label(64), stage_label(-1)) == ("0", "63", "other", "other")


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("allreduce.part", "reduce"), ("blob.index", "state"), ("blob.chunk", "state"), ("forward", "forward"),
        ("backward", "backward"), ("freeze", "plan"), ("discard", "plan"), ("reduce", "reduce"), ("adopt", "plan"),
        ("repair", "plan"), ("feeder_done", "plan"), ("paxos_prepare", "log"), ("paxos_accept", "log"),
        ("learn", "log"), ("entries", "log"), ("join", "membership"), ("ping", "membership"),
        ("shoal/pipeline/forward/1", "forward"), ("Backward", "backward"), ("reduce.part", "reduce"),
        ("log.promise", "log"), ("plan/freeze", "plan"), ("state_chunk", "state"), ("hello", "membership"),
        ("x" * 10_000, "other"), ("", "other"), ("forwarder", "other"),
    ],
)  # fmt: skip
def test_methods_fall_into_few_classes(method, expected):
    assert method_class(method) == expected
    assert expected in (*LABEL_VALUES["method"], "other")


def test_counters_with_a_reason_start_at_zero_so_that_the_first_one_shows():
    metrics = Metrics(process=False)
    for name in ("shoal_calls_failed_total", "shoal_requests_refused_total", "shoal_microbatches_retried_total"):
        for reason in Reason:
            assert value(metrics, name, reason=reason) == 0


def test_lifecycle_is_one_hot():
    metrics = Metrics(process=False)
    for state in LABEL_VALUES["state"]:
        metrics(Stamped(1.0, e.LifecycleChanged("", state)))
        hot = {dict(k[1])["state"]: v for k, v in values(metrics).items() if k[0] == "shoal_lifecycle_state"}
        assert sum(hot.values()) == 1 and hot[state] == 1


def test_an_entry_sets_the_run_and_clears_what_was_waited_for():
    metrics = Metrics(process=False)
    metrics(Stamped(1.0, e.WaitingForQuorum(5, 1, 3)))
    metrics(Stamped(1.0, e.StageUncovered(5, 1)))
    metrics(Stamped(1.0, e.LeadershipTaken(5, 1)))
    flags = ("shoal_waiting_for_quorum", "shoal_leader")
    assert [value(metrics, name) for name in flags] == [1, 1]
    assert value(metrics, "shoal_stage_uncovered", stage="1") == 1
    metrics(Stamped(2.0, e.EntryDecided(5, 0, "commit", 5, "d", 4, (3, 1), 64, 2.0, 320)))
    assert [value(metrics, name) for name in flags] == [0, 0]
    assert value(metrics, "shoal_stage_uncovered", stage="1") == 0
    assert value(metrics, "shoal_stage_servers_min") == 1 and value(metrics, "shoal_stage_servers", stage="0") == 3
    assert value(metrics, "shoal_perplexity") == pytest.approx(math.exp(2.0))
    assert value(metrics, "shoal_samples_committed_total") == 64 and value(metrics, "shoal_run_samples") == 320
    assert value(metrics, "shoal_leadership_taken_total", turn="takeover") == 1


def test_rounds_learned_while_catching_up_are_not_throughput():
    metrics = Metrics(process=False)
    metrics(Stamped(0.0, e.LifecycleChanged("joining", "syncing")))
    metrics(Stamped(1.0, sample(e.EntryDecided, samples=64)))
    assert (
        value(metrics, "shoal_samples_committed_total") == 0
        and value(metrics, "shoal_entries_total", kind="commit") == 1
    )
    metrics(Stamped(2.0, e.LifecycleChanged("syncing", "working")))
    metrics(Stamped(3.0, sample(e.EntryDecided, samples=64)))
    metrics(Stamped(5.0, sample(e.EntryDecided, samples=64)))
    assert value(metrics, "shoal_samples_committed_total") == 128
    assert (value(metrics, "shoal_round_seconds_count"), value(metrics, "shoal_round_seconds_sum")) == (1, 2.0)


def test_a_repeated_backward_is_counted_apart_and_gives_no_samples():
    metrics = Metrics(process=False)
    metrics(Stamped(0.0, e.BackwardServed(1, 0, 1, 8, True, 0.1)))
    metrics(Stamped(0.0, e.BackwardServed(1, 0, 1, 8, False, 0.1)))
    assert value(metrics, "shoal_backward_served_total", stage="1", accumulated="false") == 1
    assert value(metrics, "shoal_samples_accumulated_total", stage="1") == 8


def test_process_metrics_are_read_when_scraped():
    metrics = Metrics()
    assert value(metrics, "shoal_process_resident_memory_bytes", process="node") > 1e6
    before = value(metrics, "shoal_process_cpu_seconds_total", process="node")
    sum(i * i for i in range(400_000))
    assert value(metrics, "shoal_process_cpu_seconds_total", process="node") > before


def test_a_whole_story_is_in_step_with_its_events(story):
    metrics = Metrics(process=False)
    own = [stamped for node, stamped in story.events if node == "amber-otter"]
    for stamped in own:
        metrics(stamped)
    sent = sum(s.event.count for s in own if isinstance(s.event, e.BytesMoved) and s.event.direction == "sent")
    assert value(metrics, "shoal_traffic_bytes_total", direction="sent", method="forward", codec="none") == sent
    assert value(metrics, "shoal_step") == 27
    assert value(metrics, "shoal_microbatches_retried_total", reason="unreachable") == 2


def test_the_page_is_in_step_with_the_code():
    assert DOCS.read_text() == describe(), "run: python -m shoal.monitoring.metrics > docs/metrics.md"
