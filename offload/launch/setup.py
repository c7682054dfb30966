"""What `offload launch` and `offload profile` do before there is an engine: check the budget, build model and data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from rich.console import Console
from torch import nn

from offload.budget.verdict import verdict_of
from offload.choosing.update_choice import choose_updates
from offload.config import Config, TrainingConfig
from offload.console.tables import print_line
from offload.factories import calls_of
from offload.forecast.report import shown
from offload.launch.batches import Batches
from offload.machine.facts import available_here
from offload.store.deferred_init import deferred_init


def check_budget(make_model: Callable[[], nn.Module], config: Config, console: Console) -> None:
    """Make sure that the model can be trained here before anything is built, as `offload.budget.verdict` decides.

    A model that cannot be built on torch's meta device is checked while it is built; the console says so.

    Raises:
        BudgetError: it cannot; names what is too small and, of ``memory.ram``, the smallest that works.
    """
    verdict = verdict_of(config, make_model, available_here(config))
    if verdict.need is None:
        text = f"memory.ram is checked only while the model is built, unit by unit: {verdict.unknown}"
        print_line(console, text)
    verdict.check()


def with_mode(make_model: Callable[[], nn.Module], config: TrainingConfig, console: Console) -> TrainingConfig:
    """The configuration with the mode of updates that "auto" stands for, which the console says, with why."""
    if config.update.mode != "auto":
        return config
    with shown(console, "updates") as progress:
        chosen = choose_updates(config, make_model, progress=progress)
    print_line(console, f"updates: {chosen.update.said}")
    return chosen


def exact_on_ranks(config: TrainingConfig, console: Console) -> TrainingConfig:
    """The configuration with exact updates where "auto" is asked for: several ranks have no others yet."""
    if config.update.mode != "auto":
        return config
    made = config.update.chosen("exact", "exact (auto: of several ranks)")
    print_line(console, f"updates: {made.said}")
    return config.model_copy(update={"update": made})


def build(
    config: TrainingConfig, make_model: Callable[[], nn.Module], make_data: Callable[[], Any], stack: ExitStack
) -> tuple[nn.Module, Batches]:
    """Set threads and seed, make the data, then the model in pages.

    Args:
        stack: closes the model's pages, where an engine has not done so.

    Raises:
        ConfigError: a factory fails, or the data lack a method.
        OffloadError: see `offload.deferred_init`.
    """
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    torch.manual_seed(config.seed)
    batches = Batches(make_data(), config.data.factory, config.train)
    with deferred_init(config) as store, calls_of("model.factory", config.model.factory):
        stack.callback(store.close)  # where Ctrl-C comes before there is an engine, which closes it, too
        return make_model(), batches
