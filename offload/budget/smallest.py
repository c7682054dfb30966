"""The smallest budget that a model can be trained in, before any of it is built: from a build on torch's meta device.

On meta, parameters have shapes and no bytes. The modules are watched as `deferred_init` watches them, so the units are
those of the real model. Not seen are views of parameters that the model's own code keeps; what they need beside the
largest unit shows in the first step.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from offload.budget.need import BudgetNeed, budget_need, shapes_of
from offload.config import ConfigError
from offload.config_loading import ConfigLike, load_config
from offload.cutting.cuttable import row_blocks
from offload.factories import described
from offload.modules.checks import check_parameters
from offload.parameters.grouping import Group, groups_of
from offload.parameters.module_watch import named_parts, watching_modules
from offload.parameters.optimizer_template import OptimizerLike, optimized_by, template_of
from optim.rules import rule_for


class FactoryError(ValueError):
    """A model's factory that cannot be called on torch's meta device; says why."""


def smallest_budget(factory: Callable[[], nn.Module], optimizer: OptimizerLike, config: ConfigLike) -> BudgetNeed:
    """Find the smallest ``memory.ram`` that builds (under `deferred_init`) and trains a model, without building it.

    The factory is called once, on torch's meta device; torch's, NumPy's and Python's global random generators are
    restored afterwards, other side effects are not undone.

    Args:
        factory: makes the model.
        optimizer: as for `offload.prepare`: a factory, an optimizer section, or None for the configuration's.
        config: its ``memory.page``, ``model.dtype``, ``update`` and ``optimizer`` count; its ``memory.ram`` only for
            ``next_bytes`` of the result.

    Raises:
        FactoryError: the factory fails on meta, or makes parameters elsewhere.
        ConfigError, ValueError: something else does not fit together.
    """
    config = load_config(config)
    if isinstance(factory, nn.Module) or not callable(factory):
        raise ValueError(
            f"the model's factory is {described(factory)}; give a callable that builds the model, such as lambda: "
            "Model(...)"
        )
    model, built, blocks = _built_on_meta(factory)
    check_parameters(model, "meta")
    template = template_of(optimizer, config, model)
    kept = {id(parameter) for parameter in model.parameters()}
    dropped = [group for group in built if not any(id(parameter) in kept for _, parameter in group)]
    units = shapes_of(model, optimized_by(template), dropped, blocks)
    n_states = len(rule_for(template).state_names)
    need = budget_need(units, n_states, config)
    if need.smallest_bytes >= config.memory.ram:
        return need
    return replace(need, next_bytes=budget_need(units, n_states, config, config.memory.ram).smallest_bytes)


def _built_on_meta(factory: Callable[[], nn.Module]) -> tuple[nn.Module, list[Group], dict[int, int]]:
    """The model, all parameters that `deferred_init` pages while it is built, also of modules that the model does not
    keep, and which of them can be cut (`row_blocks`)."""
    seen: set[int] = set()
    blocks: dict[int, int] = {}
    early: list[Group] = []

    def built(parent: nn.Module, name: str, child: nn.Module) -> None:
        # At once: the rest of a model that is built elsewhere may be larger than memory.
        _check_meta(child)
        parts = list(named_parts(f"{type(parent).__name__}.{name}", child))
        early.extend(groups_of(parts, seen))
        blocks.update((key, block) for key, block in row_blocks(parts).items() if key not in blocks)

    with _random_numbers_kept(), watching_modules("smallest_budget", built):
        try:
            with torch.device("meta"):
                model = factory()
        except (FactoryError, ConfigError):
            raise
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise FactoryError(
                f"the model cannot be built on torch's meta device: {type(error).__name__}: {reason}"
            ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model's factory returns a {type(model).__name__}, not a torch.nn.Module")
    _check_meta(model)
    return model, early, {**row_blocks(model.named_modules()), **blocks}


def _check_meta(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.device.type != "meta":
            raise FactoryError(
                f"the model cannot be built on torch's meta device: {name} is made on {parameter.device} all the same"
            )


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """The global random numbers that follow the block are those that would have come without it."""
    of_torch, of_numpy, of_python = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(of_torch)
        np.random.set_state(of_numpy)
        random.setstate(of_python)
