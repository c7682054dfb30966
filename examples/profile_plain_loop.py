"""What a plain PyTorch loop does to memory, and what the engine would save, before anything is changed.

    python examples/profile_plain_loop.py

is the same as ``offload profile --plain examples.profile_plain_loop:make``. The folder then holds ``report.html``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import nn

from offload.cli import main as offload_command

WIDTH, ROWS = 512, 64


def make() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], None]]:
    """The model, its optimizer, and a function that makes one training step."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        x = torch.randn(ROWS, WIDTH)
        nn.functional.mse_loss(model(x), x).backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", default="3")
    parser.add_argument("--to", default="plain-profile")
    arguments = parser.parse_args()
    # Python puts the folder of this file on its path, so the module is found by its own name.
    sys.exit(
        offload_command(
            ["profile", "--plain", "profile_plain_loop:make", "--steps", arguments.steps, "--to", arguments.to]
        )
    )
