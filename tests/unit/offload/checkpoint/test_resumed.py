"""What is set otherwise now than when a commit was made, and which value holds, in words."""

from __future__ import annotations

from typing import Any

from offload.checkpoint.compatibility import config_changes, hyper_changes
from offload.config_loading import load_config


def dumped(**sections: Any) -> dict[str, Any]:
    """A resolved configuration, as a commit has it."""
    given = {"memory": {"ram": "8MiB"}, "ssd": {"paths": ["pages"]}, **sections}
    return load_config(given).model_dump(mode="json")


def test_nothing_changed() -> None:
    assert config_changes(dumped(), dumped()) == []


def test_each_key_is_named_with_both_values_and_what_holds() -> None:
    train = {"steps": 10, "batch": 2, "seq": 8}
    then = dumped(seed=1, train=train, optimizer={"lr": 1e-3})
    now = dumped(
        seed=2,
        train={**train, "batch": 4, "schedule": "cosine"},
        optimizer={"lr": 1e-2},
        memory={"ram": "16MiB", "page": "64KiB"},
        update={"clip_norm": 1.0},
    )
    assert [str(change) for change in config_changes(then, now)] == [
        "seed: 1 -> 2; random generators go on as the commit has them; the new one is for data that asks for it",
        "memory.ram: 8388608 -> 16777216; the new one holds",
        "memory.page: 'auto' -> 65536; pages stay as the commit has them",
        "update.clip_norm: None -> 1.0; the new one holds",
        "train.batch: 2 -> 4; the new one holds",
        "train.schedule: 'constant' -> 'cosine'; the new one holds",
    ]


def test_a_section_that_was_not_there_is_named_as_a_whole() -> None:
    [change] = config_changes(dumped(), dumped(model={"factory": "a:b"}))
    assert str(change) == "model: None -> 'given'; the new one holds"


def test_keys_that_one_version_does_not_know_are_not_compared() -> None:
    then = dumped()
    then["memory"]["gone"] = 3
    del then["update"]["start"]
    assert config_changes(then, dumped()) == []


def test_what_the_groups_were_given_is_compared_and_the_commits_holds() -> None:
    then: list[dict[str, Any]] = [
        {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1},
        {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.0},
    ]
    now = [{**then[0], "lr": 1e-2, "weight_decay": 0.2, "new": 1}, {**then[1], "lr": 1e-2}]
    holds = "the commit's holds; set it in optimizer.param_groups after resume() for another"
    assert [str(change) for change in hyper_changes(then, now)] == [
        f"optimizer.lr: 0.001 -> 0.01; {holds}",
        f"optimizer.weight_decay of group 0: 0.1 -> 0.2; {holds}",
    ]
    assert hyper_changes(then, then) == []
