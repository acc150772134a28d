import math

import pytest
import torch
from torch import Tensor

from qdeploy.quant.gradients import GradientScaling, code_width, quantize_range

STE = GradientScaling("ste", 5e-3, 1.8)
FORMULAS = {
    "ste": lambda g, r: 1.0,
    "ewgs": lambda g, r: 1 + 0.1 * math.copysign(1, g) * r,
    "pbgs": lambda g, r: 1 + 0.1 * abs(r),
    "acos": lambda g, r: 1 + 0.1 * math.sin(math.pi * r),
    "tanh": lambda g, r: 1 + 0.1 * math.copysign(1, g) * math.tanh(1.5 * r),
    "invtanh": lambda g, r: 1 + 0.1 * math.copysign(1, g) * math.atanh(1.5 * r),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_each_scaling_is_its_formula(name: str) -> None:
    torch.manual_seed(0)
    gradient, residual = torch.randn(50).double(), torch.rand(50).double() - 0.5
    found = GradientScaling(name, 0.1, 1.5)(gradient, residual)
    pairs = zip(gradient.tolist(), residual.tolist(), strict=True)
    assert found.tolist() == pytest.approx([g * FORMULAS[name](g, r) for g, r in pairs])


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_rounded_and_clipped(signed: bool) -> None:
    x = torch.tensor([-9.0, -0.74, -0.2, 0.0, 0.24, 0.26, 0.75, 1.25, 9.0])
    found = quantize_range(x, torch.tensor(0.5), torch.tensor(1.5), signed, STE) / 0.5
    assert found.tolist() == [-3 if signed else 0, -1 if signed else 0, 0, 0, 0, 1, 2, 2, 3]


def surrogate(x: Tensor, step: Tensor, bound: Tensor, at: tuple[Tensor, Tensor, Tensor], signed: bool) -> Tensor:
    """What straight-through rounding means: round(v) = v + (the rounding error at the point `at`, held constant)."""

    def clipped(x: Tensor, step: Tensor, bound: Tensor) -> Tensor:
        low = -bound / step if signed else torch.zeros_like(bound)
        return torch.maximum(torch.minimum(x / step, bound / step), low)

    return step * (clipped(x, step, bound) + (clipped(*at).round() - clipped(*at)))


def differences(loss: object, leaves: list[Tensor]) -> list[Tensor]:
    """Central differences of a function of `leaves`, float64."""
    found = []
    for index, leaf in enumerate(leaves):
        slope = torch.zeros_like(leaf)
        for i in range(leaf.numel()):
            shift = torch.zeros_like(leaf)
            shift.view(-1)[i] = 1e-6
            ends = [loss(*(t + s * shift if k == index else t for k, t in enumerate(leaves))) for s in (1, -1)]  # type: ignore[operator]
            slope.view(-1)[i] = (ends[0] - ends[1]) / 2e-6
        found.append(slope)
    return found


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("signed", [True, False])
def test_gradients_are_the_finite_differences_of_straight_through_rounding(signed: bool, channels: int) -> None:
    torch.manual_seed(channels)
    x, weights = torch.randn(4, 20).double(), torch.randn(4, 20).double()
    shape = (4, 1) if channels > 1 else ()
    step, bound = torch.rand(shape).double() * 0.2 + 0.2, torch.rand(shape).double() * 0.3 + 1
    leaves = [t.clone().requires_grad_() for t in (x, step, bound)]
    (quantize_range(*leaves, signed, STE) * weights).sum().backward()  # type: ignore[arg-type]
    assert int((x.abs() > bound).sum()) > 3  # some are clipped
    expected = differences(
        lambda *values: float((surrogate(*values, (x, step, bound), signed) * weights).sum()), [x, step, bound]
    )
    for leaf, slope in zip(leaves, expected, strict=True):
        assert leaf.grad is not None and torch.allclose(leaf.grad, slope, atol=1e-6)


def test_scaling_reaches_x_the_range_and_the_step_through_the_rounding() -> None:
    x, step, bound = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([0.7, 5.0], 1.0, 2.4))
    quantize_range(x, step, bound, True, GradientScaling("pbgs", 0.5, 1.0)).sum().backward()
    inside, outside = 1 + 0.5 * 0.3, 1 + 0.5 * 0.4
    assert x.grad is not None and x.grad.tolist() == pytest.approx([inside, 0])
    assert bound.grad is not None and float(bound.grad) == pytest.approx(outside)
    assert step.grad is not None and float(step.grad) == pytest.approx(1 - inside * 0.7 + 2 - outside * 2.4)


@pytest.mark.parametrize("signed", [True, False])
def test_a_width_is_that_of_its_greatest_code(signed: bool) -> None:
    reach = torch.arange(1, 256)
    expected = [int(n).bit_length() + signed for n in reach]
    assert code_width(reach.double().log2(), signed).tolist() == expected
    assert code_width(reach.float().log2(), signed).tolist() == expected
    assert code_width(torch.tensor([7.4, 7.6]).log2(), False).tolist() == [3, 4]


def test_the_width_has_the_gradient_of_its_formula_without_rounding() -> None:
    octaves = torch.tensor([0.1, 1.3, 4.0, 6.9], dtype=torch.float64, requires_grad=True)
    code_width(octaves, True).sum().backward()
    (slope,) = differences(lambda k: float((k.exp2() + 1).log2().sum()), [octaves.detach()])
    assert octaves.grad is not None and torch.allclose(octaves.grad, slope, atol=1e-6)
