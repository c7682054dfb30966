"""Who of the ranks still lives, and the first cause why they stop: a thread beside the step, over torch's store.

Every rank beats once a second; rank 0 watches all, and all watch rank 0. Whoever finds one silent for `SILENT_S`, or
fails itself, writes the cause into the store, where the first one stays; all read it, and stop. How long a step takes
plays no part: the thread beats on.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Final

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from offload.parallel.stop_signal import StopSignal

#: Seconds between two beats. Chosen.
BEAT_S: Final = 1.0
#: A rank that has not beaten for so many seconds is dead or stopped. Chosen: a heavily loaded machine misses some.
SILENT_S: Final = 15.0
#: Seconds that ranks have to say why they fail before the loss of a connection is taken for the cause. Chosen.
CAUSE_S: Final = 3.0
#: Seconds that a rank waits for one that has ended before that is called a fault. Chosen.
ENDED_S: Final = 5.0


class Liveness:
    """One rank's. Methods: any thread.

    Args:
        store: a client of its own, of the store that all ranks have.
        prefix: of its keys.
        stop: is set once any rank has a cause.
        waiting_since_s: since when this rank waits for others, by `time.monotonic`; None: it does not.

    Attributes:
        who: this rank, its process and its host, in words.

    Raises:
        RuntimeError: the store does not answer, or the system starts no more threads.
    """

    def __init__(
        self, store: TCPStore, prefix: str, rank: int, n_ranks: int, stop: StopSignal,
        waiting_since_s: Callable[[], float | None],
    ) -> None:  # fmt: skip
        self.who = f"rank {rank} (process {os.getpid()} on {socket.gethostname()})"
        self._store = store
        self._prefix = prefix
        self._rank, self._n_ranks = rank, n_ranks
        self._stop = stop
        self._waiting_since_s = waiting_since_s
        self._lock = threading.Lock()  # the store's client takes one request at a time
        self._wake = threading.Event()
        self._closing = False
        self._n_beats = 0
        self._seen: dict[int, tuple[str, float]] = {}
        self._set("who", self.who)
        self._beat()
        stop.on_set(self._wake.set)
        self._thread = threading.Thread(target=self._run, name="offload-liveness", daemon=True)
        self._thread.start()

    def lost(self, rank: int, how: str) -> str:
        """The connection to a rank has failed: have all ranks stop; returns the cause, as that rank has said it, if it
        has within `CAUSE_S`."""
        deadline_s = time.monotonic() + CAUSE_S
        while self._stop.why is None and time.monotonic() < deadline_s:
            time.sleep(0.05)
            self._look_for_cause()
        if self._stop.why is None:
            self._stop.set(self.publish(f"{self._name(rank)} has died, or its connection: {how}"))
        assert self._stop.why is not None
        return self._stop.why

    def publish(self, why: str) -> str:
        """Have all ranks know a cause; returns that which came first.

        Raises:
            RuntimeError: the store does not answer.
        """
        with self._lock:
            return self._store.compare_set(f"{self._prefix}/stop/0", "", why).decode()

    def end(self) -> None:
        """This process needs no other rank any more: wait until none needs it either, or the ranks stop."""
        self._set("ended", "1")
        with self._lock:
            self._store.add(f"{self._prefix}/n_ended", 1)
        while self._stop.why is None:
            with self._lock:
                n_ended = self._store.add(f"{self._prefix}/n_ended", 0)
            if n_ended == self._n_ranks:
                break
            time.sleep(0.02)

    def close(self) -> None:
        """End the thread, once others know why this rank has stopped, if it has. Idempotent."""
        self._closing = True
        self._wake.set()
        self._thread.join()

    # ---- the store ---------------------------------------------------------------------------------------------

    def _set(self, what: str, value: str) -> None:
        with self._lock:
            self._store.set(f"{self._prefix}/{what}/{self._rank}", value)

    def _get(self, what: str, rank: int) -> str | None:
        key = f"{self._prefix}/{what}/{rank}"
        with self._lock:
            return self._store.get(key).decode() if self._store.check([key]) else None

    def _name(self, rank: int) -> str:
        return self._get("who", rank) or f"rank {rank}"

    def _look_for_cause(self) -> None:
        why = self._get("stop", 0)
        if why:
            self._stop.set(why)

    def _beat(self) -> None:
        self._n_beats += 1
        self._set("beat", str(self._n_beats))

    # ---- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing and self._stop.why is None:
                self._beat()
                self._look_for_cause()
                for rank in range(1, self._n_ranks) if self._rank == 0 else [0]:
                    self._look_at(rank)
                self._wake.wait(BEAT_S)
            if self._stop.why is not None:
                self.publish(self._stop.why)
        except Exception as error:  # whatever it is: without the store nobody knows of anybody
            self._stop.set(f"{self.who} has lost the store that connects the ranks: {error!r}")

    def _look_at(self, rank: int) -> None:
        """Stop where a rank is silent, or has ended while this one waits for others."""
        now_s, waiting_since_s = time.monotonic(), self._waiting_since_s()
        if self._get("ended", rank) is not None:
            if waiting_since_s is not None and now_s - waiting_since_s > ENDED_S:
                self._stop.set(f"{self._name(rank)} has ended, and {self.who} waits for it")
            return
        beat = self._get("beat", rank)
        if beat is None:
            return
        seen, since_s = self._seen.get(rank, ("", now_s))
        if beat != seen:
            self._seen[rank] = beat, now_s
        elif now_s - since_s > SILENT_S:
            self._stop.set(
                f"{self._name(rank)} has been silent for {SILENT_S:.0f} s: it has died, hangs or was stopped"
            )
