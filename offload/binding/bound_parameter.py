"""Bound parameters: paged parameters that are views of their pages between uses, too, so that torch need not ask.

Torch's functions take them as they take ordinary parameters. What reaches past these functions, or past torch's count
of writes, is overridden here: it turns the parameter into a paged one first, of which every use is looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from offload.parameters.paged_parameter import PagedParameter
from offload.parameters.tensor_functions import no_torch_function

_TENSOR: Any = Tensor  # Its attributes are descriptors here, which its type stub does not say.

#: Methods that give out memory, or give the parameter other memory or another shape, or that change what it is to
#: autograd.
_LOOKED_AT: Final = (
    "numpy", "data_ptr", "untyped_storage", "storage", "_typed_storage", "__array__", "__dlpack__", "apply_", "map_",
    "map2_", "share_memory_", "requires_grad_", "register_post_accumulate_grad_hook", "detach_", "resize_",
    "resize_as_", "t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_", "as_strided_", "set_",
    "swap_", "rename_",
)  # fmt: skip
#: The same of attributes.
_ATTRIBUTES: Final = ("data", "grad", "requires_grad")


class BoundParameter(PagedParameter):
    """A paged parameter that is bound between uses. Made from a paged one in place, and turned back into one."""

    __torch_function__: ClassVar[Any] = torch._C._disabled_torch_function_impl


def _method(name: str) -> Callable[..., Any]:
    def looked_at(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._place.binder.bindings.look_at(self)
        return getattr(self, name)(*args, **kwargs)

    looked_at.__name__ = name
    return looked_at


def _attribute(name: str) -> property:
    def read(self: Any) -> Any:
        self._place.binder.bindings.look_at(self)
        return getattr(self, name)

    def write(self: Any, value: Any) -> None:
        self._place.binder.bindings.look_at(self)
        setattr(self, name, value)

    return property(read, write)


def _gradient() -> property:
    def read(self: Any) -> Tensor | None:
        with no_torch_function():
            return self._place.gradient.get(self)  # type: ignore[no-any-return]

    def write(self: Any, value: Tensor | None) -> None:
        with no_torch_function():
            self._place.gradient.set(self, value)

    return property(read, write)


for _name in _LOOKED_AT:
    if hasattr(Tensor, _name):
        setattr(BoundParameter, _name, _method(_name))
for _name in _ATTRIBUTES:
    setattr(BoundParameter, _name, _attribute(_name))
setattr(BoundParameter, "grad", _gradient())  # noqa: B010 - the stub has an attribute
setattr(  # noqa: B010
    BoundParameter, "requires_grad", property(_TENSOR.requires_grad.__get__, _attribute("requires_grad").fset)
)
