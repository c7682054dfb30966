"""Text tokenised once, and memory-mapped: what language models are trained on from local files.

The tokens are written as one flat file beside a description of where they come from; they are used again as long as
the sources, the tokenizer and the column are the same. RAM holds a piece of text at a time.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console

from offload.console.byte_progress import byte_progress
from offload.integrations.token_batches import TokenBatches
from pagemem.folders.own_file import has_folder, kind_of, make_folder, naming, remove_file, replace_file
from pagemem.folders.small_file import read_small
from pagemem.units import KiB

_FORMAT: Final = "offload tokenised text 1"
#: Characters of a text file that are tokenised at a time, cut at line ends.
_PIECE_CHARS: Final = 1 << 18
_MAX_DESCRIPTION_BYTES: Final = 64 * KiB
_FORMATS: Final = (".txt", ".md", ".jsonl", ".parquet")

#: Maps texts to a list of token ids for each, as transformers' tokenizers do.
Encode = Callable[[list[str]], list[list[int]]]
#: Texts with the bytes of the source that they come from; an empty text ends a document.
Pieces = Iterator[tuple[str, int]]


def load_tokens(folder: Path, *, seed: int, validation_share: float) -> TokenBatches:
    """The tokens that `tokenize` has made in ``folder``.

    Args:
        validation_share: of the tokens, those at the end.

    Raises:
        StorageError: there is none. ValueError: a share leaves one side empty.
    """
    described = folder / "tokens.json"
    with naming("reading", described):
        dtype = np.dtype(json.loads(read_small(described, _MAX_DESCRIPTION_BYTES))["dtype"])
    tokens = np.memmap(folder / "tokens.bin", dtype=dtype, mode="r")
    n_validation = round(len(tokens) * validation_share)
    if not 0 < n_validation < len(tokens):
        raise ValueError(
            f"validation_share is {validation_share:g}, which of {len(tokens)} tokens leaves {n_validation} for "
            "validation; both sides need some"
        )
    return TokenBatches(tokens[:-n_validation], tokens[-n_validation:], seed)


def tokenize(
    files: Sequence[str], folder: Path, encode: Encode, *, identity: str, n_vocabulary: int, end: int, column: str
) -> None:
    """Have the tokens of ``files`` in ``folder``; nothing is done where they are there already.

    Args:
        files: paths or patterns of .txt, .md, .jsonl or .parquet files; a text file, or a row, is a document.
        identity: of the tokenizer; with another one the tokens are made anew.
        end: token that follows each document.
        column: of .jsonl and .parquet files, the one with the text.

    Raises:
        ValueError: no file matches, one is of another kind, or has no such column. StorageError: the folder cannot be
            used; FileNotFoundError and the like: a file cannot be read.
    """
    paths = sorted({Path(path) for pattern in files for path in glob.glob(pattern, recursive=True)})
    if not paths:
        raise ValueError(f"no file is named {' or '.join(files)} (looked in {Path.cwd()})")
    for path in paths:
        if path.suffix not in _FORMATS:
            raise ValueError(f"{path} is none of {', '.join(_FORMATS)}, which text is read from")
    sizes = [path.stat().st_size for path in paths]
    sources = [[str(path.resolve()), size, path.stat().st_mtime_ns] for path, size in zip(paths, sizes, strict=True)]
    digest = hashlib.sha256(json.dumps([_FORMAT, identity, column, end, sources]).encode()).hexdigest()
    described = folder / "tokens.json"
    if _digest_in(described) == digest:
        return
    if not has_folder(folder):
        make_folder(folder)
    elif _digest_in(described) is None and any(
        kind_of(folder / name) is not None for name in ("tokens.bin", "tokens.json")
    ):
        raise ValueError(f"{folder} holds a tokens file that was not made here; name a new folder")
    remove_file(described)  # until the tokens are complete
    dtype = np.dtype(np.uint16 if n_vocabulary <= 1 << 16 else np.uint32)
    with byte_progress(Console(), "tokenising", sum(sizes)) as advance:
        replace_file(folder / "tokens.bin", _tokens(paths, encode, end, column, dtype, advance))
    replace_file(
        described, json.dumps({"format": _FORMAT, "digest": digest, "dtype": dtype.name, "sources": sources}).encode()
    )


def _tokens(
    paths: Sequence[Path], encode: Encode, end: int, column: str, dtype: np.dtype[Any], advance: Callable[[int], None]
) -> Iterator[bytes]:
    for path in paths:
        for text, n_bytes in _pieces(path, column):
            ids = encode([text])[0] if text else [end]
            yield np.asarray(ids, dtype=dtype).tobytes()
            advance(n_bytes)


def _pieces(path: Path, column: str) -> Pieces:
    if path.suffix == ".parquet":
        yield from _rows_of_parquet(path, column)
    elif path.suffix == ".jsonl":
        yield from _rows_of_json(path, column)
    else:
        with path.open(encoding="utf-8") as file:
            while lines := file.readlines(_PIECE_CHARS):
                text = "".join(lines)
                yield text, len(text.encode())
        yield "", 0


def _rows_of_json(path: Path, column: str) -> Pieces:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                text = json.loads(line)[column]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: no object with {column!r}: {error}") from error
            if text:
                yield str(text), len(line.encode())
                yield "", 0


def _rows_of_parquet(path: Path, column: str) -> Pieces:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            raise ValueError(f"{path} has no column {column!r}; it has {', '.join(file.schema_arrow.names)}")
        share = path.stat().st_size / max(1, file.metadata.num_rows)
        for batch in file.iter_batches(batch_size=256, columns=[column]):
            for text in batch.column(0).to_pylist():
                if text:
                    yield text, round(share)
                    yield "", 0


def _digest_in(described: Path) -> str | None:
    """The digest that a description of ours states, or None when there is none."""
    try:
        with naming("reading", described):
            if kind_of(described) is None:
                return None
            content = json.loads(read_small(described, _MAX_DESCRIPTION_BYTES))
    except ValueError:
        return None
    ours = isinstance(content, dict) and content.get("format") == _FORMAT
    return str(content.get("digest")) if ours else None
