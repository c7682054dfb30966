"""A driver over page files in memory, and a training thread that writes patterns into tensors and checks every one it
reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from cross_references import check_mover
from event_log import EventLog
from fake_page_files import ThreadedPageFiles

from pagemem.devices.accelerator import RamDevice
from pagemem.devices.arena import HostArena
from pagemem.frames.page import TensorId
from pagemem.residency.device_mover import DeviceMover
from pagemem.residency.host_mover import HostMover
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.tier import Tag
from pagemem.units import KiB
from scheduler.execution.driver import Driver
from scheduler.planning.trace import Access, AccessMode, OpKind

PAGE_BYTES = 64 * KiB
MODES = {"r": AccessMode.READ, "w": AccessMode.MODIFY, "c": AccessMode.CREATE, "x": AccessMode.CONSUME}


def pattern(n_bytes: int, salt: int) -> torch.Tensor:
    """Numbers that differ from place to place and from salt to salt; zeros for salt 0."""
    return (torch.arange(n_bytes // 4, dtype=torch.int32) * 7 + 1_000_003) * salt


class Rig:
    """Tensors A, B, C, ... of one page or as ``pages`` says, and the pattern each one must hold.

    An op is written as ``"Ar Bw"``: A is read, B modified (c: created, x: consumed); ``"u: Bw"`` is an update. With
    frames on a device, ``"ar"`` reads the copy of A there.
    """

    def __init__(
        self, n_frames: int, letters: str = "ABCDE", pages: dict[str, int] | None = None, device_frames: int = 0
    ) -> None:
        self.files = ThreadedPageFiles()
        self.log = EventLog()
        self.mover = HostMover(HostArena(n_frames, PAGE_BYTES), self.files, self.log)  # type: ignore[arg-type]
        self.driver = Driver(self.mover, self.log, lambda: (1e9, 1e9))
        self.tensors: dict[str, PagedTensor] = {
            letter: self.mover.create(letter, Tag.PARAM, (pages or {}).get(letter, 1) * PAGE_BYTES)
            for letter in letters
        }
        self.device: DeviceMover | None = None
        if device_frames:
            arena = HostArena(device_frames, PAGE_BYTES)
            self.device = device = DeviceMover(arena, self.mover, RamDevice(), self.log)
            self.driver.add_device(device, device.bandwidth, device.accelerator)
            for letter, tensor in list(self.tensors.items()):
                self.tensors[letter.lower()] = device.mirror(tensor)
        self.salts: dict[TensorId, int] = {tensor.id: 0 for tensor in self.tensors.values()}
        self._salt = 0
        self._consumed: set[str] = set()

    def view(self, tensor: PagedTensor) -> torch.Tensor:
        """The tensor's bytes now."""
        assert tensor.frame is not None
        return self.driver.mover_of(tensor).arena.view(tensor.frame, 0, torch.int32, tensor.n_bytes // 4)

    def check(self, tensor: PagedTensor, when: str = "") -> None:
        """The host bytes are what was written last."""
        wanted = pattern(tensor.n_bytes, self.salts[self.driver.memories.in_host(tensor.id)])
        assert torch.equal(self.view(tensor), wanted), f"{when}: {tensor.name} holds something else"

    def write(self, tensor: PagedTensor) -> None:
        """Write a new pattern into the host bytes."""
        self._salt += 1
        self.salts[tensor.id] = self._salt
        self.view(tensor).copy_(pattern(tensor.n_bytes, self._salt))
        self._consumed.discard(tensor.name)

    def resident(self) -> str:
        """The letters of the tensors that hold host frames."""
        return "".join(letter for letter, tensor in self.tensors.items() if tensor.frame is not None)

    def lease(self, letter: str) -> torch.Tensor:
        """A view of a resident tensor's first bytes that keeps it where it is."""
        tensor = self.tensors[letter]
        return self.driver.mover_of(tensor).lease(tensor, 0, torch.int32, 16)

    def _changed(self, letter: str) -> None:
        """What the device has of a tensor is out of date."""
        if self.device is not None:
            copy = self.tensors[letter.lower()]
            if not self.device.renew(copy):
                with self.driver.memories.lower_pinned(copy) as lower:
                    self.view(copy).copy_(self.view(lower))

    def op(self, text: str) -> None:
        """Perform one op, checking what it reads."""
        kind = OpKind.UPDATE if text.startswith("u: ") else OpKind.FORWARD
        words = text.removeprefix("u: ").split()
        accesses = [Access(self.tensors[word[0]].id, MODES[word[1]]) for word in words]
        with self.driver.op((kind, text), text, accesses):
            for word in words:
                tensor = self.tensors[word[0]]
                if word[1] != "c":
                    self.check(tensor, text)
                if word[1] in "cw":
                    self.write(tensor)
        for word in words:
            if word[1] in "cwx":
                self._changed(word[0])
            if word[1] == "x":
                self.driver.memories.consume(self.tensors[word[0]])
                self._consumed.add(word[0])
                self.salts[self.tensors[word[0]].id] = 0

    def step(self, *ops: str, repeatable: bool = True) -> None:
        """Perform a whole step and check the books."""
        for text in ops:
            self.op(text)
        self.driver.end_step(repeatable=repeatable)
        self.check_books()

    def check_books(self) -> None:
        """Every tier's books agree."""
        for memory in self.driver.memories.all:
            check_mover(memory.mover)

    def read_all(self) -> None:
        """Check the content of every tensor that was not consumed, between steps."""
        with self.driver.untraced():
            for letter in sorted(self.tensors.keys() - self._consumed):
                self.op(f"{letter}r")

    def close(self) -> None:
        """End all threads."""
        self.driver.quiesce()
        for memory in reversed(self.driver.memories.all):
            memory.mover.close()
        self.files.close()
        self.check_books()
        for memory in self.driver.memories.all:
            memory.mover.arena.close()


@contextmanager
def rig(
    n_frames: int, letters: str = "ABCDE", pages: dict[str, int] | None = None, device_frames: int = 0
) -> Iterator[Rig]:
    """A rig that is closed at the end of the block."""
    made = Rig(n_frames, letters, pages, device_frames)
    try:
        yield made
    finally:
        made.close()
