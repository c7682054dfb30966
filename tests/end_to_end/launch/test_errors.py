"""What goes wrong is said by the public interface: what, how much, the limit and what to change; and nothing is
lost."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parity import adamw
from small_runs import (
    PAGE_BYTES,
    assert_closed,
    assert_equal,
    assert_untouched,
    batches,
    built,
    config,
    engine_of,
    train,
)  # fmt: skip
from torch import nn

import offload
from offload.cli import main
from pagemem.files.page_file import PAGE_FILE_NAME

Start = Callable[[nn.Module, dict[str, Any]], Any]


def prepare(model: nn.Module, configuration: dict[str, Any]) -> None:
    """By the way for a loop of one's own."""
    offload.prepare(model, adamw, configuration)


def initialize(model: nn.Module, configuration: dict[str, Any]) -> None:
    """By the way for a whole engine."""
    offload.initialize(model, configuration)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything in a folder, and when it was last changed."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        found[str(path)] = path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b""
    return found


def launch(folder: Path, **changes: Any) -> int:
    """Train by the command; returns its exit code."""
    raw = config(folder) | {
        "model": {
            "factory": "examples.byte_gpt:byte_gpt",
            "arguments": {"d_model": 64, "n_layer": 1, "n_head": 2, "seq": 16},
        },
        "data": {"factory": "examples.byte_corpus:missing"},
        "train": {"steps": 2, "batch": 2, "seq": 16},
        "output": {"run": str(folder / "run")},
    }
    (folder / "config.json").write_text(json.dumps(raw | changes))
    return main(["launch", str(folder / "config.json")])


# ---- a budget that is too small ------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [prepare, initialize])
def test_a_budget_below_the_largest_unit_names_it_and_the_budget_that_works(start: Start, tmp_path: Path) -> None:
    model, tight = built(), config(tmp_path)
    tight["memory"]["ram"] = 4 * PAGE_BYTES
    with pytest.raises(offload.BudgetError) as caught:
        start(model, tight)
    smallest_bytes = caught.value.smallest_bytes
    for part in (
        "memory.ram is 262144 bytes",
        "blocks.0.up",
        f"needs {smallest_bytes} bytes",
        f"to at least {smallest_bytes}",
    ):
        assert part in str(caught.value)
    assert_untouched(model)
    tight["memory"]["ram"] = smallest_bytes
    with offload.initialize(model, tight, adamw) as engine:
        train(engine, 3)
    assert_closed(engine)


def test_a_budget_too_small_to_build_in_names_the_module_and_what_is_known_so_far(tmp_path: Path) -> None:
    tight = config(tmp_path)
    tight["memory"]["ram"] = 3 * PAGE_BYTES
    with pytest.raises(offload.BudgetError) as caught, offload.deferred_init(tight) as store:
        built()
    store.budget.close()
    least, trained = 5 * PAGE_BYTES, 2 * 5 * PAGE_BYTES + 3 * PAGE_BYTES
    for part in (
        "memory.ram is 196608 bytes",
        "Block.down, which is being built",
        f"at least {least} bytes",
        f"{trained} bytes",
        "Modules not built yet may need more: offload.smallest_budget(factory, optimizer, config) says",
    ):
        assert part in str(caught.value)
    assert caught.value.smallest_bytes == least < offload.smallest_budget(built, adamw, tight).smallest_bytes


# ---- configurations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [prepare, initialize])
def test_an_unknown_key_names_the_nearest_known_one_and_nothing_is_begun(start: Start, tmp_path: Path) -> None:
    model, wrong = built(), config(tmp_path, clip_nrom=1.0)
    with pytest.raises(offload.ConfigError, match="unknown key 'update.clip_nrom'; did you mean 'update.clip_norm'?"):
        start(model, wrong)
    assert_untouched(model)
    assert not (tmp_path / "pages").exists()


def test_the_command_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = tmp_path / "run"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    before = contents(foreign)
    assert launch(tmp_path, update={"clip_nrom": 1.0}) == 1
    assert launch(tmp_path, data={"factory": "examples.byte_gpt:python_source_text"}) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("offload: error: ") for line in lines)
    assert "did you mean 'update.clip_norm'?" in lines[0] and f"{foreign} holds files that are not of a run" in lines[1]
    assert contents(foreign) == before and not (tmp_path / "pages").exists()


# ---- folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [prepare, initialize])
@pytest.mark.parametrize("identity", [None, "not an identity", '{"format": "pagemem-run-directory-99", "run_id": "x"}'])
def test_a_folder_of_something_else_is_refused_and_left_as_it_is(
    start: Start, identity: str | None, tmp_path: Path
) -> None:
    foreign, model = tmp_path / "foreign", built()
    (foreign / "more").mkdir(parents=True)
    (foreign / PAGE_FILE_NAME).write_bytes(os.urandom(1000))
    if identity is not None:
        (foreign / "pagemem.json").write_text(identity)
    before, both = contents(foreign), config(tmp_path)
    both["ssd"]["paths"].append(str(foreign))
    with pytest.raises(
        offload.RunDirectoryError, match=rf"{foreign}.*Nothing was changed; name an empty or new folder"
    ):
        start(model, both)
    assert contents(foreign) == before
    assert_untouched(model)
    assert not (tmp_path / "pages" / "pagemem.lock").exists()


def test_a_folder_in_use_names_the_process_and_the_run_in_it_goes_on(tmp_path: Path) -> None:
    with engine_of(built(), tmp_path) as engine:
        train(engine, 2)
        second = built()
        with pytest.raises(
            offload.RunDirectoryError, match=f"pages is in use by process {os.getpid()}.*Nothing was changed"
        ):
            prepare(second, config(tmp_path))
        assert_untouched(second)
        train(engine, 2)
    assert_closed(engine)


@pytest.mark.parametrize("path", ["file", "file/pages", "/proc/pages"])
def test_a_path_that_cannot_be_written_says_why(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    model, wrong = built(), config(tmp_path)
    wrong["ssd"]["paths"] = [str(tmp_path / path)]
    with pytest.raises(
        offload.RunDirectoryError, match=rf"{tmp_path / path} cannot be used as a run directory: \w+.*Name a folder"
    ):
        prepare(model, wrong)
    assert_untouched(model)
    assert (tmp_path / "file").read_text() == "in the way"


# ---- numbers that are none -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_changes_nothing_and_training_goes_on(value: float, tmp_path: Path) -> None:
    model, plain = built(), built()
    optimizer = adamw(plain.parameters())
    with engine_of(model, tmp_path) as engine:
        for step, batch in enumerate(batches(6)):
            if step == 3:
                with pytest.raises(
                    offload.NonFiniteError, match=f"loss of step 4 is {value}: .*no parameter changed.*learning rate"
                ):
                    engine.backward(engine(*batch) * value)
                assert_equal(model, plain)
            plain(*batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            engine.backward(engine(*batch))
            assert engine.step()
        assert_equal(model, plain)
    assert_closed(engine)


def test_a_gradient_norm_that_is_no_number_changes_nothing_and_training_goes_on(tmp_path: Path) -> None:
    model, plain = built(), built()
    optimizer = adamw(plain.parameters())
    with engine_of(model, tmp_path, clip_norm=0.5) as engine:
        for step, batch in enumerate(batches(6)):
            if step == 3:
                loss = engine(*batch)
                engine.backward(loss + (0 * loss).sqrt())  # Finite, but its slope at 0 is not.
                with pytest.raises(
                    offload.NonFiniteError, match="gradients' global norm is nan: no parameter was changed"
                ):
                    engine.step()
                assert_equal(model, plain)
            plain(*batch).backward()
            nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            engine.backward(engine(*batch))
            assert engine.step()
        assert_equal(model, plain)
    assert_closed(engine)


# ---- after the end --------------------------------------------------------------------------------------------------


def test_a_closed_engine_says_so_whoever_is_asked(tmp_path: Path) -> None:
    engine = engine_of(built(), tmp_path)
    train(engine, 2)
    loss = engine(*batches(1)[0])
    engine.close()
    asked: list[tuple[Callable[[], object], str]] = [
        (lambda: engine.model(*batches(1)[0]), r"tok\.weight: the engine that holds this is closed"),
        (engine.model.state_dict, r"tok\.weight: the engine that holds this is closed"),
        (loss.backward, "the engine that holds this is closed"),
        (lambda: engine.backward(loss), "this engine is closed"),  # noqa: F821 - deleted later
        (engine.step, "this engine is closed"),
        (engine.optimizer.step, "this optimizer's engine is closed"),
        (engine.optimizer.state_dict, "this optimizer's engine is closed"),
    ]
    for ask, message in asked:
        with pytest.raises(RuntimeError, match=message):
            ask()
    del loss, asked
    assert_closed(engine)


@pytest.mark.parametrize(
    ("model", "optimizer", "more", "said"),
    [
        (
            None,
            adamw,
            {},
            "the model is None; give a torch.nn.Module first, then the optimizer, then the configuration",
        ),
        (nn.Linear, adamw, {}, "the model is the class Linear itself; give a torch.nn.Module first"),
        (adamw, nn.Linear(2, 2), {}, "the model is a function; give a torch.nn.Module first"),
        (
            nn.Linear(2, 2),
            {"name": "adamw", "lrr": 1},
            {},
            "configuration: unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?",
        ),
        (
            nn.Linear(2, 2),
            {"lr": "1e-3"},
            {},
            "configuration: optimizer.lr: Input should be a valid number, not '1e-3'",
        ),
        (
            nn.Linear(2, 2),
            adamw,
            {"config": 5},
            "the configuration is a int; give a mapping of sections, the name of a file, or a Config",
        ),
        (nn.Linear(2, 2), adamw, {"config": None}, "the configuration is a NoneType; "),
    ],
)
def test_arguments_of_prepare_in_the_wrong_place_are_one_line(
    model: Any, optimizer: Any, more: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        offload.prepare(model, optimizer, more.get("config", config(tmp_path)))
    assert "\n" not in str(caught.value) and not (tmp_path / "pages").exists()
