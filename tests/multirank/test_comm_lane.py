"""The comm lane: one order on all ranks, whatever is ready first on each; and an end for everybody once one fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing

import pytest
import torch
from event_log import EventLog
from fake_ranks import Meeting, MemoryCollectives, on_all_ranks

from pagemem.errors import RankError
from pagemem.ranks.collectives import Collectives, ShardLayout
from pagemem.ranks.comm_lane import Collective, CollectiveKind, CommLane, Outcome, Vote
from pagemem.telemetry.events import EventKind

TIMEOUT_S = 30.0


class Sent(Collective):
    """A collective that is voted on as the test says, and moves nothing of its own."""

    kind = CollectiveKind.GATHER

    def __init__(self, key: int, said: Vote | None, make: Callable[[Collectives], None] = lambda _: None) -> None:
        super().__init__(f"t{key}", key, 1)
        self.said, self._make, self.over = said, make, threading.Event()

    def vote(self) -> Vote | None:
        return self.said

    def make(self, collectives: Collectives) -> None:
        self._make(collectives)

    def ended(self) -> None:
        self.over.set()

    def wait(self) -> Outcome | None:
        """How it ended."""
        assert self.over.wait(TIMEOUT_S), f"{self.name} never ends"
        return self.outcome


def on_lanes(meeting: Meeting, body: Callable[[CommLane], object]) -> list[object]:
    """What a body returns, or raises, with a lane on each rank, none of which closes before all are through."""
    together = threading.Barrier(meeting.n_ranks)

    def run(rank: int) -> object:
        with closing(CommLane(MemoryCollectives(meeting, rank), EventLog())) as lane:
            found = body(lane)
            together.wait(TIMEOUT_S)
            return found

    return on_all_ranks(meeting, run)


def test_collectives_are_made_in_the_order_of_submission_however_late_they_can_be() -> None:
    made: list[list[int]] = [[], [], []]

    def body(lane: CommLane) -> None:
        rank = lane.collectives.rank
        sent = [Sent(key, None, lambda _, key=key: made[rank].append(key)) for key in range(3)]
        for one in sent:
            lane.submit(one)
        for one in reversed(sent) if rank else sent:  # on some ranks the last can be made first
            one.said = Vote.TAKE
            lane.look()
        assert [one.wait() for one in sent] == [Outcome.DONE] * 3

    assert on_lanes(Meeting(3), body) == [None] * 3
    assert made == [[0, 1, 2]] * 3


@pytest.mark.parametrize(
    ("said", "ended", "made"),
    [
        ((Vote.HAVE, Vote.HAVE), Outcome.DONE, 0),
        ((Vote.HAVE, Vote.TAKE), Outcome.DONE, 2),
        ((Vote.REFUSE, Vote.TAKE), Outcome.REFUSED, 0),
        ((Vote.HAVE, Vote.REFUSE), Outcome.REFUSED, 0),
    ],
)
def test_all_ranks_know_the_same_of_a_vote(said: tuple[Vote, Vote], ended: Outcome, made: int) -> None:
    calls: list[int] = []

    def body(lane: CommLane) -> object:
        rank = lane.collectives.rank
        one = Sent(7, said[rank], lambda _: calls.append(rank))
        lane.submit(one)
        return one.wait(), list(one.refusing)

    refusing = [rank for rank, vote in enumerate(said) if vote is Vote.REFUSE]
    assert on_lanes(Meeting(2), body) == [(ended, refusing)] * 2
    assert len(calls) == made


def test_a_collective_that_fails_on_one_rank_ends_all_that_follow_on_all_ranks() -> None:
    def body(lane: CommLane) -> list[str]:
        def make(collectives: Collectives) -> None:
            if collectives.rank == 1:
                raise OSError("the cable is cut")
            collectives.exchange((0,))

        first, second = Sent(1, Vote.TAKE, make), Sent(2, Vote.TAKE)
        lane.submit(first)
        lane.submit(second)
        assert (first.wait(), second.wait()) == (Outcome.FAILED, Outcome.FAILED)
        late = Sent(3, Vote.TAKE)
        lane.submit(late)
        assert late.wait() is Outcome.FAILED and lane.failed
        assert isinstance(first.error, RankError) and first.error is second.error is late.error
        lane.drain()
        return [str(first.error)]

    for said in on_lanes(Meeting(3), body):
        assert isinstance(said, list) and "rank 1: a collective failed: OSError('the cable is cut')" in said[0]


def test_ranks_that_do_different_things_are_told_what() -> None:
    def body(lane: CommLane) -> str:
        one = Sent(4 + lane.collectives.rank, Vote.TAKE)
        lane.submit(one)
        assert one.wait() is Outcome.FAILED
        return str(one.error)

    said = on_lanes(Meeting(2), body)
    assert any("collective 0, GATHER of tensor 5" in str(text) and "tensor 4 (t4)" in str(text) for text in said)


def test_a_rank_that_closes_its_lane_leaves_nobody_waiting() -> None:
    def run(rank: int) -> Outcome | None:
        lane = CommLane(MemoryCollectives(meeting, rank), EventLog())
        one = Sent(1, Vote.TAKE if rank else None)
        lane.submit(one)
        if rank:
            found = one.wait()
            assert "rank 0 has closed its comm lane" in str(one.error)
            lane.close()
            return found
        lane.close()
        return one.wait()

    meeting = Meeting(2)
    assert on_all_ranks(meeting, run) == [Outcome.FAILED] * 2


def test_sums_are_added_up_in_rank_order_and_shards_come_to_their_ranges() -> None:
    """As the protocol promises, of the implementation that all other tests use."""
    layout = ShardLayout(torch.float32, ((0, 1024), (1024, 1024), (1024, 4096)))
    parts = [torch.randn(4096, generator=torch.Generator().manual_seed(rank)) * 10.0**rank for rank in range(3)]

    def run(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        collectives = MemoryCollectives(meeting, rank)
        shard = torch.empty(layout.part(parts[0], rank).numel())
        collectives.reduce_scatter(parts[rank], shard, layout)
        whole = torch.empty(4096)
        collectives.gather(shard, whole, layout)
        return shard, whole

    meeting = Meeting(3)
    wanted = (parts[0] + parts[1]) + parts[2]
    assert not torch.equal(wanted, parts[0] + (parts[1] + parts[2]))
    for rank, found in enumerate(on_all_ranks(meeting, run)):
        assert isinstance(found, tuple)
        assert torch.equal(found[0], layout.part(wanted, rank)) and torch.equal(found[1], wanted)


def test_layouts_are_adjacent() -> None:
    with pytest.raises(ValueError, match="begin at 5"):
        ShardLayout(torch.float32, ((0, 5), (6, 7)))
    layout = ShardLayout(torch.bfloat16, ((0, 5), (5, 7)))
    assert (layout.numel, layout.n_bytes, layout.shard_bytes) == (7, 14, 10)


def test_what_is_made_is_told() -> None:
    def body(lane: CommLane) -> tuple[int, int]:
        for one in (Sent(1, Vote.TAKE), Sent(2, Vote.HAVE)):
            lane.submit(one)
            one.wait()
        lane.drain()
        log = lane._sink
        assert isinstance(log, EventLog)
        return lane.moved_bytes, len(log.of(EventKind.COMM))

    assert on_lanes(Meeting(2), body) == [(1, 1)] * 2
