"""Building a model of any size within the RAM budget.

Under `deferred_init` the parameters of each module move to pages as soon as its constructor is over, which is when it
is registered in its parent. Values are drawn by the module's own code with the global generator, so they are the bits
that plain construction gives; later initialisation of paged parameters (``model.apply(init)``, ``p.data.normal_()``)
works as on ordinary ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn
from torch.nn.parameter import is_lazy

from offload.config_loading import ConfigLike, load_config
from offload.heap import large_blocks_mapped
from offload.modules.checks import check_values
from offload.parameters.module_watch import named_parts, watching_modules
from offload.parameters.paged_parameter import PagedParameter
from offload.parameters.tensor_functions import among
from offload.store.page_store import PageStore
from offload.store.set_later import SetLater


def deferred_init(config: ConfigLike) -> AbstractContextManager[PageStore]:
    """As `offload.deferred_init`, with the mode of updates that the configuration names ("auto": exact)."""
    return built_into(lambda: PageStore(load_config(config)))


@contextmanager
def built_into(make_store: Callable[[], PageStore]) -> Iterator[PageStore]:
    """What `deferred_init` does, for a store that the caller makes."""

    def built(parent: nn.Module, name: str, child: nn.Module) -> None:
        store.watch_over(parent)
        later.flush()
        for path, module in named_parts(f"{type(parent).__name__}.{name}", child):
            for key, parameter in module.named_parameters(recurse=False):
                if not is_lazy(parameter) and not store.awaits_values(parameter):
                    check_values(f"{path}.{key}", parameter, store.parts.device)
            store.add_module(path, module)
            store.watch_over(module)
            later.built(path, module)

    with watching_modules("deferred_init", built):
        store = make_store()
        later = SetLater(store)
        try:
            with large_blocks_mapped(), later:
                yield store
                later.flush()
                store.flush()
            if not store.index.units:
                store.close()
        except BaseException:
            store.close()
            raise


def store_of(model: nn.Module) -> PageStore | None:
    """The store that a model built under `deferred_init` lives in, or None for an ordinary one.

    Raises:
        ValueError: the model has an engine, or the store is closed: the parameters' values are gone.
    """
    parameter = next(among(PagedParameter, model.parameters()), None)
    store = None if parameter is None else parameter._place.binder.owner
    if parameter is None or not isinstance(store, PageStore):
        return None
    if store.closed:
        raise ValueError(
            f"{parameter._place.slot.name}: the engine that held this model is closed, and the model's values went "
            "with it; build the model anew, and load a state_dict() taken before, or resume() from a commit"
        )
    if store.has_engine:
        raise ValueError(
            f"{parameter._place.slot.name}: this model has an engine already; go on with that one (what initialize "
            "returned, or the optimizer's .engine), or close() it, build the model anew and prepare that"
        )
    return store
