"""The comm lane: a thread that makes collectives with the other ranks, in the order in which they were submitted.

That order is the same on all ranks, because what ops and plans say decides it, never what happens to be there already.
What differs from rank to rank is *when* a collective can be made: its place, and what it reads, may be there sooner
here than elsewhere, or, after a step that differs, not at all. So a collective takes its place in the order when it is
submitted, and once it is first in line here, this rank *votes*: it takes part, has the result already, or refuses. The
ranks exchange their votes, which also tells when one of them is about to do something else; then

    any REFUSE  -> nothing is moved:  REFUSED, for all ranks
    all HAVE    -> nothing is moved:  DONE
    otherwise   -> it is made:        DONE

and every rank knows the same. After an error nothing is made any more: all that is submitted, then and later, ends as
FAILED with it, and so it does on all other ranks.
"""

from __future__ import annotations

import enum
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import ClassVar

from pagemem.errors import OffloadError, RankError
from pagemem.ranks.collectives import Collectives
from pagemem.telemetry.events import Event, EventKind, EventSink


class CollectiveKind(enum.IntEnum):
    """What is made."""

    GATHER = 0
    REDUCE_SCATTER = 1
    FILL = 2


class Vote(enum.IntEnum):
    """What a rank says to a collective that is its next one."""

    TAKE = 0
    HAVE = 1
    REFUSE = 2


class Outcome(enum.Enum):
    """How a collective ended, equal on all ranks but for FAILED."""

    DONE = "done"
    REFUSED = "refused"
    FAILED = "failed"


class Collective(ABC):
    """One collective of the lane.

    Args:
        name: of its tensor, for messages. key: the tensor's number, equal on all ranks.
        moved_bytes: that it moves, over all ranks.

    Attributes:
        outcome: how it ended; None: it has not. error: with what, if it FAILED.
        marks: what each rank said with its vote, see `mark`.
        refusing: ranks that refused.
    """

    kind: ClassVar[CollectiveKind]

    def __init__(self, name: str, key: int, moved_bytes: int) -> None:
        self.name, self.key, self.moved_bytes = name, key, moved_bytes
        self.outcome: Outcome | None = None
        self.error: BaseException | None = None
        self.marks: Sequence[int] = ()
        self.refusing: Sequence[int] = ()

    @property
    def is_done(self) -> bool:
        """Whether it has ended, in any way."""
        return self.outcome is not None

    @property
    def mark(self) -> int:
        """One more number for all ranks to know. Asked for right after `vote`."""
        return 0

    @abstractmethod
    def vote(self) -> Vote | None:
        """What this rank says, now that it is next; None: it cannot be said yet, see `CommLane.look`. With anything but
        None, what it reads and writes stays until it ends. On the lane's thread."""

    @abstractmethod
    def make(self, collectives: Collectives) -> None:
        """Take part. On the lane's thread, with no lock held."""

    @abstractmethod
    def ended(self) -> None:
        """It has ended, as `outcome` says. On the lane's thread, or on that which closes the lane or submits to one
        that has failed; perhaps without `vote`."""


class CommLane:
    """Makes collectives. `submit` is called on one thread, the training thread.

    Args:
        collectives: what connects the ranks.
        sink: takes a COMM for each collective that is made.

    Attributes:
        moved_bytes, busy_s: of collectives so far, and how long they took without waiting for other ranks' votes.

    Raises:
        RuntimeError: the system starts no more threads.
    """

    def __init__(self, collectives: Collectives, sink: EventSink) -> None:
        self.collectives = collectives
        self.moved_bytes, self.busy_s = 0, 0.0
        self._sink = sink
        self._changed = threading.Condition()
        self._waiting: deque[Collective] = deque()  # guarded by _changed, as are the next three
        self._look_again = False
        self._closing = False
        self._error: BaseException | None = None
        self._n_made = 0
        self._thread = threading.Thread(target=self._run, name="pagemem-comm", daemon=True)
        self._thread.start()

    def submit(self, collective: Collective) -> None:
        """Take the next place in the order of all ranks' collectives. Never blocks."""
        with self._changed:
            if self._error is None:
                self._waiting.append(collective)
                self._look()
                return
        self._end(collective, Outcome.FAILED, self._error)

    def look(self) -> None:
        """Something changed that the vote of the first in line may depend on. Any thread, with any lock held."""
        with self._changed:
            self._look()

    def _look(self) -> None:
        self._look_again = True
        self._changed.notify_all()

    @property
    def failed(self) -> bool:
        """Whether nothing is made any more."""
        return self._error is not None

    def drain(self) -> None:
        """Wait until all that was submitted has ended, with no lock held. Each one must be able to be voted on."""
        with self._changed:
            while self._waiting:
                self._changed.wait()

    def close(self) -> None:
        """End what has not ended as FAILED, here and on all other ranks, and join the thread. Idempotent."""
        with self._changed:
            self._closing = True
            self._look()
        why = f"rank {self.collectives.rank} has closed its comm lane"
        self.collectives.stop(why)  # before what is being made is given up: its tensors are still written to
        self._thread.join()
        self._fail(RankError(why))

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._look_again and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                self._look_again = False
                first = self._waiting[0] if self._waiting else None
            if first is None:
                continue
            try:
                if (vote := first.vote()) is None:
                    continue
                outcome = self._make(first, vote)
            except BaseException as raised:  # whatever it is: a thread that ends silently leaves its waiters for ever
                self._fail(raised)
                return
            self._pop(first, outcome)

    def _pop(self, first: Collective, outcome: Outcome, error: BaseException | None = None) -> None:
        self._end(first, outcome, error)
        with self._changed:
            # Not before: whoever drains the lane finds all ended.
            if self._waiting and self._waiting[0] is first:
                self._waiting.popleft()
            self._look()

    def _make(self, first: Collective, vote: Vote) -> Outcome:
        """Exchange votes, and make a collective if it is to be made."""
        said = (self._n_made, first.kind, first.key, vote, first.mark)
        found = self.collectives.exchange(said)
        self._n_made += 1
        for rank, (number, kind, key, _, _) in enumerate(found):
            if (number, kind, key) != said[:3]:
                raise RankError(
                    f"rank {rank} is at collective {number}, {CollectiveKind(kind).name} of tensor {key}, and rank "
                    f"{self.collectives.rank} at collective {said[0]}, {first.kind.name} of tensor {first.key} "
                    f"({first.name}); all ranks must do the same ops"
                )
        first.marks = [words[4] for words in found]
        votes = [words[3] for words in found]
        first.refusing = [rank for rank, other in enumerate(votes) if other == Vote.REFUSE]
        if first.refusing:
            return Outcome.REFUSED
        if any(other == Vote.TAKE for other in votes):
            started_s = time.perf_counter()
            first.make(self.collectives)
            spent_s = time.perf_counter() - started_s
            self.moved_bytes += first.moved_bytes
            self.busy_s += spent_s
            self._sink.emit(Event(EventKind.COMM, first.name, first.moved_bytes, started_s, spent_s))
        return Outcome.DONE

    def _end(self, collective: Collective, outcome: Outcome, error: BaseException | None) -> None:
        with self._changed:
            if collective.outcome is not None:
                return
            collective.outcome, collective.error = outcome, error
        collective.ended()

    def _fail(self, raised: BaseException) -> None:
        """Make nothing any more, and have all ranks know."""
        own = f"rank {self.collectives.rank}"
        error = raised if isinstance(raised, OffloadError) else RankError(f"{own}: a collective failed: {raised!r}")
        if error is not raised:
            error.__cause__ = raised
        with self._changed:
            if self._error is None:
                self._error = error
        self.collectives.stop(str(error))
        while True:
            with self._changed:
                if not self._waiting:
                    return
                first = self._waiting[0]
            self._pop(first, Outcome.FAILED, self._error)
