"""The run log refuses whatever does not follow, however it is forged, and changes nothing when it does."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shoal.protocol.events import Reason
from shoal.protocol.runlog import (
    MAX_ENTRY_BYTES,
    VOTE_DOMAIN,
    Chain,
    Commit,
    Decided,
    Decision,
    Entry,
    Genesis,
    Member,
    Pin,
    Reconfigure,
    Rollback,
    StageCommit,
    Vote,
    digest_of,
    majority,
    vote_payload,
)
from shoal.protocol.sampling import next_beacon
from shoal.protocol.transport import Refused

RUN = hashlib.sha256(b"run").hexdigest()
COMMITTEE = ("a", "b", "c")
STAGES = 2
SAMPLES = 8


def key_of(peer: str) -> str:
    return hashlib.sha256(peer.encode()).hexdigest()


def sign(peer: str, domain: str, payload: bytes) -> str:
    return hmac.new(key_of(peer).encode(), domain.encode() + payload, hashlib.sha256).hexdigest()


def verify(public_key: str, domain: str, payload: bytes, signature: bytes) -> bool:
    return hmac.new(public_key.encode(), domain.encode() + payload, hashlib.sha256).digest() == signature


def members(*peers: str, since: int = 0) -> tuple[Member, ...]:
    return tuple(Member(peer=p, public_key=key_of(p), since=since) for p in peers)


def new_chain() -> Chain:
    everybody = members(*COMMITTEE, "d")
    return Chain(
        Entry(
            run=RUN,
            term=0,
            round=0,
            previous="",
            members=everybody,
            committee=COMMITTEE,
            next_sample=0,
            samples_total=0,
            step=0,
            beacon=next_beacon(None, RUN),
            decision=Genesis(),
        )
    )


def commit(loss_sum: float = 1.5, samples: int = SAMPLES, stages: tuple[int, ...] = (0, 1)) -> Commit:
    return Commit(
        plan=8,
        samples=samples,
        loss_sum=loss_sum,
        stages=tuple(StageCommit(stage=s, gradient=key_of(f"g{s}"), holders=("a",)) for s in stages),
    )


def following(chain: Chain, decision: Decision, **changes: Any) -> Entry:
    """The honest entry after the head, with some fields changed."""
    head = chain.head
    here = (head.step, head.next_sample, head.samples_total)
    if isinstance(decision, Commit):
        here = (here[0] + 1, here[1] + decision.samples, here[2] + decision.samples)
    elif isinstance(decision, Rollback):
        pin = head.pin
        here = (pin.step, pin.next_sample, pin.samples_total) if pin else (0, 0, 0)
    fields = {
        "run": head.run,
        "term": head.term,
        "round": head.round + 1,
        "previous": chain.head_digest,
        "members": head.members,
        "committee": head.committee,
        "step": here[0],
        "next_sample": here[1],
        "samples_total": here[2],
        "beacon": next_beacon(head, head.run),
        "decision": decision,
        "pin": head.pin,
    }
    return Entry(**{**fields, **changes})


def votes(data: bytes, voters: tuple[str, ...] = COMMITTEE, ballot: int = 0) -> Decided:
    entry = json.loads(data)
    payload = vote_payload(entry["run"], entry["round"], ballot, digest_of(data))
    return Decided(ballot=ballot, votes=tuple(Vote(peer=p, signature=sign(p, VOTE_DOMAIN, payload)) for p in voters))


def add(chain: Chain, decision: Decision, **changes: Any) -> Entry:
    data = following(chain, decision, **changes).to_bytes()
    return chain.extend(data, votes(data), verify)


def pin_at(chain: Chain, step: int) -> Pin:
    entry = chain.commit_of(step)
    assert entry is not None
    digests = tuple(key_of(f"state {s} {step}") for s in range(STAGES))
    return Pin(step=step, next_sample=entry.next_sample, samples_total=entry.samples_total, digests=digests)


def refused(chain: Chain, data: bytes, proof: Decided) -> Reason:
    before = (len(chain), chain.head_digest, chain.head)
    with pytest.raises(Refused) as caught:
        chain.extend(data, proof, verify)
    assert (len(chain), chain.head_digest, chain.head) == before, "a refusal changes nothing"
    return caught.value.reason


def test_an_honest_entry_with_a_majority_extends_the_log() -> None:
    for voters in (("a", "b"), ("c", "a"), COMMITTEE):
        chain = new_chain()
        data = following(chain, commit()).to_bytes()
        assert chain.extend(data, votes(data, voters, ballot=9), verify) == chain.head == Entry.from_bytes(data)
        assert chain.head_digest == chain.digest(1) == digest_of(data)
        assert chain.proof(1)[0] == data


# --- what does not follow ------------------------------------------------------------------------------------------
def pinned_chain() -> Chain:
    """Three commits; the third one pins step 1."""
    chain = new_chain()
    for _ in range(2):
        add(chain, commit())
    add(chain, commit(), pin=pin_at(chain, 1))
    return chain


def candidate(step: int, digests: int = STAGES, **changes: int) -> Pin:
    """What the pinned chain may pin next, if `step` is 2 or 3."""
    cursor = {"next_sample": step * SAMPLES, "samples_total": step * SAMPLES, **changes}
    return Pin(step=step, digests=tuple(key_of(f"state {s} {step}") for s in range(digests)), **cursor)


WRONG: dict[str, tuple[Reason, dict[str, Any]]] = {
    "run": (Reason.WRONG_RUN, {"run": key_of("other run")}),
    "round again": (Reason.STALE, {"round": 3}),
    "old round": (Reason.STALE, {"round": 0}),
    "round ahead": (Reason.AHEAD, {"round": 5}),
    "previous": (Reason.MALFORMED, {"previous": key_of("another history")}),
    "term before": (Reason.MALFORMED, {"term": 1}),
    "step stays": (Reason.MALFORMED, {"step": 3}),
    "step jumps": (Reason.MALFORMED, {"step": 5}),
    "cursor stays": (Reason.MALFORMED, {"next_sample": 3 * SAMPLES}),
    "cursor skips": (Reason.MALFORMED, {"next_sample": 4 * SAMPLES + 1}),
    "samples": (Reason.MALFORMED, {"samples_total": 4 * SAMPLES - 1}),
    "second genesis": (Reason.MALFORMED, {"decision": Genesis()}),
    "a chosen beacon": (Reason.MALFORMED, {"beacon": key_of("grind")}),
    "committee of strangers": (Reason.MALFORMED, {"committee": ("x", "y", "z")}),
    "committee of two": (Reason.MALFORMED, {"committee": ("a", "b")}),
    "one peer, two seats": (Reason.MALFORMED, {"committee": ("a", "a", "b")}),
    "one peer, all seats": (Reason.MALFORMED, {"committee": ("a", "a", "a")}),
    "a member twice": (Reason.MALFORMED, {"members": members(*COMMITTEE, "d", "d")}),
    "another key for a member": (
        Reason.MALFORMED,
        {"members": (*members("a", "b", "d"), Member(peer="c", public_key=key_of("d")))},
    ),
    "a backdated newcomer": (Reason.MALFORMED, {"members": (*members(*COMMITTEE), *members("e", since=1))}),
    "a member made older": (Reason.MALFORMED, {"members": (*members(*COMMITTEE), *members("d", since=4))}),
    "no stages": (Reason.MALFORMED, {"decision": commit(stages=())}),
    "a stage too few": (Reason.MALFORMED, {"decision": commit(stages=(0,))}),
    "a stage twice": (Reason.MALFORMED, {"decision": commit(stages=(0, 0))}),
    "a stage too many": (Reason.MALFORMED, {"decision": commit(stages=(0, 1, 2))}),
    "a server of no stage": (
        Reason.MALFORMED,
        {"members": (*members(*COMMITTEE), Member(peer="d", public_key=key_of("d"), stage=2))},
    ),
    "a pin taken away": (Reason.MALFORMED, {"pin": None}),
    "a pin ahead of the log": (
        Reason.MALFORMED,
        {"pin": Pin(step=9, next_sample=9 * SAMPLES, samples_total=9 * SAMPLES, digests=(key_of("x"), key_of("y")))},
    ),
    "a pin that moves the cursor": (
        Reason.MALFORMED,
        {"pin": Pin(step=2, next_sample=0, samples_total=2 * SAMPLES, digests=(key_of("x"), key_of("y")))},
    ),
    "a pin without a stage": (
        Reason.MALFORMED,
        {"pin": Pin(step=2, next_sample=2 * SAMPLES, samples_total=2 * SAMPLES, digests=(key_of("x"),))},
    ),
    "a candidate ahead of the log": (Reason.MALFORMED, {"candidate": candidate(4)}),
    "a candidate that moves the cursor": (Reason.MALFORMED, {"candidate": candidate(2, next_sample=0)}),
    "a candidate without a stage": (Reason.MALFORMED, {"candidate": candidate(2, digests=1)}),
    "a candidate with a stage too many": (Reason.MALFORMED, {"candidate": candidate(2, digests=3)}),
    "the pinned step as a candidate": (Reason.MALFORMED, {"candidate": candidate(1)}),
    "the start as a candidate": (Reason.MALFORMED, {"candidate": candidate(0)}),
    "other digests for the pinned step": (
        Reason.MALFORMED,
        {"pin": Pin(step=1, next_sample=SAMPLES, samples_total=SAMPLES, digests=(key_of("x"), key_of("y")))},
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_follow_is_refused_even_with_all_votes(what: str) -> None:
    reason, changes = WRONG[what]
    chain = pinned_chain()
    data = following(chain, **{"decision": commit(), **changes}).to_bytes()
    assert refused(chain, data, votes(data)) is reason
    with pytest.raises(Refused):
        chain.check_follows(Entry.from_bytes(data))  # nor does an honest acceptor vote for it


def test_only_a_commit_moves_the_step_the_cursor_or_the_pin() -> None:
    chain = pinned_chain()
    for decision in (Reconfigure(), Rollback(to_step=1)):
        for changes in ({"step": 4}, {"next_sample": 7}, {"samples_total": 7}, {"pin": pin_at(chain, 2)}):
            data = following(chain, decision, **changes).to_bytes()
            assert refused(chain, data, votes(data)) is Reason.MALFORMED


def test_only_a_commit_names_a_candidate_and_a_rollback_gives_it_up() -> None:
    chain = pinned_chain()
    for decision in (Reconfigure(), Rollback(to_step=1)):
        data = following(chain, decision, candidate=candidate(2)).to_bytes()
        assert refused(chain, data, votes(data)) is Reason.MALFORMED
    add(chain, commit(), candidate=candidate(2))
    add(chain, Reconfigure(), candidate=candidate(2))
    data = following(chain, Rollback(to_step=1), candidate=candidate(2)).to_bytes()
    assert refused(chain, data, votes(data)) is Reason.MALFORMED
    assert add(chain, commit(), pin=candidate(2)).pin == candidate(2)


@pytest.mark.parametrize("digest", ["", "ab", "A" * 64, "0" * 62, "0" * 66, "g" * 64, "0" * 64 + chr(10)])
@pytest.mark.parametrize("where", ["gradient", "pin", "candidate", "previous", "beacon", "run"])
def test_what_names_bytes_is_a_whole_digest_everywhere(where: str, digest: str) -> None:
    """A shorter one would pass the log and then fail, in every node that looks for those bytes, for ever."""
    chain = pinned_chain()
    entry = following(chain, commit(), candidate=candidate(3)).model_dump(mode="json")
    if where == "gradient":
        entry["decision"]["stages"][1]["gradient"] = digest
    elif where in ("pin", "candidate"):
        entry[where]["digests"][0] = digest
    else:
        entry[where] = digest
    data = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()
    if (where, digest) == ("previous", ""):
        assert refused(chain, data, votes(data)) is Reason.MALFORMED
        return
    with pytest.raises(Refused) as caught:
        Entry.from_bytes(data)
    assert caught.value.reason is Reason.MALFORMED


def test_a_rollback_goes_to_the_pinned_step_and_nowhere_else() -> None:
    chain = pinned_chain()
    for step in (0, 2, 3):
        data = following(chain, Rollback(to_step=step)).to_bytes()
        assert refused(chain, data, votes(data)) is Reason.MALFORMED
    assert add(chain, Rollback(to_step=1)).step == 1
    chain = new_chain()
    add(chain, commit())
    assert add(chain, Rollback(to_step=0)).next_sample == 0, "without a pin the start is pinned"


# --- votes ---------------------------------------------------------------------------------------------------------
def with_votes(chain: Chain, make: Any) -> Reason:
    data = following(chain, commit()).to_bytes()
    return refused(chain, data, make(data))


def test_too_few_forged_repeated_foreign_and_displaced_votes_do_not_count() -> None:
    chain = new_chain()
    other = following(chain, commit(loss_sum=2.5)).to_bytes()

    def another_ballot(data: bytes) -> Decided:
        return votes(data, ballot=3).model_copy(update={"ballot": 4})

    def in_the_name_of_b(data: bytes) -> Decided:
        a = votes(data, ("a",)).votes[0]
        return Decided(ballot=0, votes=(a, Vote(peer="b", signature=a.signature)))

    def signature(text: str) -> Any:
        return lambda data: Decided(ballot=0, votes=(*votes(data, ("a",)).votes, Vote(peer="b", signature=text)))

    forgeries = [
        lambda _: Decided(ballot=0, votes=()),
        lambda data: votes(data, ("a",)),
        lambda data: votes(data, ("a", "a", "a", "a", "a")),
        lambda data: votes(data, ("a", "d")),  # a member, not on the committee
        lambda data: votes(data, ("a", "x", "y")),
        lambda _: votes(other),
        another_ballot,
        in_the_name_of_b,
        signature(""),
        signature("abc"),  # half a byte
        signature("00" * 32),
    ]
    for forge in forgeries:
        assert with_votes(chain, forge) is Reason.BAD_SIGNATURE


def test_the_committee_that_the_previous_entry_names_decides() -> None:
    chain = new_chain()
    add(chain, Reconfigure(), committee=("d",))
    data = following(chain, commit()).to_bytes()
    assert refused(chain, data, votes(data, COMMITTEE)) is Reason.BAD_SIGNATURE
    chain.extend(data, votes(data, ("d",)), verify)


@pytest.mark.parametrize(("committee", "need"), [(1, 1), (3, 2), (5, 3)])
def test_a_majority_is_more_than_half(committee: int, need: int) -> None:
    assert majority(str(i) for i in range(committee)) == need


# --- bytes ---------------------------------------------------------------------------------------------------------
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@given(garbage=st.binary(max_size=200) | json_values.map(lambda v: json.dumps(v).encode()))
def test_garbage_is_refused_and_nothing_else_is_raised(garbage: bytes) -> None:
    assert refused(new_chain(), garbage, Decided(ballot=0, votes=())) is Reason.MALFORMED


GOOD = json.loads(following(pinned_chain(), commit()).to_bytes())


@given(field=st.sampled_from([*GOOD, "extra"]), inner=st.booleans(), value=json_values, seed=st.data())
def test_a_field_of_the_wrong_form_is_refused_or_follows_to_the_letter(
    field: str, inner: bool, value: Any, seed: st.DataObject
) -> None:
    record = json.loads(json.dumps(GOOD))
    target = record
    if inner:
        field = seed.draw(st.sampled_from(list(record["decision"])))
        target = record["decision"]
    target[field] = value
    data = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    chain = pinned_chain()
    try:
        entry = Entry.from_bytes(data)
    except Refused:
        return
    assert entry.to_bytes() == data
    try:
        chain.check_follows(entry)
    except Refused:
        return


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b'{"run":' * 20_000, b'{"round":' + b"9" * 100_000 + b"}", b"\xff\xfe", b'"\\ud800"']
)
def test_nested_huge_and_broken_json_is_refused(data: bytes) -> None:
    assert refused(new_chain(), data, Decided(ballot=0, votes=())) is Reason.MALFORMED


def test_an_oversized_entry_is_refused_before_it_is_parsed() -> None:
    data = following(new_chain(), commit()).to_bytes()
    data += b" " * (MAX_ENTRY_BYTES - len(data) + 1)
    assert refused(new_chain(), data, Decided(ballot=0, votes=())) is Reason.TOO_LARGE


losses = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**60), 2**60).map(float)


@given(loss=losses, name=st.text(st.characters(exclude_categories=("Cs",)), max_size=20), cursor=st.integers(1, 2**62))
def test_canonical_bytes_come_back_to_the_letter(loss: float, name: str, cursor: int) -> None:
    member = Member(peer="é" + name[:9], public_key="ab", name=name, maddrs=("/ip4/192.0.2.1/tcp/1",), stage=0)
    entry = following(new_chain(), commit(loss, samples=cursor), members=(member,), next_sample=cursor)
    back = Entry.from_bytes(entry.to_bytes())
    assert back == entry and back.to_bytes() == entry.to_bytes()
    assert isinstance(back.decision, Commit)
    assert math.copysign(1, back.decision.loss_sum) == math.copysign(1, loss)


def test_an_entry_has_one_digest_because_other_spellings_of_it_are_refused() -> None:
    chain = new_chain()
    entry = following(chain, commit(loss_sum=2.0))
    data = entry.to_bytes()
    record = json.loads(data)
    spellings = [
        json.dumps(record, sort_keys=True).encode(),
        json.dumps(dict(reversed(record.items())), separators=(",", ":")).encode(),
        data + b"\n",
        data.replace(b'"loss_sum":2.0', b'"loss_sum":2'),
        data.replace(b'"loss_sum":2.0', b'"loss_sum":0.2e1'),
        data.replace(b'"term":0', b'"term":7,"term":0'),
        data.replace(b'"pin":null,', b""),
        data.replace(b'"a"', b'"\\u0061"'),
    ]
    for spelling in spellings:
        assert spelling != data
        assert refused(chain, spelling, votes(spelling)) is Reason.MALFORMED
    chain.extend(data, votes(data), verify)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_loss_that_is_no_number_never_enters_the_log(number: str) -> None:
    good = following(new_chain(), commit(loss_sum=2.0)).to_bytes()
    data = good.replace(b'"loss_sum":2.0', b'"loss_sum":' + number.encode())
    assert data != good and refused(new_chain(), data, votes(data)) is Reason.MALFORMED
    with pytest.raises(ValidationError):
        commit(loss_sum=float(number))


def test_a_commit_of_no_samples_has_no_mean_loss_and_is_refused() -> None:
    with pytest.raises(ValidationError):
        commit(samples=0)


@pytest.mark.parametrize("text", ["a", "abc", "AB", "0x", "ab\n", "ab" * 33])
def test_digests_are_whole_lower_case_bytes(text: str) -> None:
    with pytest.raises(ValidationError):
        StageCommit(stage=0, gradient=text, holders=())


# --- histories -----------------------------------------------------------------------------------------------------
@settings(max_examples=60)
@given(moves=st.lists(st.sampled_from(["commit", "commit", "commit and pin", "rollback", "reconfigure"]), max_size=12))
def test_the_history_up_to_a_step_is_named_by_the_commit_that_stands(moves: list[str]) -> None:
    chain = new_chain()
    standing: list[str] = []  # digests of the commits of the current history, by step
    pinned = 0
    for i, move in enumerate(moves):
        if move == "reconfigure":
            add(chain, Reconfigure())
        elif move == "rollback":
            add(chain, Rollback(to_step=pinned))
            del standing[pinned:]
        else:
            changes = {}
            if move == "commit and pin" and len(standing) > pinned:
                pinned = len(standing)
                changes = {"pin": pin_at(chain, pinned)}
            add(chain, commit(loss_sum=float(i)), **changes)
            standing.append(chain.head_digest)
        assert chain.head.step == len(standing)
        assert chain.head.next_sample == chain.head.samples_total == SAMPLES * len(standing)
        assert [chain.commit_digest(s + 1) for s in range(len(standing))] == standing
        assert chain.commit_digest(0) == chain.digest(0)
        assert chain.commit_of(0) is None and chain.commit_of(len(standing) + 1) is None
        for step, digest in enumerate(standing, 1):
            entry = chain.commit_of(step)
            assert entry is not None and entry.step == step and chain.digest(entry.round) == digest


def test_a_second_log_replays_the_first_one_from_its_proofs() -> None:
    chain, copy = pinned_chain(), new_chain()
    for round_ in range(1, len(chain)):
        copy.extend(*chain.proof(round_), verify)
    assert copy.head_digest == chain.head_digest and copy.commit_digest(2) == chain.commit_digest(2)
    assert refused(copy, *chain.proof(2)) is Reason.STALE, "a repeated entry is old news"
