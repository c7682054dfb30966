"""Exact and lock-free updates on a slow disk: seconds a step, and how far parameters lag.

    python examples/lock_free.py --disk 50

In exact mode every step waits for the optimizer states on the disk. In lock-free mode a thread applies the updates, and
training goes on with parameters that miss at most ``--max-staleness`` steps. How much faster that is depends on the
disk and on a free core for the thread; where states fit in RAM it is not.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import torch
from torch import nn

import offload


def build_model(width: int) -> nn.Module:
    """Twenty-four layers: many states for little compute."""
    layers = [layer for _ in range(24) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*layers)


def train(folder: str, arguments: argparse.Namespace, **update: object) -> None:
    """Train a few steps in one mode, and print what they took."""
    config = {
        "memory": {"ram": arguments.ram},
        "ssd": {"paths": [folder], "limit_mb_per_s": arguments.disk},
        "update": update,
    }
    torch.manual_seed(1)
    with offload.initialize(build_model(arguments.width), config) as engine:
        largest, timed_s = 0, 0.0
        for step in range(arguments.steps):
            started_s = time.perf_counter()
            x = torch.randn(256, arguments.width, generator=torch.Generator().manual_seed(step))
            loss = (engine(x) - x.roll(1, 1)).square().mean()
            largest = max(largest, engine.staleness)  # of the parameters that this forward pass used
            engine.backward(loss)
            engine.step()
            if step >= arguments.steps // 2:  # the first steps trace and plan
                timed_s += time.perf_counter() - started_s
        engine.drain()  # apply what is still on its way
        step_s = timed_s / (arguments.steps - arguments.steps // 2)
        print(
            f"{update['mode']:9}  {step_s:.3f} s a step, missing at most {largest} steps, last loss {loss.item():.4f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--ram", default="14MiB")
    parser.add_argument("--disk", type=float, default=50, help="MB/s of reads and writes together")
    parser.add_argument("--max-staleness", type=int, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        train(f"{folder}/exact", arguments, mode="exact")
        lock_free = {"mode": "lock-free", "max_staleness": arguments.max_staleness, "exact_steps": 2}
        train(f"{folder}/lock-free", arguments, **lock_free)


if __name__ == "__main__":
    main()
