"""Generating tokens with weights out of page files: streaming ahead of compute against fetching on demand.

    python -m benchmarks.planning.generation --save

A Llama of 70 million random parameters in fp32, of which RAM holds 30 %, generates 64 tokens for 8 rows with
`generate()` of transformers. Both sides are the engine with the same budget and files, each in a process of its own,
and take turns:

- ``streams``: as a user gets it. Every token is a pass by plan, from the second one on.
- ``on demand``: passes are not planned (the planner says that there is no room for a plan, as it does where views in
  use leave none), and nothing is read ahead (`scheduler.knobs.READ_AHEAD_PART`). Each op fetches what it lacks in place
  of what was used longest ago, and waits for it.

There is no such switch for users, so the second side changes the engine where this file says so. The tokens of both
are compared, with each other's and with those of the plain model.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import torch

import offload
from benchmarks import common
from benchmarks.common import Spread
from benchmarks.disk.weights import trained_only
from benchmarks.subjects import Pipe
from offload.machine.bench_ssd import check_target, measure
from offload.machine.facts import PROBE
from pagemem.errors import BudgetError
from pagemem.units import format_bytes
from scheduler import knobs

STREAMS, ON_DEMAND, PLAIN = "streams", "on demand", "plain"
#: The bar: how many times faster streaming is.
RATIO: Final = "on demand / streaming ahead, 64 tokens"
PROMPT: Final = 16
#: Tokens after which passes have plans with times of their own.
WARM_UP: Final = 10


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planning.generation", description=" ".join((__doc__ or "").split("\n\n")[0].split())
    )
    parser.add_argument("--ram-share", type=float, default=0.3, help="memory.ram over the bytes of the weights")
    parser.add_argument("--tokens", type=int, default=64, help="tokens generated in a turn (default: 64)")
    parser.add_argument("--batch", type=int, default=8, help="rows (default: 8)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--turns", type=int, default=3, help="paired turns (default: 3)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kind", choices=[STREAMS, ON_DEMAND, PLAIN], help=argparse.SUPPRESS)
    common.common_arguments(parser)
    return parser.parse_args(given)


def make_model(a: argparse.Namespace) -> Any:
    """Random weights, the same each time."""
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=a.width, intermediate_size=2816 * a.width // 1024, num_hidden_layers=a.layers,
        num_attention_heads=a.width // 64, num_key_value_heads=a.width // 64, dtype=torch.float32,
        eos_token_id=None, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def fetch_on_demand(engine: Any) -> None:
    """Have no pass planned and nothing read ahead."""

    def no_plan(*_: object, **__: object) -> NoReturn:
        raise BudgetError("planning is switched off for this measurement", 0)

    engine.debug.store.driver.planner.plan = no_plan
    knobs.READ_AHEAD_PART = 1 << 40


def child(a: argparse.Namespace) -> None:
    """Generates whenever a line with a number of tokens comes in, and answers with one line of JSON."""
    torch.set_num_threads(a.threads)
    model, engine = make_model(a), None
    n_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if a.kind != PLAIN:
        config = {"memory": {"ram": int(a.ram_share * n_bytes)}, "ssd": {"paths": [f"{a.dir}/{a.kind}"]}}
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)  # an engine trains something
        engine = offload.initialize(model, config, trained_only)
        if a.kind == ON_DEMAND:
            fetch_on_demand(engine)
    prompt = torch.arange(a.batch * PROMPT).view(a.batch, PROMPT) * 37 % 8192
    for line in sys.stdin:
        if line == "stop\n":
            break
        before = None if engine is None else engine.stats()
        started_s = time.perf_counter()
        tokens = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=int(line), do_sample=False
        )
        found: dict[str, Any] = {"seconds": time.perf_counter() - started_s, "tokens": tokens.tolist()}
        if engine is not None and before is not None:
            found |= dataclasses.asdict(engine.stats().since(before))
        print(json.dumps(found), flush=True)
    print(json.dumps({"peak_rss_bytes": common.status_bytes("VmHWM"), "weight_bytes": n_bytes}), flush=True)
    if engine is not None:
        engine.close()


def measured(a: argparse.Namespace) -> dict[str, Any]:
    """All sides: seconds and bytes of each turn."""
    options = ["--ram-share", a.ram_share, "--batch", a.batch, "--layers", a.layers, "--width", a.width]
    options += ["--threads", a.threads, "--dir", a.dir]
    start = [sys.executable, "-m", "benchmarks.planning.generation", *map(str, options), "--kind"]
    pipes = {kind: Pipe([*start, kind]) for kind in (STREAMS, ON_DEMAND, PLAIN)}
    for pipe in pipes.values():
        pipe.ask(str(WARM_UP))
    turns: list[dict[str, Any]] = []
    names = list(pipes)
    for number in range(a.turns):
        order = names[number % len(names) :] + names[: number % len(names)]
        turns.append({kind: pipes[kind].ask(str(a.tokens)) for kind in order})
        said = (f"{kind} {turns[-1][kind]['seconds']:.2f} s" for kind in names)
        print(f"turn {number + 1}/{a.turns}:", *said, file=sys.stderr, flush=True)
    return {"turns": turns, "ended": {kind: pipe.end() for kind, pipe in pipes.items()}}


def result(a: argparse.Namespace, found: dict[str, Any], read_bytes_per_s: float) -> dict[str, Any]:
    """What the turns come to."""
    turns = found["turns"]
    read = {kind: sum(turn[kind]["bytes_read"] for turn in turns) / a.turns for kind in (STREAMS, ON_DEMAND)}
    seconds = {kind: Spread.of([turn[kind]["seconds"] for turn in turns]) for kind in (STREAMS, ON_DEMAND, PLAIN)}
    return {
        "ratio": dataclasses.asdict(
            Spread.bootstrap([turn[ON_DEMAND]["seconds"] / turn[STREAMS]["seconds"] for turn in turns])
        ),
        "seconds": {kind: dataclasses.asdict(spread) for kind, spread in seconds.items()},
        "read_bytes": read,
        "floor_s": max(read[STREAMS] / read_bytes_per_s, seconds[PLAIN].median),
        "early": 1 - sum(turn[STREAMS]["on_demand_bytes"] for turn in turns) / (read[STREAMS] * a.turns),
        "equal": all(turn[STREAMS]["tokens"] == turn[kind]["tokens"] for turn in turns for kind in (ON_DEMAND, PLAIN)),
        "passes_planned": {kind: turns[-1][kind]["planned_passes"] for kind in (STREAMS, ON_DEMAND)},
        **found["ended"][STREAMS],
    }  # fmt: skip


def csv_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row."""
    config, found = record["config"], record["found"]
    return [
        common.ratio_row(
            RATIO, Spread(**found["ratio"]), model=f"llama, {found['weight_bytes'] / 4e6:.0f}m",
            batch=f"{config['batch']}x{config['tokens']}", ram_share=config["ram_share"], threads=config["threads"],
            pairs=config["turns"], steps_per_turn=1, step_s=found["seconds"][STREAMS]["median"],
            other_step_s=found["seconds"][ON_DEMAND]["median"], peak_rss_bytes=found["peak_rss_bytes"],
            read_bytes_per_step=round(found["read_bytes"][STREAMS]),
        )
    ]  # fmt: skip


def table(record: dict[str, Any]) -> list[tuple[str, str]]:
    """The result for people."""
    config, found = record["config"], record["found"]
    rows = [
        ("weights, RAM", f"{format_bytes(found['weight_bytes'])}, {config['ram_share']:.0%} of them"),
        ("disk, reads", f"{record['read_bytes_per_s'] / 1e9:.2f} GB/s; {config['threads']} threads"),
        ("on demand over streaming, 95 %", str(Spread(**found["ratio"]))),
    ]
    for kind in (STREAMS, ON_DEMAND, PLAIN):
        moved = f", {format_bytes(found['read_bytes'][kind])} read" if kind in found["read_bytes"] else ""
        passes = f", {found['passes_planned'][kind]} passes planned" if kind in found["passes_planned"] else ""
        rows.append((f"{config['tokens']} tokens, {kind}", f"{Spread(**found['seconds'][kind])} s{moved}{passes}"))
    return [
        *rows,
        ("floor of the bytes, or of compute", f"{found['floor_s']:.2f} s"),
        ("bytes read begun before their op", f"{found['early']:.1%}"),
        ("tokens equal, to the plain model's too", str(found["equal"])),
    ]


def main() -> None:
    """Measure and print."""
    a = arguments()
    if a.kind is not None:
        child(a)
        return
    torch.set_num_threads(a.threads)
    Path(a.dir).mkdir(parents=True, exist_ok=True)
    [point] = measure(check_target(Path(a.dir), PROBE.file_bytes), PROBE).points
    rate = point.read_gb_per_s * 1e9
    folders = [f"{a.dir}/{kind}" for kind in (STREAMS, ON_DEMAND)]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        found = result(a, measured(a), rate)
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    record = {
        "benchmark": "generation", "config": common.config_of(a), "surroundings": common.surroundings(),
        "read_bytes_per_s": rate, "found": found,
    }  # fmt: skip
    common.save(a, record, csv_rows(record))
    common.show(
        f"{a.tokens} tokens for {a.batch} rows, weights out of page files", table(record), record, as_json=a.json
    )


if __name__ == "__main__":
    main()
