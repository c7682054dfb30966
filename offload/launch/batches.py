"""What `offload launch` trains on: the object that ``data.factory`` returns, looked at before it is needed, and its
batches.

The object has ``batch(step, rows)`` and ``validation_batches(count, rows)``, with ``seq`` as a last argument where
``train.seq`` is set; both give pairs of tensors, inputs and targets. It may have

- ``unit``, text such as "byte": of what the loss is a mean over, in nats for each; losses are then shown in bits for
  each;
- ``tokens_per_sample``: throughput is then shown in tokens; it is ``train.seq`` where there is a ``unit`` and nothing
  else is said;
- ``unigram_entropy_bits()``: bits for each unit of the best model without context.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from offload.config import ConfigError, TrainConfig, TrainingConfig
from offload.factories import calls_of, described

Pair = tuple[Tensor, Tensor]


def batch_numbers(config: TrainingConfig, step: int, rank: int = 0, n_ranks: int = 1) -> range:
    """Numbers of the micro-batches of a rank in a step, counted from 0: those of a run are in one order, however many
    ranks share them."""
    own = config.update.accumulation
    first = (step * n_ranks + rank) * own
    return range(first, first + own)


class Batches:
    """Batches of a run. Training thread only.

    Args:
        data: what the factory has returned.
        reference: the factory's name, for errors.

    Raises:
        ConfigError: the object has not what is needed of it; names what it has and what is expected.
    """

    def __init__(self, data: Any, reference: str, train: TrainConfig) -> None:
        self._data = data
        self._reference = reference
        self._train = train
        self._shape = (train.batch,) if train.seq is None else (train.batch, train.seq)
        self._check_method("batch", "step", 0)
        if train.evaluate_batches:
            self._check_method("validation_batches", "count", train.evaluate_batches)
        self.unit: str | None = self._optional(
            "unit", lambda value: isinstance(value, str) and value, 'text such as "byte"'
        )
        tokens = self._optional(
            "tokens_per_sample", lambda value: type(value) is int and value > 0, "a whole number above 0"
        )
        self.tokens_per_sample: int | None = train.seq if tokens is None and self.unit is not None else tokens

    def _check_method(self, name: str, first: str, value: int) -> None:
        arguments = f"({', '.join([first, 'rows', 'seq'][: 1 + len(self._shape)])})"
        method = getattr(self._data, name, None)
        if not callable(method):
            raise ConfigError(
                f"data.factory: {self._reference} returns {described(self._data)}, which has no method "
                f"{name}{arguments}"
            )
        try:
            inspect.signature(method).bind(value, *self._shape)
        except TypeError as error:
            hint = "" if self._train.seq is not None else "; train.seq is not set, so none is given"
            raise ConfigError(
                f"data.factory: {self._reference}: {name} is called as {name}{arguments}: {error}{hint}"
            ) from error
        except ValueError:  # A method without a signature is found out when it is called.
            return

    def _optional(self, name: str, fits: Callable[[Any], object], expected: str) -> Any:
        value = getattr(self._data, name, None)
        if value is not None and not fits(value):
            raise ConfigError(
                f"data.factory: {self._reference}: {name} of what it returns is {value!r}; it must be {expected}"
            )
        return value

    def batch(self, number: int) -> Pair:
        """Micro-batch ``number`` of the run: inputs and targets.

        Raises:
            ConfigError: it is no pair of tensors, or its making has failed.
        """
        with calls_of("data.factory", f"{self._reference}: batch {number}"):
            made = self._data.batch(number, *self._shape)
        return self._pair("batch", made)

    def validation(self) -> Iterator[Pair]:
        """The ``train.evaluate_batches`` validation batches.

        Raises:
            ConfigError: something else comes than pairs of tensors, or nothing.
        """
        name, found = "validation_batches", 0
        with calls_of("data.factory", f"{self._reference}: {name}"):
            made = self._data.validation_batches(self._train.evaluate_batches, *self._shape)
        if not hasattr(made, "__iter__"):
            raise ConfigError(
                f"data.factory: {self._reference}: {name} gives {described(made)}; it must give pairs of tensors one "
                "by one"
            )
        batches = iter(made)
        while True:
            with calls_of("data.factory", f"{self._reference}: {name}"):
                pair = next(batches, None)
            if pair is None:
                break
            found += 1
            yield self._pair(name, pair)
        if not found:
            raise ConfigError(
                f"data.factory: {self._reference}: {name} gives no batch; {self._train.evaluate_batches} were asked "
                "for (train.evaluate_batches)"
            )

    def _pair(self, name: str, made: Any) -> Pair:
        if isinstance(made, (tuple, list)) and len(made) == 2 and all(isinstance(part, Tensor) for part in made):
            return made[0], made[1]
        raise ConfigError(
            f"data.factory: {self._reference}: {name} gives {described(made)}; it must give a pair of tensors, inputs "
            "and targets"
        )

    def unigram_entropy_bits(self) -> float | None:
        """Bits for each unit of the best model without context, where the data tell."""
        tell = getattr(self._data, "unigram_entropy_bits", None)
        if tell is None:
            return None
        with calls_of("data.factory", f"{self._reference}: unigram_entropy_bits"):
            return float(tell())


def loss_of(output: Any, reference: str, *, trains: bool) -> Tensor:
    """The loss that a model's forward has returned: one number.

    Args:
        reference: the model's factory, for errors.
        trains: whether it is to be differentiated.

    Raises:
        ConfigError: it is something else.
    """
    expected = "it must return the loss of a batch, a tensor with one floating-point number"
    if not isinstance(output, Tensor):
        hint = "; return its loss" if hasattr(output, "loss") else ""
        raise ConfigError(f"model.factory: {reference}: forward(x, y) returns {described(output)}; {expected}{hint}")
    if output.numel() != 1 or not output.is_floating_point():
        raise ConfigError(
            f"model.factory: {reference}: forward(x, y) returns {described(output)}; {expected}, e.g. its mean"
        )
    if trains and not output.requires_grad:
        raise ConfigError(
            f"model.factory: {reference}: the loss that forward(x, y) returns does not depend on a trained parameter; "
            "is it detached, or made under no_grad?"
        )
    return output if output.dim() == 0 else output.reshape(())


def on_device(batch: Tensor, device: torch.device) -> Tensor:
    """A batch where compute is; copies to a device are asynchronous."""
    return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch.to(device)


def evaluated(forward: Callable[..., Any], pair: Pair, reference: str, device: torch.device) -> float:
    """The loss of a batch, without gradients."""
    x, y = pair
    with torch.no_grad(), calls_of("model.factory", f"{reference}: forward(x, y)"):
        output = forward(on_device(x, device), on_device(y, device))
    return float(loss_of(output, reference, trains=False))
