import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from qdeploy.quant import functions
from qdeploy.quant.functions import quantize_activation, quantize_weight
from qdeploy.quant.grid import container_bits, container_codes, midpoint
from qdeploy.quant.layers import ActivationQuantizer, WeightQuantizer


@pytest.mark.parametrize(("top", "bits"), [(4, 2), (4, 3), (4, 4), (2, 2), (6, 3), (7, 4), (8, 2), (8, 8)])
def test_weight_forward_is_the_container_code_times_its_step(top: int, bits: int) -> None:
    weight = torch.randn(16, 3, 3, 3) * 0.3
    quantizer = WeightQuantizer(weight, top)
    expected = quantizer.codes(weight, bits) * float(quantizer.container_step)
    np.testing.assert_allclose(quantizer(weight, bits).detach().numpy(), expected, rtol=1e-6)
    half = 1 << (top - 1)
    raw = np.clip(np.rint(weight.numpy() / float(quantizer.step.detach())), -half, half - 1).astype(np.int64)
    np.testing.assert_array_equal(quantizer.codes(weight, bits), container_codes(raw, bits, top))


def test_step_gradient_is_lsqs() -> None:
    """Inside the range the code minus w/s, outside the code; times 1 / sqrt(n * Q_p)."""
    weight = torch.tensor([0.12, -0.31, 5.0, -5.0], requires_grad=True)
    step = torch.tensor(0.1, requires_grad=True)
    quantize_weight(weight, step, 4, 0, 1 << (container_bits(4) - 4), 0, 2.0 ** (4 - 7)).sum().backward()
    expected = (1 - 1.2) + (-3 + 3.1) + 7 - 8
    assert step.grad is not None and weight.grad is not None
    assert float(step.grad) == pytest.approx(expected / np.sqrt(4 * 7), rel=1e-4)
    assert weight.grad.tolist() == [1, 1, 0, 0]  # the straight-through estimator stops where it clips


def test_compensation_is_part_of_the_step_gradient() -> None:
    weight = torch.tensor([0.0], requires_grad=True)
    gradients = []
    for offset in (0, midpoint(2, 4)):
        step = torch.tensor(0.1, requires_grad=True)
        quantize_weight(weight, step, 4, 2, 1 << 5, offset, 2.0**-3).sum().backward()
        assert step.grad is not None
        gradients.append(float(step.grad))
    assert gradients[1] - gradients[0] == pytest.approx(1.5 / np.sqrt(7))  # (2^2 - 1) / 2 top units


def test_activation_gradients() -> None:
    x = torch.tensor([-1.0, 0.26, 0.9], requires_grad=True)
    step = torch.tensor(0.1, requires_grad=True)
    out = quantize_activation(x, step, 0, 3)
    assert torch.allclose(out, torch.tensor([0.0, 0.3, 0.3]))
    out.sum().backward()
    assert x.grad is not None and step.grad is not None
    assert x.grad.tolist() == [0, 1, 0]
    assert float(step.grad) == pytest.approx((0 + (3 - 2.6) + 3) / np.sqrt(3 * 3), rel=1e-4)


def test_rounding_is_half_to_even() -> None:
    out = quantize_activation(torch.tensor([0.5, 1.5, 2.5]), torch.tensor(1.0), 0, 255)
    assert out.tolist() == [0, 2, 2]


def test_signed_codes_have_their_zero_point_in_the_middle() -> None:
    quantizer = ActivationQuantizer(8, signed=True)
    quantizer(torch.linspace(-2, 2, 101))
    frozen = quantizer.frozen(clip=False)
    assert (frozen.zero_point, frozen.hi) == (128, 255)
    assert frozen.scale == pytest.approx(2 / 127)


@pytest.mark.parametrize("signed", [False, True])
def test_activation_gradients_do_not_depend_on_the_layout_in_memory(signed: bool) -> None:
    torch.manual_seed(0)
    values, grad = torch.randn(4, 3, 6, 6), torch.randn(4, 3, 6, 6)
    zero_point = 4 if signed else 0
    found = []
    for x_format in (torch.contiguous_format, torch.channels_last):
        for grad_format in (torch.contiguous_format, torch.channels_last):
            x = values.clone(memory_format=x_format).requires_grad_()
            step = torch.tensor(0.2, requires_grad=True)
            out = quantize_activation(x, step, zero_point, 7)
            out.backward(grad.contiguous(memory_format=grad_format))
            assert x.grad is not None and step.grad is not None
            found.append((out.detach(), x.grad, step.grad))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    scaled = values.double() / float(step.detach())
    codes = scaled.round().clamp(-zero_point, 7 - zero_point)
    inside = (scaled >= -zero_point) & (scaled <= 7 - zero_point)
    expected = (grad * torch.where(inside, codes - scaled, codes)).sum() / np.sqrt(values.numel() * (7 - zero_point))
    torch.testing.assert_close(found[0][1], grad * inside)
    assert float(found[0][2]) == pytest.approx(float(expected), rel=1e-4)


def test_values_on_the_border_of_the_range_keep_their_gradient() -> None:
    x = torch.tensor([0.0, 1.5, 1.6], requires_grad=True)
    quantize_activation(x, torch.tensor(0.5), 0, 3).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1, 1, 0]


@pytest.mark.parametrize("ceiling", [math.inf, 6.0])
@pytest.mark.parametrize("step", [0.02, 0.1, 0.5])
def test_unsigned_codes_are_those_of_a_relu_with_its_gradients(step: float, ceiling: float) -> None:
    """Steps whose range ends below and above the ceiling; in float64's sums the step's gradient is LSQ's."""
    torch.manual_seed(0)
    values, grad = 4 * torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    found = []
    for through_relu in (True, False):
        x, s = values.clone().requires_grad_(), torch.tensor(step, requires_grad=True)
        seen = F.hardtanh(x, 0.0, ceiling) if through_relu else x
        out = quantize_activation(seen, s, 0, 255, math.inf if through_relu else ceiling)
        out.backward(grad)
        assert x.grad is not None and s.grad is not None
        found.append((out.detach(), x.grad, s.grad))
    for (a, b), tolerance in zip(zip(*found, strict=True), (1e-6, 1e-6, 1e-4), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-6)
    clipped = values.double().clamp(0, ceiling)
    inside = clipped <= 255 * step
    error = torch.where(inside, found[0][0] - clipped, found[0][0].double()) / step
    assert float(found[1][2]) == pytest.approx(float((grad * error).sum()) / math.sqrt(values.numel() * 255), rel=1e-3)


def test_a_step_learns_as_fast_in_parts_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    values, grad = torch.rand(6, 2, 3, 3), torch.randn(6, 2, 3, 3)

    def of_step(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        step = torch.tensor(0.1, requires_grad=True)
        quantize_activation(x, step, 0, 7).backward(g)
        assert step.grad is not None
        return step.grad

    whole = of_step(values, grad)
    monkeypatch.setattr(functions, "processes", lambda: 2)
    parts = [of_step(x, 2 * g) for x, g in zip(values.chunk(2), grad.chunk(2), strict=True)]  # losses are means
    torch.testing.assert_close(sum(parts) / 2, whole, rtol=1e-4, atol=1e-6)


def test_quantizers_compute_in_float32_under_autocast() -> None:
    x, step = torch.rand(4, 3, 8, 8), torch.tensor(0.01, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = quantize_activation(x.bfloat16(), step, 0, 255)
        out.sum().backward()
    assert out.dtype == torch.float32
    assert torch.equal(out, quantize_activation(x.bfloat16().float(), step, 0, 255))
