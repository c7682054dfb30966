"""How long torch's kernels take: from rates, or by timing each of them once on this machine.

    RatedKernels   floating-point operations (torch's own formulas), or the bytes that a kernel without any touches, at
    given rates
    TimedKernels   each kernel of each shape is run here, on tensors of its own, and what it took is remembered

Kernels come as torch dispatches them, with tensors of torch's meta device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import cache
from typing import Any, Final

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from offload.forecast.timed_runs import counted, timed_runs, told_s
from offload.profiling.live_storages import tensors_in

_ATEN: Final = torch.ops.aten
FUSED: Final = frozenset({_ATEN._fused_adam_, _ATEN._fused_adamw_, _ATEN._fused_sgd_})
_UNTOUCHED: Final = frozenset(
    {_ATEN.empty, _ATEN.empty_like, _ATEN.empty_strided, _ATEN.new_empty, _ATEN.new_empty_strided}
)
_ATTENTION: Final = _ATEN._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD: Final = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward
#: Written before each run: in a step a kernel finds little of what it reads in the processor's caches, which hold no
#: more than this.
_FLUSH_BYTES: Final = 48 << 20
#: Part of the free memory that the tensors of one kernel may take.
_MEMORY_SHARE: Final = 0.5


class RatedKernels:
    """Kernels at rates.

    Args:
        flops_per_s: of those that have floating-point operations to speak of.
        bytes_per_s: read and written by the others.
        update_bytes_per_s: read and written by an optimizer's updates, where they are made in other memory; None:
            likewise.

    Attributes:
        updates_on_device: whether updates that come now are made where everything else is.
    """

    def __init__(self, flops_per_s: float, bytes_per_s: float, update_bytes_per_s: float | None = None) -> None:
        self._flops_per_s = flops_per_s
        self._bytes_per_s = bytes_per_s
        self._update_bytes_per_s = update_bytes_per_s or bytes_per_s
        self.updates_on_device = False

    def seconds(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> float:
        """Of one call of ``func``, which returned ``result``."""
        packet = func._overloadpacket
        if packet in FUSED:
            return 2 * bytes_of(args) / (self._bytes_per_s if self.updates_on_device else self._update_bytes_per_s)
        flops = flops_of(packet, args, kwargs, result)
        if flops is not None:
            return flops / self._flops_per_s
        return 0.0 if packet in _UNTOUCHED or is_view(func) else bytes_of((args, kwargs, result)) / self._bytes_per_s


class TimedKernels:
    """Kernels as they are on this machine's CPU, with torch's present number of threads.

    Args:
        otherwise: asked about kernels that cannot be run here: their tensors would not fit in this machine's free
            memory, or they do not take the values they would be run with.
        progress: called with the number of kernels after each that was timed.

    Attributes:
        n_timed: kernels that were timed. spent_s: what that took. n_others: those asked of ``otherwise``.
    """

    def __init__(self, otherwise: RatedKernels, progress: Callable[[int], None] = lambda n_timed: None) -> None:
        self._otherwise = otherwise
        self._progress = progress
        self._known: dict[Hashable, float] = {}
        self.n_timed = 0
        self.n_others = 0
        self.spent_s = 0.0
        self._ran_s = self._on_processor_s = 0.0

    @property
    def undisturbed_share(self) -> float:
        """Of the time of those runs that count, the share in which the thread that runs them had a processor. A machine
        that is so busy with something else that no other runs were to be had gives it less."""
        return min(1.0, self._on_processor_s / self._ran_s) if self._ran_s else 1.0

    def seconds(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> float:
        """Of one call of ``func``, which returned ``result``."""
        if func._overloadpacket in _UNTOUCHED:
            return 0.0
        key = self._key(func, args, kwargs)
        if key not in self._known:
            fits = bytes_of((args, kwargs, result)) < _MEMORY_SHARE * psutil.virtual_memory().available
            took_s = self._timed(func, args, kwargs) if fits else None
            self.n_timed += took_s is not None
            self.n_others += took_s is None
            self._known[key] = self._otherwise.seconds(func, args, kwargs, result) if took_s is None else took_s
        return self._known[key]

    def _key(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
        values, structure = tree_flatten((args, dict(kwargs)))
        return func, str(structure), tuple(_told_apart(value) for value in values)

    def _timed(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float | None:
        began_s = time.perf_counter()
        with _disable_current_modes(), torch.no_grad():
            real_args, real_kwargs = tree_map(_real, (args, dict(kwargs)))
            try:
                func(*real_args, **real_kwargs)
            except (RuntimeError, ValueError, IndexError, NotImplementedError):
                # It wants other values than ones, or has no CPU kernel. Rated by flops and bytes instead, and counted:
                # the table says how many kernels were.
                return None
            flush = torch.zeros(_FLUSH_BYTES // 4)
            made = timed_runs(lambda: func(*real_args, **real_kwargs), lambda: flush.add_(1.0))
        self._ran_s += sum(one.took_s for one in counted(made))
        self._on_processor_s += sum(one.on_processor_s for one in counted(made))
        self._progress(self.n_timed + 1)
        self.spent_s += time.perf_counter() - began_s
        return told_s(made)


def _told_apart(value: Any) -> Hashable:
    """What of an argument a kernel's time depends on; one generator of random numbers is as fast as another."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    return "generator" if isinstance(value, torch.Generator) else str(value)


def _real(value: Any) -> Any:
    """Bytes for a meta tensor, at the same strides: ones, which are numbers that every kernel takes, and indices that
    exist."""
    if isinstance(value, Tensor):
        numel = (
            1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            if value.numel()
            else 0
        )
        return torch.ones(numel, dtype=value.dtype, device="cpu").as_strided(value.shape, value.stride())
    return torch.device("cpu") if isinstance(value, torch.device) else value


Kernels = RatedKernels | TimedKernels


class CostMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what the kernels dispatched while it is on would take, one after the other.

    Attributes:
        seconds: of all so far.
    """

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds = 0.0
        self._kernels = kernels

    def updates_are_made(self, *, on_device: bool) -> None:
        """Say where updates that come from now on are made; kernels that are timed here are all made here."""
        if isinstance(self._kernels, RatedKernels):
            self._kernels.updates_on_device = on_device

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count one kernel."""
        named = kwargs or {}
        # They change their arguments in place, and not all of them exist on meta.
        result = None if func._overloadpacket in FUSED else func(*args, **named)
        self.seconds += self._kernels.seconds(func, args, named, result)
        return result


def flops_of(packet: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int | None:
    """Floating-point operations of a kernel; None of one that has none to speak of."""
    if packet is _ATTENTION:
        return int(sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape))  # type: ignore[no-untyped-call]
    if packet is _ATTENTION_BACKWARD:
        return int(sdpa_backward_flop_count(args[0].shape, args[1].shape, args[2].shape, args[3].shape))  # type: ignore[no-untyped-call]
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result))
    return None


def bytes_of(values: Any) -> int:
    """Bytes of all tensors in a structure."""
    return sum(t.numel() * t.element_size() for t in tensors_in(values))


@cache
def is_view(func: Any) -> bool:
    """Whether a kernel returns its argument's bytes."""
    return any(
        returned.alias_info is not None and not returned.alias_info.is_write for returned in func._schema.returns
    )
