"""A frozen base in bf16, in a safetensors file, under a head in fp32 that is trained: plainly, and over pages that have
the file for their origin."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cross_references import check_mover
from safetensors.torch import save_file
from torch import Tensor, nn

import offload
from offload.config_loading import load_config
from offload.store.adoption import page_model
from offload.store.page_store import PageStore
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.sources.source_files import SourceFile, SourcePiece
from pagemem.tier import Tag

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
WIDTH = 128


class FrozenBase(nn.Module):
    """Linear layers, experts that are looked at through views, a norm; and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
        self.experts = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / WIDTH**0.5)
        self.norm = nn.LayerNorm(WIDTH)
        self.to(torch.bfloat16)
        self.requires_grad_(False)
        self.head = nn.Linear(WIDTH, 10)
        self.scale_by: float | None = None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for number, layer in enumerate(self.base):
            x = torch.relu(layer(x)) @ self.experts[number % 3].t()
            if self.scale_by is not None and number == 1:
                self.experts[0].mul_(self.scale_by)
        return nn.functional.cross_entropy(self.head(self.norm(x).float()), y)


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Of what is trained."""
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-2, fused=True)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels of a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, WIDTH, generator=generator).bfloat16(), torch.randint(10, (4,), generator=generator)


def plain_and_file(folder: Path) -> tuple[FrozenBase, Path]:
    """A model with values, and a safetensors file with the same."""
    torch.manual_seed(3)
    plain = FrozenBase()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    save_file(plain.state_dict(), path)
    return plain, path


def pieces_of(path: Path, dtypes: Mapping[str, torch.dtype] | None = None) -> dict[str, SourcePiece]:
    """Where each tensor of a safetensors file lies, by name, to be read in its own dtype or another."""
    file = SourceFile.of(path)
    with path.open("rb") as opened:
        (n_bytes,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(n_bytes))
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            dtype = DTYPES[entry["dtype"]]
            found[name] = SourcePiece(
                file, 8 + n_bytes + begin, end - begin, 0, dtype, dtypes[name] if dtypes is not None else dtype
            )
    return found


def on_meta(make: Callable[[], nn.Module] = FrozenBase) -> nn.Module:
    """A model without values."""
    with torch.device("meta"):
        return make()


def sources_of(model: nn.Module, path: Path) -> dict[nn.Parameter, Sequence[SourcePiece]]:
    """Where the parameters of a model lie in a file of its ``state_dict()``."""
    named = dict(model.named_parameters())
    pieces = pieces_of(path, {name: parameter.dtype for name, parameter in named.items()})
    return {parameter: [pieces[name]] for name, parameter in named.items()}


def settings(folder: Path, **memory: Any) -> dict[str, Any]:
    """A configuration, with pages of 64 KiB."""
    return {
        "device": "cpu-emulated" if "device" in memory else "cpu",
        "memory": {"ram": "640KiB", "page": "64KiB", **memory},
        "ssd": {"paths": [str(folder / "pages")], "threads": 2},
    }


def prepared(config: Mapping[str, Any], path: Path | None, factory: Any = sgd) -> tuple[nn.Module, Any]:
    """A model in pages that come from a file (None: without values), and its optimizer."""
    model = on_meta()
    with_values = {} if path is None else sources_of(model, path)
    page_model(PageStore(load_config(config)), model, with_values)
    return offload.prepare(model, factory, config)


def train(model: nn.Module, optimizer: Any, steps: Iterable[int]) -> list[Tensor]:
    """Losses of these steps."""
    losses = []
    for step in steps:
        loss = model(*batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().clone())
    engine = getattr(optimizer, "engine", None)
    if engine is not None:
        check_mover(engine.debug.store.mover)
    return losses


def of_base(optimizer: Any) -> list[PagedTensor]:
    """The tensors with frozen parameters."""
    tensors = optimizer.engine.debug.store.mover.tensors.values()
    return [tensor for tensor in tensors if tensor.tag is Tag.PARAM and not tensor.name.startswith("head")]


def same(plain: nn.Module, model: nn.Module) -> bool:
    """Whether all parameters are equal, bit for bit."""
    ours = model.state_dict()
    return all(torch.equal(value, ours[name]) for name, value in plain.state_dict().items())
