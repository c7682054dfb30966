"""The states of a paged tensor: which moves there are, what a refused one leaves behind, and what a record holds."""

from __future__ import annotations

import itertools

import pytest

from pagemem.errors import TransitionError
from pagemem.frames.page import TensorId
from pagemem.residency.paged_tensor import READABLE, RESIDENCY, PagedTensor, Residency
from pagemem.tier import Tag
from pagemem.units import BLOCK_BYTES, KiB, MiB

R = Residency

#: The diagram in the module's docstring, move by move, written down a second time.
MOVES = {
    (R.ABSENT, R.CLEAN): "first load",
    (R.ABSENT, R.STORED): "resume",
    (R.STORED, R.LOADING): "load",
    (R.STORED, R.CLEAN): "fresh load: the content is not wanted",
    (R.STORED, R.ABSENT): "discard",
    (R.LOADING, R.CLEAN): "load complete",
    (R.LOADING, R.STORED): "load failed",
    (R.CLEAN, R.DIRTY): "touch",
    (R.CLEAN, R.STORED): "drop, with a copy in the page files",
    (R.CLEAN, R.ABSENT): "drop without one, or discard",
    (R.DIRTY, R.STORING): "store",
    (R.DIRTY, R.ABSENT): "discard",
    (R.STORING, R.CLEAN): "store complete",
    (R.STORING, R.DIRTY): "store failed",
    (R.DIRTY, R.ARRIVING): "a device begins to fill it",
    (R.ARRIVING, R.DIRTY): "what it copies is there",
}


def record(state: Residency = R.ABSENT) -> PagedTensor:
    tensor = PagedTensor.sized(TensorId(3), "weights of layer 0", Tag.PARAM, 5000, 64 * KiB)
    tensor.state = state
    return tensor


def test_the_table_is_the_diagram_and_knows_every_state() -> None:
    assert set(RESIDENCY.moves) == set(Residency)
    assert {(here, there) for here, goals in RESIDENCY.moves.items() for there in goals} == set(MOVES)


@pytest.mark.parametrize(("here", "there"), MOVES, ids=lambda state: state.value)
def test_a_legal_move_is_made_and_remembered(here: Residency, there: Residency) -> None:
    tensor = record(here)
    tensor.become(there)
    assert tensor.state is there
    assert tensor.history == [here]


@pytest.mark.parametrize(
    ("here", "there"),
    [pair for pair in itertools.product(Residency, repeat=2) if pair not in MOVES],
    ids=lambda state: state.value,
)
def test_an_illegal_move_raises_and_leaves_the_state(here: Residency, there: Residency) -> None:
    tensor = record(here)
    with pytest.raises(
        TransitionError, match=f"^weights of layer 0: {here.value} -> {there.value} is not a legal move"
    ):
        tensor.become(there)
    assert tensor.state is here
    assert tensor.history == []


def test_the_message_of_an_illegal_move_ends_with_the_history() -> None:
    tensor = record()
    for state in (R.CLEAN, R.DIRTY, R.STORING):
        tensor.become(state)
    with pytest.raises(TransitionError, match=r"\(history: absent -> clean -> dirty -> storing\)$"):
        tensor.become(R.STORED)
    assert tensor.history == [R.ABSENT, R.CLEAN, R.DIRTY]


def test_a_tensor_goes_on_after_an_illegal_move() -> None:
    tensor = record(R.STORED)
    with pytest.raises(TransitionError):
        tensor.become(R.DIRTY)
    tensor.become(R.LOADING)
    tensor.become(R.CLEAN)
    assert tensor.history == [R.STORED, R.LOADING]


def test_the_history_keeps_the_last_six_states() -> None:
    tensor = record()
    for state in (R.CLEAN, R.DIRTY, R.STORING, R.CLEAN, R.STORED, R.LOADING, R.CLEAN, R.DIRTY):
        tensor.become(state)
    assert tensor.history == [R.DIRTY, R.STORING, R.CLEAN, R.STORED, R.LOADING, R.CLEAN]


def test_every_state_can_be_reached_from_absent_and_absent_from_every_state() -> None:
    def reachable(start: Residency) -> set[Residency]:
        found, new = {start}, {start}
        while new:
            new = set().union(*(RESIDENCY.moves[state] for state in new)) - found
            found |= new
        return found

    assert reachable(R.ABSENT) == set(Residency)
    assert all(R.ABSENT in reachable(state) for state in Residency)


def test_no_move_loses_the_only_copy() -> None:
    # Where the page file alone has the bytes, only a load or a discard may follow; where host memory alone has them,
    # only a store or a discard: a dirty tensor is never simply dropped.
    assert R.STORED not in RESIDENCY.moves[R.DIRTY] | RESIDENCY.moves[R.STORING]
    assert R.DIRTY not in RESIDENCY.moves[R.STORED] | RESIDENCY.moves[R.LOADING]


@pytest.mark.parametrize("state", Residency, ids=lambda state: state.value)
def test_compute_reads_host_copies_that_are_whole(state: Residency) -> None:
    readable = state in (R.CLEAN, R.DIRTY, R.STORING)
    assert record(state).readable is readable
    assert (state in READABLE) is readable


@pytest.mark.parametrize(("pins", "leases", "held"), [(0, 0, False), (1, 0, True), (0, 2, True), (3, 1, True)])
def test_pins_and_leases_hold_a_tensor(pins: int, leases: int, held: bool) -> None:
    tensor = record()
    tensor.pins, tensor.leases = pins, leases
    assert tensor.held is held


@pytest.mark.parametrize(
    ("asked_bytes", "n_bytes", "n_frames"),
    [
        (1, BLOCK_BYTES, 1),
        (BLOCK_BYTES, BLOCK_BYTES, 1),
        (BLOCK_BYTES + 1, 2 * BLOCK_BYTES, 1),
        (64 * KiB, 64 * KiB, 1),
        (64 * KiB + 1, 64 * KiB + BLOCK_BYTES, 2),
        (MiB, MiB, 16),
    ],
)
def test_a_new_record_is_absent_and_sized_in_whole_blocks(asked_bytes: int, n_bytes: int, n_frames: int) -> None:
    tensor = PagedTensor.sized(TensorId(0), "m", Tag.MOMENT, asked_bytes, 64 * KiB)
    assert (tensor.n_bytes, tensor.n_frames) == (n_bytes, n_frames)
    assert (tensor.state, tensor.frame, tensor.copy, tensor.ssd_valid, tensor.held) == (
        R.ABSENT,
        None,
        None,
        False,
        False,
    )


def test_records_are_compared_by_identity() -> None:
    assert record() != record()
    assert len({record(), record()}) == 2
