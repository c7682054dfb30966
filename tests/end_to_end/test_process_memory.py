"""Memory beside the pages: the heap's free pages go back at the end of each forward pass, and what is not imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity import adamw
from small_runs import RAM_BYTES, batches, built, config, engine_of, train

import offload.parameters
from pagemem.heap import ForwardEnd


@pytest.mark.parametrize("arguments", [{}, {"tied": True}, {"recompute": "non-reentrant"}], ids=["plain", "tied", "recompute"])
def test_each_training_forward_gives_pages_back_once(tmp_path: Path, arguments: dict[str, object]) -> None:
    calls: list[bool] = []
    with engine_of(built(**arguments), tmp_path) as engine:
        engine._store.binder.forward_end = ForwardEnd(lambda: calls.append(torch.is_grad_enabled()))
        train(engine, 1)
        assert len(calls) == 1
        train(engine, 1)
        assert len(calls) == 3, "the second pass begins with it too"
        with torch.no_grad():
            engine(*batches(1)[0])
        train(engine, 2)
        assert len(calls) == 5
        assert all(calls)


@pytest.mark.parametrize(("budgets", "given_back"), [(1, True), (20, False)], ids=["short", "all fits"])
def test_only_where_memory_is_short_are_pages_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budgets: int, given_back: bool
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(offload.parameters, "give_back_free_pages", lambda: calls.append(True))
    with offload.initialize(built(), config(tmp_path, ram=budgets * RAM_BYTES), adamw) as engine:
        train(engine, 3)
    assert bool(calls) is given_back


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
