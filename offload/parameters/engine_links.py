"""What the binder of parameters is told when an engine begins to train with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from offload.activations.saved import SavedActivations
from optim.updater import Updater


@dataclass(frozen=True, slots=True)
class EngineLinks:
    """What a binder knows of the engine that trains with it.

    Attributes:
        root: the model.
        save_hooks: saved-tensor hooks for one call.
        structure_is_known, check_structure: says, and raises, when the model no longer has the parameters that are in
            pages.
        only_trainable: the optimizer was made from the configuration, for what was trainable then.
        trims: free pages of the heap are given back at the end of forward passes.
    """

    updater: Updater
    root: nn.Module
    save_hooks: Callable[[], Any]
    structure_is_known: Callable[[], bool]
    check_structure: Callable[[], None]
    activations: SavedActivations | None
    only_trainable: bool
    trims: bool
