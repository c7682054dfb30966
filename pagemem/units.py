"""Byte quantities: constants, reading them from text, and printing them."""

from __future__ import annotations

import re
import reprlib
from typing import Final

KiB: Final = 1 << 10
MiB: Final = 1 << 20
GiB: Final = 1 << 30
TiB: Final = 1 << 40

#: What an address of 64 bits can tell apart, and files may have.
MOST_BYTES: Final = (1 << 63) - 1

#: Logical block that O_DIRECT buffers, offsets and lengths must be a multiple of.
BLOCK_BYTES: Final = 4096

_SUFFIX: Final = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": KiB,
    "mib": MiB,
    "gib": GiB,
    "tib": TiB,
}
_PATTERN: Final = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*$")


def parse_bytes(text: str | int) -> int:
    """Number of bytes in a size such as ``"4GiB"``, ``"1.5 MB"`` or ``4096``.

    Raises:
        ValueError: the text is not a size, or is negative; the message lists the known suffixes.
    """
    if isinstance(text, int):
        if text < 0:
            raise ValueError(f"a size cannot be negative: {text}")
        n_bytes: float = text
    else:
        match = _PATTERN.match(text)
        if match is None or match[2].lower() not in _SUFFIX:
            raise ValueError(
                f"not a size: {reprlib.repr(text)}; write a number and one of B, KB, MB, GB, TB, KiB, MiB, GiB, TiB"
            )
        n_bytes = float(match[1]) * _SUFFIX[match[2].lower()]
    if n_bytes > MOST_BYTES:
        raise ValueError(f"not a size: {reprlib.repr(text)} is more bytes than there are addresses")
    return int(n_bytes)


def format_bytes(n_bytes: float) -> str:
    """A short human form with a 1024-based suffix, e.g. ``"192.0 MiB"``."""
    size = float(n_bytes)
    for suffix in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {suffix}" if suffix == "B" else f"{size:.1f} {suffix}"
        size /= 1024
    return f"{size:.1f} TiB"


def ceil_div(a: int, b: int) -> int:
    """Smallest integer not below ``a / b``."""
    return -(-a // b)


def round_up(n: int, multiple: int) -> int:
    """Smallest multiple of ``multiple`` not below ``n``."""
    return ceil_div(n, multiple) * multiple
