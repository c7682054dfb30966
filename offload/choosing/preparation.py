"""What a program calls first: `prepare` for a training loop of one's own, `initialize` for a whole engine, and
`deferred_init` before both. With ``update.mode = "auto"`` they choose the mode by a forecast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from offload.choosing.copied_model import copied_to_meta
from offload.choosing.update_choice import choose_updates
from offload.config import Config
from offload.config_loading import ConfigLike, load_config
from offload.engine import Engine
from offload.factories import model_factory
from offload.parameters.optimizer_template import OptimizerLike
from offload.store.deferred_init import built_into, store_of
from offload.store.page_store import PageStore
from optim.optimizer import PagedOptimizer


def initialize(model: nn.Module, config: ConfigLike, optimizer: OptimizerLike = None) -> Engine:
    """An engine around ``model``; see `Engine` for arguments and errors."""
    return Engine(model, _resolved(model, load_config(config), optimizer), optimizer)


def prepare(model: nn.Module, optimizer: OptimizerLike, config: ConfigLike) -> tuple[nn.Module, PagedOptimizer]:
    """The same model, its parameters now paged, and its optimizer, for your own loop: forward, ``loss.backward()``,
    ``optimizer.step()``. Close ``optimizer.engine`` at the end."""
    engine = initialize(model, config, optimizer)
    return model, engine.optimizer


@contextmanager
def deferred_init(config: ConfigLike) -> Iterator[PageStore]:
    """Page the parameters of every module built inside the block, right after its constructor.

    Give the finished model to `offload.prepare` or `offload.initialize` with the same configuration. Pages of modules
    that are built but not part of that model are freed then. If the block raises, or leaves nothing in pages, the store
    is closed; to discard a model without making an engine, call ``close()`` of the store that the block yields.

    Modules that are built on meta wait: their parameters go to pages when they are set, as transformers'
    ``from_pretrained`` does. What that reads from safetensors files stays there until it is changed. Modules that other
    threads build are left alone.

    With ``update.mode = "auto"`` the mode is chosen now, for the model that ``model.factory`` names; where the
    configuration names none, updates are exact.

    Raises:
        BudgetError: a module's parameters do not fit in the budget; the error proposes the smallest budget for what has
            been built so far. `offload.smallest_budget` covers the whole model.
        RunDirectoryError: a page-file path is unusable.
        RuntimeError: another `deferred_init` block is open.
        ValueError: a parameter is of a kind that pages cannot hold.
        ImportError, StorageError: transformers loads a checkpoint in another way than is known here, a pickle, say.
    """
    named = _named(load_config(config))
    with built_into(lambda: PageStore(named)) as store:
        yield store


def _named(config: Config) -> Config:
    """With the mode for the model that a configuration names."""
    if config.update.mode != "auto":
        return config
    named = config.model is not None and config.model.has_factory
    return choose_updates(config, model_factory(config.model) if named and config.model is not None else None)


def _resolved(model: nn.Module, config: Config, optimizer: OptimizerLike) -> Config:
    """With the mode for a model that is there; one that is in pages has it from `deferred_init`."""
    if config.update.mode != "auto" or not isinstance(model, nn.Module):
        return config
    store = store_of(model)
    if store is None:
        return choose_updates(config, lambda: copied_to_meta(model), optimizer)
    if store.config.update.mode == "auto":
        return choose_updates(config, None)
    return config.model_copy(update={"update": store.config.update})
