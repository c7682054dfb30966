"""A device whose events fail."""

from __future__ import annotations


class Broken:
    """An event of a device that failed: whatever is asked of it raises, as of a CUDA device after an assertion in a
    kernel."""

    def reached(self) -> bool:
        raise RuntimeError("device-side assert")

    def wait(self) -> None:
        raise RuntimeError("device-side assert")

    def seconds(self) -> float:
        raise AssertionError("it has not been waited for")


def broken(*_: object) -> Broken:
    return Broken()


def fails(*_: object) -> Broken:
    raise RuntimeError("device-side assert")
