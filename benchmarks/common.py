"""What all benchmarks share: the model and its data, meters, the record of a result, and how it is printed.

The model, initial values, batches and hyper-parameters are those of the published peer measurements: a GPT with
head dimension 64, vocabulary 8192 and an untied head; each weight is drawn by a generator of its own, so that every way
of building the model starts from the same values.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks import results_csv

SIZES: Final = {"27m": (512, 6), "112m": (768, 14), "357m": (1024, 27), "2x512": (512, 2), "24x64": (64, 24)}
VOCAB: Final = 8192
HYPER: Final[dict[str, Any]] = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
_LANGUAGE: Final = 256
RESAMPLES: Final = 10_000


class _Draw:
    """Numbers the weights as they are built, for their generators' seeds."""

    count = 0

    @classmethod
    def fill(cls, weight: Tensor) -> None:
        cls.count += 1
        generator = torch.Generator().manual_seed(1000003 + cls.count)
        with torch.no_grad():
            weight.copy_(torch.empty(weight.shape).normal_(0, 0.02, generator=generator))


def restart_draws() -> None:
    """Number weights from the first one again: a model that is built next has the same values as any other like it."""
    _Draw.count = 0


class Linear(nn.Linear):
    """Linear layer whose weight has a generator of its own."""

    def reset_parameters(self) -> None:
        _Draw.fill(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """Embedding whose weight has a generator of its own."""

    def reset_parameters(self) -> None:
        _Draw.fill(self.weight)


class Block(nn.Module):
    """Pre-norm transformer block, (B, T, C) -> (B, T, C)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.heads = d_model // 64
        self.ln1, self.ln2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.proj = Linear(d_model, 3 * d_model), Linear(d_model, d_model)
        self.fc, self.out = Linear(d_model, 4 * d_model), Linear(4 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, channels = x.shape
        heads = self.qkv(self.ln1(x)).view(rows, tokens, 3, self.heads, 64).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(rows, tokens, channels))
        grown: Tensor = self.out(F.gelu(self.fc(self.ln2(x))))
        return x + grown


class GPT(nn.Module):
    """The measured model; forward returns the mean cross entropy.

    Args:
        recompute: whether each block is computed again in the backward pass (`torch.utils.checkpoint`).
    """

    def __init__(self, d_model: int, n_layer: int, seq: int, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        restart_draws()
        self.tok, self.pos = Embedding(VOCAB, d_model), Embedding(seq, d_model)
        self.blocks = nn.ModuleList(Block(d_model) for _ in range(n_layer))
        self.lnf, self.head = nn.LayerNorm(d_model), Linear(d_model, VOCAB, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.tok(x) + self.pos(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            hidden = checkpoint(block, hidden, use_reentrant=False) if self.recompute else block(hidden)
        loss: Tensor = F.cross_entropy(self.head(self.lnf(hidden)).flatten(0, 1), y.flatten())
        return loss


def n_parameters(d_model: int, n_layer: int, seq: int) -> int:
    """Parameters of `GPT`, without building it."""
    return n_layer * (12 * d_model**2 + 13 * d_model) + (2 * VOCAB + seq + 2) * d_model


def batch(step: int, rows: int, seq: int) -> tuple[Tensor, Tensor]:
    """Batch number ``step`` of a fixed synthetic language (noisy affine successor), (rows, seq) int64 each."""
    generator = torch.Generator().manual_seed(7919 + step)
    start = torch.randint(_LANGUAGE, (rows, 1), generator=generator)
    x = (start + 17 * torch.arange(seq + 1)) % _LANGUAGE
    noise = torch.rand(x.shape, generator=generator) < 0.1
    x = torch.where(noise, torch.randint(_LANGUAGE, x.shape, generator=generator), x) * (VOCAB // _LANGUAGE)
    return x[:, :-1].contiguous(), x[:, 1:].contiguous()


def fused_adamw(parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of all measurements."""
    return torch.optim.AdamW(list(parameters), fused=True, **HYPER)


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float | None, x: Tensor, y: Tensor
) -> float:
    """One training step as any PyTorch program makes it; returns the loss."""
    loss = model(x, y)
    loss.backward()
    if clip_norm:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def status_bytes(key: str) -> int:
    """A field of /proc/self/status in bytes: VmHWM is the peak resident set, VmData the private mappings."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def disk_bytes() -> tuple[int, int]:
    """Bytes that this process has had read from and written to block devices."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"]), int(fields["write_bytes"])


@dataclass(frozen=True)
class Spread:
    """A median, with the range of the values or an interval for the median."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Median, least and greatest."""
        return cls(statistics.median(values), min(values), max(values))

    @classmethod
    def bootstrap(cls, values: Sequence[float]) -> Spread:
        """Median and its bootstrap 95 % interval, of `RESAMPLES` medians of values drawn anew."""
        drawn = np.random.default_rng(1).choice(np.asarray(values), (RESAMPLES, len(values)))
        low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
        return cls(statistics.median(values), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


def surroundings() -> dict[str, Any]:
    """Versions, hardware and date of a result; no host names or paths."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    memory_kib = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "offload": _version("offload"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory_kib / 2**20, 1),
        "kernel": platform.release().split("-")[0],
        "threads": torch.get_num_threads(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "source tree"


def show(title: str, rows: Sequence[tuple[str, str]], record: Mapping[str, Any], *, as_json: bool) -> None:
    """Print a result: a table on a terminal, aligned lines in a pipe, and the record as the last line if asked."""
    console = Console()
    if console.is_terminal:
        table = Table(title=title, show_header=False)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    else:
        width = max(len(what) for what, _ in rows)
        print(title)
        for what, value in rows:
            print(f"  {what:<{width}}  {value}")
    if as_json:
        print(json.dumps(record))


def save(
    a: argparse.Namespace, record: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], file: Path = results_csv.FILE
) -> None:
    """Append ``rows`` to the CSV and keep the whole record as a file, as the options of `common_arguments` ask for.

    Args:
        rows: fields of `results_csv.Row`; date, commit, machine, benchmark, command and record are added.
    """
    keep_record(a, record)
    if a.save:
        around, name = record["surroundings"], record["benchmark"]
        shared: dict[str, Any] = {
            "date": datetime.date.fromisoformat(around["date"]), "commit": results_csv.commit(),
            "machine": results_csv.machine(around), "benchmark": name, "command": command_line(sys.argv),
            "record": _name_in_results(a.record),
        }  # fmt: skip
        results_csv.append([results_csv.Row(**shared, **row) for row in rows], file)


def keep_record(a: argparse.Namespace, record: Mapping[str, Any]) -> None:
    """Keep the whole record as a file if ``--record`` asks for it."""
    if a.record:
        Path(a.record).write_text(json.dumps(record, indent=1) + "\n")


def _name_in_results(record: str | None) -> str | None:
    path = Path(record or "").resolve()
    return path.name if record and path.parent == results_csv.RESULTS else None


def command_line(argv: Sequence[str]) -> str:
    """The command of a module that runs as ``python -m``, without the options that say where results and files go."""
    path = Path(argv[0]).resolve().relative_to(results_csv.RESULTS.parents[1]).with_suffix("")
    module = ".".join(path.parts).removesuffix(".__main__")
    kept: list[str] = []
    given = iter(argv[1:])
    for option in given:
        if option in ("--record", "--dir"):
            next(given, None)
        elif option not in ("--save", "--json") and not option.startswith(("--record=", "--dir=")):
            kept.append(option)
    return shlex.join(["python", "-m", module, *kept])


def ratio_row(ratio_of: str, ratio: Spread, **more: Any) -> dict[str, Any]:
    """Fields of a `results_csv.Row` for one ratio."""
    return {
        "ratio_of": ratio_of, "ratio": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high, **more
    }  # fmt: skip


def step_arguments(
    parser: argparse.ArgumentParser, *, steps: int, batch: int = 4, seq: int = 256
) -> argparse.Namespace:
    """Options of benchmarks that time training steps, and all that is asked on the command line."""
    parser.add_argument("--steps", type=int, default=steps, help="timed steps each, at least 5 (default: %(default)s)")
    batch_arguments(parser, batch, seq)
    common_arguments(parser)
    chosen = parser.parse_args()
    if chosen.steps < 5:
        parser.error("--steps must be at least 5")
    return chosen


def batch_arguments(parser: argparse.ArgumentParser, batch: int = 4, seq: int = 256) -> None:
    """Rows and tokens of a batch, and compute threads."""
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--seq", type=int, default=seq)
    parser.add_argument("--threads", type=int, default=2)


def common_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that every benchmark with rows for the CSV has."""
    parser.add_argument("--save", action="store_true", help="append the medians to benchmarks/results/results.csv")
    output_arguments(parser)


def output_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that every benchmark has."""
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    parser.add_argument("--record", metavar="FILE", help="keep everything measured as a JSON file")
    parser.add_argument("--dir", default="runs/benchmark", help="folder for page files (default: %(default)s)")


def config_of(a: argparse.Namespace) -> dict[str, Any]:
    """The options for a record, without those that say where results and files go."""
    return {key: value for key, value in vars(a).items() if key not in ("json", "save", "record", "dir")}
