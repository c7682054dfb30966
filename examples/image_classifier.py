"""An image classifier over pages: a small ResNet tells drawn shapes apart. Nothing is downloaded.

    python examples/image_classifier.py --steps 150

Shows `offload.initialize`, a learning-rate schedule, batch normalisation, gradient clipping, and evaluation.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch import Tensor, nn

import offload

SHAPES = ("disc", "square", "ring", "cross")
SIZE = 24


def images(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images (rows, 1, SIZE, SIZE) of shapes at random places, and which shape each is (rows,)."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(len(SHAPES), (rows,), generator=generator)
    centre = torch.rand(rows, 2, 1, 1, generator=generator) * (SIZE - 12) + 6
    radius = torch.rand(rows, 1, 1, generator=generator) * 3 + 3
    axis = torch.arange(SIZE, dtype=torch.float32)
    dy, dx = (axis[None, :, None] - centre[:, 0]).abs(), (axis[None, None, :] - centre[:, 1]).abs()
    distance = (dx.square() + dy.square()).sqrt()
    drawn = torch.stack(
        [
            distance <= radius,
            torch.maximum(dx, dy) <= radius,
            (distance <= radius) & (distance >= radius - 2),
            (torch.minimum(dx, dy) <= 1) & (torch.maximum(dx, dy) <= radius),
        ]
    )
    picture = drawn[label, torch.arange(rows)].float()
    return (picture + 0.3 * torch.randn(picture.shape, generator=generator)).unsqueeze(1), label


class Residual(nn.Module):
    """Two convolutions beside a shortcut; ``stride`` 2 halves the image."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(n_out), nn.BatchNorm2d(n_out)])
        self.shortcut = nn.Conv2d(n_in, n_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        grown = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(self.norms[1](self.second(grown)) + self.shortcut(x))


def build_model(channels: int) -> nn.Module:
    """A ResNet of three stages."""
    stages = [Residual(1, channels, 1), Residual(channels, 2 * channels, 2), Residual(2 * channels, 4 * channels, 2)]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * channels, len(SHAPES)))


def accuracy(model: nn.Module, rows: int) -> float:
    """Share of held-out images that are told right."""
    x, label = images(rows, seed=1_000_000)
    model.eval()
    with torch.no_grad():
        right = (model(x).argmax(1) == label).float().mean().item()
    model.train()
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--ram", default="1MiB")
    arguments = parser.parse_args()
    torch.manual_seed(1)
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "memory": {"ram": arguments.ram},
            "ssd": {"paths": [f"{folder}/pages"]},
            "update": {"clip_norm": 1.0},
            "optimizer": {"name": "adamw", "lr": 4e-3, "weight_decay": 0.01, "no_decay": ["1d"]},
        }
        with offload.initialize(build_model(arguments.channels), config) as engine:
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(engine.optimizer, arguments.steps)
            for step in range(arguments.steps):
                x, label = images(arguments.batch, seed=step)
                loss = nn.functional.cross_entropy(engine(x), label)
                engine.backward(loss)
                engine.step()
                schedule.step()
                if step % 25 == 0:
                    print(f"step {step:4d}  loss {loss.item():.3f}  gradient norm {engine.grad_norm:.2f}")
            print(f"accuracy on new images: {accuracy(engine.model, 8 * arguments.batch):.1%}")


if __name__ == "__main__":
    main()
