"""Building a model of any size within the RAM budget.

Under `deferred_init` the parameters of each module move to pages as soon as its constructor is over, which is when it
is registered in its parent. Values are drawn by the module's own code with the global generator, so they are the bits
that plain construction gives; later initialisation of paged parameters (``model.apply(init)``, ``p.data.normal_()``)
works as on ordinary ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from offload.config import Config, load_config
from offload.parameters import PagedParameter
from offload.store import PageStore
from pagemem.heap import large_blocks_mapped

_building: PageStore | None = None


@contextmanager
def deferred_init(config: Config | Mapping[str, Any] | str | Path) -> Iterator[PageStore]:
    """Page the parameters of every module built inside the block, right after its constructor.

    Give the finished model to `offload.prepare` or `offload.initialize` with the same configuration. Modules that are
    built but never used by that model give their pages back then. If the block raises, or leaves nothing in pages, the
    store is closed; a model that is never to get an engine is given up by ``close()`` of the store the block yields.

    Raises:
        BudgetError: a module's parameters do not fit in the budget. RunDirectoryError: a page-file path is unusable.
        RuntimeError: another `deferred_init` block is open.
    """
    global _building
    if _building is not None:
        raise RuntimeError("deferred_init inside deferred_init: a model has one store; leave the outer block first")
    store = _building = PageStore(load_config(config))

    def registered(_parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is not None:
            for path, module in child.named_modules():
                store.add_module(f"{name}.{path}" if path else name, module)

    handle = register_module_module_registration_hook(registered)
    try:
        with large_blocks_mapped():
            yield store
            store.flush()
        if not store.index.units:
            store.close()
    except BaseException:
        store.close()
        raise
    finally:
        handle.remove()
        _building = None


def store_of(model: nn.Module) -> PageStore | None:
    """The store that a model built under `deferred_init` lives in, or None for an ordinary one.

    Raises:
        ValueError: the store is closed: the parameters' values are gone.
    """
    for parameter in model.parameters():
        if isinstance(parameter, PagedParameter):
            store = parameter._place.binder.owner
            if not isinstance(store, PageStore):
                return None
            if store.closed:
                raise ValueError(f"{parameter._place.slot.name}: the engine that held this model is closed; build the model anew")
            return store
    return None
