import numpy as np
import pytest
import torch
from torch import Tensor

from qdeploy import integer
from qdeploy.errors import ModelError
from qdeploy.quant.batchquant import (
    ESTIMATORS,
    MOMENTUM,
    BatchQuantizer,
    RunningQuantizer,
    channel_mean,
    extremes,
    quantize_batch,
    three_sigma,
)

BITS = (2, 3, 4, 8)


def batch(seed: int = 0, low: float = -0.4) -> Tensor:
    """Activations with channels of unlike spread, as behind a hard-swish."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 6, 5, 5, generator=generator) * torch.linspace(0.2, 3, 6)[:, None, None]
    return x.clamp_min(low)


def test_estimators_are_the_papers() -> None:
    x = batch()
    values = x.numpy()
    assert extremes(x, True) == (values.min(), values.max())
    by_channel = values.transpose(1, 0, 2, 3).reshape(6, -1)
    low, high = channel_mean(x, True)
    assert float(low) == pytest.approx(by_channel.min(1).mean()) and float(high) == pytest.approx(
        by_channel.max(1).mean()
    )
    low, high = three_sigma(x, True)
    assert float(low) == pytest.approx(values.mean() - 3 * values.std(), rel=1e-5)
    assert float(high) == pytest.approx(values.mean() + 3 * values.std(), rel=1e-5)
    for estimate in ESTIMATORS.values():
        assert float(estimate(x.relu(), False)[0]) == 0


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("signed", [False, True])
def test_forward_is_equation_5_with_a_rounded_offset(bits: int, estimator: str, signed: bool) -> None:
    x = batch() if signed else batch(low=0.0)
    quantizer = BatchQuantizer(bits, signed, estimator)
    with torch.no_grad():
        quantizer.gamma.fill_(0.8)
        quantizer.beta.fill_(0.7)
    low, high = (float(v) for v in (extremes if bits == 8 else ESTIMATORS[estimator])(x, signed))
    hi = 2**bits - 1
    delta = (max(high, 0) - min(low, 0)) / hi
    offset = np.rint(np.clip(np.clip(-np.rint(min(low, 0) / delta), 0, hi) + 0.7, 0, hi))
    codes = np.clip(np.rint(x.numpy() / (delta * 0.8) + offset), 0, hi)
    got = quantizer(x).detach().numpy()
    wrong = np.abs(got - (codes - offset) * delta * 0.8) > 1e-4
    assert wrong.mean() < 1e-3  # ties


def test_gradients_are_finite_differences_of_straight_through_rounding() -> None:
    """Of the function with rounding errors held constant, through the extreme values too."""
    x0, hi = batch(low=-9).double(), 7
    x0 = x0 + 0.01 * torch.rand(x0.shape, generator=torch.Generator().manual_seed(1)).double()
    weights = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2)).double()
    gamma0, beta0 = torch.tensor(0.6).double(), torch.tensor(0.8).double()
    low0, high0 = channel_mean(x0, True)
    zero = (-(low0 / ((high0 - low0) / hi)).round()).clamp(0, hi)
    step0, offset0 = (high0 - low0) / hi * gamma0, (zero + beta0).round()
    error = (x0 / step0).round() - x0 / step0
    below, above = x0 / step0 < -offset0 - 1e-9, x0 / step0 > hi - offset0 + 1e-9

    def loss(x: Tensor, gamma: Tensor, beta: Tensor) -> float:
        low, high = channel_mean(x, True)
        step, offset = (high - low) / hi * gamma, zero + beta + (offset0 - zero - beta0)
        out = torch.where(below, -offset * step, torch.where(above, (hi - offset) * step, x + error * step))
        return float((out * weights).sum())

    quantizer = BatchQuantizer(3, True, "channel-mean").double()
    with torch.no_grad():
        quantizer.gamma.copy_(gamma0)
        quantizer.beta.copy_(beta0)
    x = x0.clone().requires_grad_()
    (quantizer(x) * weights).sum().backward()
    assert below.any() and above.any()
    small = 1e-7
    for index, parameter in ((1, quantizer.gamma), (2, quantizer.beta)):
        values = [[x0, gamma0, beta0] for _ in range(2)]
        values[0][index], values[1][index] = values[0][index] + small, values[1][index] - small
        assert parameter.grad is not None
        assert float(parameter.grad) == pytest.approx((loss(*values[0]) - loss(*values[1])) / (2 * small), rel=1e-4)
    assert x.grad is not None
    top = int(x0[:, 5].argmax())  # the greatest value of a channel moves the step
    places = [0, 7, 300, int(np.ravel_multi_index((top // 25, 5, (top % 25) // 5, top % 5), x0.shape))]
    for place in places:
        shift = torch.zeros_like(x0).reshape(-1)
        shift[place] = small
        moved = [loss(x0 + sign * shift.reshape(x0.shape), gamma0, beta0) for sign in (1, -1)]
        expected = (moved[0] - moved[1]) / (2 * small)
        assert float(x.grad.reshape(-1)[place]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("beta", [-0.6, 0.0, 1.4])
def test_the_integer_quantizer_is_the_calibrated_one(bits: int, beta: float) -> None:
    quantizer = BatchQuantizer(bits, True, "channel-mean")
    with torch.no_grad():
        quantizer.beta.fill_(beta)
    quantizer.reset_extremes()
    for seed in range(3):
        quantizer(batch(seed))
    quantizer.eval()
    x = batch(7)
    frozen = quantizer.frozen(clip=bits < 8)
    assert not frozen.problems() and frozen.hi == 2**bits - 1
    expected = integer.dequantize(integer.quantize(x.numpy(), frozen), frozen)
    np.testing.assert_array_equal(quantizer(x).detach().numpy(), expected)


def test_calibration_averages_the_batches_and_training_forgets_none_of_them() -> None:
    quantizer = BatchQuantizer(3, True, "extremes")
    with pytest.raises(ModelError, match="calibrate"):
        quantizer.eval()(batch())
    quantizer.train()
    quantizer(batch())
    with pytest.raises(ModelError, match="calibrate"):
        quantizer.frozen(clip=True)
    quantizer.reset_extremes()
    pairs = [extremes(batch(seed), True) for seed in range(4)]
    for seed in range(4):
        quantizer(batch(seed))
    assert float(quantizer.low) == pytest.approx(np.mean([float(low) for low, _ in pairs]), rel=1e-5)
    assert float(quantizer.high) == pytest.approx(np.mean([float(high) for _, high in pairs]), rel=1e-5)
    quantizer.train()
    quantizer(10 * batch())  # a training batch is no calibration
    assert float(quantizer.high) == pytest.approx(np.mean([float(high) for _, high in pairs]), rel=1e-5)


def test_eight_bits_learn_nothing_through_their_extremes() -> None:
    for bits in (3, 8):
        x = batch(low=-9).requires_grad_()
        BatchQuantizer(bits, True, "extremes")(x).sum().backward()
        assert x.grad is not None
        inside = x.grad[(x > x.min() / 2) & (x < x.max() / 2)]
        assert bool((inside == 1).all())
        assert (float(x.grad.reshape(-1)[x.argmax()].detach()) == 1) == (bits == 8)


def test_constant_and_zero_tensors_are_quantized() -> None:
    for value in (0.0, 2.5, -3.0):
        for estimator in ESTIMATORS:
            out = BatchQuantizer(2, True, estimator)(torch.full((4, 3, 2, 2), value))
            assert torch.isfinite(out).all() and float((out - value).abs().max().detach()) <= max(1e-3, abs(value))


def test_projection() -> None:
    quantizer = BatchQuantizer(2, True, "channel-mean")
    with torch.no_grad():
        quantizer.gamma.fill_(-1.0)
        quantizer.beta.fill_(50.0)
    quantizer.project()
    assert float(quantizer.gamma.detach()) > 0 and float(quantizer.beta.detach()) == 3


def test_no_gradient_is_scaled_by_the_size_of_the_tensor() -> None:
    step = torch.tensor(0.5, requires_grad=True)
    x = torch.full((1000,), 10.0)
    quantize_batch(x, step, torch.tensor(0.0), 3).sum().backward()
    assert step.grad is not None and float(step.grad) == 3000


# ---- what the method is compared with ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_without_gamma_and_beta_step_and_zero_point_are_those_of_the_batch(bits: int, estimator: str) -> None:
    x = batch()
    quantizer = BatchQuantizer(bits, True, estimator, affine=False)
    assert not list(quantizer.parameters())
    low, high = (float(v) for v in (extremes if bits == 8 else ESTIMATORS[estimator])(x, True))
    hi = 2**bits - 1
    delta = (high - low) / hi
    zero_point = np.clip(-np.rint(low / delta), 0, hi)
    codes = np.clip(np.rint(x.numpy() / delta + zero_point), 0, hi)
    wrong = np.abs(quantizer(x).numpy() - (codes - zero_point) * delta) > 1e-4
    assert wrong.mean() < 1e-3  # ties
    quantizer.project()
    quantizer.reset_extremes()
    quantizer(x)
    frozen = quantizer.eval().frozen(clip=bits < 8)
    expected = integer.dequantize(integer.quantize(x.numpy(), frozen), frozen)
    np.testing.assert_array_equal(quantizer(x).numpy(), expected)


def test_without_gamma_and_beta_gradients_reach_the_extremes() -> None:
    """As with them, with factor 1: finite differences of the function with rounding errors held constant."""
    x0, hi, small = batch(low=-9).double(), 3, 1e-7
    weights = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2)).double()
    low0, high0 = channel_mean(x0, True)
    zero, step0 = (-(low0 / ((high0 - low0) / hi)).round()).clamp(0, hi), (high0 - low0) / hi
    error = (x0 / step0).round() - x0 / step0
    below, above = x0 / step0 < -zero, x0 / step0 > hi - zero

    def loss(x: Tensor) -> float:
        low, high = channel_mean(x, True)
        step = (high - low) / hi
        return float(
            (torch.where(below, -zero * step, torch.where(above, (hi - zero) * step, x + error * step)) * weights).sum()
        )

    x = x0.clone().requires_grad_()
    (BatchQuantizer(2, True, "channel-mean", affine=False)(x) * weights).sum().backward()
    assert x.grad is not None
    least = int(x0[:, 2].argmin())
    for place in (0, 11, int(np.ravel_multi_index((least // 25, 2, (least % 25) // 5, least % 5), x0.shape))):
        shift = torch.zeros_like(x0).reshape(-1)
        shift[place] = small
        expected = (loss(x0 + shift.reshape(x0.shape)) - loss(x0 - shift.reshape(x0.shape))) / (2 * small)
        assert float(x.grad.reshape(-1)[place]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_running_averages_quantize_in_training_too(signed: bool, affine: bool) -> None:
    quantizer = RunningQuantizer(3, signed, affine)
    low = high = 0.0
    for seed in range(5):
        x = (seed + 1) * batch(seed) if signed else (seed + 1) * batch(seed, low=0.0)
        found = [float(v) for v in extremes(x, signed)]
        rate = MOMENTUM if seed else 1.0
        low, high = low + rate * (min(found[0], 0) - low), high + rate * (max(found[1], 0) - high)
        got = quantizer(x).detach().numpy()
        delta = (high - low) / 7
        zero_point = np.clip(-np.rint(low / delta), 0, 7)
        expected = (np.clip(np.rint(x.numpy() / delta + zero_point), 0, 7) - zero_point) * delta
        assert (np.abs(got - expected) > 1e-4).mean() < 1e-3  # ties
    assert float(quantizer.low) == pytest.approx(low) and float(quantizer.high) == pytest.approx(high)


def test_running_averages_take_no_gradient() -> None:
    quantizer = RunningQuantizer(2, True)
    x = batch(low=-9).requires_grad_()
    quantizer(x).sum().backward()
    assert x.grad is not None and quantizer.gamma.grad is not None
    assert set(x.grad.unique().tolist()) == {0.0, 1.0}  # straight through alone


def test_calibration_leaves_running_averages_to_training() -> None:
    quantizer = RunningQuantizer(3, True)
    quantizer(batch())
    before = quantizer.low.clone(), quantizer.high.clone()
    quantizer.eval()
    quantizer.reset_extremes()
    quantizer(100 * batch(1))
    assert (quantizer.low, quantizer.high) == before
    frozen = quantizer.frozen(clip=True)
    x = batch(3)
    expected = integer.dequantize(integer.quantize(x.numpy(), frozen), frozen)
    np.testing.assert_array_equal(quantizer(x).detach().numpy(), expected)


def test_a_tensor_that_training_never_saw_gets_its_averages_from_calibration() -> None:
    quantizer = RunningQuantizer(3, True)
    quantizer.eval()
    with pytest.raises(ModelError, match="calibrate"):
        quantizer(batch())
    quantizer.reset_extremes()
    quantizer(batch())
    quantizer.eval()
    assert (quantizer.low, quantizer.high) == extremes(batch(), True)
