"""The torch optimizer that a user asks for, as a template: its class, groups and options; it never makes a step
itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch import nn

from offload.config import Config, OptimizerConfig
from offload.config_loading import load_optimizer
from optim.unit import Slot

#: Makes a torch optimizer over the parameters given to it; its class, groups and options are taken over.
OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OptimizerLike = OptimizerFactory | OptimizerConfig | Mapping[str, Any] | None

_TORCH_CLASSES: Final[dict[str, Callable[..., torch.optim.Optimizer]]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}


def template_of(optimizer: OptimizerLike, config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The torch optimizer that is asked for, over a model's parameters.

    Raises:
        ValueError: it is neither a factory nor a section, or the factory gives something else than a new optimizer.
    """
    if isinstance(optimizer, Mapping):
        optimizer = load_optimizer(optimizer)
    if optimizer is None or isinstance(optimizer, OptimizerConfig):
        return template_from(optimizer or config.optimizer, model)
    return _made_by(optimizer, model)


def _made_by(factory: Any, model: nn.Module) -> torch.optim.Optimizer:
    way_out = "give a factory, such as lambda p: torch.optim.AdamW(p, lr=3e-4, fused=True)"
    if not callable(factory):
        raise ValueError(f"the optimizer is a {type(factory).__name__}; {way_out}")
    try:
        inspect.signature(factory).bind([])
    except TypeError as error:
        raise ValueError(
            f"the optimizer's factory cannot be called with the model's parameters: {error}; {way_out}"
        ) from error
    except ValueError:  # It has no signature, as some of C.
        pass
    made = factory(list(model.parameters()))
    if not isinstance(made, torch.optim.Optimizer):
        raise ValueError(
            f"the optimizer's factory returns a {type(made).__name__}, not a torch.optim.Optimizer; {way_out}"
        )
    theirs = set(map(id, model.parameters()))
    for parameter in (
        parameter for group in made.param_groups for parameter in group["params"] if id(parameter) not in theirs
    ):
        raise ValueError(f"the optimizer has a parameter of shape {tuple(parameter.shape)} that is not the model's")
    if made.state:
        raise ValueError(
            f"the {type(made).__name__} that the optimizer's factory returns has states already; load them into the "
            "engine's optimizer by load_state_dict"
        )
    return made


def optimized_by(template: torch.optim.Optimizer) -> set[int]:
    """``id`` of every parameter that a torch optimizer has."""
    return {id(parameter) for group in template.param_groups for parameter in group["params"]}


def assign_groups(template: torch.optim.Optimizer, slots: Mapping[torch.Tensor, Iterable[Slot]]) -> None:
    """Note in each parameter's slots which group of the template it is in. Ones that no gradient is ever of have
    none."""
    for number, group in enumerate(template.param_groups):
        for parameter in group["params"]:
            for slot in slots.get(parameter, ()):
                slot.group = number


def template_from(section: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The torch optimizer that an optimizer section describes, over a model's trainable parameters."""
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            free = any((parameter.ndim < 2) if key == "1d" else (key in name) for key in section.no_decay)
            (undecayed if free else decayed).append(parameter)
    # Of a model without trainable parameters (a teacher, the base of adapters to come) there is one, empty group.
    groups: list[dict[str, Any]] = [{"params": decayed}] if decayed or not undecayed else []
    if undecayed:
        groups.append({"params": undecayed, "weight_decay": 0.0})
    common: dict[str, Any] = {"lr": section.lr, "weight_decay": section.weight_decay, "fused": True}
    if section.name == "sgd":
        common.update(momentum=section.momentum, nesterov=section.nesterov)
    else:
        common.update(betas=section.betas, eps=section.eps)
    return _TORCH_CLASSES[section.name](groups, **common)
