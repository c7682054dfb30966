"""The commit thread: writes one commit at a time in the background, and hands its error to the training thread.

IDLE --run--> WRITING --written--> IDLE
              WRITING --error--> FAILED --check--> IDLE
IDLE | FAILED --close--> CLOSED
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable
from typing import Final

from pagemem.files.threads import start_thread
from pagemem.process import interrupts
from pagemem.process.wait_lock import WaitLock
from pagemem.state_machine import StateMachine

#: How often a wait for a commit checks for Ctrl-C.
_LOOK_S: Final = 0.1


class CommitThreadState(enum.Enum):
    """See the diagram at the top of this module."""

    IDLE = "idle"
    WRITING = "writing"
    FAILED = "failed"
    CLOSED = "closed"


_MOVES: Final = StateMachine(
    "committer",
    {
        CommitThreadState.IDLE: {CommitThreadState.WRITING, CommitThreadState.CLOSED},
        CommitThreadState.WRITING: {CommitThreadState.IDLE, CommitThreadState.FAILED},
        CommitThreadState.FAILED: {CommitThreadState.IDLE, CommitThreadState.CLOSED},
    },
)


class CommitThread:
    """Runs jobs, one at a time. Methods belong to the training thread; see `Committer` for what they raise."""

    def __init__(self) -> None:
        self._state = CommitThreadState.IDLE
        self._failure: BaseException | None = None
        self._changed = WaitLock("commits")
        self._job: Callable[[], None] | None = None
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether a job is under way."""
        return self._state is CommitThreadState.WRITING

    def start(self) -> None:
        """Start the thread, unless it runs; raises StorageError where the system starts no more threads."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="offload-commit", daemon=True)
            start_thread(thread)
            self._thread = thread

    def run(self, job: Callable[[], None]) -> None:
        """Have the thread, which is idle, do a job."""
        with self._changed:
            # One without the other would be waited for forever: no signal can interrupt between the two.
            self._state = _MOVES.move(self._state, CommitThreadState.WRITING)
            self._job = job
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._job is None and self._state is not CommitThreadState.CLOSED:
                    self._changed.wait()
                job, self._job = self._job, None
            if job is None:
                return
            error: BaseException | None = None
            try:
                job()
            except BaseException as raised:  # whatever it is goes to the training thread
                error = raised
            with self._changed:
                self._failure = error
                self._state = _MOVES.move(
                    self._state, CommitThreadState.IDLE if error is None else CommitThreadState.FAILED
                )
                self._changed.notify_all()

    def wait(self) -> None:
        """See `Committer.wait`."""
        with self._changed:
            while self._state is CommitThreadState.WRITING:
                self._changed.wait(_LOOK_S)
                interrupts.check()
        self.check()

    def check(self) -> None:
        """Raise what a job failed of, once. Does not wait."""
        with self._changed:
            if self._state is CommitThreadState.FAILED:
                failure, self._failure = self._failure, None
                self._state = _MOVES.move(self._state, CommitThreadState.IDLE)
                assert failure is not None
                raise failure

    def close(self, hurry: Callable[[], None]) -> None:
        """See `Committer.close`; ``hurry`` has the job end soon, where an interrupt ends the wait."""
        with self._changed:
            self._changed.notify_all()
            while self._state is CommitThreadState.WRITING:
                try:
                    self._changed.wait()
                except BaseException:
                    hurry()
                    raise
            failed = self._state is CommitThreadState.FAILED
            if self._state is not CommitThreadState.CLOSED:
                self._state = _MOVES.move(self._state, CommitThreadState.CLOSED)
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        failure, self._failure = self._failure, None  # kept here, it would keep its traceback, and so the caller's data
        if failed and failure is not None:
            raise failure
