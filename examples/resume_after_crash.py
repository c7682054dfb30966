"""A run that is killed in the middle of a step goes on from its last commit, with the bits of one that never was.

    python examples/resume_after_crash.py

The first life is a process of its own, which kills itself (SIGKILL) during a backward pass. The second resumes from the
newest commit. A third run is never interrupted; its weights are compared with those of the second, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import offload


def build_model() -> nn.Module:
    """An MLP with dropout, whose random numbers are part of every commit."""
    return nn.Sequential(nn.Linear(32, 512), nn.GELU(), nn.Dropout(0.1), nn.Linear(512, 32))


class Data:
    """Batches in order; where it stands is part of every commit."""

    def __init__(self) -> None:
        self.position = 0

    def next(self) -> tuple[Tensor, Tensor]:
        """The next inputs and targets, (16, 32) each."""
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(self.position))
        self.position += 1
        return x, x.flip(1)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def train(pages: Path, steps: int, crash_at: int | None = None) -> dict[str, Tensor]:
    """Train from the newest commit in ``pages``, or from the start; returns the weights."""
    torch.manual_seed(1)
    config = {"memory": {"ram": "1MiB"}, "ssd": {"paths": [str(pages)]}, "commit": {"every_steps": 3}}
    with offload.initialize(build_model(), config) as engine:
        data = Data()
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(engine.optimizer, steps)
        engine.track("data", data)
        engine.track("learning rate", schedule)
        resumed = engine.resume()
        start = resumed.step if resumed else 0
        print(f"begins at step {start}" + (f", from commit {resumed.number}" if resumed else ""), flush=True)
        for step in range(start, steps):
            x, y = data.next()
            loss = nn.functional.mse_loss(engine(x), y)
            if step == crash_at:
                loss.register_hook(lambda _gradient: os.kill(os.getpid(), signal.SIGKILL))
            engine.backward(loss)
            engine.step()
            schedule.step()
            engine.save_if_due()
        return engine.model.state_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--crash-at", type=int, default=8)
    parser.add_argument("--first-life", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.first_life:
        train(arguments.first_life, arguments.steps, arguments.crash_at)
        return
    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder) / "pages"
        command = [sys.executable, __file__, "--first-life", str(pages), f"--steps={arguments.steps}"]
        first = subprocess.run([*command, f"--crash-at={arguments.crash_at}"], check=False)
        print(f"the first life ended with {signal.Signals(-first.returncode).name}")
        resumed = train(pages, arguments.steps)
        whole = train(Path(folder) / "other-pages", arguments.steps)
        equal = all(torch.equal(resumed[name], value) for name, value in whole.items())
        print(f"weights of the resumed run and of one never interrupted are equal bit for bit: {equal}")


if __name__ == "__main__":
    main()
