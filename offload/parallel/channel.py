"""Messages between ranks that can be stopped: point to point, over a TCP connection to each other rank.

Not over gloo's works: these can be neither ended nor waited for with a limit, so a process whose peer has stopped could
not even exit in order. One thread sends and receives, whatever is possible first, so both directions of all connections
are used at once; the kernel's buffers go on while it does something else.
"""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final

import torch

from offload.parallel.stop_signal import StopSignal
from pagemem.errors import RankError
from pagemem.units import KiB, MiB

#: Most bytes of one call of the system, so that no direction waits long for the other. Chosen.
_CALL_BYTES: Final = 512 * KiB
#: Of the kernel's buffers of a connection, if it allows as much. Chosen.
BUFFER_BYTES: Final = 4 * MiB


class Message:
    """One message under way.

    Args:
        tensor: flat; it is read, or filled, until the transfer is over.
    """

    __slots__ = ("_at", "_bytes", "rank")

    def __init__(self, rank: int, tensor: torch.Tensor) -> None:
        self.rank = rank
        self._bytes = tensor.detach().view(torch.uint8).numpy().data
        self._at = 0

    @property
    def is_over(self) -> bool:
        """Whether all bytes are through."""
        return self._at == len(self._bytes)

    def go_on(self, move: Callable[[memoryview], int]) -> int:
        """Move some more bytes; returns how many. BlockingIOError: none now."""
        n_bytes = move(self._bytes[self._at : self._at + _CALL_BYTES])
        self._at += n_bytes
        return n_bytes


class Channel:
    """Of one rank. One thread uses it at a time.

    Args:
        connections: to each other rank; they are the channel's.
        stop: ends all waits.
        lost: told of a rank whose connection failed, and with what; returns what has stopped the ranks.

    Attributes:
        sent_bytes, received_bytes, n_sent: so far; messages sent.
        waiting_since_s: since when somebody waits for another rank, by `time.monotonic`; None: nobody does.
    """

    def __init__(
        self, rank: int, connections: Mapping[int, socket.socket], stop: StopSignal, lost: Callable[[int, str], str]
    ) -> None:
        self.rank, self.n_ranks = rank, len(connections) + 1
        self.sent_bytes = self.received_bytes = self.n_sent = 0
        self.waiting_since_s: float | None = None
        self._connections = dict(connections)
        self._stop = stop
        self._lost = lost
        self._out: dict[int, deque[Message]] = {other: deque() for other in connections}
        self._in: dict[int, deque[Message]] = {other: deque() for other in connections}
        self._posted: list[Message] = []
        self._woken, self._waker = socket.socketpair()
        for connection in (*connections.values(), self._woken, self._waker):
            connection.setblocking(False)
        self._poll = select.poll()
        self._polled: dict[int, int] = {}
        self._poll.register(self._woken, select.POLLIN)
        stop.on_set(self._wake)

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Begin to send a flat tensor, which stays as it is until `wait`; nothing, if it is empty."""
        if tensor.numel():
            self._begin(Message(to, tensor), self._out)
            self.sent_bytes += tensor.numel() * tensor.element_size()
            self.n_sent += 1

    def receive(self, into: torch.Tensor, source: int) -> None:
        """Begin to fill a flat tensor, which nobody reads until `wait`; nothing, if it is empty."""
        if into.numel():
            self._begin(Message(source, into), self._in)
            self.received_bytes += into.numel() * into.element_size()

    def _begin(self, transfer: Message, queues: dict[int, deque[Message]]) -> None:
        queues[transfer.rank].append(transfer)
        self._posted.append(transfer)

    def take_posted(self) -> Sequence[Message]:
        """What was begun since the last call of this or `wait`, to be waited for by itself."""
        posted, self._posted = self._posted, []
        return posted

    def wait(self, posted: Sequence[Message] | None = None) -> None:
        """Wait for these, or for all that was begun and not taken.

        Raises:
            RankError: the ranks have stopped, or one of them is gone; says why. Nothing is moved any more.
        """
        posted = self.take_posted() if posted is None else posted
        self.waiting_since_s = time.monotonic()
        try:
            while not all(transfer.is_over for transfer in posted):
                if self._stop.why is not None:
                    raise RankError(self._stop.why)
                if not self._move():
                    self._await_any()
        finally:
            self.waiting_since_s = None

    def exchange(self, words: torch.Tensor) -> list[torch.Tensor]:
        """What every rank calls it with, flat and of one size, in rank order.

        Raises:
            RankError: as `wait`.
        """
        found = [words if rank == self.rank else torch.empty_like(words) for rank in range(self.n_ranks)]
        for other in self._connections:
            self.send(words, other)
            self.receive(found[other], other)
        self.wait()
        return found

    def close(self) -> None:
        """Close all connections. Idempotent."""
        self._stop.forget(self._wake)
        for connection in (*self._connections.values(), self._woken, self._waker):
            connection.close()

    def _wake(self) -> None:
        with suppress(OSError):  # it is closed, so that nobody waits
            self._waker.send(b"!")

    def _move(self) -> int:
        """Move what can be moved at once; returns the bytes."""
        n_bytes = 0
        for rank, connection in self._connections.items():
            for queue, move in ((self._out[rank], connection.send), (self._in[rank], connection.recv_into)):
                if queue:
                    n_bytes += self._go_on(queue, move)
        return n_bytes

    def _go_on(self, queue: deque[Message], move: Callable[[memoryview], int]) -> int:
        first = queue[0]
        try:
            n_bytes = first.go_on(move)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise RankError(self._lost(first.rank, str(error))) from error
        if not n_bytes:
            raise RankError(self._lost(first.rank, "it was closed"))
        if first.is_over:
            queue.popleft()
        return n_bytes

    def _await_any(self) -> None:
        """Wait until something can be moved, or the ranks stop."""
        for rank, connection in self._connections.items():
            wanted = select.POLLIN * bool(self._in[rank]) | select.POLLOUT * bool(self._out[rank])
            if wanted:
                self._poll.register(connection, wanted)
            elif self._polled.get(rank):
                self._poll.unregister(connection)  # that it has ended is told all the same, otherwise
            self._polled[rank] = wanted
        self._poll.poll()
