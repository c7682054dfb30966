"""A slow link made real: two network namespaces, a pair of virtual Ethernet devices, and a token bucket at each end.

Needs root, ``ip`` and ``tc`` (iproute2), and a kernel with namespaces, veth and tbf.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

_DEVICE: Final = "offload-link"
_ADDRESSES: Final = ("10.87.0.1", "10.87.0.2")
#: What the bucket lets through at once, and how long a packet may wait in it. Chosen.
_BURST, _LATENCY = "256kb", "50ms"


@dataclass(frozen=True, slots=True)
class SlowLink:
    """Two namespaces that reach each other over nothing else. Use `slow_link`.

    Attributes:
        mbit_per_s: in each direction.
        environment: that processes inside need to find each other.
    """

    mbit_per_s: float
    namespaces: tuple[str, str]

    @property
    def environment(self) -> Mapping[str, str]:
        """See the class."""
        return {"MASTER_ADDR": _ADDRESSES[0], "GLOO_SOCKET_IFNAME": _DEVICE, "TP_SOCKET_IFNAME": _DEVICE}

    @property
    def bytes_per_s(self) -> float:
        """In each direction, Ethernet's own bytes included."""
        return self.mbit_per_s * 1e6 / 8

    def within(self, rank: int) -> Sequence[str]:
        """What a command begins with that runs at one end."""
        return "ip", "netns", "exec", self.namespaces[rank]


@contextmanager
def slow_link(mbit_per_s: float) -> Iterator[SlowLink]:
    """The link, which is taken away afterwards.

    Raises:
        OSError: it cannot be made here; says why.
    """
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        raise OSError(f"a slow link needs root and iproute2 ({', '.join(missing) or 'this is not root'})")
    names = (f"offload-a-{os.getpid()}", f"offload-b-{os.getpid()}")
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        _run(
            "ip", "link", "add", _DEVICE, "netns", names[0], "type", "veth", "peer", "name", _DEVICE, "netns", names[1]
        )
        for name, address in zip(names, _ADDRESSES, strict=True):
            inside = ("ip", "-n", name)
            _run(*inside, "address", "add", f"{address}/24", "dev", _DEVICE)
            _run(*inside, "link", "set", _DEVICE, "up")
            _run(*inside, "link", "set", "lo", "up")
            rate = ("rate", f"{mbit_per_s:g}mbit", "burst", _BURST, "latency", _LATENCY)
            _run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", _DEVICE, "root", "tbf", *rate)
        yield SlowLink(mbit_per_s, names)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)  # it may not be there


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
