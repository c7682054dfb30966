"""The heap: when the end of a forward pass gives free pages back, and that this lowers resident memory."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offload.heap import (
    TUNABLE,
    TUNABLES_VARIABLE,
    ForwardEnd,
    give_back_free_pages,
    large_blocks_mapped,
    without_tcache,
)  # fmt: skip
from offload.knobs import WORTH_TRIMMING_BYTES
from pagemem.frames.page import TensorId
from pagemem.units import MiB

EVERYTHING = [TensorId(number) for number in range(4)]


class Passes:
    """Forward and backward passes that use single tensors, and when pages were given back."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.end = ForwardEnd(lambda: self.log.append("back"))

    def forward(self, *used: int) -> list[str]:
        """What happened while these were used; uses are named by their number."""
        self.log.clear()
        for number in used:
            self.end.forward_use([TensorId(number)], EVERYTHING)
            self.log.append(str(number))
        return list(self.log)

    def backward(self) -> None:
        """A backward pass with several uses."""
        for _ in range(3):
            self.end.backward_use()


def test_pages_are_given_back_when_the_last_tensor_of_a_pass_is_first_used() -> None:
    passes = Passes()
    assert passes.forward(0, 1, 2, 3, 0) == ["0", "1", "2", "back", "3", "0"]
    passes.backward()
    assert passes.forward(0, 1, 2, 3, 0) == ["back", "0", "1", "2", "back", "3", "0"]
    for _ in range(2):
        passes.backward()
        assert passes.forward(0, 1, 2, 3, 0) == ["0", "1", "2", "back", "3", "0"]


def test_a_pass_is_expected_to_use_what_the_pass_before_used() -> None:
    passes = Passes()
    assert passes.forward(0, 2) == ["0", "2"]
    passes.backward()
    assert passes.forward(0, 2) == ["back", "0", "back", "2"]
    passes.backward()
    assert passes.forward(0, 1, 2) == ["0", "1", "back", "2"]
    passes.backward()
    assert passes.forward(0, 2) == ["0", "2"]


def test_a_second_forward_before_the_backward_gives_nothing_back() -> None:
    passes = Passes()
    passes.forward(0, 1, 2, 3)
    assert passes.forward(0, 1, 2, 3) == ["0", "1", "2", "3"]


def test_free_pages_between_living_blocks_leave_the_process() -> None:
    if getattr(ctypes.CDLL(None), "mallinfo2", None) is None:
        pytest.skip("needs glibc")
    with large_blocks_mapped():
        pass  # From here on blocks of one MiB lie in the heap.
    blocks = [torch.ones(MiB, dtype=torch.uint8) for _ in range(2 * (WORTH_TRIMMING_BYTES // MiB + 32))]
    del blocks[::2]
    before = resident_bytes()
    give_back_free_pages()
    assert before - resident_bytes() >= WORTH_TRIMMING_BYTES
    assert all(bool((block == 1).all()) for block in blocks)


def test_what_one_engine_keeps_another_one_gives_back() -> None:
    if getattr(ctypes.CDLL(None), "mallinfo2", None) is None:
        pytest.skip("needs glibc")
    # In a process of its own: what other tests have freed here would serve the block.
    code = (
        "import sys, torch; sys.path[:0] = sys.argv[1].split(':')\n"
        "from offload.heap import give_back_large_blocks, keep_freed_memory\n"
        "from test_heap import MiB, resident_bytes\n"
        "keep_freed_memory()\n"
        "give_back_large_blocks()\n"
        "before = resident_bytes()\n"
        "block = torch.ones(64 * MiB, dtype=torch.uint8)\n"
        "held = resident_bytes() - before\n"
        "del block\n"
        "print(held >= 60 * MiB, resident_bytes() - before < 4 * MiB)\n"
    )
    path = ":".join([str(Path(__file__).parent), *(path for path in sys.path if path)])
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_joining_keeps_what_the_environment_says_of_other_things() -> None:
    if getattr(ctypes.CDLL(None), "mallinfo2", None) is None:
        pytest.skip("needs glibc")
    assert without_tcache({"A": "1"}) == {"A": "1", TUNABLES_VARIABLE: TUNABLE}
    others = "glibc.malloc.arena_max=2:glibc.malloc.mxfast=0"
    assert without_tcache({TUNABLES_VARIABLE: others}) == {TUNABLES_VARIABLE: f"{others}:{TUNABLE}"}


@pytest.mark.parametrize("decided", [TUNABLE, "glibc.malloc.mxfast=0:glibc.malloc.tcache_count=7"])
def test_joining_leaves_a_decision_of_somebody_else_alone(decided: str) -> None:
    assert without_tcache({TUNABLES_VARIABLE: decided}) is None


def test_a_process_knows_whether_it_was_started_joining() -> None:
    environment = without_tcache(os.environ)
    if environment is None:
        pytest.skip("needs glibc, and a process that has its cache")
    # What is put into the environment once the process runs has no effect, and is not taken for one.
    code = (
        "import os, sys; sys.path[:0] = sys.argv[1].split(':')\n"
        "from offload.heap import TUNABLE, TUNABLES_VARIABLE, tcache_disabled\n"
        "os.environ[TUNABLES_VARIABLE] = TUNABLE\n"
        "print(tcache_disabled())\n"
    )
    path = ":".join(path for path in sys.path if path)
    for variables, expected in ((dict(os.environ), "False"), (environment, "True")):
        done = subprocess.run(
            [sys.executable, "-c", code, path], capture_output=True, text=True, timeout=120, check=False, env=variables
        )
        assert done.stdout.split() == [expected], done.stderr


def resident_bytes() -> int:
    """Anonymous memory of this process that is resident."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
