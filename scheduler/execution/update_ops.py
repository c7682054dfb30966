"""Ops that are updates: made by the worker beside compute where there is one, else by the training thread, which also
says what comes after them. Training thread only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from pagemem.residency.paged_tensor import PagedTensor
from pagemem.tier import Tier
from scheduler.planning.trace import Access, Op, OpKey
from scheduler.tiers.memories import Memories, touching

#: The accesses of an op that has begun, with their tiers, and the op, if it is recorded.
Entered = tuple[Sequence[Access], Op | None]


class OpsOfSteps(Protocol):
    """What is asked of the driver."""

    memories: Memories

    @property
    def in_step(self) -> bool:
        """Whether ops are part of a step."""

    def begin(self, key: OpKey, name: str, accesses: Sequence[Access]) -> list[PagedTensor]:
        """See `Driver.begin`."""

    def enter(self, key: OpKey, name: str, accesses: Sequence[Access]) -> Entered:
        """Begin what an op triggers."""

    def compute(self, key: OpKey, name: str, held: Sequence[PagedTensor], op: Op | None) -> None:
        """The time from now on is that of an op, whose tensors are held."""

    def end(self, held: Sequence[PagedTensor]) -> None:
        """See `Driver.end`."""


class UpdateOps:
    """Makes updates.

    Args:
        driver: has begun none yet.

    Attributes:
        beside: whether updates in host memory are made beside compute.
    """

    def __init__(self, driver: OpsOfSteps) -> None:
        self.beside = False
        self._driver = driver
        self._memories = driver.memories

    def add_worker(self, n_threads: int) -> None:
        """Have updates in host memory made beside compute, on a thread of their own. Once, before the first op.

        Args:
            n_threads: compute threads of an update.

        Raises:
            StorageError: the system starts no more threads.
        """
        self.beside = True
        self._memories.add_worker(n_threads)

    def perform(
        self, key: OpKey, name: str, accesses: Sequence[Access], work: Callable[[], None], begun: Callable[[], None], *,
        beside: bool,
    ) -> None:  # fmt: skip
        """One op that is an update: its tensors are in their tiers and do not move while ``work`` is called.

        Where there is a worker, and the tensors, in host memory, are there or about to come, it calls ``work`` beside
        compute. Later ops of these tensors wait for it, and what ``work`` raises is raised by one of the next ops.

        Args:
            begun: called on this thread when it is certain that ``work`` is called, before that.
            beside: whether the worker may; otherwise it is called here.

        Raises:
            As `Driver.op`, and what ``work`` raises.
        """
        updates = self._memories.updates
        below = all(self._memories.of(access.tensor).tier is Tier.HOST for access in accesses)
        if updates is None or not (beside and below and self._driver.in_step):
            held = self._driver.begin(key, name, accesses)
        else:
            accesses, op = self._driver.enter(key, name, accesses)

            def took(seconds: float) -> None:
                if op is not None:
                    op.duration_s += seconds

            if updates.submit(name, touching(accesses), work, begun, took):
                self._memories.host.pinner.used(touching(accesses))
                return
            updates.finish()
            held = self._memories.pin(name, accesses)
            self._driver.compute(key, name, held, op)
        try:
            begun()
            work()
        finally:
            self._driver.end(held)

    def when_made(self, call: Callable[[], None]) -> None:
        """Call ``call``, on this thread, once the updates that were given to the worker so far are over; at once, if
        they are."""
        if self._memories.updates is None:
            call()
        else:
            self._memories.updates.when_done(call)

    def finish_oldest(self) -> bool:
        """Wait until the oldest update that was given to the worker is made; returns whether there was one.

        Raises:
            As `UpdateLane.finish`.
        """
        return self._memories.updates is not None and self._memories.updates.finish_one()

    def finish(self) -> None:
        """Wait until all of them are made. Raises as `UpdateLane.finish`."""
        self._memories.finish_updates()

    def close(self) -> None:
        """End the worker after the update that it is making; those after it are given up. Idempotent."""
        if self._memories.updates is not None:
            self._memories.updates.close()
