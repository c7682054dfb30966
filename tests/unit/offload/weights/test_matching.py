"""Names of a checkpoint and of a model: prefixes, ties, and everything that does not fit in one error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offload.sources.safetensors_file import FileTensor
from offload.weights.matching import Naming, Wanted, match
from pagemem.sources.source_files import SourceFile

FILE = SourceFile(Path("x.safetensors"), 0, 0, 0, 0)


def target(*names: str, shape: tuple[int, ...] = (2,), dtype: torch.dtype = torch.float32) -> Wanted:
    return Wanted(names, torch.Size(shape), dtype)


def held(*names: str, shape: tuple[int, ...] = (2,), kind: str = "F32") -> dict[str, FileTensor]:
    return {name: FileTensor(name, FILE, kind, torch.Size(shape), 0, 0) for name in names}


def test_names_as_they_are_and_other_dtypes() -> None:
    found = match([target("a"), target("b", dtype=torch.bfloat16)], held("b", "a"), Naming())
    assert [(one.names, stored.name) for one, stored in found.pairs] == [(("a",), "a"), (("b",), "b")]
    found.check(Path("x"), "M", strict=True)


@pytest.mark.parametrize(("mine", "theirs"), [("model.a", "a"), ("a", "model.a")])
def test_the_base_models_prefix_may_be_there_or_not(mine: str, theirs: str) -> None:
    found = match([target(mine)], held(theirs), Naming("model"))
    assert len(found.pairs) == 1 and not found.missing and not found.surplus
    found = match([target(mine)], held(theirs), Naming())
    assert (found.missing, found.surplus) == ([mine], [theirs])


def test_of_two_tensors_for_one_parameter_the_one_with_its_name_counts() -> None:
    for names in (("model.a", "a"), ("a", "model.a")):
        found = match([target("model.a")], held(*names), Naming("model"))
        assert [stored.name for _, stored in found.pairs] == ["model.a"] and found.surplus == ["a"]
    found = match([target("model.a")], held("model.model.a", "a"), Naming("model"))
    assert [stored.name for _, stored in found.pairs] == ["model.model.a"] and found.surplus == ["a"]


def test_tied_parameters_need_one_name_and_the_last_one_stays() -> None:
    tied = target("embed", "head")
    for names in (("head",), ("embed",), ("embed", "head"), ("head", "embed")):
        found = match([tied], held(*names), Naming())
        assert [stored.name for _, stored in found.pairs] == ["head" if "head" in names else "embed"]
        assert not found.missing and not found.surplus


def test_everything_that_does_not_fit_is_in_one_line() -> None:
    targets = [target("a", shape=(3,)), target("b"), target("c"), target("d", dtype=torch.int64), target("e")]
    found = match(targets, held("a", "d", "e", "x", "y"), Naming())
    with pytest.raises(ValueError, match="x does not fit M; ") as caught:
        found.check(Path("x"), "M", strict=True)
    assert str(caught.value) == (
        "x does not fit M; misfits: a is [2] in the file and [3] in the model, d is torch.float32 in the file and "
        "torch.int64 in the model; missing: b, c; surplus: x, y"
    )
    with pytest.raises(ValueError, match="misfits: a is"):
        found.check(Path("x"), "M", strict=False)


def test_missing_and_surplus_are_errors_when_strict() -> None:
    found = match([target("a"), target("b")], held("a", "x"), Naming())
    with pytest.raises(ValueError, match=r"missing: b; surplus: x \(strict=False leaves these as they are\)"):
        found.check(Path("x"), "M", strict=True)
    found.check(Path("x"), "M", strict=False)


def test_what_a_model_passes_over() -> None:
    found = match([target("a"), target("b")], held("a", "rotary.inv_freq"), Naming("", ("^b$",), (r"inv_freq",)))
    found.check(Path("x"), "M", strict=True)
