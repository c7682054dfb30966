"""What factories return is looked at: one line that names the factory, what came and what is expected."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload.config import ConfigError, ModelConfig, TrainConfig
from offload.factories import described, model_factory, resolve
from offload.launch.batches import Batches, loss_of

PAIR = (torch.zeros(2, 4), torch.ones(2, 4))
HERE = __name__


def train(seq: int | None = 4, evaluate: int = 2) -> TrainConfig:
    """The section."""
    return TrainConfig(steps=3, batch=2, seq=seq, evaluate_batches=evaluate)


def data(
    batch: Callable[..., Any] = lambda step, rows, seq: PAIR,
    validation: Any = lambda count, rows, seq: [PAIR] * count,
    **more: Any,
) -> Any:
    """What a factory might return."""
    return SimpleNamespace(batch=batch, validation_batches=validation, **more)


def complaint(made: Callable[[], object]) -> str:
    """The one line of the error."""
    with pytest.raises(ConfigError) as caught:
        made()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_batches_are_passed_on_with_and_without_a_length() -> None:
    seen: list[tuple[int, ...]] = []

    def batch(*arguments: int) -> tuple[Tensor, Tensor]:
        seen.append(arguments)
        return PAIR

    batches = Batches(data(batch, lambda *arguments: [batch(*arguments)]), "a:b", train())
    assert batches.batch(7)[0] is PAIR[0] and next(iter(batches.validation()))[1] is PAIR[1]
    without = Batches(data(batch, lambda *arguments: iter([batch(*arguments)])), "a:b", train(seq=None))
    without.batch(8)
    assert len(list(without.validation())) == 1
    assert seen == [(7, 2, 4), (2, 2, 4), (8, 2), (2, 2)]


@pytest.mark.parametrize(
    ("more", "seq", "unit", "tokens"),
    [
        ({}, 4, None, None),
        ({"unit": "byte"}, 4, "byte", 4),
        ({"unit": "token", "tokens_per_sample": 9}, 4, "token", 9),
        ({"unit": "byte"}, None, "byte", None),
        ({"tokens_per_sample": 9}, None, None, 9),
    ],
)
def test_bytes_and_tokens_are_what_the_data_say(
    more: dict[str, Any], seq: int | None, unit: str | None, tokens: int | None
) -> None:
    batches = Batches(data(lambda *_: PAIR, lambda *_: [], **more), "a:b", train(seq))
    assert (batches.unit, batches.tokens_per_sample, batches.unigram_entropy_bits()) == (unit, tokens, None)


@pytest.mark.parametrize(
    ("made", "seq", "said"),
    [
        (None, 4, "data.factory: a:b returns None, which has no method batch(step, rows, seq)"),
        (
            PAIR,
            4,
            (
                "returns a tuple of 2 (a tensor of shape (2, 4), float32, a tensor of shape (2, 4), float32), which "
                "has no method batch("
            ),
        ),
        (SimpleNamespace(batch=3), 4, "which has no method batch("),
        (
            SimpleNamespace(batch=lambda step, rows, seq: PAIR),
            4,
            "which has no method validation_batches(count, rows, seq)",
        ),
        (data(lambda step, rows: PAIR), 4, "batch is called as batch(step, rows, seq): too many positional arguments"),
        (
            data(),
            None,
            (
                "batch is called as batch(step, rows): missing a required argument: 'seq'; train.seq is not set, so "
                "none is given"
            ),
        ),
        (data(unit=3), 4, 'unit of what it returns is 3; it must be text such as "byte"'),
        (data(tokens_per_sample=0), 4, "tokens_per_sample of what it returns is 0; it must be a whole number above 0"),
    ],
)
def test_data_that_lack_something(made: Any, seq: int | None, said: str) -> None:
    message = complaint(lambda: Batches(made, "a:b", train(seq)))
    assert message.startswith("data.factory: a:b") and said in message


def failing(*_: int) -> Any:
    raise KeyError("nowhere")


def broken(*_: int) -> Iterator[Any]:
    yield PAIR
    raise IndexError("the end")


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (
            lambda *_: PAIR[0],
            "batch gives a tensor of shape (2, 4), float32; it must give a pair of tensors, inputs and targets",
        ),
        (lambda *_: (*PAIR, PAIR[0]), "batch gives a tuple of 3 ("),
        (lambda *_: (1, 2), "batch gives a tuple of 2 (int, int); "),
        (lambda *_: None, "batch gives None; "),
        (lambda *_: {"x": PAIR[0]}, "batch gives a dict; "),
        (failing, "batch 5 fails: KeyError: 'nowhere' (--debug shows where)"),
    ],
)
def test_a_batch_that_is_no_pair(batch: Callable[..., Any], said: str) -> None:
    assert said in complaint(lambda: Batches(data(batch), "a:b", train()).batch(5))


@pytest.mark.parametrize(
    ("validation", "said"),
    [
        (lambda *_: None, "validation_batches gives None; it must give pairs of tensors one by one"),
        (lambda *_: [], "validation_batches gives no batch; 2 were asked for (train.evaluate_batches)"),
        (lambda *_: [PAIR[0]], "validation_batches gives a tensor of shape (2, 4), float32; it must give a pair"),
        (failing, "validation_batches fails: KeyError: 'nowhere'"),
        (broken, "validation_batches fails: IndexError: the end"),
    ],
)
def test_validation_batches_that_are_none(validation: Callable[..., Any], said: str) -> None:
    assert said in complaint(lambda: list(Batches(data(validation=validation), "a:b", train()).validation()))


def test_errors_of_the_system_pass_as_they_are() -> None:
    def full(*_: int) -> Any:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        Batches(data(full), "a:b", train()).batch(0)


# ---- models ----------------------------------------------------------------------------------------------------------


class Output:
    """As some libraries return."""

    loss = torch.zeros(())


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (None, "returns None; it must return the loss of a batch, a tensor with one floating-point number"),
        (
            Output(),
            (
                "returns a Output; it must return the loss of a batch, a tensor with one floating-point number; return "
                "its loss"
            ),
        ),
        ((torch.zeros(()), 1), "returns a tuple of 2 (a tensor of shape (), float32, int); "),
        (
            torch.zeros(3, requires_grad=True),
            (
                "returns a tensor of shape (3,), float32; it must return the loss of a batch, a tensor with one "
                "floating-point number, e.g. its mean"
            ),
        ),
        (torch.zeros((), dtype=torch.int64), "returns a tensor of shape (), int64; "),
        (torch.zeros(()), "does not depend on a trained parameter; is it detached, or made under no_grad?"),
        (0.5, "returns a float; "),
    ],
)
def test_a_loss_that_is_none(output: Any, said: str) -> None:
    message = complaint(lambda: loss_of(output, "a:b", trains=True))
    assert message.startswith("model.factory: a:b: ") and said in message


def test_a_loss_of_one_number_is_one() -> None:
    assert loss_of(torch.ones(1, 1, requires_grad=True), "a:b", trains=True).shape == ()
    assert loss_of(torch.ones(()), "a:b", trains=False) == 1


def none() -> None:
    return None


def a_class() -> type[nn.Linear]:
    return nn.Linear


def empty() -> nn.Module:
    return nn.ReLU()


def frozen() -> nn.Module:
    return nn.Linear(2, 2).requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none", "returns None; it must return a torch.nn.Module"),
        ("a_class", "returns the class Linear itself; it must return a torch.nn.Module"),
        ("empty", "returns a ReLU without parameters; there is nothing to train"),
        ("frozen", "returns a Linear without trainable parameters (none requires grad); there is nothing to train"),
    ],
)
def test_a_model_that_is_none(name: str, said: str) -> None:
    message = complaint(lambda: model_factory(ModelConfig(factory=f"{HERE}:{name}"))())
    assert message.startswith(f"model.factory: {HERE}:{name} ") and said in message


@pytest.mark.parametrize("reference", [":x", "a:", "a..b:c", "a:b..c", "1:2", ".:.", "..a:b"])
def test_a_reference_that_is_none(reference: str) -> None:
    assert (
        complaint(lambda: resolve("--plain", reference)) == f"--plain: {reference!r} is not written as module:callable"
    )


def test_a_module_that_fails_when_it_is_imported(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_module.py").write_text("x = [][1]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert complaint(lambda: resolve("model", "broken_module:x")) == (
        "model: 'broken_module:x': importing it fails: IndexError: list index out of range (--debug shows where)"
    )


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("my_module:make_model", "No module named 'my_module': this is the placeholder of `offload config`"),
        ("elsewhere.deep:x", f"No module named 'elsewhere' in the current folder ({os.getcwd()}) or elsewhere on sys."),
        ("importing_module:x", "No module named 'elsewhere'"),
        ("os:getcwt", "module 'os' has no attribute 'getcwt'; did you mean 'getcwd'?"),
        ("os:path.zzzzzz", "module 'posixpath' has no attribute 'zzzzzz'"),
    ],
)
def test_a_name_that_is_not_found_says_where_it_was_looked_for(
    reference: str, said: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "importing_module.py").write_text("import elsewhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    message = complaint(lambda: resolve("model.factory", reference))
    assert message.startswith(f"model.factory: {reference!r}: {said}")
    assert ("current folder" in message) == reference.startswith("elsewhere")


def test_long_values_are_described_in_few_words() -> None:
    assert described([1] * 9) == "a list of 9 (int, int, int, int, ...)"
