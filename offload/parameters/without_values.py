"""Parameters in pages that have no values yet: a model built on meta leaves them, until they are loaded or initialised.

Using one is an error, whereas its pages would read as zeros. Writing one whole gives it values: ``copy_``, ``normal_``
and the like at once; what is written part by part, or through a view, is known by a pattern that is put there before
and is gone when all of it has been overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from offload.parameters.paged_parameter import PagedParameter
from offload.parameters.tensor_functions import UNCOUNTED, no_torch_function
from optim.unit import Slot

#: Functions that write all of their first tensor and read nothing of it.
_WRITE_WHOLE: Final = frozenset({"copy_", "_copy_into", "zero_", "fill_", "normal_", "uniform_"})
#: A NaN that nothing computes, by element size.
_PATTERNS: Final = {2: (torch.int16, 0x7FE5), 4: (torch.int32, 0x7FE5A5C3)}
#: Elements compared at a time.
_CHUNK_NUMEL: Final = 1 << 20


class WithoutValues:
    """The slots of one engine's parameters that have no values. Training thread only."""

    def __init__(self) -> None:
        self._filled: dict[Slot, bool] = {}  # whether the pattern was put there

    def __bool__(self) -> bool:
        return bool(self._filled)

    def __contains__(self, slot: Slot) -> bool:
        return slot in self._filled

    def add(self, slot: Slot) -> None:
        """The parameter has no values."""
        self._filled[slot] = False

    def discard(self, slots: Iterable[Slot]) -> None:
        """These parameters have values by now."""
        for slot in slots:
            self._filled.pop(slot, None)

    def check(self, slots: Iterable[Slot]) -> None:
        """Raise RuntimeError where one has no values."""
        found = [slot.name for slot in slots if slot in self._filled]
        if found:
            more = f" and {len(found) - 1} more parameters" if len(found) > 1 else ""
            raise RuntimeError(
                f"{found[0]}{more}: no values yet, the model was built on meta; load_weights, resume or initialise "
                "them first"
            )

    def guarding(
        self, func: Callable[..., Any], parameters: Sequence[PagedParameter], copying: object
    ) -> Callable[..., Any]:
        """``func``, to be called with ``parameters``, which are bound.

        Args:
            copying: whether what it gives out is copied, for a ``state_dict()``.

        Raises:
            RuntimeError: (when it is called) it uses one that has no values.
        """
        return partial(self._call, func, parameters, copying)

    def _call(
        self, func: Callable[..., Any], parameters: Sequence[PagedParameter], copying: object, *args: Any, **kwargs: Any
    ) -> Any:
        name = getattr(func, "__name__", "")
        exposes = not copying and (func in UNCOUNTED or func == Tensor.detach)
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        for place, parameter in enumerate(parameters):
            slot = parameter._place.slot
            if slot not in self._filled:
                continue
            if not exposes and not (place == 0 and in_place):
                self._look(parameter)
                self.check([slot])
            elif name not in _WRITE_WHOLE and not self._filled[slot]:
                dtype, pattern = _PATTERNS[slot.dtype.itemsize]
                parameter.detach().view(dtype).fill_(pattern)
                self._filled[slot] = True
        result = func(*args, **kwargs)
        if name in _WRITE_WHOLE:
            self.discard([parameters[0]._place.slot])
        for parameter in parameters:
            self._look(parameter)
        return result

    def _look(self, parameter: PagedParameter) -> None:
        """Take a parameter out of the list where nothing is left of the pattern."""
        slot = parameter._place.slot
        if not self._filled.get(slot):
            return
        dtype, pattern = _PATTERNS[slot.dtype.itemsize]
        flat: Tensor = parameter.detach().view(-1).view(dtype)
        if not any(bool((chunk == pattern).any()) for chunk in torch.split(flat, _CHUNK_NUMEL)):
            self.discard([slot])


def assign(parameter: nn.Parameter, values: Tensor) -> None:
    """``parameter.data = values``, also to or from meta, which torch does not do: identity and attributes stay."""
    with no_torch_function():
        if (parameter.device.type == "meta") is (values.device.type == "meta"):
            parameter.data = values
            return
        other = nn.Parameter(values, parameter.requires_grad)
        other.__class__ = parameter.__class__
        other.__dict__.update(parameter.__dict__)
        torch.utils.swap_tensors(parameter, other)  # type: ignore[no-untyped-call]
