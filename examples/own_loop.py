"""Your own training loop over pages: train, save the weights, load them into a plain model.

    python examples/own_loop.py --width 2048 --ram 64MiB

The model's parameters and AdamW states take 12 bytes a parameter; ``--ram`` bounds how many of them are in RAM.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import offload


def build_model(width: int) -> nn.Module:
    """An MLP from 64 numbers to 64, with four hidden layers of ``width``."""
    hidden = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(nn.Linear(64, width), nn.GELU(), *hidden, nn.Linear(width, 64))


def batch(step: int, rows: int = 64) -> tuple[Tensor, Tensor]:
    """Random rows (rows, 64), and what the model is to make of them; the same for the same step."""
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(step))
    return x, x.cumsum(1).sin()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--ram", default="16MiB", help="RAM for parameters, gradients and optimizer states")
    parser.add_argument("--folder", type=Path, help="for page files and weights; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        config = {"memory": {"ram": arguments.ram}, "ssd": {"paths": [str(folder / "pages")]}}

        torch.manual_seed(1)
        model, optimizer = offload.prepare(
            build_model(arguments.width), lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True), config
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
        for step in range(arguments.steps):
            x, y = batch(step)
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 10 == 0:
                print(f"step {step:4d}  loss {loss.item():.4f}")

        stats, host = optimizer.engine.stats(), optimizer.engine.memory_report().tiers["host"]
        print(f"RAM of states: at most {host.peak_bytes / 2**20:.1f} MiB of {host.budget_bytes / 2**20:.1f} MiB")
        print(f"SSD: {stats.bytes_read / 2**20:.0f} MiB read, {stats.bytes_written / 2**20:.0f} MiB written")

        model.eval()
        x, _ = batch(arguments.steps)
        with torch.no_grad():
            expected = model(x)
        torch.save(model.state_dict(), folder / "weights.pt")  # plain tensors; before the engine closes
        optimizer.engine.close()

        plain = build_model(arguments.width)
        plain.load_state_dict(torch.load(folder / "weights.pt"))
        with torch.no_grad():
            equal = torch.equal(plain(x), expected)
        print(f"loaded into a plain model: outputs equal bit for bit: {equal}")


if __name__ == "__main__":
    main()
