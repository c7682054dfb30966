"""A loop of accelerate over pages: prepare twice, first for pages and then for accelerate. The loop stays as it is.

    python examples/accelerate_loop.py --width 1024 --ram 16MiB

Needs accelerate.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

import offload


def build_model(width: int) -> nn.Module:
    """An MLP that tells four classes of vectors apart."""
    torch.manual_seed(1)
    hidden = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(nn.Linear(16, width), nn.GELU(), *hidden, nn.Linear(width, 4))


def data(n: int = 128) -> list[tuple[torch.Tensor, int]]:
    """Vectors of 16 numbers, and which of the first four is largest."""
    vectors = torch.randn(n, 16, generator=torch.Generator().manual_seed(0))
    return [(vector, int(vector[:4].argmax())) for vector in vectors]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def train(model: Any, optimizer: Any) -> list[float]:
    """One pass over the data; returns the losses."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    schedule: Any = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, DataLoader(data(), 8), schedule)
    losses = []
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--ram", default="2MiB", help="RAM for parameters, gradients and optimizer states")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = {"memory": {"ram": arguments.ram}, "ssd": {"paths": [f"{folder}/pages"]}}
        model, optimizer = offload.prepare(build_model(arguments.width), adamw, config)
        losses = train(model, optimizer)
        optimizer.engine.close()
    plain = build_model(arguments.width)
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    print(f"equal to those without pages: {losses == train(plain, adamw(plain.parameters()))}")


if __name__ == "__main__":
    main()
