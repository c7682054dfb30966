"""Step time of the engine against plain PyTorch: same model, data and run, in turns, each in a process of its own.

    python -m benchmarks.step --size 27m --ram-share 0.25

Each process is blocked on its pipe while the other one steps, so they do not disturb each other and each has its own
peak memory. In turns of one step, what the engine reads and writes beyond a step's end goes on during the other's step;
with ``--turn 5`` only that of every fifth step does. ``--ram-share`` is the RAM budget for model states over 12 bytes a
parameter (fp32 parameters and two moments); 1.5 holds everything. The engine traces in its first two steps and plans
once more after its sixth; all that is warm-up.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from benchmarks import common
from benchmarks.common import GPT, SIZES, Spread, batch, fused_adamw
from offload.heap import keep_freed_memory, without_tcache
from offload.profiling.live_storages import Holder, LiveStorages

if TYPE_CHECKING:
    from benchmarks.torch_offload import TorchOffload

WARM_UP = 8


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    model_arguments(parser)
    parser.add_argument(
        "--torch-offload", action="store_true", help="torch's own CPU offload (FSDP2) steps beside them"
    )
    parser.add_argument(
        "--torch-keeps-heap",
        action="store_true",
        help="plain PyTorch keeps freed memory too, as memory.heap = keep does",
    )
    parser.add_argument(
        "--joining-heap",
        action="store_true",
        help="start the engine's process with GLIBC_TUNABLES=glibc.malloc.tcache_count=0, as offload launch does where "
        "--activations is set",
    )
    parser.add_argument("--count-tensors", type=int, metavar="STEP", help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=["torch", "engine", "torch_offload"], help=argparse.SUPPRESS)
    parser.add_argument(
        "--runs",
        type=int,
        default=1,
        help="pairs of new processes, one after another: where their memory lies differs (default: %(default)s)",
    )
    parser.add_argument(
        "--turn", type=int, default=1, help="steps that each makes before the other's turn (default: %(default)s)"
    )
    options = common.step_arguments(parser, steps=9)
    if min(options.runs, options.turn) < 1:
        parser.error("--runs and --turn must be at least 1")
    if options.device == "cuda" and options.device_share is None:
        parser.error("--device cuda needs --device-share, what the device holds of the parameters")
    return options


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the model and of `Engine`."""
    parser.add_argument("--size", choices=SIZES, default="27m")
    parser.add_argument("--ram-share", type=float, default=0.25)
    parser.add_argument(
        "--device-share",
        type=float,
        metavar="SHARE",
        help="compute out of a third tier of ordinary RAM (device = cpu-emulated) with room for so much of the "
        "parameters; with AdamW in fp32, from 3 on for states as well",
    )
    parser.add_argument(
        "--device-states", choices=["auto", "never"], default="auto", help="memory.device_states of the engine"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="where both compute; cuda needs --device-share"
    )
    parser.add_argument("--clip-norm", type=float, help="clip gradients, on both sides")
    parser.add_argument(
        "--activations", metavar="SIZE", help="memory.activations of the engine, such as 600MiB; the rest goes to pages"
    )
    parser.add_argument(
        "--blocks",
        choices=["auto", "never"],
        default="auto",
        help="memory.recompute of the engine, which matters with --activations",
    )
    parser.add_argument(
        "--ssd-limit", type=float, metavar="MB_PER_S", help="ssd.limit_mb_per_s of the engine, to model a slower disk"
    )
    parser.add_argument("--heap", choices=["auto", "keep", "trim"], default="auto", help="memory.heap of the engine")
    parser.add_argument(
        "--recompute", action="store_true", help="each block is computed again in the backward pass, on both sides"
    )
    parser.add_argument("--no-checksums", action="store_true")


# ---- the measured processes ---------------------------------------------------------------------------------------


class PlainTorch:
    """PyTorch alone."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.clip_norm = a.clip_norm
        if a.torch_keeps_heap:
            keep_freed_memory()
        self.model = GPT(*SIZES[a.size], a.seq, a.recompute).to(a.device)
        self.optimizer = fused_adamw(self.model.parameters())

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """One training step; returns the loss."""
        loss = self.model(x, y)
        loss.backward()
        if self.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

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

        ram = int(a.ram_share * 12 * common.n_parameters(*SIZES[a.size], a.seq))
        device = (
            None if a.device_share is None else int(a.device_share * 4 * common.n_parameters(*SIZES[a.size], a.seq))
        )
        config = {
            "device": a.device if device is None or a.device != "cpu" else "cpu-emulated",
            "memory": {
                "ram": ram,
                "device": device,
                "device_states": a.device_states,
                "activations": a.activations,
                "recompute": a.blocks,
                "heap": a.heap,
            },
            "ssd": {"paths": [f"{a.dir}/pages"], "checksums": not a.no_checksums, "limit_mb_per_s": a.ssd_limit},
            "update": {"clip_norm": a.clip_norm},
        }
        with offload.deferred_init(config):
            model = GPT(*SIZES[a.size], a.seq, a.recompute)
        self.model, self.optimizer = offload.prepare(model, fused_adamw, config)
        self.engine = self.optimizer.engine

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """One training step; returns the loss."""
        loss = self.model(x, y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def counters(self) -> dict[str, float]:
        """The engine's counters."""
        return dataclasses.asdict(self.engine.stats())

    def summary(self) -> dict[str, Any]:
        """Memory by tier, and the plan's forecast."""
        report = self.engine.memory_report()
        return {
            "planned_step_s": self.engine.planned_step_s, "device_units": self.engine.stats().device_units,
            "units": len(self.engine.debug.units), "memory": dataclasses.asdict(report),
        }  # fmt: skip

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()


class Count:
    """The most bytes of tensors that a step made and that were alive at once; what lies in pages is not made anew."""

    def __init__(self) -> None:
        self.bytes = self.peak_bytes = 0

    def __call__(self, _holder: Holder, more_bytes: int) -> None:
        self.bytes += more_bytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)


def _subject(a: argparse.Namespace) -> PlainTorch | Engine | TorchOffload:
    if a.child == "torch":
        return PlainTorch(a)
    if a.child == "engine":
        return Engine(a)
    from benchmarks.torch_offload import TorchOffload  # not in the processes whose memory it would change

    return TorchOffload(GPT(*SIZES[a.size], a.seq, a.recompute), a.device, Path(a.dir), a.clip_norm)


def child(a: argparse.Namespace) -> None:
    """Step whenever a line comes in; answer each with one JSON line."""
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
    subject = _subject(a)
    count = Count()
    tensors = LiveStorages(count)
    for number, _ in enumerate(iter(sys.stdin.readline, "stop\n")):
        x, y = (tensor.to(a.device) for tensor in batch(number, a.batch, a.seq))
        before, disk = subject.counters(), common.disk_bytes()
        started_s, cpu_s = time.perf_counter(), time.process_time()
        with tensors if number == a.count_tensors else nullcontext():
            loss = subject.step(x, y)
            if a.device == "cuda":
                torch.cuda.synchronize()
        step_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
        after, disk_after = subject.counters(), common.disk_bytes()
        answer = {
            "step_s": step_s,
            "cpu_s": cpu_s,
            "loss": loss,
            "disk_read": disk_after[0] - disk[0],
            "disk_written": disk_after[1] - disk[1],
            **{key: after[key] - before[key] for key in after if key != "recomputed_blocks"},
            **{key: after[key] for key in after if key == "recomputed_blocks"},
        }
        print(json.dumps(answer), flush=True)
    summary = {"peak_rss_bytes": common.status_bytes("VmHWM"), "tensor_peak_bytes": count.peak_bytes}
    if a.device == "cuda":
        summary["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps({**summary, **subject.summary()}), flush=True)
    subject.close()


# ---- the measuring process ----------------------------------------------------------------------------------------


class Child:
    """One measured process, which takes the command line's options."""

    def __init__(self, kind: str, options: Sequence[str], *, joining_heap: bool) -> None:
        command = [sys.executable, "-m", "benchmarks.step", *options, "--child", kind]
        environment = without_tcache(os.environ) if joining_heap else None
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, line: str) -> dict[str, Any]:
        """Send a line, wait for the answer."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(line + "\n")
        stdin.flush()
        return _answer(stdout)

    def end(self) -> dict[str, Any]:
        """Stop the process; returns its summary."""
        summary = self.ask("stop")
        self.process.wait()
        return summary


def _answer(stdout: IO[str]) -> dict[str, Any]:
    line = stdout.readline()
    if not line:
        raise SystemExit("a measured process ended early; its error is above")
    answer: dict[str, Any] = json.loads(line)
    return answer


def take_turns(a: argparse.Namespace, run: int) -> Run:
    """New processes that step in turns, until each has made the steps asked for."""
    shutil.rmtree(f"{a.dir}/pages", ignore_errors=True)
    kinds = ["torch", "engine", *(["torch_offload"] if a.torch_offload else [])]
    children = {kind: Child(kind, sys.argv[1:], joining_heap=a.joining_heap and kind == "engine") for kind in kinds}
    steps: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    n_steps = WARM_UP + a.steps
    for begin in range(0, n_steps, a.turn):
        turn = range(begin, min(begin + a.turn, n_steps))
        for kind, process in children.items():
            steps[kind] += [process.ask("step") for _ in turn]
        for number in turn:
            times = (f"{kind} {values[number]['step_s']:.3f} s" for kind, values in steps.items())
            print(f"run {run + 1}/{a.runs}, step {number + 1}/{n_steps}", *times, file=sys.stderr)
    summaries = {kind: process.end() for kind, process in children.items()}
    shutil.rmtree(f"{a.dir}/pages", ignore_errors=True)
    return Run(steps, summaries)


@dataclasses.dataclass(frozen=True)
class Run:
    """What its processes answered, by kind: their steps, and their summaries."""

    steps: dict[str, list[dict[str, Any]]]
    summaries: dict[str, dict[str, Any]]

    def timed(self, kind: str) -> list[dict[str, Any]]:
        """The steps after the warm-up."""
        return self.steps[kind][WARM_UP:]

    def ratios(self, over: str = "torch") -> list[float]:
        """The engine's time over another's, step by step."""
        return [
            ours["step_s"] / theirs["step_s"]
            for ours, theirs in zip(self.timed("engine"), self.timed(over), strict=True)
        ]

    def losses_equal(self, a: argparse.Namespace) -> bool | None:
        """Whether both had the same losses, bit for bit, in every step.

        None: that is not to be expected on a GPU, where plain PyTorch makes updates by other kernels than the CPU does
            of units that
        are not at home there, and adds norms up in another order.
        """
        engine = self.summaries["engine"]
        if a.device == "cuda" and (a.clip_norm or engine["device_units"] < engine["units"]):
            return None
        torch_losses, engine_losses = ([step["loss"] for step in self.steps[kind]] for kind in ("torch", "engine"))
        return torch_losses == engine_losses


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """All runs; returns the record: times over all their steps, the highest peaks, tiers of the last one."""
    runs = [take_turns(a, run) for run in range(a.runs)]
    timed = {kind: [step for run in runs for step in run.timed(kind)] for kind in runs[0].steps}
    summaries = [run.summaries for run in runs]
    n = common.n_parameters(*SIZES[a.size], a.seq)
    per_step = {key: sum(step[key] for step in timed["engine"]) / len(timed["engine"]) for key in timed["engine"][0]}

    def highest(kind: str, key: str) -> Any:
        return max((summary[kind][key] for summary in summaries if key in summary[kind]), default=None)

    return {
        "benchmark": "step",
        "config": {k: v for k, v in vars(a).items() if k not in ("child", "json", "save", "dir")},
        "surroundings": common.surroundings(),
        "parameters": n,
        "ratio": dataclasses.asdict(Spread.of([ratio for run in runs for ratio in run.ratios()])),
        "ratio_of_each_run": [statistics.median(run.ratios()) for run in runs],
        "torch_step_s": dataclasses.asdict(Spread.of([step["step_s"] for step in timed["torch"]])),
        "engine_step_s": dataclasses.asdict(Spread.of([step["step_s"] for step in timed["engine"]])),
        "torch_peak_rss_bytes": highest("torch", "peak_rss_bytes"),
        "engine_peak_rss_bytes": highest("engine", "peak_rss_bytes"),
        "torch_device_peak_bytes": highest("torch", "device_peak_bytes"),
        "engine_device_peak_bytes": highest("engine", "device_peak_bytes"),
        "read_bytes_per_parameter": per_step["bytes_read"] / n,
        "written_bytes_per_parameter": per_step["bytes_written"] / n,
        "device_read_bytes_per_parameter": per_step["disk_read"] / n,
        "device_written_bytes_per_parameter": per_step["disk_written"] / n,
        "waiting_s": per_step["wait_s"],
        "update_s": per_step["update_s"],
        "planned_step_s": summaries[-1]["engine"]["planned_step_s"],
        "device_units": highest("engine", "device_units"),
        "deviations": sum(step["deviations"] for run in runs for step in run.steps["engine"]),
        "losses_equal": None if runs[0].losses_equal(a) is None else all(run.losses_equal(a) for run in runs),
        "memory": summaries[-1]["engine"]["memory"],
        "torch_offload": None
        if not a.torch_offload
        else {
            "ratio": dataclasses.asdict(Spread.of([ratio for run in runs for ratio in run.ratios("torch_offload")])),
            "step_s": dataclasses.asdict(Spread.of([step["step_s"] for step in timed["torch_offload"]])),
            "peak_rss_bytes": highest("torch_offload", "peak_rss_bytes"),
            "device_peak_bytes": highest("torch_offload", "device_peak_bytes"),
        },
        "all_steps": [run.steps for run in runs],
    }


def rows_of(record: dict[str, Any]) -> list[tuple[str, str]]:
    """The table."""
    ratio, plain, ours = (Spread(**record[key]) for key in ("ratio", "torch_step_s", "engine_step_s"))
    rest_s = ours.median - record["waiting_s"] - record["update_s"]
    rows = [
        ("parameters", f"{record['parameters']:,}"),
        ("step time over plain torch", str(ratio)),
        *(
            [("  of each run", ", ".join(f"{median:.3f}" for median in record["ratio_of_each_run"]))]
            if len(record["ratio_of_each_run"]) > 1
            else []
        ),
        ("plain torch, s a step", str(plain)),
        ("engine, s a step", str(ours)),
        ("  of it waiting for reads", f"{record['waiting_s']:.3f}"),
        ("  of it updates", f"{record['update_s']:.3f}"),
        ("  of it compute and everything else", f"{rest_s:.3f}"),
        ("  as the plan forecast it", f"{record['planned_step_s'] or 0:.3f}"),
        (
            "losses equal, bit for bit",
            "not compared: other kernels" if record["losses_equal"] is None else str(record["losses_equal"]),
        ),
        ("VmHWM, plain torch", f"{record['torch_peak_rss_bytes'] / 1e6:,.0f} MB"),
        ("VmHWM, engine", f"{record['engine_peak_rss_bytes'] / 1e6:,.0f} MB"),
        *([("units updated on the device", str(record["device_units"]))] if record["device_units"] else []),
        *(
            (f"device memory at its peak, {name}", f"{record[key] / 1e6:,.0f} MB")
            for name, key in (("plain torch", "torch_device_peak_bytes"), ("engine", "engine_device_peak_bytes"))
            if record[key] is not None
        ),
        (
            "SSD bytes a parameter and step",
            f"{record['read_bytes_per_parameter']:.2f} read, {record['written_bytes_per_parameter']:.2f} written",
        ),
        (
            "  as the block device counts",
            (
                f"{record['device_read_bytes_per_parameter']:.2f} read, "
                f"{record['device_written_bytes_per_parameter']:.2f} written"
            ),
        ),
    ]
    peer = record["torch_offload"]
    if peer is not None:
        rows += [
            ("step time over torch's own CPU offload", str(Spread(**peer["ratio"]))),
            ("torch's own CPU offload, s a step", str(Spread(**peer["step_s"]))),
            ("VmHWM, torch's own CPU offload", f"{peer['peak_rss_bytes'] / 1e6:,.0f} MB"),
        ]
        if peer["device_peak_bytes"] is not None:
            rows.append(
                ("device memory at its peak, torch's own CPU offload", f"{peer['device_peak_bytes'] / 1e6:,.0f} MB")
            )
    for name, tier in record["memory"]["tiers"].items():
        rows.append((f"{name} pages: planned, measured", f"{tier['planned_peak_pages']}, {tier['peak_pages']}"))
    return rows


def main() -> None:
    """Measure and print."""
    a = arguments()
    if a.child:
        child(a)
        return
    torch.set_num_threads(a.threads)
    record = measure(a)
    common.save(record, a.save)
    title = f"{a.size}, batch {a.batch} x {a.seq}, RAM for states {a.ram_share:g} of them" + (
        f", {a.activations} of activations" if a.activations else ""
    )
    title += "" if a.device_share is None else f", device for parameters {a.device_share:g} of them"
    common.show(title, rows_of(record), {k: v for k, v in record.items() if k != "all_steps"}, as_json=a.json)


if __name__ == "__main__":
    main()
