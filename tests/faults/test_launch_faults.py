"""Each single call of the system goes wrong once in a launched run: metrics, configuration, picture and data included.

The run ends with exit code 0 or one line that names the file; the next launch ends as one that nothing happened to,
with the same weights, bit for bit.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from committed_runs import assert_same
from counted_calls import Call, CountedCalls, Fault
from faulty_lives import descriptors, harmless, in_time
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

import offload
from offload.checkpoint.export import export_run
from offload.config import ConfigError
from offload.config_loading import load_config
from offload.launch.train import launch
from pagemem.folders.folder_lock import holder_of

STEPS = 4
FAULTS = (Fault.EIO, Fault.ENOSPC, Fault.SHORT, Fault.NOTHING)
#: Of the calls that a fault can befall, every so many go wrong in the short test.
SPARSE = 131


def settings(folder: Path) -> dict[str, Any]:
    """A short run in ``folder``, which commits every other step."""
    source = folder.parent / "source"
    source.mkdir(exist_ok=True)
    for number in range(8):
        (source / f"{number}.txt").write_bytes(b"the quick brown fox jumps over the lazy dog. " * 20)
    return {
        "seed": 5,
        "memory": {"ram": "768KiB", "page": "64KiB"},
        "ssd": {"paths": [str(folder / "pages")], "threads": 1},
        "commit": {"every_steps": 2},
        "model": {
            "factory": "examples.byte_gpt:byte_gpt",
            "arguments": {"d_model": 32, "n_layer": 1, "n_head": 2, "seq": 16},
        },
        "data": {"factory": "launch_data:kept_text", "arguments": {"source": str(source)}},
        "train": {"steps": STEPS, "batch": 2, "seq": 16, "evaluate_batches": 1, "threads": 1},
        "output": {"run": str(folder / "run")},
    }


def launched(folder: Path) -> tuple[int, str]:
    """Launch; returns the exit code and what was printed, or 1 and the error."""
    out = io.StringIO()
    try:
        return launch(load_config(settings(folder)), Console(file=out, width=400)), out.getvalue()
    except (offload.OffloadError, ConfigError) as error:
        return 1, str(error)


def end_of(folder: Path) -> tuple[dict[str, Tensor], dict[int, float]]:
    """The weights of the last commit, and the losses in the metrics."""
    export_run(
        folder / "pages",
        folder / "out",
        paths=[],
        commit=None,
        dtype="keep",
        max_shard_bytes=1 << 30,
        console=Console(quiet=True),
    )
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return load_file(folder / "out" / "model.safetensors"), {
        line["step"]: line["loss"] for line in map(json.loads, lines)
    }


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Call], dict[str, Tensor], dict[int, float]]:
    """What comes of a run that nothing happens to, and the calls that it makes."""
    threads, folder = torch.get_num_threads(), tmp_path_factory.mktemp("known")
    assert launched(folder / "warm")[0] == 0
    with pytest.MonkeyPatch.context() as patch:
        calls = CountedCalls(patch, folder / "counted").calls
        assert launched(folder / "counted")[0] == 0
    weights, losses = end_of(folder / "counted")
    assert list(losses) == list(range(1, STEPS + 1))
    torch.set_num_threads(threads)
    return folder, calls, weights, losses


def trial(folder: Path, at: int, fault: Fault, weights: dict[str, Tensor], losses: dict[int, float]) -> None:
    """One launch in which call number ``at`` goes wrong, and the next one without."""
    before = descriptors()
    with pytest.MonkeyPatch.context() as patch, in_time(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        calls = CountedCalls(patch, folder, at, fault)
        code, said = launched(folder)
    said = "; ".join([said, *(str(warning.message) for warning in warned)])
    # The data are the user's, and mapped as long as the error's traceback has them.
    left = {target for _, target in descriptors() - before if "/run/data/" not in target}
    assert not left, f"descriptors are left: {left}"
    for name in ("pages", "run"):
        assert not (folder / name).exists() or holder_of(folder / name) is None, f"the lock of {name} is held"
    struck = calls.struck
    if code:
        assert "\n" not in said, said
    if struck is not None and fault is Fault.SHORT:
        assert code == 0, said
    elif struck is not None and not harmless(struck, fault):
        reason = "moved" if fault is Fault.NOTHING else os.strerror(fault.value)
        what = Path(struck.path.removesuffix(" (deleted)")).name
        assert reason in said and what in said, f"nobody was told: {said}"
    with pytest.MonkeyPatch.context() as patch, in_time():
        CountedCalls(patch, folder)
        code, said = launched(folder)
        assert code == 0, f"the next launch: {said}"
    found, found_losses = end_of(folder)
    assert_same(found, weights, "weights")
    assert set(found_losses.items()) <= set(losses.items())
    shutil.rmtree(folder)


@pytest.mark.parametrize("fault", FAULTS)
def test_some_calls_of_a_launch_go_wrong(
    fault: Fault, known: tuple[Path, list[Call], dict[str, Tensor], dict[int, float]]
) -> None:
    folder, calls, weights, losses = known
    for at in range(7 * FAULTS.index(fault), sum(call.can(fault) for call in calls), SPARSE):
        trial(folder / str(at), at, fault, weights, losses)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_call_of_a_launch_goes_wrong(
    fault: Fault, known: tuple[Path, list[Call], dict[str, Tensor], dict[int, float]], tally: Callable[..., None]
) -> None:
    folder, calls, weights, losses = known
    fitting = [call for call in calls if call.can(fault)]
    failures: list[str] = []
    for at, call in enumerate(fitting):
        try:
            trial(folder / str(at), at, fault, weights, losses)
        except (AssertionError, Exception) as error:
            failures.append(f"{fault.name} of call {at}, here {call}: {type(error).__name__}: {error}")
    kinds = Counter(call.kind for call in fitting)
    detail = ", ".join(f"{kind} {number}" for kind, number in kinds.most_common())
    tally(
        f"I/O faults of a launch, every call: {fault.name}", trials=len(fitting), failures=len(failures), detail=detail
    )
    assert not failures, "\n".join(failures)
