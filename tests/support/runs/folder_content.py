"""What a folder holds, to see that nothing in it changed."""

from __future__ import annotations

from pathlib import Path


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file below a folder by relative path; folders themselves without them."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else (b"", 0)
        for path in folder.rglob("*")
    }
