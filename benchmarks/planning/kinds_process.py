"""The measured processes of `benchmarks.planning.kinds`: a model whose steps differ, of plain PyTorch or of
the engine."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

import offload
from benchmarks import common
from benchmarks.planning.models import GAN_WIDTH, Adversaries, Mixture
from benchmarks.subjects import ENGINE, SAME_HEAP, Pipe
from offload.heap import keep_freed_memory
from pagemem.telemetry.events import Event, EventKind

MIXTURE, GAN = "experts", "gan"
#: Words in the names of tensors of which a step uses only some.
_CONDITIONAL: Final = ".experts.experts."
_SEED: Final = 7919


class Waits:
    """Adds up the training thread's waits for what is used by condition, as a sink of events."""

    def __init__(self) -> None:
        self.conditional_s = 0.0

    def emit(self, event: Event) -> None:
        """Take one record."""
        if event.kind is EventKind.WAIT and _CONDITIONAL in event.name:
            self.conditional_s += event.duration_s


def inputs(case: str, number: int, rows: int, seq: int) -> tuple[Tensor, Tensor | None]:
    """Of step ``number``: tokens and targets, or noise and, in every other step, real rows."""
    if case == MIXTURE:
        return common.batch(number, rows, seq)
    generator = torch.Generator().manual_seed(_SEED + number)
    noise = torch.randn(rows, GAN_WIDTH, generator=generator)
    return noise, torch.randn(rows, GAN_WIDTH, generator=generator) if number % 2 else None


class Subject:
    """A model and its optimizer; what the engine counts is empty for plain PyTorch."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.case, self.waits = a.case, Waits()

        def make() -> nn.Module:
            return Mixture(a.seq, a.kind == ENGINE and not a.silent) if a.case == MIXTURE else Adversaries()

        self.engine: Any = None
        if a.kind == SAME_HEAP:
            self.model, keep = make(), keep_freed_memory
            self.optimizer = common.fused_adamw(self.model.parameters())
            keep()
            return
        with torch.device("meta"):
            n = sum(parameter.numel() for parameter in make().parameters())
        config = {"memory": {"ram": int(a.ram_share * 12 * n)}, "ssd": {"paths": [f"{a.dir}/pages"]}}
        with offload.deferred_init(config):
            model = make()
        self.model, self.optimizer = offload.prepare(model, common.fused_adamw, config)
        self.engine = self.optimizer.engine  # type: ignore[attr-defined]
        self.engine.debug.store.counters.onward = self.waits

    def step(self, x: Tensor, y: Tensor | None) -> float:
        """One training step; returns the loss."""
        loss = self.model(x, y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def counters(self) -> dict[str, float]:
        """What the engine has counted so far."""
        if self.engine is None:
            return {}
        return {**dataclasses.asdict(self.engine.stats()), "conditional_wait_s": self.waits.conditional_s}

    def digest(self) -> str:
        """Of all weights and biases."""
        found = hashlib.sha256()
        for name, value in self.model.state_dict().items():
            found.update(name.encode())
            found.update(value.contiguous().numpy().data)
        return found.hexdigest()


def _answers(a: argparse.Namespace) -> None:
    torch.set_num_threads(a.threads)
    torch.manual_seed(1)
    subject = Subject(a)
    for number, line in enumerate(sys.stdin):
        if line == "stop\n":
            break
        x, y = inputs(a.case, number, a.batch, a.seq)
        before, started_s = subject.counters(), time.perf_counter()
        loss = subject.step(x, y)
        step_s, after = time.perf_counter() - started_s, subject.counters()
        moved = {key: after[key] - before[key] for key in after}
        print(json.dumps({"step_s": step_s, "loss": loss, **moved}), flush=True)
    peak = common.status_bytes("VmHWM")
    print(json.dumps({"peak_rss_bytes": peak, "digest": subject.digest()}), flush=True)
    if subject.engine is not None:
        subject.engine.close()


class KindsProcess:
    """A measured process, seen from the measuring one.

    Args:
        kind: `SAME_HEAP` or `ENGINE`. options: of the command line below.
    """

    def __init__(self, kind: str, case: str, options: Sequence[object]) -> None:
        command = [sys.executable, "-m", "benchmarks.planning.kinds_process", kind, case, *map(str, options)]
        self._pipe = Pipe(command)

    def step(self) -> dict[str, Any]:
        """Have it make a step; returns what that took and moved."""
        answer: dict[str, Any] = self._pipe.ask("step")
        return answer

    def end(self) -> dict[str, Any]:
        """Stop the process; returns its peak memory and what became of its weights."""
        return self._pipe.end()


def main() -> None:
    """The process of `KindsProcess`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=[SAME_HEAP, ENGINE])
    parser.add_argument("case", choices=[MIXTURE, GAN])
    parser.add_argument("--ram-share", type=float, required=True)
    parser.add_argument("--silent", action="store_true")
    common.batch_arguments(parser)
    parser.add_argument("--dir")
    _answers(parser.parse_args())


if __name__ == "__main__":
    main()
