"""Reports what a launched run does to its callbacks, see `offload.callbacks`."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Final

from offload.callbacks import Callback, CommitBegun, Evaluation, RunEnded, RunStarted, StepMetrics
from offload.config import ConfigError
from offload.factories import calls_of, described, factory_of

Record = RunStarted | StepMetrics | Evaluation | CommitBegun | RunEnded
_METHODS: Final[dict[type, str]] = {
    RunStarted: "on_start",
    StepMetrics: "on_step",
    Evaluation: "on_evaluation",
    CommitBegun: "on_commit",
    RunEnded: "on_end",
}


class Reporter:
    """Calls all callbacks of a run.

    Args:
        named: in the order in which they are called; of the user's with the factory's name, of the engine's with "".
    """

    def __init__(self, named: Sequence[tuple[str, Callback]]) -> None:
        self._named = named
        self._step = 0

    def tell(self, record: StepMetrics | Evaluation | CommitBegun) -> None:
        """Call the method for a record on all callbacks; the first exception is raised at once."""
        self._step = record.step
        for reference, callback in self._named:
            _call(reference, callback, record)

    @contextmanager
    def running(self, run: RunStarted) -> Iterator[None]:
        """Inside, callbacks are started; all that were are ended afterwards, whatever happens."""
        self._step = run.step
        error: BaseException | None = None
        started: list[tuple[str, Callback]] = []
        try:
            for reference, callback in self._named:
                _call(reference, callback, run)
                started.append((reference, callback))
            yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._end(started, error)

    def _end(self, started: Sequence[tuple[str, Callback]], error: BaseException | None) -> None:
        """End the callbacks; what one raises is raised once all have ended, unless an error ended the run."""
        failed: Exception | None = None
        for reference, callback in started:
            try:
                _call(reference, callback, RunEnded(self._step, error))
            except Exception as raised:
                failed = failed or raised
        if failed is not None and error is None:
            raise failed
        if failed is not None and error is not None:
            error.add_note(f"and at its end: {failed}")


def _call(reference: str, callback: Callback, record: Record) -> None:
    method = _METHODS[type(record)]
    with calls_of("output.callbacks", f"{reference}: {method}") if reference else nullcontext():
        getattr(callback, method)(record)


def made_callback(reference: str) -> Callback:
    """The callback of a ``module:callable`` factory, which is called without arguments.

    Raises:
        ConfigError: the factory cannot be found or fails, or returns something else than a callback, or one with a
            method ``on_...`` that is none of a callback's.
    """
    with calls_of("output.callbacks", reference):
        made: Callback = factory_of("output.callbacks", reference, {})()
    known = _METHODS.values()
    unknown = [name for name in dir(made) if name.startswith("on_") and name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"methods: {', '.join(known)}"
        raise ConfigError(
            f"output.callbacks: {reference} returns {described(made)}, whose {unknown[0]} is never called; {hint}"
        )
    missing = [method for method in known if not callable(getattr(made, method, None))]
    if missing:
        raise ConfigError(
            f"output.callbacks: {reference} returns {described(made)}, which has no method {missing[0]}; derive it "
            "from offload.Callback, whose methods do nothing"
        )
    return made
