"""The largest model that trains three steps under a cap on memory.

    python -m benchmarks.capacity --cap 4GiB --layers 213
    python -m benchmarks.capacity --cap 4GiB --search 100 260
    python -m benchmarks.capacity --cap 4GiB --plain --search 4 40

The cap is RLIMIT_DATA, which counts private writable mappings whether touched or not; VmHWM, the peak resident set, is
reported beside it. d_model 1024, batch 1 x 64 tokens. The model is built under the cap as well.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import GPT, batch, fused_adamw
from pagemem.units import MiB, format_bytes, parse_bytes

D_MODEL, SEQ, STEPS = 1024, 64, 3
#: Kept from the cap for the interpreter, torch, thread stacks and the largest gradients' temporaries.
BASE_BYTES = 740 * MiB
#: Activations, autograd nodes and module objects of one layer at batch 1 x 64.
LAYER_BYTES = int(4.8 * MiB)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cap", type=parse_bytes, default=parse_bytes("4GiB"))
    parser.add_argument("--layers", type=int, help="try this depth only")
    parser.add_argument(
        "--search", type=int, nargs=2, metavar=("LOW", "HIGH"), help="bisect; LOW should pass, HIGH fail"
    )
    parser.add_argument("--plain", action="store_true", help="plain torch instead of the engine")
    parser.add_argument("--ram", type=parse_bytes, help="RAM for model states (default: what the cap leaves)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one try")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    common.common_arguments(parser)
    return parser.parse_args()


def child(a: argparse.Namespace) -> None:
    """Three steps under the cap; prints one JSON line."""
    resource.setrlimit(resource.RLIMIT_DATA, (a.cap, a.cap))
    torch.set_num_threads(a.threads)
    torch.manual_seed(1)
    started_s = time.perf_counter()
    engine: Any = None
    ram = 0
    if a.plain:
        model: torch.nn.Module = GPT(D_MODEL, a.layers, SEQ)
        optimizer = fused_adamw(model.parameters())
    else:
        import offload

        ram = a.ram or a.cap - BASE_BYTES - a.layers * LAYER_BYTES
        config = {
            "memory": {"ram": ram},
            "ssd": {
                "paths": [f"{a.dir}/pages"],
            },
        }
        with offload.deferred_init(config):
            model = GPT(D_MODEL, a.layers, SEQ)
        model, optimizer = offload.prepare(model, fused_adamw, config)
        engine = optimizer.engine  # type: ignore[attr-defined]
    build_s = time.perf_counter() - started_s
    losses, step_s = [], []
    for number in range(STEPS):
        started_s = time.perf_counter()
        loss = model(*batch(number, 1, SEQ))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(float(loss.detach()), 6))
        step_s.append(round(time.perf_counter() - started_s, 2))
        print(f"step {number + 1}: {step_s[-1]} s, loss {losses[-1]}", file=sys.stderr, flush=True)
    found = {
        "build_s": build_s, "step_s": step_s, "losses": losses, "ram_bytes": ram,
        "vm_hwm_bytes": common.status_bytes("VmHWM"), "vm_data_bytes": common.status_bytes("VmData"),
    }  # fmt: skip
    if engine is not None:
        stats = engine.stats()
        found |= {"bytes_read": stats.bytes_read, "bytes_written": stats.bytes_written}
        engine.close()
    print(json.dumps(found), flush=True)


def attempt(a: argparse.Namespace, layers: int) -> dict[str, Any] | None:
    """One try in a process of its own; None when it did not get through."""
    passed_on = [argument for argument in sys.argv[1:] if argument not in ("--json", "--save")]
    command = [sys.executable, "-m", "benchmarks.capacity", *passed_on, "--child", "--layers", str(layers)]
    shutil.rmtree(f"{a.dir}/pages", ignore_errors=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=a.timeout, check=False)
        lines = done.stdout.splitlines()
        if done.returncode == 0 and lines:
            result: dict[str, Any] = json.loads(lines[-1])
            print(f"{layers} layers: passed, steps {result['step_s']}", file=sys.stderr, flush=True)
            return result
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        reason = f"not done after {a.timeout:g} s"
    finally:
        shutil.rmtree(f"{a.dir}/pages", ignore_errors=True)
    print(f"{layers} layers: failed, {reason}", file=sys.stderr, flush=True)
    return None


def search(a: argparse.Namespace) -> tuple[int, dict[str, Any] | None, bool]:
    """The deepest model that got through, its figures, and whether one layer more is known to fail."""
    if a.layers:
        return a.layers, attempt(a, a.layers), False
    low, high = a.search or (10, 300)
    best: dict[str, Any] | None = None
    while high - low > 1:
        middle = (low + high) // 2
        result = attempt(a, middle)
        low, high, best = (middle, high, result) if result else (low, middle, best)
    return low, best, True


def csv_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row, where it got through: the median of its steps."""
    if not record["passed"]:
        return []
    config = record["config"]
    moved = {
        f"{way}_bytes_per_step": round(record[f"bytes_{way}"] / STEPS)
        for way in ("read", "written")
        if f"bytes_{way}" in record
    }
    row = {
        "ratio_of": f"seconds a step under a cap of {format_bytes(config['cap'])}{', plain PyTorch' * config['plain']}",
        "model": f"{record['parameters'] / 1e9:.2f}B, {record['layers']} layers", "batch": f"1x{config['seq']}",
        "threads": config["threads"], "step_s": statistics.median(record["step_s"]),
        "peak_rss_bytes": record["vm_hwm_bytes"], **moved,
    }  # fmt: skip
    return [row]


def main() -> None:
    """Search and print."""
    a = arguments()
    if a.child:
        child(a)
        return
    layers, result, settled = search(a)
    n = common.n_parameters(D_MODEL, layers, SEQ)
    record = {
        "benchmark": "capacity",
        "config": {
            "cap": a.cap,
            "plain": a.plain,
            "d_model": D_MODEL,
            "seq": SEQ,
            "steps": STEPS,
            "threads": a.threads,
        },
        "surroundings": common.surroundings(),
        "layers": layers,
        "parameters": n,
        "passed": result is not None,
        "settled": settled,
        **(result or {}),
    }
    rows = [
        ("layers, parameters", f"{layers}, {n:,}"),
        ("got through", str(result is not None)),
        ("RLIMIT_DATA", format_bytes(a.cap)),
    ]
    if result:
        rows += [
            ("VmHWM", format_bytes(result["vm_hwm_bytes"])),
            ("VmData at the end", format_bytes(result["vm_data_bytes"])),
            ("RAM for model states", format_bytes(result["ram_bytes"])),
            ("build, s", f"{result['build_s']:.1f}"),
            ("steps, s", ", ".join(f"{s:.1f}" for s in result["step_s"])),
            ("losses", ", ".join(map(str, result["losses"]))),
        ]
    common.save(a, record, csv_rows(record))
    common.show("plain torch" if a.plain else "engine", rows, record, as_json=a.json)


if __name__ == "__main__":
    main()
