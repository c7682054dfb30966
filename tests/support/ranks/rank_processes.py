"""Ranks that are processes, as torchrun starts them: the store is the starter's, so that it outlives any rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from torch.distributed import TCPStore  # type: ignore[attr-defined]

ROOT: Final = Path(__file__).parents[3]
FOLDERS: Final = ("", "tests/support/ranks", "tests/multirank/bodies", "tests/support/models")
#: A body's result is the line of its output that begins so.
RESULT: Final = "result: "
#: torch keeps a pipe from the first store on, which is not a test's.
TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def give(result: Any) -> None:
    """In a body: return something that JSON can hold."""
    print(RESULT + json.dumps(result), flush=True)


@dataclass
class RankProcesses:
    """Processes of all ranks, under way.

    Args:
        code: run by each; ``sys.argv[1:]`` are ``arguments``.
    """

    n_ranks: int
    code: str
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes = [self._start(rank) for rank in range(self.n_ranks)]

    def _start(self, rank: int) -> subprocess.Popen[str]:
        ranks = {"RANK": rank, "WORLD_SIZE": self.n_ranks, "LOCAL_RANK": rank, "MASTER_PORT": self.store.port}
        ranks = ranks if self.n_ranks > 1 else {}
        environment = {
            **os.environ, "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in FOLDERS), **self.environment,
            **{name: str(value) for name, value in ranks.items()},
        }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-c", self.code, *self.arguments], env=environment, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def await_file(self, path: Path, timeout_s: float = 60) -> None:
        """Wait until a rank has written a file."""
        deadline_s = time.monotonic() + timeout_s
        while not path.exists():
            assert time.monotonic() < deadline_s, f"{path} was not written"
            time.sleep(0.01)

    def end(self, timeout_s: float = 120) -> list[Ended]:
        """What each rank left behind; kills all that are there after the time."""
        deadline_s = time.monotonic() + timeout_s
        found = []
        for process in self.processes:
            try:
                output, errors = process.communicate(timeout=max(0.1, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                for other in self.processes:
                    other.kill()
                output, errors = process.communicate()
                errors += "\n(killed: it did not end)"
            found.append(Ended(process.returncode, output, errors))
        del self.store
        return found


@dataclass(frozen=True, slots=True)
class Ended:
    """What a process left behind."""

    code: int
    output: str
    errors: str

    @property
    def result(self) -> Any:
        """What it gave; its errors are raised where it gave nothing."""
        lines = [line for line in self.output.splitlines() if line.startswith(RESULT)]
        assert lines and self.code == 0, f"exit code {self.code}\n{self.output}\n{self.errors}"
        return json.loads(lines[-1].removeprefix(RESULT))


def on_processes(n_ranks: int, body: Callable[[], object], *arguments: str, timeout_s: float = 120) -> list[Any]:
    """What a function of a module of tests/multirank/bodies gives on each rank."""
    code = f"import {body.__module__} as bodies; bodies.{body.__name__}()"
    return [ended.result for ended in RankProcesses(n_ranks, code, arguments).end(timeout_s)]
