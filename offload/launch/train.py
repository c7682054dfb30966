"""`offload launch FILE`: train the model of a configuration from beginning to end.

Ctrl-C or SIGTERM ends the run cleanly after the step under way: metrics, table and picture are of the steps made, and
the exit code is 130 or 143. The end of a run is committed, whatever ends it but an error. The same command again goes
on from there, or says that the run is finished. A run folder that holds anything not of an earlier run is refused and
left as it is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from torch import nn

from offload.budget.verdict import verdict_of
from offload.config import Config, ConfigError, TrainConfig
from offload.console.output import BROKEN_PIPE, Output, is_closed
from offload.engine import Engine, initialize
from offload.factories import calls_of, data_factory, model_factory
from offload.forecast.fit import available_here
from offload.launch.batches import Batches, Pair, evaluated, loss_of, on_device
from offload.launch.interrupt import Interrupt, noted
from offload.launch.metrics_file import kept_metrics
from offload.launch.progress import ProgressLog, StepMetrics
from offload.launch.run_folder import CURVE, DATA, METRICS, RunFolder, check_free, removed_unless_begun
from offload.launch.summary import RunSummary, print_summary, save_loss_curve
from offload.store.deferred_init import deferred_init
from pagemem.durable.commit_folder import CommitFolder
from pagemem.errors import CommitError, RunDirectoryError, StorageError

_FINAL_LR: Final = 0.1


@dataclass(slots=True)
class _Past:
    """What a run that goes on must know of its beginning; tracked in commits."""

    before_nats: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """For the commit."""
        return {"before_nats": self.before_nats}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the commit; raises ValueError for what is no loss."""
        before_nats = state_dict.get("before_nats")
        if before_nats is not None and type(before_nats) not in (int, float):
            raise ValueError(f"before_nats is a {type(before_nats).__name__}, not a number")
        self.before_nats = before_nats


def _goes_on(config: Config) -> bool:
    """Whether the run directory holds commits to go on from.

    Raises:
        RunDirectoryError: it does, and the configuration forbids that.
    """
    folder = CommitFolder(Path(config.ssd.paths[0]))
    if folder.numbers() and config.commit.resume == "never":
        raise RunDirectoryError(
            f'{folder.path} holds commits and commit.resume is "never"; name another folder in ssd.paths, or set it '
            'to "auto"'
        )
    return bool(folder.numbers())


def _newest_step(config: Config) -> int:
    """The step of the newest commit; 0 where it cannot be read, which going on from it will say."""
    folder = CommitFolder(Path(config.ssd.paths[0]))
    try:
        return folder.read(folder.numbers()[-1]).step
    except CommitError:
        return 0


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


def check_budget(make_model: Callable[[], nn.Module], config: Config, console: Console) -> None:
    """Before anything is built: make sure that the model can be trained here, as `offload.budget.verdict` decides.

    A model that cannot be built on torch's meta device is checked while it is built; the console says so.

    Raises:
        BudgetError: it cannot; names what is too small and, of ``memory.ram``, the smallest that works.
    """
    verdict = verdict_of(config, make_model, available_here(config))
    if verdict.need is None:
        console.print(
            f"memory.ram is checked only while the model is built, unit by unit: {verdict.unknown}",
            highlight=False,
            markup=False,
        )
    verdict.check()


def validation_loss(engine: Engine, batches: Batches, reference: str, interrupt: Interrupt) -> float | None:
    """Mean validation loss in nats, or None when a signal came first."""
    was_training = engine.model.training
    engine.model.eval()
    losses = []
    for pair in batches.validation():
        if interrupt.asked:
            break
        losses.append(evaluated(engine, pair, reference, engine.torch_device))
    engine.model.train(was_training)
    return None if interrupt.asked else sum(losses) / len(losses)


def _process_peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def one_step(engine: Engine, batches: Batches, reference: str, step: int, first: Pair | None = None) -> float:
    """All micro-batches of one optimizer step, of which the first may be at hand; returns their mean loss in nats."""
    losses, n = [], engine.config.update.accumulation
    for micro in range(n):
        x, y = first if first is not None and not micro else batches.batch(step * n + micro)
        with calls_of("model.factory", f"{reference}: forward(x, y) of step {step + 1}"):
            output = engine(on_device(x, engine.torch_device), on_device(y, engine.torch_device))
        loss = loss_of(output, reference, trains=True)
        losses.append(loss.detach())
        with calls_of("model.factory", f"{reference}: the backward pass of step {step + 1}"):
            engine.backward(loss)
    engine.step()
    # Not before: reading one waits until a device has come that far, and it would have nothing to do meanwhile.
    return sum(map(float, losses)) / n


def launch(config: Config, console: Console | None = None) -> int:
    """Train as ``config`` says, on the main thread, which alone hears signals.

    All that can be found wrong beforehand is found before anything in ``output.run`` or ``ssd.paths`` is changed;
    folders that were made for a run that then could not begin are removed again.

    Returns:
        The exit code: 0, 130 after Ctrl-C, 143 after SIGTERM, 141 when nobody reads the output any more. The steps made
        are committed in all four cases, unless ``commit.at_end`` is false.

    Raises:
        ConfigError: a section is missing, a factory cannot be found or does not take its arguments.
        BudgetError: ``memory.ram`` is too small; see `check_budget`.
        RunDirectoryError: ``output.run`` or one of ``ssd.paths`` is in use or something else's; nothing was changed.
        NonFiniteError: a loss is NaN or infinite; the metrics of the steps before are in the run folder.
        OffloadError: see `offload.Engine`.
        KeyboardInterrupt: a second Ctrl-C, or one before the first step. SystemExit: SIGTERM after another signal.
            Everything is closed.
    """
    if config.model is None or config.data is None or config.train is None or config.output is None:
        missing = [name for name in ("model", "data", "train", "output") if getattr(config, name) is None]
        raise ConfigError(f"launch needs the sections {', '.join(missing)} as well")
    console = console or Output(goes_on=True)
    train, run = config.train, Path(config.output.run)
    make_model, make_data = model_factory(config.model), data_factory(config.data, run / DATA, config.seed)
    goes_on = _goes_on(config)
    with ExitStack() as stack:
        folder = stack.enter_context(RunFolder(run))
        stack.enter_context(removed_unless_begun(folder, config.ssd.paths))
        check_free(config.ssd.paths)
        if goes_on and (step := _newest_step(config)) >= train.steps:
            said = f"finished: the newest commit is of step {step}, train.steps is {train.steps}; raise it to train on"
            console.print(said, highlight=False, soft_wrap=True)
            return 0
        check_budget(make_model, config, console)
        if train.threads is not None:
            torch.set_num_threads(train.threads)
        torch.manual_seed(config.seed)
        folder.claim()
        batches = Batches(make_data(), config.data.factory, train)
        with deferred_init(config) as store, calls_of("model.factory", config.model.factory):
            stack.callback(store.close)  # where Ctrl-C comes before there is an engine, which closes it, too
            model = make_model()
        with initialize(model, config) as engine, noted() as interrupt:
            past = _Past()
            engine.track("launch", past)
            resumed = engine.resume() if goes_on else None
            if resumed is not None:
                console.print(
                    f"going on after step {resumed.step}, from commit {resumed.number} of {resumed.created}",
                    highlight=False,
                )
                for change in resumed.changed:
                    console.print(f"changed since: {change}", highlight=False, markup=False, soft_wrap=True)
            n_parameters = sum(p.numel() for p in engine.model.parameters())
            console.print(
                f"{n_parameters:,} parameters; RAM budget for their states {config.memory.ram:,} bytes", highlight=False
            )
            if train.evaluate_batches and not engine.steps:
                past.before_nats = validation_loss(engine, batches, config.model.factory, interrupt)
            pair = None if interrupt.asked else batches.batch(engine.steps * config.update.accumulation)
            set_aside = folder.begin(config, engine.run_id, goes_on=resumed is not None)
            if set_aside is not None:
                console.print(set_aside, highlight=False, soft_wrap=True)
            _train(engine, batches, config.model.factory, train, run, console, interrupt, past, pair)
        return interrupt.exit_code or (BROKEN_PIPE if is_closed(console) else 0)


def _written(log: ProgressLog, metrics: StepMetrics | None = None, durable: bool = True) -> Exception | None:
    """Log a step; a commit that is durable has the metrics of its steps. An error is returned: the steps made must not
    be lost by it."""
    try:
        if metrics is not None:
            log.take(metrics)
        if durable:
            log.sync()
    except (OSError, StorageError) as error:
        return error
    return None


def _train(
    engine: Engine,
    batches: Batches,
    reference: str,
    train: TrainConfig,
    folder: Path,
    console: Console,
    interrupt: Interrupt,
    past: _Past,
    pair: Pair | None,
) -> None:
    """All steps from here on, their commit and the summary; ``pair`` is the first batch, where nobody has asked to end
    before it."""
    config = engine.config
    n_parameters = sum(p.numel() for p in engine.model.parameters())
    if engine.steps and any("initial_lr" not in group for group in engine.optimizer.param_groups):
        raise CommitError(
            "the commit's parameter groups have no initial_lr, so it is not of a launched run; go on from it in a "
            "loop of your own"
        )
    schedule = torch.optim.lr_scheduler.LambdaLR(engine.optimizer, learning_rate(train), last_epoch=engine.steps - 1)
    kept = kept_metrics(folder / METRICS, engine.steps)
    if kept.note is not None:
        console.print(kept.note, soft_wrap=True, highlight=False, markup=False)
    metrics = kept.metrics
    first = committed = engine.steps
    samples_a_step, a_sample = train.batch * config.update.accumulation, batches.tokens_per_sample
    begun = last = engine.stats()
    started_s = time.perf_counter()
    ended: Exception | None = None
    with ProgressLog(folder / METRICS, console, train.steps, train.log_every, metrics) as log:
        for step in range(engine.steps, train.steps):
            if is_closed(console) or (interrupt.asked and pair is None):
                break
            step_started_s = time.perf_counter()
            lr = float(schedule.get_last_lr()[0])
            try:
                pair = pair or batches.batch(step * config.update.accumulation)
            except (ConfigError, OSError) as error:  # Between two steps: what has been trained must not be lost by it.
                ended = error
                break
            loss, pair = one_step(engine, batches, reference, step, pair), None
            schedule.step()
            step_s = time.perf_counter() - step_started_s
            now, memory = engine.stats(), engine.memory_report()
            metrics.append(
                StepMetrics(
                    step=step + 1,
                    loss=loss,
                    lr=lr,
                    step_s=step_s,
                    samples_per_s=samples_a_step / step_s,
                    tokens_per_s=None if a_sample is None else samples_a_step * a_sample / step_s,
                    host_bytes=memory.tiers["host"].used_bytes,
                    ssd_bytes=memory.tiers["ssd"].used_bytes,
                    ssd_read_bytes=now.bytes_read - last.bytes_read,
                    ssd_written_bytes=now.bytes_written - last.bytes_written,
                    wait_share=(now.wait_s - last.wait_s) / step_s,
                    staleness=engine.staleness,
                )
            )
            last = now
            due = engine.commit_due
            if (unwritten := _written(log, metrics[-1], due)) is not None:
                ended = unwritten
                break
            if due and engine.save_if_due() is not None:
                committed = engine.steps
        # In lock-free mode a background commit leaves out what was on its way.
        if config.commit.at_end and engine.steps > (first if config.update.mode == "lock-free" else committed):
            ended = ended or _written(log)
            engine.save()
    if ended is not None:
        raise ended
    train_s = time.perf_counter() - started_s
    stats = engine.stats().since(begun)
    evaluates = train.evaluate_batches and not is_closed(console)
    after_nats = validation_loss(engine, batches, reference, interrupt) if evaluates else None
    run = RunSummary(
        n_parameters,
        engine.steps,
        engine.steps - first,
        train_s,
        samples_a_step * (engine.steps - first),
        a_sample,
        past.before_nats,
        after_nats,
        batches.unit,
        batches.unigram_entropy_bits(),
        stats,
        engine.memory_report(),
        engine.planned_step_s,
        _process_peak_bytes(),
    )
    print_summary(run, console)
    save_loss_curve(folder / CURVE, metrics, run)
    console.print(f"metrics, configuration and loss curve are in {folder}", highlight=False)
    if interrupt.asked:
        console.print(f"interrupted after step {engine.steps}", highlight=False)
