"""`offload launch`: trains the model of a configuration file and leaves metrics, a loss curve and a table behind.

Training is the engine's: nothing here knows of pages. The first Ctrl-C, or a SIGTERM, ends the run cleanly after the
step under way: metrics, table and picture are of the steps made, and the exit code is 130 or 143. The end of a run is
committed, unless an error of a step ends it. The same command again continues from there, or says that the run is
finished. A run folder that contains anything else is refused and left as it is.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from offload.callbacks import Callback, RunStarted, StepMetrics
from offload.checkpoint.compatibility import Resumed
from offload.commits.foreign_commits import OTHERS, ForeignCommits
from offload.config import Config, TrainingConfig
from offload.console.output import BROKEN_PIPE, is_closed
from offload.console.tables import print_line, print_rows
from offload.engine import Engine
from offload.factories import data_factory, model_factory
from offload.launch.batches import Batches, batch_numbers
from offload.launch.interrupt import noted
from offload.launch.loop import TrainingLoop, ValidationRecord, validation_loss
from offload.launch.ranks import LaunchRanks, SharedInterrupt, ranks_line, set_rank_threads
from offload.launch.run_folder import CURVE, DATA, RunFolder, check_free, removed_unless_begun
from offload.launch.setup import build, check_budget, exact_on_ranks, with_mode
from offload.machine.calibration import calibrated, is_off
from offload.parameters.inner_tensors import n_elements
from offload.reporting.loss_curve import save_loss_curve
from offload.reporting.metrics_file import FORMATS, MetricsFile, kept_metrics
from offload.reporting.progress import Progress
from offload.reporting.reporter import Reporter, made_callback
from offload.reporting.summary import RankUse, summary_rows
from pagemem.durable.commit_folder import CommitFolder
from pagemem.durable.root_folder import RootFolder
from pagemem.errors import CommitError, RunDirectoryError


def _resumes(config: Config) -> bool:
    """Whether the run directory holds commits to continue from.

    Raises:
        RunDirectoryError: it does, and the configuration forbids that.
    """
    path = Path(config.ssd.paths[0])
    found = bool(CommitFolder(path).numbers() or RootFolder(path).numbers())
    if found and config.commit.resume == "never":
        raise RunDirectoryError(
            f'{path} holds commits and commit.resume is "never"; name another folder in ssd.paths, or set it to "auto"'
        )
    return found


def _finished_step(config: TrainingConfig, folder: RunFolder) -> int | None:
    """The step of the newest commit where nothing is left to do: all steps are made, and validated. Also None where
    the commit cannot be read, which resuming will report."""
    pages = Path(config.ssd.paths[0])
    try:
        commits = ForeignCommits([pages], OTHERS)
        step = commits.steps[commits.newest()]
    except CommitError:
        return None
    stopped = step == config.train.steps and config.train.evaluate_batches and folder.lacks_validation(pages, step)
    return None if step < config.train.steps or stopped else step


def launch(config: Config, console: Console | None = None) -> int:
    """Train as ``config`` says, on the main thread, which alone receives signals.

    All that can be found wrong beforehand is found before anything in ``output.run`` or ``ssd.paths`` is changed;
    folders that were made for a run that then could not begin are removed again.

    Returns:
        The exit code: 0, 130 after Ctrl-C, 143 after SIGTERM, 141 when the output's reader has gone. The steps made
        are committed in all four cases, unless ``commit.at_end`` is false.

    Raises:
        ConfigError: a section is missing, a factory cannot be found or does not take its arguments.
        BudgetError: ``memory.ram`` is too small; see `offload.launch.setup.check_budget`.
        RunDirectoryError: ``output.run`` or one of ``ssd.paths`` is in use or something else's; nothing was changed.
        NonFiniteError: a loss is NaN or infinite; the metrics of the steps before are in the run folder.
        Exception: what a callback raised; the steps made are committed.
        OffloadError: see `offload.Engine`.
        KeyboardInterrupt: a second Ctrl-C, or one before the first step. SystemExit: SIGTERM after another signal.
            Everything is closed.
    """
    config = config.for_training("launch", "output")
    ranks = LaunchRanks()
    with ranks.failing_together():
        return _launch(config, ranks, console or ranks.console())


def _launch(config: TrainingConfig, ranks: LaunchRanks, console: Console) -> int:
    assert config.output is not None
    run = Path(config.output.run)
    make_model, make_data = model_factory(config.model), data_factory(config.data, run / DATA, config.seed)
    resumes = ranks.first_then_others(partial(_resumes, config))
    with ExitStack() as stack:
        folder = None
        if ranks.is_first:
            folder = stack.enter_context(RunFolder(run))
            stack.enter_context(removed_unless_begun(folder, config.ssd.paths))
            check_free(config.ssd.paths)
        finished = _finished_step(config, folder) if resumes and folder is not None else None
        if ranks.any(finished is not None):
            text = f"finished: the newest commit is of step {finished}, train.steps is {config.train.steps}; raise it "
            print_line(console, text + "to train on")
            return 0
        config = with_mode(make_model, config, console) if ranks.n_ranks == 1 else exact_on_ranks(config, console)
        check_budget(make_model, config, console)
        if not is_off():
            machine = ranks.first_then_others(partial(calibrated, config.ssd.paths))
            machine.apply()
            print_line(console, f"this machine: {machine.line}")
        if folder is not None:
            folder.claim()
        model, batches = build(config, make_model, partial(ranks.first_then_others, make_data), stack)
        if ranks.n_ranks > 1:
            set_rank_threads(config)
            torch.manual_seed(config.seed + ranks.rank)  # what is drawn from here on differs from rank to rank
            print_line(console, ranks_line(config, ranks))
        with Engine(model, config) as engine, ranks.failing_together(), noted(commits=config.commit.at_end) as own:
            record = ValidationRecord()
            engine.track("launch", record)
            resumed = _resume(engine, console) if resumes else None
            interrupt = SharedInterrupt(own, ranks, console)
            _train(Launch(engine, config, batches, ranks, folder, console, interrupt), record, resumed is not None)
            exit_code = interrupt.exit_code
        return exit_code or (BROKEN_PIPE if is_closed(console) else 0)


@dataclass(frozen=True, slots=True)
class Launch:
    """What one launch is made of.

    Attributes:
        folder: of ``output.run``; None on ranks that leave nothing there.
    """

    engine: Engine
    config: TrainingConfig
    batches: Batches
    ranks: LaunchRanks
    folder: RunFolder | None
    console: Console
    interrupt: SharedInterrupt


def _resume(engine: Engine, console: Console) -> Resumed | None:
    """Continue from the newest commit, and print from where, and which settings differ."""
    configured = engine.config.commit.hyper_parameters == "configuration"
    resumed = engine.resume(keep_hyper_parameters=configured)
    if resumed is None:
        return None
    text = f"resumes after step {resumed.step}, from commit {resumed.number} of {resumed.created}"
    print_line(console, text)
    for change in resumed.changed:
        if change.key.startswith("optimizer.") and not configured:
            change = replace(
                change, holds='the commit\'s value holds; set commit.hyper_parameters = "configuration" for the new one'
            )
        print_line(console, f"changed since: {change}")
    return resumed


def _train(launch: Launch, record: ValidationRecord, resumed: bool) -> None:
    """All steps from here on, and what closes the run."""
    engine, config, batches, console = launch.engine, launch.config, launch.batches, launch.console
    interrupt, ranks = launch.interrupt, launch.ranks
    assert config.output is not None
    first = engine.steps
    n_parameters = n_elements(engine.model)
    print_line(console, f"{n_parameters:,} parameters; RAM budget for their states {config.memory.ram:,} bytes")
    progress = Progress(console, config.train, batches.unit)
    validate = partial(validation_loss, engine, batches, config.model.factory, interrupt, progress.validating)
    if config.train.evaluate_batches and not first:
        record.before_nats = validate()
    if interrupt.asked() or interrupt.closed():  # Nothing has begun: what lies in the folder stays as it is.
        if interrupt.asked():
            print_line(console, _kept(config, "interrupted", first, first))
        return
    numbers = batch_numbers(config, first, ranks.rank, ranks.n_ranks)
    pair = batches.batch(numbers[0]) if first < config.train.steps else None
    metrics, callbacks = _begun(launch, progress, resumed) if ranks.is_first else ([], [])
    loop = TrainingLoop(engine, config, batches, Reporter(callbacks), interrupt, record, metrics, validate, ranks)
    try:
        loop.run(RunStarted(config, Path(config.output.run), first, n_parameters, batches.unit, engine.model), pair)
    except Exception:
        if loop.ended:
            print_line(console, _kept(config, "ended by an error", engine.steps, loop.committed))
        raise
    _close_books(launch, loop)


def _begun(launch: Launch, progress: Progress, resumed: bool) -> tuple[list[StepMetrics], list[tuple[str, Callback]]]:
    """Begin in the run's folder; returns the metrics of the steps made, and whom to tell of those to come."""
    folder, engine, config = launch.folder, launch.engine, launch.config
    assert folder is not None and config.output is not None
    others = [(reference, made_callback(reference)) for reference in config.output.callbacks]
    set_aside = folder.begin(config, engine.run_id, resumes=resumed)
    kept = kept_metrics(folder.path, engine.steps, config.output.log)
    for note in (set_aside, kept.note):
        if note is not None:
            print_line(launch.console, note)
    files = [MetricsFile(folder.path, FORMATS[name], kept.metrics) for name in config.output.log]
    return kept.metrics, [*(("", callback) for callback in (*files, progress)), *others]


def _close_books(launch: Launch, loop: TrainingLoop) -> None:
    """Summary, picture, and what is kept of a run that a signal has ended."""
    engine, config, console, folder = launch.engine, launch.config, launch.console, launch.folder
    summary = loop.summary()
    peaks, page_waits, rank_waits = (
        launch.ranks.all(float(value))
        for value in (summary.process_peak_bytes, summary.stats.wait_s, summary.rank_wait_s)
    )
    uses = [RankUse(int(peak), *waits) for peak, *waits in zip(peaks, page_waits, rank_waits, strict=True)]
    asked = launch.interrupt.asked()
    if folder is None:
        return
    print_rows("Run", summary_rows(summary, uses), console)
    model = config.model.factory.rpartition(":")[2]
    title = f"{'/'.join(folder.path.parts[-2:])}: {model}, {summary.n_parameters / 1e6:.1f}M parameters"
    save_loss_curve(folder.path / CURVE, loop.metrics, summary, title)
    validated = summary.after_nats is not None
    if validated:
        folder.note_validation(engine.steps)
    print_line(console, f"metrics, configuration and loss curve are in {folder.path}")
    if asked:
        print_line(console, _kept(config, "interrupted", engine.steps, loop.committed, validated=validated))


def _kept(config: TrainingConfig, how: str, steps: int, committed: int, *, validated: bool = False) -> str:
    """What is kept of a run that has ended early, and how it continues.

    Args:
        how: it has ended.
        validated: whether the steps made are.
    """
    if not steps:
        return f"{how} before the first step"
    said, where = f"{how} after step {steps}", config.ssd.paths[0]
    if not committed:
        return f"{said}; nothing is committed (commit.at_end is false); the same command starts over"
    if committed < steps:
        return f"{said}; the same command resumes after step {committed}, committed in {where}"
    if steps < config.train.steps:
        to_do = "the same command resumes from there"
    elif config.train.evaluate_batches and not validated:
        to_do = "the same command makes the validation that is missing"
    else:
        to_do = "it was the last one, nothing is left to do"
    return f"{said}, which is committed in {where}; {to_do}"
