"""Memory beside the pages: the heap's free pages go back at the end of each forward pass, and what is not imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity import adamw
from small_runs import RAM_BYTES, batches, built, config, engine_of, train

import offload.cli
import offload.parameters.binder
from offload.cli import main
from offload.heap import ForwardEnd, without_tcache


@pytest.mark.parametrize(
    "arguments", [{}, {"tied": True}, {"recompute": "non-reentrant"}], ids=["plain", "tied", "recompute"]
)
def test_each_training_forward_gives_pages_back_once(tmp_path: Path, arguments: dict[str, object]) -> None:
    calls: list[bool] = []
    with engine_of(built(**arguments), tmp_path) as engine:
        engine.debug.binder.forward_end = ForwardEnd(lambda: calls.append(torch.is_grad_enabled()))
        train(engine, 1)
        assert len(calls) == 1
        train(engine, 1)
        assert len(calls) == 3, "the second pass begins with it too"
        with torch.no_grad():
            engine(*batches(1)[0])
        train(engine, 2)
        assert len(calls) == 5
        assert all(calls)


@pytest.mark.parametrize(
    ("budgets", "memory", "given_back"),
    [
        (1, {"heap": "trim"}, True),
        (1, {"activations": 0}, True),
        (1, {"activations": 0, "heap": "keep"}, False),
        (1, {}, False),
        (20, {"heap": "trim"}, False),
    ],
    ids=["trim", "activations", "activations, keep", "default", "trim, all fits"],
)
def test_free_pages_are_given_back_only_where_they_are_wanted_and_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budgets: int, memory: dict[str, object], given_back: bool
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(offload.parameters.binder, "give_back_free_pages", lambda: calls.append(True))
    settings = config(tmp_path, ram=budgets * RAM_BYTES)
    settings["memory"] |= memory
    with offload.initialize(built(), settings, adamw) as engine:
        train(engine, 3)
    assert bool(calls) is given_back


def test_with_freed_blocks_that_join_activations_need_no_trimming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(offload.parameters.binder, "give_back_free_pages", lambda: calls.append(True))
    monkeypatch.setattr("offload.assembly.parts.tcache_disabled", lambda: True)
    settings = config(tmp_path, ram=RAM_BYTES)
    settings["memory"] |= {"activations": 0}
    with offload.initialize(built(), settings, adamw) as engine:
        train(engine, 3)
    assert not calls


@pytest.mark.parametrize(
    ("memory", "anew"),
    [({"activations": 0}, True), ({"activations": 0, "heap": "keep"}, False), ({}, False)],
    ids=["activations", "keep", "default"],
)
def test_launch_starts_itself_anew_where_the_heap_would_be_trimmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: dict[str, object], anew: bool
) -> None:
    environment = without_tcache(os.environ)
    if environment is None:
        pytest.skip("needs glibc, and a process that has its cache")
    started: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(offload.cli, "launch", lambda config: 0)
    monkeypatch.setattr(offload.cli, "own_process", lambda: None)
    monkeypatch.setattr(offload.cli, "only_exit_is_left", lambda: None)
    settings = config(tmp_path)
    settings["memory"] |= memory
    (tmp_path / "config.json").write_text(json.dumps(settings))
    command = ["launch", str(tmp_path / "config.json")]
    assert main(command) == 0 and not started, "a caller's process is not replaced"
    monkeypatch.setattr(sys, "argv", ["offload", *command])
    assert main() == 0
    assert started == ([(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)] if anew else [])


def test_a_large_block_that_is_freed_stays_with_the_process_or_leaves_it(tmp_path: Path) -> None:
    code = (
        "with offload.deferred_init(settings):\n"
        "    model = built()\n"
        "with offload.initialize(model, settings, adamw) as engine:\n"
        "    train(engine, 1)\n"
        "    print(growth(64 << 20))\n"
    )
    grown = _printed("", code, tmp_path, ["keep", "trim"])
    assert {heap: n_mib > 48 for heap, n_mib in grown.items()} == {"keep": True, "trim": False}


@pytest.mark.long
def test_a_block_of_the_size_of_an_unpacked_weight_stays_only_where_it_is_told_to(tmp_path: Path) -> None:
    for package in ("bitsandbytes", "peft", "transformers"):
        pytest.importorskip(package)
    code = (
        "model, optimizer = offload.prepare(adapted(base_of('nf4')), adamw, settings)\n"
        "trained(model, optimizer, 1)\n"
        "print(growth(8 << 20))\n"
        "optimizer.engine.close()\n"
    )
    imports = "from quantised_models import adamw, adapted, base_of, trained\n"
    grown = _printed(imports, code, tmp_path, ["auto", "keep", "trim"])
    assert {heap: n_mib > 4 for heap, n_mib in grown.items()} == {"auto": False, "keep": True, "trim": False}


def _printed(imports: str, code: str, folder: Path, heaps: list[str]) -> dict[str, int]:
    """What ``code`` prints last in a process of its own for each setting of the heap, where ``growth`` is how many MiB
    more are resident once a block of so many bytes was in use. They are forked from one, which has the imports."""
    before = (
        "import os, sys, torch; sys.path[:0] = sys.argv[2].split(':')\n"
        "from pathlib import Path\n"
        "import offload\n"
        "from parity import adamw\n"
        "from small_runs import built, config, train\n"
        f"{imports}"
        "def resident():\n"
        "    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('RssAnon')) >> "
        "10\n"
        "def growth(n_bytes):\n"
        "    before = resident()\n"
        "    torch.ones(n_bytes, dtype=torch.uint8)\n"
        "    return resident() - before\n"
        "for heap in sys.argv[3:]:\n"
        "    if os.fork() == 0:\n"
        "        break\n"
        "    if os.wait()[1]:\n"
        "        sys.exit(1)\n"
        "else:\n"
        "    sys.exit()\n"
        "settings = config(Path(sys.argv[1], heap))\n"
        "settings['memory']['heap'] = heap\n"
    )
    path = ":".join(path for path in sys.path if path)
    command = [sys.executable, "-c", before + code, str(folder), path, *heaps]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(heaps, map(int, done.stdout.split()), strict=True))


def test_an_engine_does_not_import_the_compiler(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[2].split(':')\n"
        "from pathlib import Path\n"
        "from small_runs import built, engine_of, train\n"
        "with engine_of(built(), Path(sys.argv[1])) as engine:\n"
        "    train(engine, 3)\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), ":".join(path for path in sys.path if path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines() == ["False"], done.stderr


def test_a_group_can_still_be_added_to_a_torch_optimizer(tmp_path: Path) -> None:
    before = torch.optim.Optimizer.add_param_group
    engine_of(built(), tmp_path).close()
    assert torch.optim.Optimizer.add_param_group is before
