"""The training loop of `offload launch`: steps, evaluations, commits, and what is reported of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch

from offload.callbacks import CommitBegun, Evaluation, RunStarted, StepMetrics
from offload.config import TrainConfig, TrainingConfig
from offload.engine import Engine
from offload.factories import calls_of
from offload.launch.batches import Batches, Pair, batch_numbers, evaluated, loss_of, on_device
from offload.launch.ranks import LaunchRanks, SharedInterrupt
from offload.parameters.inner_tensors import n_elements
from offload.reporting.reporter import Reporter
from offload.reporting.summary import RunSummary, process_peak_bytes
from pagemem.errors import CommitError

#: The commit of the lowest validation loss, with ``commit.keep_best``.
BEST: Final = "best"
_FINAL_LR: Final = 0.1


def learning_rate(train: TrainConfig) -> Callable[[int], float]:
    """What the learning rate is multiplied by at each step, counted from 0."""

    def factor(step: int) -> float:
        if step < train.warmup_steps:
            return (step + 1) / train.warmup_steps
        if train.schedule == "constant":
            return 1.0
        done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
        return _FINAL_LR + (1 - _FINAL_LR) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return factor


def one_step(
    engine: Engine, batches: Batches, reference: str, step: int, numbers: Sequence[int], first: Pair | None = None
) -> float:
    """All micro-batches of one optimizer step, of which the first may be at hand; returns their mean loss in nats.

    Args:
        numbers: of the micro-batches.
    """
    losses = []
    for number in numbers:
        x, y = first if first is not None and number == numbers[0] else batches.batch(number)
        with calls_of("model.factory", f"{reference}: forward(x, y) of step {step + 1}"):
            output = engine(on_device(x, engine.torch_device), on_device(y, engine.torch_device))
        loss = loss_of(output, reference, trains=True)
        losses.append(loss.detach())
        with calls_of("model.factory", f"{reference}: the backward pass of step {step + 1}"):
            engine.backward(loss)
    engine.step()
    # Not before: reading one waits until a device has come that far, and it would have nothing to do meanwhile.
    return sum(map(float, losses)) / len(losses)


def validation_loss(
    engine: Engine, batches: Batches, reference: str, interrupt: SharedInterrupt, tell: Callable[[int], None]
) -> float | None:
    """Mean validation loss in nats, or None when a signal came first; ``tell`` hears how many batches are done."""
    if interrupt.asked():
        return None
    was_training = engine.model.training
    engine.model.eval()
    losses: list[float] = []
    tell(0)
    for pair in batches.validation():
        if interrupt.asked():
            break
        losses.append(evaluated(engine, pair, reference, engine.torch_device))
        tell(len(losses))
    engine.model.train(was_training)
    return None if interrupt.asked() else sum(losses) / len(losses)


@dataclass(slots=True)
class ValidationRecord:
    """Validation losses, in nats, that a run needs when it resumes; tracked in commits.

    Attributes:
        before_nats: before training. best_nats: the lowest during training. None: not measured.
    """

    before_nats: float | None = None
    best_nats: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """For the commit."""
        return asdict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the commit; raises ValueError for what is no loss."""
        found = [state_dict.get(name) for name in ("before_nats", "best_nats")]
        for value in found:
            if value is not None and type(value) not in (int, float):
                raise ValueError(f"a validation loss is a {type(value).__name__}, not a number")
        self.before_nats, self.best_nats = found


class _Ended(Exception):
    """An error between two steps, as the cause: it ends the run once the steps made are committed."""


@contextmanager
def _between_steps() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _Ended from error


class TrainingLoop:
    """The steps of one launch. Training thread only.

    Args:
        record: of earlier launches; kept up to date.
        metrics: of the steps made by earlier launches.
        validate: returns the validation loss, see `validation_loss`.

    Attributes:
        metrics: of all steps that have any.
        committed: step of the newest commit, 0 without one.
        ended: the last step is made, and all steps are committed unless ``commit.at_end`` is false. What `run` raises
            from then on loses none of them.

    Raises:
        CommitError: the run resumes from a commit of another kind of loop.
    """

    def __init__(
        self,
        engine: Engine,
        config: TrainingConfig,
        batches: Batches,
        reporter: Reporter,
        interrupt: SharedInterrupt,
        record: ValidationRecord,
        metrics: list[StepMetrics],
        validate: Callable[[], float | None],
        ranks: LaunchRanks,
    ) -> None:
        if engine.steps and any("initial_lr" not in group for group in engine.optimizer.param_groups):
            raise CommitError(
                "the commit's parameter groups have no initial_lr, so it is not of a launched run; "
                "continue it in a loop of your own"
            )
        self._engine, self._batches, self._reporter = engine, batches, reporter
        self._interrupt, self._ranks, self._record, self._validate = interrupt, ranks, record, validate
        self._config, self._train, self._reference = config, config.train, config.model.factory
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            engine.optimizer, learning_rate(config.train), last_epoch=engine.steps - 1
        )
        self.metrics = metrics
        self._first = self.committed = engine.steps
        self.ended = False
        self._evaluation: Evaluation | None = None
        self._last = self._begun = self._stats = engine.stats()
        self._train_s = self._rank_wait_s = 0.0
        self._after_nats: float | None = None

    def run(self, started: RunStarted, pair: Pair | None) -> None:
        """All steps from here on, their commits, and the validation after them.

        Args:
            pair: the first batch, unless a signal came before it.

        Raises:
            As `offload.launch.train.launch`. What comes between two steps is raised once the steps made are committed.
        """
        ended: BaseException | None = None
        with self._reporter.running(started):
            started_s, waited_s = time.perf_counter(), self._ranks.wait_s
            try:
                with _between_steps():
                    if not self._first and self._record.before_nats is not None:
                        self._reporter.tell(Evaluation(0, self._record.before_nats, best=False))
                for step in range(self._first, self._train.steps):
                    if self._interrupt.closed() or (self._interrupt.asked() and pair is None):
                        break
                    self._step(step, pair)
                    pair = None
            except _Ended as error:
                ended = error.__cause__
                if self._ranks.n_ranks > 1 and ended is not None:
                    raise ended from None  # other ranks are in a step, and cannot commit with this one
            self._commit_at_end(ended)
            self._train_s = time.perf_counter() - started_s
            self._rank_wait_s = self._ranks.wait_s - waited_s
            self._stats = self._engine.stats().since(self._begun)
            if self._train.evaluate_batches and not self._interrupt.closed():
                self._validate_after()

    def _step(self, step: int, pair: Pair | None) -> None:
        """Step number ``step``, counted from 0, its evaluation and its commit."""
        engine, before, started_s = self._engine, self._last, time.perf_counter()
        lr = float(self._schedule.get_last_lr()[0])
        with _between_steps():
            numbers = batch_numbers(self._config, step, self._ranks.rank, self._ranks.n_ranks)
            pair = pair or self._batches.batch(numbers[0])
        loss = self._ranks.mean(one_step(engine, self._batches, self._reference, step, numbers, pair))
        self._schedule.step()
        step_s = time.perf_counter() - started_s
        self._last = now = engine.stats()
        tiers = engine.memory_report().tiers
        samples, tokens = self._samples_each, self._batches.tokens_per_sample
        with _between_steps():
            self._evaluation = self._evaluated()
        self.metrics.append(
            StepMetrics(
                step=step + 1,
                loss=loss,
                lr=lr,
                step_s=step_s,
                samples_per_s=samples / step_s,
                tokens_per_s=None if tokens is None else samples * tokens / step_s,
                host_bytes=tiers["host"].used_bytes,
                ssd_bytes=tiers["ssd"].used_bytes,
                ssd_read_bytes=now.bytes_read - before.bytes_read,
                ssd_written_bytes=now.bytes_written - before.bytes_written,
                wait_share=(now.wait_s - before.wait_s) / step_s,
                staleness=engine.staleness,
                validation_loss=None if self._evaluation is None else self._evaluation.loss,
            )
        )
        self._report_and_commit()

    @property
    def _samples_each(self) -> int:
        """Rows of a step, of all ranks."""
        return self._train.batch * self._config.update.accumulation * self._ranks.n_ranks

    def _evaluated(self) -> Evaluation | None:
        """The evaluation after this step, if it is time for one and no signal comes."""
        every = self._train.evaluate_every
        if every is None or self._engine.steps % every:
            return None
        nats = self._validate()
        if nats is None:
            return None
        self._last = self._engine.stats()  # what it read counts for no step
        best = self._record.best_nats is None or nats < self._record.best_nats
        if best:
            self._record.best_nats = nats
        return Evaluation(self._engine.steps, nats, best)

    def _commit_name(self) -> str | None:
        """The name of a commit of the steps made: `BEST` where their evaluation is the best so far."""
        evaluation = self._evaluation
        is_best = evaluation is not None and evaluation.best and evaluation.step == self._engine.steps
        return BEST if self._config.commit.keep_best and is_best else None

    def _report_and_commit(self) -> None:
        engine, evaluation, name = self._engine, self._evaluation, self._commit_name()
        due = name is not None or engine.commit_due
        with _between_steps():
            self._reporter.tell(self.metrics[-1])
            if evaluation is not None:
                self._reporter.tell(evaluation)
            if due:
                self._reporter.tell(CommitBegun(engine.steps, name))
        if name is not None:
            engine.save(name, wait=False)
        elif due:
            engine.save_if_due()
        self.committed = engine.steps if due else self.committed

    def _commit_at_end(self, ended: BaseException | None) -> None:
        """Commit what is not committed; raises what ended the run, afterwards."""
        # In lock-free mode a background commit leaves out what was on its way.
        committed = self._first if self._config.update.lock_free else self.committed
        if self._config.commit.at_end and self._engine.steps > committed:
            # The commit holds the best loss so far. Where a callback raised before the commit of that name, it is this.
            name = self._commit_name()
            try:
                self._reporter.tell(CommitBegun(self._engine.steps, name))
            except Exception as error:
                ended = ended or error
            self._engine.save(name)
            self.committed = self._engine.steps
        self.ended = True
        if ended is not None:
            raise ended

    def _validate_after(self) -> None:
        evaluation = self._evaluation
        if evaluation is None:
            nats = self._validate()
            evaluation = None if nats is None else Evaluation(self._engine.steps, nats, best=False)
            if evaluation is not None:
                self._reporter.tell(evaluation)
        self._after_nats = None if evaluation is None else evaluation.loss

    def summary(self) -> RunSummary:
        """The closing table's content."""
        engine, batches = self._engine, self._batches
        made = engine.steps - self._first
        return RunSummary(
            n_parameters=n_elements(engine.model),
            steps=engine.steps,
            made=made,
            train_s=self._train_s,
            samples=made * self._samples_each,
            tokens_per_sample=batches.tokens_per_sample,
            before_nats=self._record.before_nats,
            after_nats=self._after_nats,
            unit=batches.unit,
            unigram_bits=batches.unigram_entropy_bits(),
            stats=self._stats,
            rank_wait_s=self._rank_wait_s,
            memory=engine.memory_report(),
            planned_step_s=engine.planned_step_s,
            process_peak_bytes=process_peak_bytes(),
            page_files_bytes=engine.debug.page_files.n_frames * engine.memory_report().page_bytes,
        )
