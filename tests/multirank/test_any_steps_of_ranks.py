"""Any steps after any plan, on ranks that all make the same ops: every op sees what the shards of all ranks hold, and
no rank waits for ever, whatever each one finds in its own memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank_rigs import RankRig, on_ranks, right

from scheduler import knobs

#: Whole units are read; gradients are made, and summed; shards, and a rank's own tensors, change.
OPS = ("Pr", "Qr", "Rr", "Pr Qr", "Qr Xr", "Wc", "Wx Is", "u: Cw Ix", "Vc Qr", "Vx Hs", "u: Bw Hr Yw", "Uc", "Ux Gs")
MORE = ("u: Aw Gx Xw", "u: Cw Zw", "Xr", "Yw", "Cr", "Pr Ar", "Zc", "u: Aw", "u: Bw")
ops = st.sampled_from(OPS + MORE)
KINDS = ["leave out", "insert", "replace", "leave out more", "again", "aside", "pass", "announce", "hold"]
edits = st.lists(st.tuples(st.integers(0, 11), st.sampled_from(KINDS), ops), max_size=4)
Edits = list[tuple[int, str, str]]


def on_device(op: str) -> str:
    """The same with whole units on the device."""
    return " ".join(word.lower() if word[0] in "PQRS" else word for word in op.split())


edits_above = edits.map(lambda found: [(at, what, on_device(op)) for at, what, op in found])


def perform(r: RankRig, step: list[str], changes: Edits) -> None:
    """Make a step with so many differences."""
    left_out: set[int] = set()
    view = None
    for place, what, _ in changes:
        if what.startswith("leave out"):
            left_out |= set(range(place, place + (5 if what.endswith("more") else 1)))
    for place, op in enumerate(step):
        here = [(what, other) for at, what, other in changes if at == place]
        for what, other in here:
            if what == "insert":
                r.op(other)
            elif what == "aside":
                with r.driver.untraced():
                    r.op(other)
            elif what == "pass":
                with r.driver.evaluating():
                    for letter in "PQRP":
                        r.op(f"{letter if r.device is None else letter.lower()}r")
            elif what == "announce":
                r.driver.announce([r.tensors[word[0]].id for word in other.removeprefix("u: ").split()])
        if place not in left_out:
            replaced = [other for what, other in here if what == "replace"]
            r.op(replaced[0] if replaced else op)
            if any(what == "again" for what, _ in here):
                r.op(op)
        held = [other.removeprefix("u: ")[0] for what, other in here if what == "hold"]
        # On some ranks, perhaps: what is there depends on the time that copies took.
        if held and r.tensors[held[0]].readable and view is None:
            view = r.lease(held[0])
    del view
    gc.collect(0)
    r.driver.end_step(repeatable=True)


def perform_all(r: RankRig, step: list[str], turns: list[Edits]) -> None:
    """Make steps with differences after a plan, and the plan's own step again."""
    r.step(*step)
    r.step(*step)
    for changes in turns:
        perform(r, step, changes)
    r.step(*step)
    r.step(*step)
    r.read_all()


@pytest.fixture(autouse=True, scope="module")
def quick_plans() -> Iterator[None]:
    """One plan for each kind of step, not the best of several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knobs, "KEPT_SHARES", ())
        yield


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    step=st.lists(ops, min_size=1, max_size=12),
    turns=st.lists(edits, min_size=1, max_size=5),
    n_ranks=st.integers(2, 3),
    n_frames=st.integers(7, 12),
)
def test_any_steps_of_all_ranks_are_right(step: list[str], turns: list[Edits], n_ranks: int, n_frames: int) -> None:
    right(on_ranks(n_ranks, lambda r: perform_all(r, step, turns), n_frames))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    step=st.lists(ops.map(on_device), min_size=1, max_size=12),
    turns=st.lists(edits_above, min_size=1, max_size=5),
    n_frames=st.integers(7, 10),
    device_frames=st.integers(6, 9),
)
def test_any_steps_of_all_ranks_over_devices_are_right(
    step: list[str], turns: list[Edits], n_frames: int, device_frames: int
) -> None:
    right(on_ranks(2, lambda r: perform_all(r, step, turns), n_frames, device_frames=device_frames))
