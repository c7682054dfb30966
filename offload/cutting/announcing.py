"""Saying which weights are used next, as soon as that is known."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from offload.cutting.cut_parameter import CutParameter
from offload.parameters.paged_parameter import PagedParameter
from offload.parameters.tensor_functions import among, no_torch_function


def announce(what: nn.Module | Iterable[nn.Module | Tensor]) -> None:
    """Say which weights are used next, as soon as that is known, so that they come in while other things are computed.

    For models that choose at run time, such as mixtures of experts: call it with the experts that a gate has chosen,
    in the order in which they are used. It does not wait, changes no result, and what has no room, or is there, is left
    as it is. Training thread.

    Args:
        what: a module, or several, or parameters; those that are not in pages are passed over.

    Raises:
        StorageError: a copy that was under way failed; nothing was lost.
    """
    parts = [what] if isinstance(what, (nn.Module, Tensor)) else list(what)
    found: list[PagedParameter] = []
    for part in parts:
        for parameter in part.parameters() if isinstance(part, nn.Module) else [part]:
            found += among(PagedParameter, parameter.slices if isinstance(parameter, CutParameter) else [parameter])
    if found:
        with no_torch_function():
            binder: Any = found[0]._place.binder
            if binder.closed:
                raise binder.refusal(found[0]._place.slot.name)
            units = dict.fromkeys(parameter._place.unit for parameter in found)
            binder.driver.announce([unit.compute.id for unit in units if not unit.compute.resident])
