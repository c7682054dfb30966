"""The measured processes of benchmarks that time steps: plain PyTorch, the engine, torch's own CPU offload.

Each is blocked on its pipe while another one steps, so none disturbs another, and each has its own peak memory. The
engine has a user's default configuration: budget and folder, and beyond those only what the command line names.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from benchmarks import common
from benchmarks.common import GPT, SIZES, batch, fused_adamw, plain_step
from offload.heap import give_back_large_blocks, keep_freed_memory, without_tcache
from offload.profiling.live_storages import Holder, LiveStorages
from offload.store.store_parts import StoreParts
from optim.lockfree.unit_channel import GradientSum, UnitChannel
from optim.unit import Slot

if TYPE_CHECKING:
    from benchmarks.torch_offload import TorchOffload

#: The engine traces in its first two steps and plans once more after its sixth.
WARM_UP: Final = 8
PLAIN, SAME_HEAP, ENGINE, TORCH_OFFLOAD = "plain", "plain-same-heap", "engine", "torch-offload"


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the model and of `Engine`."""
    parser.add_argument("--size", choices=SIZES, default="27m")
    parser.add_argument("--ram-share", type=float, default=0.25, help="memory.ram over 12 bytes a parameter")
    parser.add_argument(
        "--device-share", type=float, metavar="SHARE",
        help="compute out of a third tier of ordinary RAM (device = cpu-emulated) with room for this share of the "
        "parameters; with AdamW in fp32, from 3 on for states as well",
    )  # fmt: skip
    parser.add_argument("--device-states", choices=["auto", "never"], help="memory.device_states of the engine")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="where both compute; cuda needs --device-share"
    )
    parser.add_argument("--clip-norm", type=float, help="clip gradients, on both sides")
    parser.add_argument("--activations", metavar="SIZE", help="memory.activations of the engine, such as 600MiB")
    parser.add_argument("--blocks", choices=["auto", "never"], help="memory.recompute of the engine")
    parser.add_argument(
        "--ssd-limit", type=float, metavar="MB_PER_S", help="ssd.limit_mb_per_s, to model a slower disk"
    )
    parser.add_argument("--mode", choices=["exact", "lock-free", "auto"], help="update.mode of the engine")
    parser.add_argument("--max-staleness", type=int, help="update.max_staleness of the engine")
    parser.add_argument("--exact-steps", type=int, help="update.exact_steps of the engine")
    parser.add_argument("--on-time", choices=["auto", "never"], help="update.on_time of the engine")
    parser.add_argument("--worker", choices=["true", "false"], help="update.worker of the engine")
    parser.add_argument("--updates-off", action="store_true", help="lock-free mode whose gradients are dropped")
    parser.add_argument(
        "--recompute", action="store_true", help="each block is computed again in the backward pass, on both sides"
    )


class PlainTorch:
    """PyTorch alone.

    Args:
        same_heap: whether freed memory is kept, or given back, as the engine's default does with the same options.
    """

    def __init__(self, a: argparse.Namespace, *, same_heap: bool) -> None:
        self.clip_norm = a.clip_norm
        self.model = GPT(*SIZES[a.size], a.seq, a.recompute).to(a.device)
        self.optimizer = fused_adamw(self.model.parameters())
        if same_heap:
            (keep_freed_memory if a.activations is None else give_back_large_blocks)()

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
        """Nothing to close."""


class Engine:
    """PyTorch with parameters and states in pages."""

    def __init__(self, a: argparse.Namespace) -> None:
        import offload

        config = engine_config(a)
        with offload.deferred_init(config):
            model = GPT(*SIZES[a.size], a.seq, a.recompute)
        with updates_off() if a.updates_off else nullcontext():
            self.model, self.optimizer = offload.prepare(model, fused_adamw, config)
        self.engine: Any = self.optimizer.engine  # type: ignore[attr-defined]

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """One training step; returns the loss."""
        return plain_step(self.model, self.optimizer, None, x, y)  # the engine clips by its configuration

    def counters(self) -> dict[str, float]:
        """The engine's counters."""
        return dataclasses.asdict(self.engine.stats())

    def summary(self) -> dict[str, Any]:
        """Memory by tier, and the plan's forecast."""
        return {
            "planned_step_s": self.engine.planned_step_s,
            "updates": self.engine.memory_report().updates,
            "device_units": self.engine.stats().device_units,
            "units": len(self.engine.debug.units),
            "memory": dataclasses.asdict(self.engine.memory_report()),
        }

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()


def engine_config(a: argparse.Namespace) -> dict[str, Any]:
    """What a user writes: the RAM budget, the folder, and keys for those options that were given."""
    n = common.n_parameters(*SIZES[a.size], a.seq)
    memory = {
        "ram": int(a.ram_share * 12 * n), "device": None if a.device_share is None else int(a.device_share * 4 * n),
        "device_states": a.device_states, "activations": a.activations, "recompute": a.blocks,
    }  # fmt: skip
    config: dict[str, Any] = {
        "memory": _given(memory),
        "ssd": _given({"paths": [f"{a.dir}/pages"], "limit_mb_per_s": a.ssd_limit}),
    }
    if a.device_share is not None:
        config["device"] = "cuda" if a.device == "cuda" else "cpu-emulated"
    update = {
        "clip_norm": a.clip_norm, "mode": a.mode, "max_staleness": a.max_staleness, "exact_steps": a.exact_steps,
        "on_time": a.on_time, "worker": {"true": True, "false": False}.get(a.worker),
    }  # fmt: skip
    if _given(update):
        config["update"] = _given(update)
    if a.mode == "auto":  # what a forecast needs
        d_model, n_layer = SIZES[a.size]
        arguments = {"d_model": d_model, "n_layer": n_layer, "seq": a.seq, "recompute": a.recompute}
        config["model"] = {"factory": "benchmarks.common:GPT", "arguments": arguments}
        config["train"] = {"steps": 1, "batch": a.batch, "seq": a.seq, "threads": a.threads}
    return config


def _given(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if value is not None}


class DroppingUnitChannel(UnitChannel):
    """Takes gradients as any channel does, and throws them away: training without updates, the rest as it is."""

    def put(self, sums: dict[Slot, GradientSum]) -> int:
        """Drop one step's gradients; returns the bytes that are free afterwards."""
        return sum(total.release() for total in sums.values())


@contextmanager
def updates_off() -> Iterator[None]:
    """Lock-free engines made inside drop the gradients that their update threads get."""
    kept = StoreParts.channel
    StoreParts.channel = lambda parts, unit: DroppingUnitChannel(unit)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        StoreParts.channel = kept  # type: ignore[method-assign]


class Count:
    """The most bytes of tensors that a step made and that were alive at once; what lies in pages is not made anew."""

    def __init__(self) -> None:
        self.bytes = self.peak_bytes = 0

    def __call__(self, _holder: Holder, more_bytes: int) -> None:
        self.bytes += more_bytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)


def _subject(a: argparse.Namespace) -> PlainTorch | Engine | TorchOffload:
    if a.kind in (PLAIN, SAME_HEAP):
        return PlainTorch(a, same_heap=a.kind == SAME_HEAP)
    if a.kind == ENGINE:
        return Engine(a)
    from benchmarks.torch_offload import TorchOffload  # not in the processes whose memory it would change

    return TorchOffload(GPT(*SIZES[a.size], a.seq, a.recompute), a.device, Path(a.dir), a.clip_norm)


def _answers(a: argparse.Namespace) -> None:
    """Step whenever a line comes in and answer with one JSON line; the line "stop" and the end of input end it."""
    torch.set_num_threads(a.threads)
    torch.manual_seed(1)
    if a.device == "cuda":
        # Fused kernels of attention add gradients up in any order: neither side would have the same bits twice.
        for enable in (
            torch.backends.cuda.enable_flash_sdp,
            torch.backends.cuda.enable_mem_efficient_sdp,
            torch.backends.cuda.enable_cudnn_sdp,
        ):
            enable(False)
    subject, count = _subject(a), Count()
    for number, line in enumerate(sys.stdin):
        if line == "stop\n":
            break
        with LiveStorages(count) if number == a.count_tensors else nullcontext():
            print(json.dumps(_timed_step(subject, number, a)), flush=True)
    summary = {"peak_rss_bytes": common.status_bytes("VmHWM"), "tensor_peak_bytes": count.peak_bytes}
    if a.device == "cuda":
        summary["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps({**summary, **subject.summary()}), flush=True)
    subject.close()


def _timed_step(subject: PlainTorch | Engine | TorchOffload, number: int, a: argparse.Namespace) -> dict[str, float]:
    x, y = (tensor.to(a.device) for tensor in batch(number, a.batch, a.seq))
    before, disk = subject.counters(), common.disk_bytes()
    started_s, cpu_s, thread_s = time.perf_counter(), time.process_time(), time.thread_time()
    loss = subject.step(x, y)
    thread_s = time.thread_time() - thread_s
    if a.device == "cuda":
        torch.cuda.synchronize()
    step_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
    after, disk_after = subject.counters(), common.disk_bytes()
    moved = {key: after[key] - (0 if key == "recomputed_blocks" else before[key]) for key in after}
    return {
        "step_s": step_s, "cpu_s": cpu_s, "thread_s": thread_s, "loss": loss,
        "disk_read": disk_after[0] - disk[0], "disk_written": disk_after[1] - disk[1], **moved,
    }  # fmt: skip


class Pipe:
    """A process that answers each line with one line of JSON."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, line: str) -> Any:
        """Send a line, wait for the answer.

        Raises:
            SystemExit: the process has ended.
        """
        self.say(line)
        return self.answer()

    def say(self, line: str) -> None:
        """Send a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """Wait for the next answer. Raises as `ask`."""
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("a measured process ended early; its error is above")
        return json.loads(answer)

    def wait(self) -> None:
        """Wait for the process's end."""
        self._process.wait()

    def end(self) -> dict[str, Any]:
        """Stop the process; returns its summary."""
        summary: dict[str, Any] = self.ask("stop")
        self.wait()
        return summary


class Process:
    """A measured process of this module, seen from the measuring one.

    Args:
        options: of `model_arguments`, ``--batch``, ``--seq``, ``--threads`` and ``--dir``.
        tcache_disabled: start it as `offload launch` starts itself with `memory.activations`, see `offload.heap`.
    """

    def __init__(self, kind: str, options: Sequence[object], *, tcache_disabled: bool = False) -> None:
        command = [sys.executable, "-m", "benchmarks.subjects", kind, *map(str, options)]
        self._pipe = Pipe(command, without_tcache(os.environ) if tcache_disabled else None)

    def step(self) -> dict[str, Any]:
        """Have it make a step; returns what that took and moved."""
        answer: dict[str, Any] = self._pipe.ask("step")
        return answer

    def end(self) -> dict[str, Any]:
        """Stop the process; returns its summary."""
        return self._pipe.end()


def options_of(a: argparse.Namespace, names: Sequence[str]) -> list[object]:
    """Options of ``a`` as a command line, those that are None or False left out."""
    options: list[object] = []
    for name in names:
        value = getattr(a, name)
        if value is not None and value is not False:
            options += [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
    return options


#: What a measured process needs to know of a command line that has `model_arguments` and a batch.
OPTIONS: Final = (
    "size", "ram_share", "device_share", "device_states", "device", "clip_norm", "activations", "blocks", "ssd_limit",
    "recompute", "mode", "max_staleness", "exact_steps", "on_time", "worker", "updates_off", "batch", "seq", "threads",
    "dir",
)  # fmt: skip


def main() -> None:
    """The process of `Process`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=[PLAIN, SAME_HEAP, ENGINE, TORCH_OFFLOAD])
    model_arguments(parser)
    common.batch_arguments(parser)
    parser.add_argument("--dir")
    parser.add_argument("--count-tensors", type=int, metavar="STEP")
    _answers(parser.parse_args())


if __name__ == "__main__":
    main()
