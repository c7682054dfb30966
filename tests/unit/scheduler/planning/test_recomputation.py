"""A step with parts computed again, made from one without: worked by hand, and for any step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagemem.frames.page import TensorId
from scheduler.lookahead.planner import make_plan
from scheduler.planning.bounds import check_bounds
from scheduler.planning.machine import TierSpec
from scheduler.planning.recomputation import ForwardPart, pages, recomputed
from scheduler.planning.trace import Access, AccessMode, Op, OpKind, Trace

PAGE_BYTES = 1 << 16
KINDS = {"f": OpKind.FORWARD, "b": OpKind.BACKWARD, "u": OpKind.UPDATE}
MODES = {"r": AccessMode.READ, "w": AccessMode.MODIFY, "c": AccessMode.CREATE, "x": AccessMode.CONSUME}


def tensor(letter: str) -> TensorId:
    return TensorId(ord(letter) - ord("A"))


def step(text: str, seconds: dict[str, float] | None = None, until: dict[str, int] | None = None) -> Trace:
    """Ops written as ``"fPr"``: in the forward pass P is read (b: backward, u: update; c: created, x: consumed, w:
    modified)."""
    ops = [
        Op(
            (KINDS[word[0]], word),
            word,
            (Access(tensor(word[1]), MODES[word[2]]),),
            (seconds or {}).get(word, 1.0),
            (until or {}).get(word, index),
        )
        for index, word in enumerate(text.split())
    ]
    return Trace(tuple(ops))


def names(trace: Trace) -> str:
    return " ".join(op.name for op in trace.ops)


def sizes(trace: Trace) -> dict[TensorId, int]:
    return dict.fromkeys(trace.tensors(), PAGE_BYTES)


#: Blocks P and Q. Each saves three tensors, the first of which is what it reads; copies are made when the next weights
#: are about to be used.
STEP = "fPr fAc fPr fBc fCc fQr fDc fQr fEc fFc fHr bHr bFx bEx bQr bDx uQw bCx bPr bBx bPr bAx uPw"


def test_saved_tensors_of_a_part_are_those_copied_after_its_first_op_up_to_the_next_ones() -> None:
    trace = step(STEP)
    assert pages(trace, ForwardPart(range(3), 0)) == {tensor("A"): 1, tensor("B"): 3, tensor("C"): 4}
    assert pages(trace, ForwardPart(range(3, 8), 0)) == {tensor("D"): 6, tensor("E"): 8, tensor("F"): 9}
    assert pages(trace, ForwardPart(range(10, 11), 0)) == {}


def test_a_part_is_computed_once_more_before_the_first_of_what_it_had_saved() -> None:
    trace = step(STEP)
    both = [ForwardPart(range(3), PAGE_BYTES), ForwardPart(range(3, 8), PAGE_BYTES)]
    assert names(recomputed(trace, both[:1], sizes(trace))) == (
        "fPr fAc fPr fQr fDc fQr fEc fFc fHr bHr bFx bEx bQr bDx uQw bAx fPr fPr bPr bPr uPw"
    )
    assert (
        names(recomputed(trace, both, sizes(trace)))
        == "fPr fAc fPr fQr fDc fQr fHr bHr bDx fQr fQr bQr uQw bAx fPr fPr bPr bPr uPw"
    )
    assert recomputed(trace, [], sizes(trace)) == trace


def test_a_part_that_saves_nothing_but_what_it_reads_stays_as_it_is() -> None:
    trace = step("fPr fAc fQr bAx bPr")
    assert recomputed(trace, [ForwardPart(range(1), PAGE_BYTES)], sizes(trace)) == trace
    assert recomputed(trace, [ForwardPart(range(0), 0)], sizes(trace)) == trace


def test_what_is_computed_after_a_copy_back_stays_when_the_copy_goes() -> None:
    trace = step("fPr fAc fBc fHr bHr bBx bAx bPr", {"fBc": 0.25, "bBx": 2.0, "bAx": 3.0})
    made = recomputed(trace, [ForwardPart(range(1), PAGE_BYTES)], sizes(trace))
    assert [(op.name, op.duration_s) for op in made.ops] == [
        ("fPr", 1.0), ("fAc", 1.0), ("fHr", 1.0), ("bHr", 1.0), ("bAx", 1.0), ("fPr", 1.0 + 1.75 + 2.0), ("bPr", 1.0),
    ]  # fmt: skip


def test_views_live_as_long_as_before() -> None:
    trace = step(STEP, until={"bQr": 16, "fHr": 12, "bFx": 13})
    made = recomputed(trace, [ForwardPart(range(3), PAGE_BYTES), ForwardPart(range(3, 8), PAGE_BYTES)], sizes(trace))
    place = {op.name: index for index, op in enumerate(made.ops)}
    assert made.ops[place["bQr"]].until == place["uQw"]
    assert made.ops[place["fHr"]].until >= place["bHr"]
    assert all(op.until >= index for index, op in enumerate(made.ops))


@st.composite
def steps(draw: st.DrawFn) -> tuple[Trace, list[ForwardPart], dict[TensorId, int]]:
    """Blocks that save some tensors each, of which the first may be what they read, and their ranges of ops."""
    ops: list[Op] = []
    parts: list[ForwardPart] = []
    saved: list[list[TensorId]] = []
    n_bytes: dict[TensorId, int] = {}

    def add(kind: OpKind, used: TensorId, mode: AccessMode) -> None:
        ops.append(
            Op(
                (kind, len(ops)),
                f"op {len(ops)}",
                (Access(used, mode),),
                draw(st.sampled_from([0.0, 0.5, 2.0])),
                len(ops),
            )
        )

    for _ in range(draw(st.integers(1, 4))):
        weight, begin = TensorId(len(n_bytes)), len(ops)
        n_bytes[weight] = PAGE_BYTES
        own = [TensorId(len(n_bytes) + number) for number in range(draw(st.integers(0, 4)))]
        n_bytes |= dict.fromkeys(own, 2 * PAGE_BYTES)
        early = draw(st.integers(0, len(own)))
        add(OpKind.FORWARD, weight, AccessMode.READ)
        for chunk in own[:early]:
            add(OpKind.FORWARD, chunk, AccessMode.CREATE)
        add(OpKind.FORWARD, weight, AccessMode.READ)
        parts.append(ForwardPart(range(begin, len(ops)), draw(st.integers(0, 1)) * 2 * PAGE_BYTES))
        for chunk in own[early:]:
            add(OpKind.FORWARD, chunk, AccessMode.CREATE)
        saved.append([weight, *own])
    for weight, *own in reversed(saved):
        add(OpKind.BACKWARD, weight, AccessMode.READ)
        for chunk in reversed(own):
            add(OpKind.BACKWARD, chunk, AccessMode.CONSUME)
        add(OpKind.UPDATE, weight, AccessMode.MODIFY)
    chosen = [part for part in parts if draw(st.booleans())]
    return Trace(tuple(ops)), chosen, n_bytes


@given(steps(), st.integers(3, 12))
def test_the_step_can_be_planned_and_takes_what_it_took_less_the_copies_and_with_the_forward_ops_again(
    made: tuple[Trace, list[ForwardPart], dict[TensorId, int]], n_frames: int
) -> None:
    trace, parts, n_bytes = made
    other = recomputed(trace, parts, n_bytes)
    machine = TierSpec(n_frames, PAGE_BYTES, 1e6, 1e6)
    check_bounds(make_plan(other, n_bytes, machine), other, n_bytes, machine)
    created = [a.tensor for op in other.ops for a in op.accesses if a.mode is AccessMode.CREATE]
    consumed = [a.tensor for op in other.ops for a in op.accesses if a.mode is AccessMode.CONSUME]
    assert sorted(created) == sorted(consumed) and len(set(created)) == len(created)
    expected_s = trace.compute_s
    for part in parts:
        gone = list(pages(trace, part).items())[1 if part.input_bytes else 0 :]
        for chunk, index in gone:
            created_s = trace.ops[index].duration_s
            consumed_s = next(
                op.duration_s for op in trace.ops if op.kind is OpKind.BACKWARD and op.accesses[0].tensor == chunk
            )
            expected_s -= created_s + min(created_s, consumed_s)
        if gone:
            expected_s += sum(
                trace.ops[index].duration_s
                for index in part.ops
                if trace.ops[index].accesses[0].mode is AccessMode.READ
            )
    assert other.compute_s == pytest.approx(expected_s)
