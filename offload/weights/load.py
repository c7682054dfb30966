"""Weights of a checkpoint into a model that is there, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from torch import Tensor, nn

from offload.console.byte_progress import byte_progress
from offload.cutting.cut_parameter import CutParameter
from offload.cutting.make_cut import gathered
from offload.parameters.paged_parameter import PagedParameter
from offload.sources.checkpoint_index import read_checkpoint
from offload.sources.safetensors_file import FileTensor
from offload.store.adoption import give_sources
from offload.store.page_store import PageStore
from offload.weights.matching import Naming, Wanted, match
from pagemem.process import interrupts
from pagemem.sources.source_files import SourcePiece

#: Elements that are read at a time, beside the budget.
_CHUNK_NUMEL: Final = 1 << 20


def load_weights(model: nn.Module, folder: str | Path, *, strict: bool = True) -> None:
    """Give a model the weights of a checkpoint: its parameters, in pages or ordinary, and its persistent buffers.

    The values are those that ``model.load_state_dict`` gives. Names may have or lack the base model's prefix; tied
    parameters need one of their names. Names that transformers converts are not known here: use `from_pretrained`.

    Args:
        folder: has ``model.safetensors``, or shards and their index.
        strict: whether it is an error if tensors are missing or surplus. Those of other shapes always are.

    Raises:
        ValueError: the checkpoint does not fit the model; lists every tensor. Nothing was changed.
        RuntimeError: a step is under way, and parameters have their update of it already. Nothing was changed.
        StorageError, KeyboardInterrupt: the folder has no safetensors files, or one is damaged or cannot be read, or
            Ctrl-C; what was read before stays loaded.
    """
    checkpoint = read_checkpoint(folder)
    tensors = _tensors_of(model)
    _check_materialized(tensors)
    targets = [Wanted(names, tensor.shape, tensor.dtype) for names, tensor in tensors.items()]
    found = match(targets, checkpoint.tensors, _naming(model))
    found.check(checkpoint.folder, type(model).__name__, strict=strict)
    to_read = _given_sources({tensors[target.names]: stored for target, stored in found.pairs})
    to_read = sorted(to_read, key=lambda pair: (pair[1].file.path, pair[1].offset_bytes))
    total_bytes = sum(stored.n_bytes for _, stored in to_read)
    with byte_progress(Console(stderr=True), "loading", total_bytes) as advance:
        for tensor, stored in to_read:
            interrupts.check()  # it may take long, and what was read stays loaded
            for n_bytes in _fill(tensor, stored):
                advance(n_bytes)


def _given_sources(wanted: Mapping[Tensor, FileTensor]) -> list[tuple[Tensor, FileTensor]]:
    """Have what can be read where it lies be read there when it is used; returns the rest, to be copied now."""
    store = next((store for tensor in wanted if (store := _store_of(tensor)) is not None), None)
    if store is None:
        return list(wanted.items())
    in_pages: dict[nn.Parameter, list[SourcePiece]] = {
        tensor: stored.pieces(tensor.dtype)
        for tensor, stored in wanted.items()
        if isinstance(tensor, (PagedParameter, CutParameter)) and _store_of(tensor) is store
    }
    taken = {id(tensor) for tensor in in_pages} - {id(tensor) for tensor in give_sources(store, in_pages)}
    return [(tensor, stored) for tensor, stored in wanted.items() if id(tensor) not in taken]


def _store_of(tensor: Tensor) -> PageStore | None:
    first = tensor.slices[0] if isinstance(tensor, CutParameter) else tensor
    owner = first._place.binder.owner if isinstance(first, PagedParameter) else None
    return owner if isinstance(owner, PageStore) else None


def _tensors_of(model: nn.Module) -> dict[tuple[str, ...], Tensor]:
    """Parameters and persistent buffers with all their names, in order."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        kept = [
            *module._parameters.items(),
            *(
                (key, buffer)
                for key, buffer in module._buffers.items()
                if key not in module._non_persistent_buffers_set
            ),
        ]
        for key, tensor in kept:
            if tensor is not None:
                names.setdefault(id(tensor), []).append(f"{prefix}.{key}" if prefix else key)
                tensors[id(tensor)] = tensor
    return {tuple(names[number]): tensor for number, tensor in tensors.items()}


def _check_materialized(tensors: dict[tuple[str, ...], Tensor]) -> None:
    for names, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(
                f"{names[0]} is on meta, so there is nothing to load into; give the model to offload.prepare first"
            )


def _naming(model: nn.Module) -> Naming:
    """What transformers' models say of their names; of others, nothing."""
    return Naming(
        prefix=getattr(model, "base_model_prefix", ""),
        may_lack=tuple(getattr(model, "_keys_to_ignore_on_load_missing", None) or ()),
        may_add=tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
    )


def _fill(tensor: Tensor, stored: FileTensor) -> Iterator[int]:
    """Copy a stored tensor in parts; yields the bytes of each."""
    with torch.no_grad(), gathered([tensor]):
        values = tensor.detach()
        if not values.is_contiguous():
            values.copy_(stored.read(tensor.dtype).view(stored.shape))
            yield stored.n_bytes
            return
        flat = values.view(-1)
        for begin in range(0, tensor.numel(), _CHUNK_NUMEL):
            end = min(begin + _CHUNK_NUMEL, tensor.numel())
            flat[begin:end].copy_(stored.read(tensor.dtype, begin, end))
            yield (end - begin) * stored.dtype.itemsize
