"""Any steps after any plan, on ranks that all make the same ops: every op sees what the shards of all ranks hold, and
no rank waits for ever, whatever each one finds in its own memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from different_steps import Edits, edits_of, perform
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank_rigs import RankRig, on_ranks, right

from scheduler import knobs

#: Whole units are read; gradients are made, and summed; shards, and a rank's own tensors, change.
OPS = ("Pr", "Qr", "Rr", "Pr Qr", "Qr Xr", "Wc", "Wx Is", "u: Cw Ix", "Vc Qr", "Vx Hs", "u: Bw Hr Yw", "Uc", "Ux Gs")
MORE = ("u: Aw Gx Xw", "u: Cw Zw", "Xr", "Yw", "Cr", "Pr Ar", "Zc", "u: Aw", "u: Bw")
ops = st.sampled_from(OPS + MORE)
edits = edits_of(ops)


def on_device(op: str) -> str:
    """The same with whole units on the device."""
    return " ".join(word.lower() if word[0] in "PQRS" else word for word in op.split())


edits_above = edits.map(lambda found: [(at, what, on_device(op)) for at, what, op in found])


def perform_all(r: RankRig, step: list[str], turns: list[Edits]) -> None:
    """Make steps with differences after a plan, and the plan's own step again."""
    r.step(*step)
    r.step(*step)
    for changes in turns:
        perform(
            r,
            step,
            changes,
            lambda _: [f"{on_device(letter) if r.device is not None else letter}r" for letter in "PQRP"],
        )
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
