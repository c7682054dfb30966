"""Has transformers' loader open safetensors files through us, so that it moves tensors that have not been read.

transformers maps a file into memory and reads ahead of what it assigns, in threads: the whole checkpoint may be in RAM
at once, beside every budget. transformers itself is never imported here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor
from torch.utils._pytree import tree_map

from offload.sources.safetensors_file import FileTensor, read_header
from offload.sources.unread import Source, UnreadTensor, read_now

#: Modules of transformers, and what is replaced there.
_LOADER: Final = "transformers.modeling_utils"
_OPENER: Final = "safe_open"
#: What keeps the loader from reading ahead of what it assigns.
_NO_THREADS: Final = "HF_DEACTIVATE_ASYNC_LOAD"
_CONVERSIONS: Final = "transformers.core_model_loading"
_CONVERSION: Final = "WeightTransform"
_COLLECT: Final = "materialize_tensors"


class OpenedFile:
    """What `safetensors.safe_open` gives for a file on the CPU, as far as transformers' loader uses it."""

    def __init__(self, path: str | Path) -> None:
        self._file = read_header(Path(path))

    def keys(self) -> list[str]:
        """Names of the tensors, in order."""
        return list(self._file.tensors)

    def metadata(self) -> Mapping[str, str]:
        """What the header says beside tensors."""
        return self._file.metadata

    def get_slice(self, name: str) -> OpenedTensor:
        """A tensor, to be cut."""
        return OpenedTensor(self._file.tensors[name])

    def get_tensor(self, name: str) -> Tensor:
        """A tensor."""
        return OpenedTensor(self._file.tensors[name])[...]

    def __enter__(self) -> OpenedFile:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class OpenedTensor:
    """What ``get_slice`` gives."""

    def __init__(self, stored: FileTensor) -> None:
        self._stored = stored

    def get_dtype(self) -> str:
        """The dtype, as safetensors names it."""
        return self._stored.kind

    def get_shape(self) -> list[int]:
        """The shape."""
        return list(self._stored.shape)

    def __getitem__(self, what: Any) -> Tensor:
        unread = UnreadTensor(Source(self._stored, self._stored.dtype))
        return unread if what is Ellipsis else unread[what]


class FilesOfTransformers:
    """Replaces the function with which transformers opens files, from `take_over` until `give_back`, and that with
    which it collects the tensors of a parameter: those that it converts or quantises are read then."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Any]] = []
        self._setting: str | None = None

    def take_over(self) -> None:
        """Once transformers is imported, and has begun to build a model. Idempotent."""
        loader, conversions = sys.modules.get(_LOADER), sys.modules.get(_CONVERSIONS)
        if self._replaced or not hasattr(loader, _OPENER):
            return
        self._setting = os.environ.get(_NO_THREADS)
        os.environ[_NO_THREADS] = "1"
        self._replace(loader, _OPENER, _opener)
        if hasattr(conversions, _CONVERSION):
            self._replace(getattr(conversions, _CONVERSION), _COLLECT, _collector)

    def _replace(self, owner: Any, name: str, made: Callable[[Any], Any]) -> None:
        theirs = getattr(owner, name)
        self._replaced.append((owner, name, theirs))
        setattr(owner, name, made(theirs))

    def give_back(self) -> None:
        """Have transformers do it as before. Idempotent."""
        if self._replaced:
            del os.environ[_NO_THREADS]
            if self._setting is not None:
                os.environ[_NO_THREADS] = self._setting
        while self._replaced:
            setattr(*self._replaced[-1])
            self._replaced.pop()


def _opener(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def open_file(path: str | Path, framework: str = "pt", device: str = "cpu", **options: Any) -> Any:
        if framework == "pt" and str(device) == "cpu":
            return OpenedFile(path)
        return theirs(path, framework=framework, device=device, **options)

    return open_file


def _collector(theirs: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def collect(transform: Any) -> Any:
        collected = theirs(transform)
        converts = transform.quantization_operation is not None or getattr(transform, "operations", None)
        return tree_map(read_now, collected) if converts else collected

    return collect
