"""One thing that is wrong with a file of a run, and how it is done."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from pagemem.durable.manifest import FORMAT


def body_of(path: Path) -> Any:
    """The content of a manifest, without its header."""
    return json.loads(path.read_bytes().partition(b"\n")[2])


def newest(folder: Path) -> Path:
    """The newest manifest."""
    return max((folder / "pages" / "commits").glob("*.json"))


def manifest_of(folder: Path) -> tuple[Path, Any]:
    """Path and content of the newest manifest."""
    path = newest(folder)
    return path, body_of(path)


def write_manifest(path: Path, body: bytes) -> None:
    """With a header that fits."""
    path.write_bytes(f"{FORMAT} {len(body)} {xxh3_128_hexdigest(body)}\n".encode() + body)


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong.

    Attributes:
        file: which kind of file: "manifest", "side", "identity", "lock", "pages", "plan", "metrics", "run identity",
            "config".
        do: does it to a run's folder.
    """

    file: str
    what: str
    do: Callable[[Path], None]
