"""Kills a run that commits again and again, at any instant, and compares its end with a run that was never killed.

    python -m benchmarks.soak --kills 500

A child process trains a small model whose states do not fit in its RAM, with a commit in the background every step or
two. It says after each step what its loss was, bit by bit, and is killed (SIGKILL) some random time after one of its
messages: while it starts, goes on from a commit, trains, stores, commits or clears up. The next child checks every byte
of every commit, goes on from the newest and is killed in turn. Each loss, and the state at the end, must have the bits
of the run that was never killed. Children are forked from the process that made that run, on one thread, and has no
other left.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import select
import shutil
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Before torch is imported: a pool of compute threads would be in the way of forking.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import offload
from benchmarks import common
from offload.checkpoint.verify import verify_run
from pagemem.durable.commit_folder import FOLDER_NAME, CommitFolder

STEPS = 40
TIMEOUT_S = 60.0
#: A life is killed some time after its message of this number at the latest.
MOST_MESSAGES = 7


class Model(nn.Module):
    """Layers of a page each, with dropout and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(96, 96) for _ in range(6))
        self.norm = nn.BatchNorm1d(96)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross entropy."""
        for layer in self.layers:
            x = x + F.dropout(F.gelu(layer(x)), 0.1)
        return F.cross_entropy(self.norm(x), y)


def config(folder: Path, mode: str, every_steps: int) -> dict[str, Any]:
    """A budget that keeps a part of the model on the disk."""
    return {
        "memory": {"ram": "768KiB" if mode == "exact" else "2MiB", "page": "64KiB"},
        "ssd": {"paths": [str(folder)], "threads": 2},
        "update": {"mode": mode, "max_staleness": 0},
        "optimizer": {"lr": 1e-2, "no_decay": ["1d"]},
        "commit": {"every_steps": every_steps, "keep": 2},
    }


# ---- the process that is killed -----------------------------------------------------------------------------------


def live(folder: Path, mode: str, every_steps: int, seed: int, say: Callable[[str], object]) -> None:
    """Go on from the newest commit, if there is one, to the last step."""
    torch.set_num_threads(1)
    commits = CommitFolder(folder)
    # What goes on from a commit does not depend on how it starts.
    torch.manual_seed(seed if commits.numbers() else 1)
    if commits.numbers():
        report = verify_run(folder, paths=[], commit=None, console=Console(quiet=True))
        if report.faults:
            raise AssertionError(f"damaged commits: {report.faults}")
    say("verified")
    settings = config(folder, mode, every_steps)
    with offload.deferred_init(settings):
        model = Model()
    with offload.initialize(model, settings) as engine:
        schedule = torch.optim.lr_scheduler.LambdaLR(engine.optimizer, _rate)
        engine.track("schedule", schedule)
        engine.resume()
        say(f"begun {engine.steps}")
        while engine.steps < STEPS:
            generator = torch.Generator().manual_seed(1000 + engine.steps)
            x, y = torch.randn(16, 96, generator=generator), torch.randint(0, 96, (16,), generator=generator)
            loss = engine(x, y)
            engine.backward(loss)
            engine.step()
            schedule.step()
            begun = engine.save_if_due()
            doing = "committing" if begun is not None else "training"
            say(f"{doing} {engine.steps} {struct.pack('<f', float(loss.detach())).hex()}")
        say(f"done {_digest(engine)}")


def _rate(step: int) -> float:
    return 1 / (1 + 0.1 * step)


def _digest(engine: offload.Engine) -> str:
    found = hashlib.sha256()
    for name, value in engine.model.state_dict().items():
        found.update(name.encode() + value.numpy().tobytes())
    states = engine.optimizer.state_dict()["state"]
    for number in sorted(states):
        for name, value in sorted(states[number].items()):
            found.update(f"{number} {name}".encode() + value.numpy().tobytes())
    found.update(torch.get_rng_state().numpy().tobytes())
    return found.hexdigest()


# ---- the process that kills ---------------------------------------------------------------------------------------


class Life:
    """A forked child and its messages."""

    def __init__(self, folder: Path, mode: str, every_steps: int, seed: int) -> None:
        receive, send = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(receive)
            code = 1
            try:
                live(folder, mode, every_steps, seed, lambda message: _send(send, message))
                code = 0
            except BaseException as error:  # a child has nobody else to tell
                _send(send, f"failed {type(error).__name__}: {error}".replace("\n", " "))
            os._exit(code)
        os.close(send)
        self._receive = receive
        self._left = b""

    def message(self) -> str | None:
        """The next message, or None when the child has ended."""
        while b"\n" not in self._left:
            ready, _, _ = select.select([self._receive], [], [], TIMEOUT_S)
            if not ready:
                raise SystemExit(f"a run says nothing for {TIMEOUT_S} s: it hangs")
            more = os.read(self._receive, 65536)
            if not more:
                return None
            self._left += more
        line, self._left = self._left.split(b"\n", 1)
        return line.decode()

    def kill(self) -> None:
        """At once, whatever it does."""
        os.kill(self.pid, signal.SIGKILL)

    def end(self) -> None:
        """Wait for the child."""
        os.waitpid(self.pid, 0)
        os.close(self._receive)


def _send(pipe: int, message: str) -> None:
    os.write(pipe, message.encode() + b"\n")


@dataclass
class Tally:
    """What came of it.

    Attributes:
        last_said: how many kills came after which message of the child.
        drafts: kills after which a half-written manifest lay in the folder.
        runs: runs that came to their end. repeated_steps: steps made again after a kill.
    """

    kills: int = 0
    runs: int = 0
    steps: int = 0
    repeated_steps: int = 0
    drafts: int = 0
    last_said: dict[str, int] = field(default_factory=dict)


class Soak:
    """Kills runs of one update mode.

    Args:
        folder: for the runs; emptied.
        rng: says when.
    """

    def __init__(self, folder: Path, mode: str, rng: random.Random) -> None:
        self._folder = folder
        self._mode = mode
        self._rng = rng
        self.tally = Tally()
        self._losses: dict[int, str] = {}
        self._end = ""
        self._furthest = 0
        self._pause_s = 0.01
        shutil.rmtree(folder, ignore_errors=True)
        live(folder / "never killed", mode, 10**9, 1, self._hear)
        self.tally = Tally()
        if len(os.listdir("/proc/self/task")) > 1:
            raise SystemExit("a thread is left of the run that was never killed; children cannot be forked beside it")

    def run(self, kills: int) -> None:
        """Kill so many times, and let the last run come to its end.

        Raises:
            SystemExit: a run differed from the one that was never killed, failed or hung.
        """
        tally, folder = self.tally, self._folder / "killed"
        while tally.kills < kills:
            shutil.rmtree(folder, ignore_errors=True)
            self._furthest, ended = 0, False
            while not ended:
                ended = self._live(folder, self._rng.choice([1, 1, 2]), kill=tally.kills < kills)
            tally.runs += 1

    def _live(self, folder: Path, every_steps: int, *, kill: bool) -> bool:
        """One life; returns whether it came to the end of the run."""
        last = self._rng.randrange(MOST_MESSAGES) if kill else -1
        life = Life(folder, self._mode, every_steps, self._rng.randrange(1 << 30))
        said, count, heard_s = "started", 0, time.perf_counter()
        while True:
            if count == last:
                time.sleep(self._rng.random() * 1.5 * self._pause_s)
                life.kill()
                last = -1
            message = life.message()
            if message is None:
                break
            said = self._hear(message)
            self._pause_s += 0.1 * (time.perf_counter() - heard_s - self._pause_s)
            count, heard_s = count + 1, time.perf_counter()
        life.end()
        if said != "done":
            self._count_kill(folder, said)
        return said == "done"

    def _hear(self, message: str) -> str:
        """Take a message in and compare what it says; returns its first word."""
        said, *words = message.split(" ")
        if said == "failed":
            raise SystemExit(f"a run failed: {message}")
        if said in ("training", "committing"):
            self._compare(int(words[0]), words[1])
        if said == "done":
            if self._end not in ("", words[0]):
                raise SystemExit("the end of a run has other bits than that of the run that was never killed")
            self._end = words[0]
        return said

    def _compare(self, step: int, loss: str) -> None:
        if self._losses.setdefault(step, loss) != loss:
            raise SystemExit(f"step {step}: loss {loss}, not {self._losses[step]} as in the run that was never killed")
        self.tally.steps += 1
        self.tally.repeated_steps += step <= self._furthest
        self._furthest = max(self._furthest, step)

    def _count_kill(self, folder: Path, said: str) -> None:
        tally = self.tally
        tally.kills += 1
        tally.last_said[said] = tally.last_said.get(said, 0) + 1
        tally.drafts += any(name.endswith(".new") for name in _names(folder / FOLDER_NAME))


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def main() -> None:
    """Kill and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--kills", type=int, default=60, help="in all, half of them in each update mode (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1)
    common.output_arguments(parser)
    a = parser.parse_args()
    rng, started_s = random.Random(a.seed), time.perf_counter()
    tallies: dict[str, Any] = {}
    for mode, kills in (("exact", a.kills - a.kills // 2), ("lock-free", a.kills // 2)):
        soak = Soak(Path(a.dir) / "soak", mode, rng)
        soak.run(kills)
        tallies[mode] = asdict(soak.tally)
    shutil.rmtree(Path(a.dir) / "soak")
    seconds = time.perf_counter() - started_s
    record = {
        "benchmark": "soak",
        "kills": a.kills,
        "seed": a.seed,
        "seconds": round(seconds, 1),
        "modes": tallies,
        "equal": True,
        "surroundings": common.surroundings(),
    }
    common.keep_record(a, record)
    rows = [
        (
            f"{mode}: kills",
            f"{tally['kills']} in {tally['runs']} runs of {STEPS} steps; "
            + ", ".join(f"{n} after '{said}'" for said, n in tally["last_said"].items()),
        )
        for mode, tally in tallies.items()
    ]
    common.show(f"{a.kills} kills in {seconds:.0f} s, every loss and every end bit-equal", rows, record, as_json=a.json)


if __name__ == "__main__":
    main()
