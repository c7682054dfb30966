"""Planning a model no machine here could train: ``python -m benchmarks.planning.plan_large [--layers 80]``.

`offload plan` of a 70-billion-parameter model of Llama's shape on given hardware (a GPU of 80 GB, 256 GB of RAM, four
SSDs), in a process of its own: its wall time and its VmHWM, which are to stay below 60 s and 2 GiB, and what it
predicts.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.common import common_arguments, save, show, surroundings
from pagemem.units import GiB, format_bytes

BAR_S: Final = 60.0
BAR_BYTES: Final = 2 * GiB
#: Of the hardware that is planned for: bf16 matrix products of a large GPU at the share of its peak that training
#: reaches, its memory, PCIe 4.0 x16, eight channels of DDR4 for the updates, four SSDs of 6.5 and 4 GB/s.
RATES: Final = (
    "--flops", "1.4e14", "--device-ram-speed", "1500000", "--h2d", "24000", "--ram-speed", "150000",
    "--ssd-read", "26000", "--ssd-write", "16000",
    "--machine-device", "80GB", "--machine-ram", "256GB", "--machine-disk", "15TB",
)  # fmt: skip


def configuration(layers: int, folder: Path) -> dict[str, Any]:
    """The run that is planned."""
    return {
        "device": "cuda",
        "memory": {"ram": "220GiB", "device": "60GiB"},
        "ssd": {"paths": [str(folder / f"ssd{i}") for i in range(4)]},
        "model": {"factory": "benchmarks.planning.llama:llama", "arguments": {"n_layer": layers}, "dtype": "bf16"},
        "train": {"steps": 1000, "batch": 1, "seq": 4096},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Plan once and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planning.plan_large", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--layers", type=int, default=80, help="80 are 70.6 billion parameters (default)")
    common_arguments(parser)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="plan-large-") as folder:
        file = Path(folder) / "run.json"
        file.write_text(json.dumps(configuration(options.layers, Path(folder))))
        command = [sys.executable, "-m", "offload.cli", "plan", str(file), *RATES, "--json"]
        began_s = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        took_s = time.perf_counter() - began_s
    if done.returncode:
        raise SystemExit(f"offload plan failed with exit code {done.returncode}")
    peak_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    forecast = json.loads(done.stdout.splitlines()[-1])
    record = {
        "benchmark": "plan_large",
        "surroundings": surroundings(),
        "layers": options.layers,
        "plan_s": took_s,
        "peak_bytes": peak_bytes,
        "rates": list(RATES),
        "forecast": forecast,
    }
    save(options, record, csv_rows(record))
    show(f"offload plan of a model of {options.layers} layers", rows_of(record), record, as_json=options.json)


def csv_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row: seconds and memory of planning."""
    row = {
        "ratio_of": "seconds to plan", "model": f"llama-{record['layers']}-layers", "step_s": record["plan_s"],
        "peak_rss_bytes": record["peak_bytes"],
    }  # fmt: skip
    return [row]


def rows_of(record: dict[str, Any]) -> list[tuple[str, str]]:
    """The table as (what, value) pairs."""
    forecast = record["forecast"]
    step = forecast["step"]
    return [
        ("parameters", f"{forecast['parameters']:,}"),
        ("planning took", f"{record['plan_s']:.1f} s (bar {BAR_S:.0f})"),
        ("its VmHWM", f"{format_bytes(record['peak_bytes'])} (bar {format_bytes(BAR_BYTES)})"),
        ("ops a step", f"{forecast['ops']:,}"),
        (
            "pages on the device, in RAM, on SSD",
            ", ".join(format_bytes(step[f"{tier}_bytes"]) for tier in ("device", "host", "ssd")),
        ),
        ("fits", str(forecast["fit"]["fits"])),
        ("step, predicted", f"{forecast['step_s']:.1f} s, of which compute {forecast['compute_s']:.1f} s"),
        ("limited by", forecast["limiting"]),
        ("busy", ", ".join(f"{lane} {share:.0%}" for lane, share in forecast["busy"].items())),
    ]


if __name__ == "__main__":
    main()
