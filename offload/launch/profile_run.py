"""`offload profile FILE`: train a few steps of a configuration and show what they do to memory.

The steps are of a run of its own, from the beginning: its page files and the data's cache lie in temporary folders
beside those of ``ssd.paths``, on the same disks, and are removed at the end. A run that the configuration has made is
neither read nor changed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from offload.config import Config, TrainingConfig
from offload.console.tables import print_line, print_rows
from offload.engine import Engine
from offload.factories import data_factory, model_factory
from offload.launch.batches import Batches, batch_numbers
from offload.launch.loop import learning_rate, one_step
from offload.launch.setup import build, check_budget, with_mode
from offload.profiling.profile import WRITTEN, Profile, check_profile_folder, check_steps
from offload.profiling.summary import summary_rows

#: Enough to make a plan, to follow it while its ops are timed, and to follow the one that is made with those times.
WARM_UP_STEPS: Final = 8


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A folder on the disk that ``path`` is on, or would be; removed at the end with all that is in it."""
    ancestor = next(folder for folder in path.absolute().parents if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.profile-", dir=ancestor) as folder:
        yield Path(folder)


def profile_run(config: Config, steps: int, to: Path, console: Console) -> dict[str, Any]:
    """Train `WARM_UP_STEPS` steps, then ``steps`` more, and write their profile into ``to``; returns its summary.

    Raises:
        ConfigError: ``steps`` is not positive, a section is missing, or a factory cannot be called.
        RunDirectoryError: ``to`` holds something other than a profile; nothing was changed.
        BudgetError: ``memory.ram`` is too small; see `offload.launch.setup.check_budget`.
        OffloadError: see `offload.Engine`. Nothing is left of the run after any error.
    """
    check_steps(steps)
    config = config.for_training("profile")
    check_profile_folder(to)
    output = config.output
    with ExitStack() as stack:
        folders = [stack.enter_context(temporary_beside(Path(path))) for path in config.ssd.paths]
        paths = [str(folder / "pages") for folder in folders]
        config = config.model_copy(update={"ssd": config.ssd.model_copy(update={"paths": paths}), "output": None})
        make_model, make_data = model_factory(config.model), data_factory(config.data, folders[0] / "data", config.seed)
        config = with_mode(make_model, config, console)
        check_budget(make_model, config, console)
        model, batches = build(config, make_model, make_data, stack)
        with Engine(model, config) as engine:
            title = config.model.factory if output is None else output.run
            profile = _profile(engine, config, batches, steps, to, title, console)
    print_rows("Profile", summary_rows(profile.summary), console)
    print_line(console, f"{WRITTEN} {to}")
    return profile.summary


def _profile(
    engine: Engine, config: TrainingConfig, batches: Batches, steps: int, to: Path, title: str, console: Console
) -> Profile:
    schedule = torch.optim.lr_scheduler.LambdaLR(engine.optimizer, learning_rate(config.train))

    def step() -> None:
        one_step(engine, batches, config.model.factory, engine.steps, batch_numbers(config, engine.steps))
        schedule.step()
        engine.save_if_due()

    for _ in range(WARM_UP_STEPS):
        step()
    print_line(console, f"{WARM_UP_STEPS} steps made; recording {steps} more")
    with engine.profile(to, title) as profile:
        for _ in range(steps):
            step()
    return profile
