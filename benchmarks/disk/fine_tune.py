"""Fine-tuning a checkpoint of a billion parameters: peak memory and bytes written, by adapters and as a whole.

    python -m benchmarks.disk.fine_tune

The checkpoint is that of `benchmarks.disk.weights` (22 layers of 2048, vocabulary 32,000, bf16, 2.0 GiB). Each case is
three steps of one sequence of 64 tokens, in a process of its own:

- ``lora``: adapters of rank 16 on the query and value projections; the base is read from the checkpoint in place.
- ``lora_4bit``: the same, over a base that bitsandbytes quantises to 4 bits while it is read.
- ``full``: all parameters, with fp32 masters and AdamW's moments.

Peak memory is VmHWM of the whole process: interpreter and imports, RAM budget, activations. Bytes written are those of
the page files, by what they were written of; *base* are parameters that are not trained.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.disk.weights import LAYERS, in_child, make_checkpoint, trained_only
from offload.store.page_store import PageStore
from pagemem.telemetry.events import Event, EventKind
from pagemem.tier import Tag
from pagemem.units import MiB, format_bytes

STEPS, TOKENS = 3, 64
#: RAM budget of each case.
CASES = {"lora": 768 * MiB, "lora_4bit": 384 * MiB, "full": 1024 * MiB}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", help="a folder with it (default: made, and removed afterwards)")
    parser.add_argument("--case", choices=[*CASES], help="only this one")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    common.common_arguments(parser)
    return parser.parse_args()


class WrittenBytes:
    """Adds up the bytes written to page files, by tensor; a sink of a store's events."""

    def __init__(self, store: PageStore) -> None:
        self._store = store
        self._by_name: Counter[str] = Counter()
        store.counters.onward = self

    def emit(self, event: Event) -> None:
        """Count a write; I/O threads end writes one at a time for each tensor."""
        if event.kind is EventKind.WRITE:
            self._by_name[event.name] += event.n_bytes

    def by_kind(self) -> dict[str, int]:
        """Bytes so far of the base, of trained parameters, of their masters, moments and gradients, and of units whose
        parameters went to others when the engine was made. The engine is drained.

        Raises:
            RuntimeError: they are not all that the page files have written.
        """
        for _ in range(100):
            if self._by_name.total() == self._store.page_files.writes.n_bytes:
                return self._kinds()
            time.sleep(0.01)  # The thread that ended the last write says so afterwards.
        raise RuntimeError(
            f"{self._by_name.total()} bytes counted, and the page files wrote {self._store.page_files.writes.n_bytes}"
        )

    def _kinds(self) -> dict[str, int]:
        trained = {unit.parameters.name: unit.trained for unit in self._store.index.units}
        kinds = {tensor.name: tensor.tag.value for tensor in list(self._store.mover.tensors.values())}
        kinds |= {name: Tag.PARAM.value if of_trained else "base" for name, of_trained in trained.items()}
        found: Counter[str] = Counter()
        for name, n_bytes in list(self._by_name.items()):
            found[kinds.get(name, "regrouped")] += n_bytes
        return dict(found)


def base_bytes(written: dict[str, int]) -> int:
    """Bytes written of frozen parameters: before the engine was made, units held nothing else that is written."""
    return written.get("base", 0) + written.get("regrouped", 0)


def child(a: argparse.Namespace) -> None:
    """One case; prints one JSON line."""
    import offload
    from offload.integrations.recipes import causal_lm

    torch.set_num_threads(a.threads)
    torch.manual_seed(1)
    config = {"memory": {"ram": CASES[a.case]}, "ssd": {"paths": [f"{a.dir}/pages"]}}
    lora = None if a.case == "full" else {"r": 16, "target_modules": ["q_proj", "v_proj"]}
    started_s = time.perf_counter()
    with offload.deferred_init(config) as store:
        written = WrittenBytes(store)
        model = causal_lm(a.checkpoint, lora=lora, four_bit=a.case == "lora_4bit")
    engine = offload.initialize(model, config, trained_only)
    found: dict[str, Any] = {"load_s": time.perf_counter() - started_s, "load_peak": common.status_bytes("VmHWM")}
    engine.drain()
    found |= {"load_written": written.by_kind(), "losses": [], "step_s": []}
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1000, (1, TOKENS + 1), generator=generator)
    for _ in range(STEPS):
        started_s = time.perf_counter()
        loss = engine(tokens[:, :-1], tokens[:, 1:])
        engine.backward(loss)
        engine.step()
        found["step_s"].append(time.perf_counter() - started_s)
        found["losses"].append(float(loss.detach()))
    engine.drain()
    stats = engine.stats()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    found |= {
        "peak": common.status_bytes("VmHWM"), "read": stats.bytes_read, "written": written.by_kind(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()), "trained": trained,
    }  # fmt: skip
    engine.close()
    print(json.dumps(found), flush=True)


def run_case(a: argparse.Namespace, checkpoint: str, case: str) -> dict[str, Any]:
    """One case in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.disk.fine_tune", "--child", "--case", case]
    command += ["--checkpoint", checkpoint, "--threads", str(a.threads), "--dir", a.dir]
    return in_child(command, f"{a.dir}/pages")


def rows_of(case: str, found: dict[str, Any]) -> list[tuple[str, str]]:
    """What a case took, as lines of the table."""
    steps = ", ".join(f"{step_s:.1f}" for step_s in found["step_s"])
    base_load = base_bytes(found["load_written"])
    losses = ", ".join(f"{loss:.4f}" for loss in found["losses"])
    return [
        (f"{case}: peak (VmHWM), RAM budget", f"{format_bytes(found['peak'])}, {format_bytes(CASES[case])}"),
        (f"{case}: trained parameters", f"{found['trained']:,}"),
        (f"{case}: load, steps", f"{found['load_s']:.1f} s, {steps} s"),
        (
            f"{case}: base bytes written by the load, by the steps",
            f"{base_load:,}, {base_bytes(found['written']) - base_load:,}",
        ),
        (
            f"{case}: read, written in all",
            f"{format_bytes(found['read'])}, {format_bytes(sum(found['written'].values()))}",
        ),
        (f"{case}: losses", losses),
    ]


def main() -> None:
    """Make the checkpoint, measure all cases, and print."""
    a = arguments()
    if a.child:
        child(a)
        return
    Path(a.dir).mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, str]] = []
    record: dict[str, Any] = {
        "benchmark": "fine_tune", "config": common.config_of(a), "surroundings": common.surroundings(), "cases": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=a.dir) as folder:
        checkpoint = a.checkpoint or f"{folder}/checkpoint"
        if a.checkpoint is None:
            make_checkpoint(Path(checkpoint), a.layers)
        for case in [a.case] if a.case else CASES:
            record["cases"][case] = run_case(a, checkpoint, case)
            rows += rows_of(case, record["cases"][case])
    common.save(a, record, [])
    common.show("fine-tuning of a billion parameters", rows, record, as_json=a.json)


if __name__ == "__main__":
    main()
