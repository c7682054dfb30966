"""Commits that cannot be gone on from: one clear error, the engine and the commits as they were."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from committed_runs import MIB, RANDOM, SMALL, Random, Run, Setup, assert_same, momentum
from parity import adamw
from tiny_models import Case
from torch import nn

import offload
from pagemem.durable.commit_folder import CommitFolder
from pagemem.files.page_file import PAGE_FILE_NAME


def committed(folder: Path, setup: Setup = SMALL, steps: tuple[int, ...] = (1, 2)) -> dict[int, dict[str, Any]]:
    """A run with a commit after each of these steps; returns the state after each."""
    states = {}
    with Run(setup, folder, keep=5) as run:
        for step in range(1, max(steps) + 1):
            run.step()
            if step in steps:
                run.engine.save()
                states[step] = without_draws(run)
    return states


def without_draws(run: Run) -> dict[str, Any]:
    """The state, without numbers drawn from the generators."""
    return {key: value for key, value in run.state().items() if key not in ("numpy", "python", "torch")}


def commit_file(folder: Path, number: int, kind: str) -> Path:
    return folder / "pages" / "commits" / f"commit-{number:08d}.{kind}"


# ---- damage ---------------------------------------------------------------------------------------------------------


def cut_manifest(folder: Path) -> None:
    os.truncate(commit_file(folder, 2, "json"), commit_file(folder, 2, "json").stat().st_size // 2)


def change_manifest(folder: Path) -> None:
    path = commit_file(folder, 2, "json")
    path.write_bytes(path.read_bytes().replace(b'"step":2', b'"step":3'))


def remove_beside(folder: Path) -> None:
    commit_file(folder, 2, "safetensors").unlink()


def change_beside(folder: Path) -> None:
    path = commit_file(folder, 2, "safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")


DAMAGES = {
    cut_manifest: "commit-00000002.json is damaged: .* it was cut",
    change_manifest: "commit-00000002.json is damaged: .*checksum differs",
    remove_beside: "commit-00000002.safetensors cannot be read: No such file",
    change_beside: "commit-00000002.safetensors is damaged: it is not what was written",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_commit_is_named_and_passed_over_only_when_that_is_asked_for(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    states = committed(tmp_path)
    damage(tmp_path)
    with Run(SMALL, tmp_path, seed=8) as run:
        before = without_draws(run)
        with pytest.raises(offload.CommitError, match=DAMAGES[damage]):
            run.engine.resume()
        assert_same(without_draws(run), before)
        run.train(1)
        resumed = run.engine.resume(allow_older=True)
        assert resumed is not None and (resumed.step, resumed.number) == (1, 1)
        assert len(resumed.passed_over) == 1 and "commit-00000002" in resumed.passed_over[0]
        assert_same(without_draws(run), states[1])
        run.train(2)
        assert run.engine.save() == 3
        expected = without_draws(run)
    # Of a file that is not there it is not known that it was not what was written: that commit stays.
    stays = [2] if damage is remove_beside else []
    assert CommitFolder(tmp_path / "pages").numbers() == [1, *stays, 3] and len(
        os.listdir(tmp_path / "pages" / "commits")
    ) == 4 + len(stays)
    with Run(SMALL, tmp_path, seed=9) as run:
        resumed = run.engine.resume()
        assert resumed is not None and (resumed.step, resumed.passed_over) == (2, ())
        assert_same(without_draws(run), expected)


def test_no_whole_commit_at_all(tmp_path: Path) -> None:
    committed(tmp_path, steps=(1,))
    os.truncate(commit_file(tmp_path, 1, "json"), 10)
    with Run(SMALL, tmp_path) as run:
        with pytest.raises(offload.CommitError, match="commit-00000001.json is damaged.* no other one is whole"):
            run.engine.resume()
        assert run.engine.resume(allow_older=True) is None
        run.train(1)
        with pytest.raises(offload.CommitError, match="did not go on from one"):
            run.engine.save()


def test_a_changed_byte_of_a_page_is_found_when_it_is_read_and_the_commit_before_is_whole(tmp_path: Path) -> None:
    states = committed(tmp_path)
    on_disk = CommitFolder(tmp_path / "pages")
    earlier = {(tensor.runs, tensor.tail) for tensor in on_disk.read(1).tensors}
    frame = next(
        tensor.runs[0][0]
        for tensor in on_disk.read(2).tensors
        if tensor.runs and (tensor.runs, tensor.tail) not in earlier
    )
    with open(tmp_path / "pages" / PAGE_FILE_NAME, "r+b") as pages:
        pages.seek((frame << 16) + 100)
        changed = bytes([pages.read(1)[0] ^ 1])
        pages.seek(-1, os.SEEK_CUR)
        pages.write(changed)
    with (
        pytest.raises(offload.ChecksumError, match=rf"frame {frame} .*was written with xxh3 \w+ and reads as"),
        Run(SMALL, tmp_path) as run,
    ):
        assert run.engine.resume() is not None
        run.train(4)
    commit_file(tmp_path, 2, "json").unlink()
    with Run(SMALL, tmp_path) as run:
        resumed = run.engine.resume()
        assert resumed is not None and resumed.step == 1
        assert_same(without_draws(run), states[1])


# ---- of something else ----------------------------------------------------------------------------------------------


class Wider(Random):
    """Larger layers."""

    def __init__(self) -> None:
        super().__init__(256)


class Longer(Random):
    """One layer more."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(10, 10)


class Turned(Random):
    """As many elements everywhere, in another shape."""

    def __init__(self) -> None:
        super().__init__()
        weight = self.first.weight
        self.first.weight = nn.Parameter(weight.detach().reshape(64, 192).t().contiguous().reshape(96, 128))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Never called."""
        raise AssertionError


class Counting(Random):
    """One buffer more."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(3))


class CountingWider(Random):
    """The same buffers, one of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(5, dtype=torch.int64))


class Fewer(Random):
    """One buffer less."""

    def __init__(self) -> None:
        super().__init__()
        del self._buffers["seen"]


def one_group(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(parameters), lr=1e-2, fused=True)


def other_groups(parameters: Any) -> torch.optim.Optimizer:
    every = list(parameters)
    return torch.optim.AdamW([{"params": every[:2]}, {"params": every[2:], "weight_decay": 0.0}], lr=1e-2, fused=True)


def adam(parameters: Any) -> torch.optim.Optimizer:
    every = list(parameters)
    groups = [
        {"params": [p for p in every if p.ndim > 1]},
        {"params": [p for p in every if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.Adam(groups, lr=1e-2, fused=True)


def model(build: Callable[[], nn.Module]) -> Setup:
    return replace(SMALL, case=Case(build, "vectors"), ram=2 * MIB)


def precision(dtype: str) -> Setup:
    return Setup(RANDOM, 2 * MIB, more={"model": {"factory": "none:none", "dtype": dtype}})


OTHERS: dict[str, tuple[Setup, str]] = {
    "wider": (model(Wider), r"parameter first\.bias: .*192.*256"),
    "longer": (model(Longer), r"parameter more\.bias: none and .*10"),
    "turned": (model(Turned), r"parameter first\.weight: .*192, 64.*96, 128"),
    "buffer more": (model(Counting), r"buffer or unpaged parameter count: none and"),
    "buffer less": (model(Fewer), r"buffer or unpaged parameter seen: .* and none"),
    "buffer wider": (model(CountingWider), r"buffer or unpaged parameter seen: .*\[\].*\[5\]"),
    "momentum": (replace(SMALL, factory=momentum), "made with AdamW, this run has SGD"),
    "adam": (replace(SMALL, factory=adam), "made with AdamW, this run has Adam"),
    "one group": (replace(SMALL, factory=one_group), r"parameter first.bias: .* 1\] and .* 0\].*parameter group"),
    "other groups": (replace(SMALL, factory=other_groups), r"parameter first.bias: .* 1\] and .* 0\].*parameter group"),
    "bf16": (precision("bf16"), r"parameter .*float32.*bfloat16"),
    "fp16": (precision("fp16"), r"parameter .*float32.*float16"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_commit_of_another_model_optimizer_or_precision_is_refused(other: str, tmp_path: Path) -> None:
    expected = committed(tmp_path)[2]
    setup, message = OTHERS[other]
    with Run(setup, tmp_path, seed=8) as run:
        before = without_draws(run)
        with pytest.raises(offload.CommitError, match=message) as raised:
            run.engine.resume()
        assert "commit 2" in str(raised.value) and "; name other ssd.paths, or build the model" in str(raised.value)
        assert_same(without_draws(run), before)
        if other not in ("turned", "buffer less"):
            run.train(2)
    with Run(SMALL, tmp_path, seed=9) as run:
        assert run.engine.resume() is not None
        assert_same(without_draws(run), expected)


def test_16_bit_formats_of_one_size_are_told_apart(tmp_path: Path) -> None:
    committed(tmp_path, precision("bf16"))
    with (
        Run(replace(precision("fp16"), update={"loss_scale": 1.0}), tmp_path) as run,
        pytest.raises(offload.CommitError, match=r"float16"),
    ):
        run.engine.resume()


def test_what_the_run_tracks_must_be_in_the_commit(tmp_path: Path) -> None:
    committed(tmp_path)
    with Run(SMALL, tmp_path) as run:
        run.engine.track("more", run.schedule)
        with pytest.raises(ValueError, match="tracked as 'more' already"):
            run.engine.track("more", run.schedule)
        with pytest.raises(offload.CommitError, match="no state of more, which this run tracks; name other ssd.paths"):
            run.engine.resume()
        run.train(1)


class Odd:
    """Its state is what it is given."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise KeyError("before")


def test_a_state_that_cannot_be_committed_is_refused_when_it_is_tracked_and_at_the_latest_when_it_is_saved(
    tmp_path: Path,
) -> None:
    with Run(SMALL, tmp_path) as run:
        run.train(1)
        with pytest.raises(
            ValueError, match=r"the state of 'odd'\['at'\] is a builtins.object, which is not committed"
        ):
            run.engine.track("odd", Odd(object()))
        odd = Odd([1])
        run.engine.track("odd", odd)
        odd.state = [1, {"x": object()}]
        with pytest.raises(offload.CommitError, match=r"the state of 'odd'\['at'\]\[1\]\['x'\] is a builtins.object"):
            run.engine.save()
        run.train(2)
    assert CommitFolder(tmp_path / "pages").numbers() == []


def test_a_thing_that_does_not_take_its_state_leaves_everything_as_it_was(tmp_path: Path) -> None:
    with Run(SMALL, tmp_path) as run:
        run.engine.track("odd", Odd(1))
        run.train(2)
        run.engine.save()
    with Run(SMALL, tmp_path, seed=8) as run:
        run.engine.track("odd", Odd(1))
        before = without_draws(run)
        with pytest.raises(KeyError):  # its own error, as it does not take its own state either
            run.engine.resume()
        run.engine.debug.checkpoints._tracked.pop("odd")

        class Once(Odd):
            def load_state_dict(self, state_dict: dict[str, Any]) -> None:
                if state_dict == {"at": 1}:
                    raise KeyError("before")

        run.engine.track("odd", Once(2))
        with pytest.raises(offload.CommitError, match="commit 1: 'odd' does not take its state: KeyError: 'before'"):
            run.engine.resume()
        assert_same(without_draws(run), before)


@pytest.mark.parametrize("name", ["", "two\nlines", "x" * 201, "bell\a"])
def test_a_name_that_is_not_one_line_is_refused(name: str, tmp_path: Path) -> None:
    with Run(SMALL, tmp_path) as run:
        run.train(1)
        with pytest.raises(ValueError, match="a commit's name is one line of 1 to 200 characters"):
            run.engine.save(name)
        assert run.engine.save("one line") == 1


def test_weights_are_not_taken_over_under_a_view_that_is_in_use(tmp_path: Path) -> None:
    expected = committed(tmp_path)[2]
    with Run(SMALL, tmp_path, seed=8) as run:
        before = without_draws(run)
        view = run.model.last.weight.data
        kept = view.clone()
        with pytest.raises(offload.CommitError, match="while a view of it is in use"):
            run.engine.resume()
        assert torch.equal(view, kept)
        assert_same(without_draws(run), before)
        del view
        assert run.engine.resume() is not None
        assert_same(without_draws(run), expected)


# ---- other folders and settings -------------------------------------------------------------------------------------


def test_another_page_size_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    expected = committed(tmp_path)[2]
    config = SMALL.config(tmp_path)
    config["memory"] = {"ram": 4 * MIB, "page": "128KiB"}
    with pytest.raises(offload.ConfigError, match="memory.page is 131072, the commits in .* have pages of 65536 bytes"):
        offload.prepare(Random(), adamw, config)
    config["memory"]["page"] = "auto"
    _, optimizer = offload.prepare(Random(), adamw, config)
    assert optimizer.engine.debug.page_files.page_bytes == 65536
    optimizer.engine.close()
    with Run(SMALL, tmp_path) as run:
        run.engine.resume()
        assert_same(without_draws(run), expected)


def two_paths(folder: Path, *names: str) -> dict[str, Any]:
    config = SMALL.config(folder)
    config["ssd"]["paths"] = [str(folder / name) for name in names]
    return config


@pytest.mark.parametrize("names", [("b", "a"), ("a",), ("b",), ("a", "c"), ("c", "a"), ("c", "b"), ("a", "b", "c")])
def test_other_folders_than_the_commits_are_refused_before_they_are_written_to(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    _, optimizer = offload.prepare(Random(), adamw, two_paths(tmp_path, "a", "b"))
    optimizer.engine.save()
    weights = optimizer.engine.model.state_dict()
    optimizer.engine.close()
    with pytest.raises(offload.ConfigError, match="ssd.paths"):
        offload.prepare(Random(), adamw, two_paths(tmp_path, *names))
    _, optimizer = offload.prepare(Random(), adamw, two_paths(tmp_path, "a", "b"))
    optimizer.engine.resume()
    assert_same(optimizer.engine.model.state_dict(), weights)
    optimizer.engine.close()


def test_folders_that_were_moved_together_are_the_same_run(tmp_path: Path) -> None:
    expected = committed(tmp_path / "before")[2]
    shutil.move(tmp_path / "before", tmp_path / "after")
    with Run(SMALL, tmp_path / "after") as run:
        assert run.engine.resume() is not None
        assert_same(without_draws(run), expected)


def test_commits_without_checksums_are_not_read_with_them(tmp_path: Path) -> None:
    config = SMALL.config(tmp_path)
    config["ssd"]["checksums"] = False
    for _ in range(2):
        _, optimizer = offload.prepare(Random(), adamw, config)
        optimizer.engine.resume()
        optimizer.engine.save()
        weights = optimizer.engine.model.state_dict()
        optimizer.engine.close()
    with pytest.raises(offload.ConfigError, match="ssd.checksums is true, but commits in .* have none"):
        offload.prepare(Random(), adamw, SMALL.config(tmp_path))
    _, optimizer = offload.prepare(Random(), adamw, config)
    optimizer.engine.resume()
    assert_same(optimizer.engine.model.state_dict(), weights)
    optimizer.engine.close()


def test_checksums_can_be_turned_off_later(tmp_path: Path) -> None:
    expected = committed(tmp_path)[2]
    config = SMALL.config(tmp_path)
    config["ssd"]["checksums"] = False
    _, optimizer = offload.prepare(Random(), adamw, config)
    optimizer.engine.resume()
    assert_same(optimizer.engine.model.state_dict(), expected["model"])
    optimizer.engine.close()
