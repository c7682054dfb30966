"""Which updates `update.mode = "auto"` stands for: the ones whose steps are forecast to be quicker.

A step is rehearsed and simulated in both modes (`offload.forecast.rehearsal`), by the same kernels' times and the same
rates of the disk. Where lock-free updates cannot be made, or nothing can be forecast (as on a machine that other
programs keep busy), updates are exact, and the choice says why. A run that goes on from a commit keeps the mode it was
begun with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Literal, TypeVar

from torch import nn

from offload.budget.smallest import smallest_budget
from offload.config import Config
from offload.forecast.forecast import predicted
from offload.forecast.kernels import CostMode, Kernels, TimedKernels
from offload.forecast.rates import Rates, kernels_of, rates_of, threads_of
from offload.forecast.rehearsal import rehearsed
from offload.forecast.timed_runs import UNDISTURBED
from offload.machine.calibration import calibrated
from offload.parameters.optimizer_template import OptimizerLike
from pagemem.durable.commit_folder import CommitFolder
from pagemem.errors import CommitError, OffloadError

AnyConfig = TypeVar("AnyConfig", bound=Config)
Mode = Literal["exact", "lock-free"]
_MODES: Final[tuple[Mode, ...]] = ("exact", "lock-free")
Progress = Callable[[str], None]

#: Lock-free steps have to be forecast as so much quicker, as exact ones have plain PyTorch's bits and no late updates.
WORTH_IT: Final = 0.97


def choose_updates(
    config: AnyConfig,
    make_model: Callable[[], nn.Module] | None,
    optimizer: OptimizerLike = None,
    rates: Rates | None = None,
    progress: Progress = lambda stage: None,
) -> AnyConfig:
    """The configuration with the mode that "auto" stands for; ``update.said`` says why, with both forecasts.

    Args:
        make_model: called on torch's meta device; None: the model is not known yet.
        optimizer: as for `offload.Engine`.
        rates: of the machine; None: this one's, with its disks as they were measured.
    """
    seconds: dict[Mode, float] = {}
    kept = _committed_mode(config)
    if kept is not None:
        return _chosen(config, kept, seconds, "as the commits in ssd.paths were made")
    refused = _refused(config, make_model, optimizer)
    if make_model is None or refused:
        return _chosen(config, "exact", seconds, refused)
    try:
        rates = rates or disk_rates(config)
        kernels = kernels_of(rates, lambda n_timed: progress(f"a step, kernel by kernel: {n_timed} timed"))
        for mode in _MODES:
            progress(f"a step without bytes, {mode} updates")
            seconds[mode] = _step_s(_with_mode(config, mode), make_model, optimizer, rates, kernels)
    except (OffloadError, OSError) as error:
        return _chosen(config, "exact", seconds, f"nothing more can be forecast: {_first_line(error)}")
    share = kernels.undisturbed_share if isinstance(kernels, TimedKernels) else 1.0
    if share < UNDISTURBED:
        busy = f"which is too uncertain: kernels had a processor for {share:.0%} of the time in which they were timed"
        return _chosen(config, "exact", seconds, f"{busy}, as other programs compute on this machine")
    quicker: Mode = "lock-free" if seconds["lock-free"] < WORTH_IT * seconds["exact"] else "exact"
    return _chosen(config, quicker, seconds, "")


def _refused(config: Config, make_model: Callable[[], nn.Module] | None, optimizer: OptimizerLike) -> str:
    """Why updates have to be exact, whatever that takes; empty where they need not."""
    if config.device != "cpu":
        return f'device is "{config.device}", for which updates are exact'
    if make_model is None or config.train is None or config.train.seq is None:
        return "to forecast a step takes train.batch and train.seq, and the model"
    try:
        smallest_budget(make_model, optimizer, _with_mode(config, "lock-free")).check(config.memory.ram)
    except (OffloadError, ValueError) as error:
        return _first_line(error)
    return ""


def _step_s(
    config: Config, make_model: Callable[[], nn.Module], optimizer: OptimizerLike, rates: Rates, kernels: Kernels
) -> float:
    train = config.train
    assert train is not None
    assert train.seq is not None
    with threads_of(config), rehearsed(make_model, config, CostMode(kernels), rates, optimizer) as engine:
        engine.rehearse(train.batch, train.seq)
        return predicted(engine, rates, kernels)[0].step_s


def _chosen(config: AnyConfig, mode: Mode, seconds: Mapping[Mode, float], reason: str) -> AnyConfig:
    found = ", ".join(f"{tried} {step_s:.3f} s" for tried, step_s in seconds.items())
    said = [*([f"a step is forecast to take {found}"] if found else []), *([reason] if reason else [])]
    return config.model_copy(update={"update": config.update.chosen(mode, f"{mode} (auto: {'; '.join(said)})")})


def _with_mode(config: Config, mode: Mode) -> Config:
    return config.model_copy(update={"update": config.update.chosen(mode, "")})


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0]


def disk_rates(config: Config) -> Rates:
    """Rates of this machine, with its disks as they were measured once (`offload.machine.calibration`)."""
    return rates_of(config, here=calibrated(config.ssd.paths))


def _committed_mode(config: Config) -> Mode | None:
    """Of the newest commit that there is to go on from; None without one."""
    commits = CommitFolder(Path(config.ssd.paths[0]))
    try:
        numbers = commits.numbers()
        mode = commits.read(numbers[-1]).state["config"]["update"]["mode"] if numbers else None
    except (CommitError, KeyError):
        return None  # whoever resumes from it says what is wrong with it
    return None if mode is None else "lock-free" if mode == "lock-free" else "exact"
