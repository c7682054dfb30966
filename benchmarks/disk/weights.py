"""Loading a checkpoint of a billion parameters: peak memory, bytes moved over the disk's rate, the first use in place,
and evaluation.

    python -m benchmarks.disk.weights

The checkpoint (22 layers of 2048, vocabulary 32,000, bf16, 2.0 GiB) is made in a temporary folder below ``--dir`` and
removed afterwards. Each case is a process of its own, with the checkpoint's pages dropped from the page cache before:

- ``read``: `offload.from_pretrained`, then each parameter is brought to RAM once, with nothing computed.
- ``evaluate``: the first evaluation, of two tokens.
- ``pages``: an evaluation of two tokens once each parameter was written, so that it comes from page files.
- ``frozen``: the first step of two tokens, with all but the last norm frozen.
- ``fine-tune``: the same with all parameters trained: fp32 masters and states are written.

Peak memory is VmHWM less what the process had after its imports; the disk's rates are those of `offload bench-ssd`:
4 MiB requests by 4 threads.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import offload
from benchmarks import common
from offload.machine.bench_ssd import BenchPlan, Setting, check_target, measure
from pagemem.units import GiB, MiB, format_bytes, parse_bytes

LAYERS, WIDTH, VOCAB = 22, 2048, 32_000
CASES = ("read", "evaluate", "pages", "frozen", "fine-tune")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--ram", type=parse_bytes, default=512 * MiB, help="memory.ram (default: 512 MiB)")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=CASES, help="only this one")
    common.common_arguments(parser)
    return parser.parse_args()


def make_checkpoint(folder: Path, layers: int) -> None:
    """Random weights, layer by layer in one file of about a gigabyte each."""
    transformers: Any = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=4, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size="1GB")


def drop_cache(folder: Path) -> None:
    """Have the next reads of a folder's files come from the disk."""
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def child(a: argparse.Namespace) -> None:
    """One case; prints one JSON line."""
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(a.threads)
    config = {"memory": {"ram": a.ram}, "ssd": {"paths": [f"{a.dir}/pages"]}}
    source = Path(a.checkpoint)
    drop_cache(source)
    base_bytes = common.status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    started_s = time.perf_counter()
    model: Any = offload.from_pretrained(source, config)
    if a.case == "frozen":
        model.requires_grad_(False)
        model.model.norm.requires_grad_(True)
    engine = offload.initialize(model, config, trained_only)
    found: dict[str, Any] = {"load_s": time.perf_counter() - started_s}
    found |= {f"load_{key}": value for key, value in _use(engine, base_bytes).items()}
    if a.case == "pages":
        for parameter in model.parameters():
            with offload.gathered([parameter]), torch.no_grad():
                parameter.mul_(1)
        use(engine, a.case)  # which has to write the last ones
    before = engine.stats()
    started_s = time.perf_counter()
    use(engine, a.case)
    found["use_s"] = time.perf_counter() - started_s
    found |= {f"use_{key}": value for key, value in _use(engine, base_bytes).items()}
    after = engine.stats()
    found |= {
        "use_read": after.bytes_read - before.bytes_read,
        "use_written": after.bytes_written - before.bytes_written,
    }
    found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    engine.close()
    print(json.dumps(found), flush=True)


def use(engine: Any, case: str) -> None:
    """What is measured of a case."""
    tokens = torch.ones(1, 2, dtype=torch.long)
    if case == "read":
        for parameter in engine.model.parameters():
            with offload.gathered([parameter]):
                pass
    elif case in ("evaluate", "pages"):
        with torch.no_grad():
            engine(input_ids=tokens)
    else:
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.drain()


def trained_only(parameters: Any) -> torch.optim.Optimizer:
    """AdamW over what is not frozen."""
    return common.fused_adamw(parameter for parameter in parameters if parameter.requires_grad)


def _use(engine: Any, base_bytes: int) -> dict[str, int]:
    stats = engine.stats()
    return {
        "peak": common.status_bytes("VmHWM") - base_bytes, "read": stats.bytes_read, "written": stats.bytes_written
    }  # fmt: skip


def run_case(a: argparse.Namespace, checkpoint: Path, case: str) -> dict[str, Any]:
    """One case in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.disk.weights", "--case", case, "--checkpoint", str(checkpoint)]
    command += ["--ram", str(a.ram), "--threads", str(a.threads), "--dir", a.dir]
    return in_child(command, f"{a.dir}/pages")


def in_child(command: list[str], pages: str) -> dict[str, Any]:
    """What a process says in its last line, as JSON; its page files are new, and gone afterwards."""
    shutil.rmtree(pages, ignore_errors=True)
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        shutil.rmtree(pages, ignore_errors=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def rows_of(case: str, found: dict[str, Any], read_rate: float, both_rate: float, ram: int) -> list[tuple[str, str]]:
    """What a case took, as lines of the table."""
    moved = found["use_read"] + found["use_written"]
    read, written = format_bytes(found["use_read"]), format_bytes(found["use_written"])
    rate = read_rate if not found["use_written"] else both_rate
    name = f"{case}, the first step" if case in ("frozen", "fine-tune") else case
    return [
        (f"{case}: load", f"{found['load_s']:.1f} s, {format_bytes(found['load_read'] + found['load_written'])} moved"),
        (f"{case}: peak of the load beyond imports and budget", format_bytes(max(0, found["load_peak"] - ram))),
        (f"{name}: seconds, bytes", f"{found['use_s']:.1f} s, {read} read, {written} written"),
        (f"{name}: over the disk's rate", f"{moved / found['use_s'] / rate / 1e9:.2f}"),
        (f"{name}: peak beyond imports and budget", format_bytes(max(0, found["use_peak"] - ram))),
    ]  # fmt: skip


def main() -> None:
    """Make the checkpoint, measure all cases, and print."""
    a = arguments()
    if a.checkpoint:
        child(a)
        return
    Path(a.dir).mkdir(parents=True, exist_ok=True)
    plan = BenchPlan(2 * GiB, 4.0, (Setting(4 * MiB, 4),))
    [point] = measure(check_target(Path(a.dir), plan.file_bytes), plan).points
    read_rate, both_rate = point.read_gb_per_s, point.both_gb_per_s
    rows = [("disk, read and mixed", f"{read_rate:.2f} and {both_rate:.2f} GB/s")]
    record: dict[str, Any] = {
        "benchmark": "weights", "config": common.config_of(a), "surroundings": common.surroundings(),
        "read_gb_per_s": read_rate, "both_gb_per_s": both_rate, "cases": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=a.dir) as folder:
        checkpoint = Path(folder) / "checkpoint"
        make_checkpoint(checkpoint, a.layers)
        for case in [a.case] if a.case else CASES:
            record["cases"][case] = run_case(a, checkpoint, case)
            rows += rows_of(case, record["cases"][case], read_rate, both_rate, a.ram)
    common.save(a, record, [])
    common.show(f"checkpoint of {next(iter(record['cases'].values()))['parameters'] / 1e9:.2f}B parameters", rows,
                record, as_json=a.json)  # fmt: skip


if __name__ == "__main__":
    main()
