"""TCP connections between all ranks, found through torch's store."""

from __future__ import annotations

import secrets
import socket
import struct
import time
from typing import Final

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from offload.parallel.channel import BUFFER_BYTES
from offload.parallel.stop_signal import StopSignal
from pagemem.errors import RankError

#: Seconds in which all ranks must have come. Chosen: models are built before.
_TIMEOUT_S: Final = 600.0
#: A greeting: what only ranks know, and the rank.
_GREETING: Final = struct.Struct("!16sI")


def connect(
    store: TCPStore, prefix: str, rank: int, n_ranks: int, towards: tuple[str, int], stop: StopSignal
) -> dict[int, socket.socket]:
    """Connect this rank with all others; on all ranks.

    Args:
        prefix: of keys in the store, used once.
        towards: host and port that all ranks reach: each is reached where it is from there.

    Raises:
        RankError: the ranks have stopped, or not all have come in time. OSError: the network failed.
    """
    token = store.compare_set(f"{prefix}/token", "", secrets.token_hex(8))
    with socket.create_server((_own_address(towards), 0), backlog=n_ranks) as server:
        host, port = server.getsockname()[:2]
        store.set(f"{prefix}/at/{rank}", f"{host} {port}")
        found: dict[int, socket.socket] = {}
        deadline_s = time.monotonic() + _TIMEOUT_S
        try:
            for other in range(rank):
                at = _await_key(store, f"{prefix}/at/{other}", deadline_s, stop)
                host, port_text = at.split()
                found[other] = socket.create_connection((host, int(port_text)), timeout=30)
                found[other].sendall(_GREETING.pack(token, rank))
            server.settimeout(0.5)
            while len(found) < n_ranks - 1:
                _check(deadline_s, stop, f"{n_ranks - 1 - len(found)} of {n_ranks} ranks have not come")
                _accept(server, token, found)
        except BaseException:
            for connection in found.values():
                connection.close()
            raise
    for connection in found.values():
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for side in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, side, BUFFER_BYTES)
    return found


def _own_address(towards: tuple[str, int]) -> str:
    """The address that this host has on the way there."""
    family, kind, _, _, address = socket.getaddrinfo(*towards, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _accept(server: socket.socket, token: bytes, found: dict[int, socket.socket]) -> None:
    """Take the next connection, if one comes and is a rank's."""
    try:
        connection, _ = server.accept()
    except TimeoutError:
        return
    connection.settimeout(5)
    try:
        said, rank = _GREETING.unpack(connection.recv(_GREETING.size, socket.MSG_WAITALL))
    except (OSError, struct.error):
        said, rank = b"", -1
    if said == token:
        found[rank] = connection
    else:
        connection.close()  # a stranger


def _await_key(store: TCPStore, key: str, deadline_s: float, stop: StopSignal) -> str:
    while not store.check([key]):
        _check(deadline_s, stop, f"a rank has not come: there is no {key}")
        time.sleep(0.02)
    return str(store.get(key).decode())


def _check(deadline_s: float, stop: StopSignal, late: str) -> None:
    if stop.why is not None:
        raise RankError(stop.why)
    if time.monotonic() > deadline_s:
        raise RankError(f"{late} within {_TIMEOUT_S:.0f} s; look at what the other ranks have printed")
