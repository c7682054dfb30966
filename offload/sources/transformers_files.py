"""Has transformers' loader open safetensors files through us, so that it moves tensors that have not been read.

transformers maps a file into memory and reads ahead of what it assigns, in threads: the whole checkpoint may be in RAM
at once, beside every budget. So a loader that does not have the names replaced here, or that gives a model values
without opening a file by them, is refused. transformers itself is never imported here.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Final

from torch import Tensor
from torch.utils._pytree import tree_map

from offload.sources.checkpoint_index import pickle_refused
from offload.sources.safetensors_file import FileTensor, read_header
from offload.sources.unread import Source, UnreadTensor, read_now
from pagemem.errors import StorageError

#: The newest version whose loader is known.
NEWEST_KNOWN: Final = "5.24.0"
#: Modules of transformers, and what is replaced there.
_LOADER: Final = "transformers.modeling_utils"
_OPENER: Final = "safe_open"
_PICKLE_READER: Final = "load_state_dict"
_WHOLE_READER: Final = "_safe_load_bytes"  # not in every version
#: What keeps the loader from reading ahead of what it assigns.
_NO_THREADS: Final = "HF_DEACTIVATE_ASYNC_LOAD"
_CONVERSIONS: Final = "transformers.core_model_loading"
_CONVERSION: Final = "WeightTransform"
_COLLECT: Final = "materialize_tensors"
_NEEDED: Final = ((_LOADER, _OPENER), (_LOADER, _PICKLE_READER), (_CONVERSIONS, f"{_CONVERSION}.{_COLLECT}"))


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


def check_loader() -> None:
    """Raise ImportError, in one line, where the loader of the transformers that is imported lacks what is replaced."""
    missing = [f"{module}.{name}" for module, name in _NEEDED if not _has(sys.modules.get(module), name)]
    if missing:
        raise ImportError(
            f"transformers {_version()} has no {' and no '.join(missing)}, by which its loader is to read a checkpoint "
            "where it lies; without that all of it may be in RAM at once, so nothing was loaded. "
            f"Known are versions 5.0 to {NEWEST_KNOWN}: pip install 'transformers<={NEWEST_KNOWN}'"
        )


class FilesOfTransformers:
    """Replaces the function with which transformers opens files, from `take_over` until `give_back`, and that with
    which it collects the tensors of a parameter: those that it converts or quantises are read then. Other threads load
    as ever."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Any]] = []
        self._setting: str | None = None
        self._thread = threading.get_ident()
        # Of the load under way:
        self._is_load = False
        self._has_opened = False
        self._has_set = False

    def take_over(self) -> None:
        """Once transformers is imported, and has begun to build a model; every time that it builds a part of one.

        Raises:
            ImportError: it loads a checkpoint, and its loader is not known. Nothing was read.
        """
        self._is_load = _loads_now()
        if self._has_set:  # what comes is another model's
            self._has_opened = self._has_set = False
        if self._replaced:
            return
        if self._is_load:
            check_loader()
        elif not all(_has(sys.modules.get(module), name) for module, name in _NEEDED):
            return
        self._setting = os.environ.get(_NO_THREADS)
        os.environ[_NO_THREADS] = "1"
        loader, conversions = sys.modules[_LOADER], sys.modules[_CONVERSIONS]
        self._replace(loader, _OPENER, self._opener)
        self._replace(loader, _PICKLE_READER, self._pickle_reader)
        if hasattr(loader, _WHOLE_READER):
            self._replace(loader, _WHOLE_READER, self._whole_reader)
        self._replace(getattr(conversions, _CONVERSION), _COLLECT, _collector)

    def note_values(self, name: str) -> None:
        """A parameter that was built on meta is set to values, in memory or in a file.

        Raises:
            StorageError: (one line) transformers loads them from something that was not opened here.
        """
        self._has_set = True
        if self._is_load and not self._has_opened and _loads_now():
            raise StorageError(
                f"transformers {_version()} gives {name} values without opening a safetensors file as it does up to "
                f"{NEWEST_KNOWN}, so all of a checkpoint may be in RAM at once: give from_pretrained a folder with "
                "safetensors files, without state_dict, gguf_file or disable_mmap, or install transformers "
                f"{NEWEST_KNOWN}"
            )

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

    def _opener(self, theirs: Callable[..., Any]) -> Callable[..., Any]:
        def open_file(path: str | Path, framework: str = "pt", device: str = "cpu", **options: Any) -> Any:
            if framework == "pt" and str(device) == "cpu" and threading.get_ident() == self._thread:
                self._has_opened = True
                return OpenedFile(path)
            return theirs(path, framework=framework, device=device, **options)

        return open_file

    def _pickle_reader(self, theirs: Callable[..., Any]) -> Callable[..., Any]:
        def read(path: str | Path, *arguments: Any, **options: Any) -> Any:
            if threading.get_ident() == self._thread and not str(path).endswith(".safetensors"):
                raise StorageError(pickle_refused(Path(path).parent, Path(path).name))
            return theirs(path, *arguments, **options)

        return read

    def _whole_reader(self, theirs: Callable[..., Any]) -> Callable[..., Any]:
        def read(content: bytes) -> Any:
            if threading.get_ident() == self._thread:
                raise StorageError(
                    "transformers is to read whole safetensors files into RAM, as disable_mmap=True and mounts of the "
                    "hub have it; leave disable_mmap out, or copy the checkpoint to a folder of an ordinary disk"
                )
            return theirs(content)

        return read


def _collector(theirs: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def collect(transform: Any) -> Any:
        collected = theirs(transform)
        converts = transform.quantization_operation is not None or getattr(transform, "operations", None)
        return tree_map(read_now, collected) if converts else collected

    return collect


def _has(owner: Any, names: str) -> bool:
    """Whether there is something of this name, with dots in it."""
    for name in names.split("."):
        owner = getattr(owner, name, None)
    return owner is not None


def _version() -> str:
    return str(getattr(sys.modules.get("transformers"), "__version__", "(of unknown version)"))


def _loads_now() -> bool:
    """Whether a ``from_pretrained`` of transformers has called."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if frame.f_code.co_name == "from_pretrained" and module.startswith("transformers."):
            return True
        frame = frame.f_back
    return False
