"""torch's own CPU offload as a subject of `benchmarks.step`: FSDP2 on one rank, each block and the whole a group of its
own.

Parameters, gradients and optimizer states are in host memory; a group's parameters are copied to the device before its
forward and backward, its gradients back after, and the optimizer steps on the CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from benchmarks.common import GPT, fused_adamw, plain_step


class TorchOffload:
    """FSDP2 with `CPUOffloadPolicy`.

    Args:
        model: on the CPU.
        device: "cuda", or "cpu" to try it without one.
        folder: for the file at which the only rank meets itself.
        clip_norm: None: gradients are not clipped.
    """

    def __init__(self, model: GPT, device: str, folder: Path, clip_norm: float | None) -> None:
        self.clip_norm = clip_norm
        self.model = model
        folder.mkdir(parents=True, exist_ok=True)
        self._meeting = folder / "torch-offload-ranks"
        self._meeting.unlink(missing_ok=True)
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{self._meeting.absolute()}", rank=0, world_size=1)
        mesh = init_device_mesh(device, (1,))
        policy = CPUOffloadPolicy(pin_memory=device == "cuda")
        for block in model.blocks:
            fully_shard(block, mesh=mesh, offload_policy=policy)
        fully_shard(model, mesh=mesh, offload_policy=policy)
        self.optimizer = fused_adamw(model.parameters())

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """One training step; returns the loss."""
        return plain_step(self.model, self.optimizer, self.clip_norm, x, y)

    def counters(self) -> dict[str, float]:
        """Nothing of its own."""
        return {}

    def summary(self) -> dict[str, Any]:
        """Nothing of its own."""
        return {}

    def close(self) -> None:
        """End the process group."""
        dist.destroy_process_group()
        self._meeting.unlink(missing_ok=True)
