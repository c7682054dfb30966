"""Clipping computes, bit for bit, what `torch.nn.utils.clip_grad_norm_` does to the same gradients."""

from __future__ import annotations

import math

import pytest
import torch

from optim.scaling.clip import check_finite, clip_coefficient, gradient_norm, total_norm
from pagemem.errors import NonFiniteError

SHAPES = [(7,), (64, 33), (1,), (128, 128), (3, 5, 7), (1001,)]


def parameters(scale: float, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """Parameters with gradients of all magnitudes."""
    generator = torch.Generator().manual_seed(3)
    made = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    for number, parameter in enumerate(made):
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * scale * 10.0 ** (number - 3)).to(dtype)
    return made


def gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("max_norm", [0.1, 1.0, 3, 1e9])
def test_clipped_gradients_and_the_norm_equal_torchs(scale: float, max_norm: float) -> None:
    plain = parameters(scale)
    flat = [gradient(parameter).reshape(-1).clone() for parameter in plain]
    expected = torch.nn.utils.clip_grad_norm_(plain, max_norm)
    norms = [gradient_norm(part) for part in flat]
    coefficient = clip_coefficient(total_norm(norms), max_norm)
    assert torch.equal(torch.linalg.vector_norm(torch.stack(norms)), expected)
    for parameter, part in zip(plain, flat, strict=True):
        assert torch.equal(part.mul_(coefficient).view(parameter.shape), gradient(parameter))


def test_small_gradients_are_multiplied_by_exactly_one() -> None:
    norms = [gradient_norm(gradient(parameter)) for parameter in parameters(1e-6)]
    assert clip_coefficient(total_norm(norms), 1e3).item() == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_16_bits_are_widened_first(dtype: torch.dtype) -> None:
    for parameter in parameters(1.0, dtype):
        norm = gradient_norm(gradient(parameter).reshape(-1))
        assert norm.dtype is torch.float32 and norm.shape == ()
        assert torch.equal(norm, torch.linalg.vector_norm(gradient(parameter).reshape(-1).float()))


def test_a_norm_that_16_bits_cannot_hold_is_finite() -> None:
    norm = gradient_norm(torch.full((4096,), 6e4, dtype=torch.float16))
    assert math.isfinite(norm.item())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_gradient_that_is_not_finite_raises(bad: float, place: int) -> None:
    flat = [torch.ones(10) for _ in range(3)]
    flat[place][4] = bad
    name = "nan" if math.isnan(bad) else "inf"
    with pytest.raises(NonFiniteError, match=rf"^the gradients' global norm is {name}: no parameter was changed"):
        check_finite(total_norm([gradient_norm(part) for part in flat]))


def test_finite_gradients_with_an_infinite_norm_raise() -> None:
    with pytest.raises(NonFiniteError):
        check_finite(total_norm([torch.tensor(3e38), torch.tensor(3e38)]))


def test_no_gradient_at_all_is_fine() -> None:
    assert clip_coefficient(total_norm([gradient_norm(torch.zeros(100))]), 1.0).item() == 1.0


def test_norms_on_a_device_are_brought_down_together() -> None:
    """Those of units that are at home there, among others: each copy would be waited for."""
    brought: list[int] = []

    class OnDevice(torch.Tensor):
        @property
        def device(self) -> torch.device:
            return torch.device("cuda")

        def cpu(self) -> torch.Tensor:  # type: ignore[override]
            brought.append(self.numel())
            return self.as_subclass(torch.Tensor)

    norms = [gradient_norm(gradient(parameter).reshape(-1)) for parameter in parameters(1.0)]
    mixed = [norm.as_subclass(OnDevice) if number % 2 else norm for number, norm in enumerate(norms)]
    assert torch.equal(total_norm(mixed), torch.linalg.vector_norm(torch.stack(norms)))
    assert brought == [len(norms) // 2]
