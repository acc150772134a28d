import numpy as np
import pytest
import torch
from torch import Tensor

from qdeploy.errors import RecipeError
from qdeploy.nets import build
from qdeploy.quant.eqnet import ElasticActivationQuantizer, ElasticWeightQuantizer, EQNet, signed_range
from qdeploy.quant.functions import quantize_affine
from qdeploy.quant.graph import read_graph
from qdeploy.quant.lp_error import POWER, lowest_error_steps, lowest_error_zero_point
from qdeploy.recipe import EQNetQuantization
from qdeploy.space import GRANULARITIES, SYMMETRIES, LayerBits

BITS = (2, 3, 4, 8)


def elastic(name: str = "resnet8", **changes: object) -> EQNet:
    torch.manual_seed(0)
    network = build(name, 1, 10, 8, 2)
    return EQNet(network, read_graph(network), name, EQNetQuantization("eqnet", **changes))  # type: ignore[arg-type]


def surrogate(x: Tensor, step: Tensor, offset: Tensor, at: tuple[Tensor, Tensor, Tensor], lo: int, hi: int) -> Tensor:
    """What straight-through rounding means: round(v) = v + (the rounding error at the point `at`, held constant)."""
    x0, step0, offset0 = at
    codes = x / step + ((x0 / step0).round() - x0 / step0)
    inside = ((x0 / step0) >= lo - offset0.round()) & ((x0 / step0) <= hi - offset0.round())
    point = offset + (offset0.round() - offset0)
    clipped = torch.where((x0 / step0) < lo - offset0.round(), lo - point, hi - point)
    return torch.where(inside, codes, clipped) * step


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("point", [0.0, 0.8, -1.3])
def test_gradients_are_the_finite_differences_of_straight_through_rounding(channels: int, point: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 30, dtype=torch.float64)
    x = x[(x / 0.31 - (x / 0.31).round()).abs() < 0.45].reshape(-1)[:80].reshape(4, 20)
    step = torch.tensor([0.31, 0.42, 0.27, 0.5], dtype=torch.float64)[:channels].reshape(-1, *[1] * (channels > 1))
    step = step.reshape(()) if channels == 1 else step
    offset, weights = torch.tensor(point, dtype=torch.float64), torch.randn(4, 20, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, step, offset)]
    (quantize_affine(*leaves, -2, 1) * weights).sum().backward()  # type: ignore[arg-type]
    at = (x, step, offset)

    def loss(*values: Tensor) -> float:
        return float((surrogate(*values, at, -2, 1) * weights).sum())  # type: ignore[arg-type]

    mean_square, count = float(step.square().mean()), x.numel() / step.numel()
    for index, leaf in enumerate(leaves):
        expected = torch.zeros_like(leaf)
        for i in range(leaf.numel()):
            shift = torch.zeros_like(leaf)
            shift.view(-1)[i] = 1e-6
            moved = [[t + shift * sign if k == index else t for k, t in enumerate(at)] for sign in (1, -1)]
            expected.view(-1)[i] = (loss(*moved[0]) - loss(*moved[1])) / 2e-6
        scale = 1.0 if index == 0 else 1 / np.sqrt(count) / mean_square  # Q_p is 1
        scale = scale * step.square() if index == 1 else scale
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, expected * scale, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_the_integers_are_what_training_computes_with(bits: int, granularity: str, symmetry: str) -> None:
    torch.manual_seed(1)
    weight = torch.randn(6, 3, 3, 3) * torch.linspace(0.1, 1, 6)[:, None, None, None] + 0.2
    quantizer = ElasticWeightQuantizer(weight, BITS, GRANULARITIES, SYMMETRIES)
    with torch.no_grad():
        for offset in quantizer.offsets.values():
            offset.add_(0.3)  # as training leaves it: between integers
    quantizer.project()
    entry = LayerBits("x", bits, bits, granularity, symmetry)
    simulated, found = quantizer(weight, entry).detach().numpy(), quantizer.codes(weight, entry)
    step = found.step.reshape(-1, 1, 1, 1) if found.step.ndim else found.step
    integers = found.codes.astype(np.int64) - found.zero_point
    np.testing.assert_allclose(simulated, integers * step, rtol=1e-6, atol=1e-12)
    assert found.codes.dtype == np.int8 and len(np.unique(found.codes)) <= 1 << bits
    assert (found.step.size == 6) == (granularity == "channel")
    assert (found.zero_point != 0) == (symmetry == "asymmetric")
    assert (found.bits.bits, found.bits.top) == (bits, bits)


def error(values: Tensor, step: Tensor, lo: int, hi: int, zero_point: int) -> float:
    codes = (values / step).round().clamp(lo - zero_point, hi - zero_point)
    return float(((codes * step - values).abs() ** POWER).sum())


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_initial_steps_have_the_lowest_error_of_a_fine_grid(bits: int) -> None:
    values = torch.randn(1, 4000, generator=torch.Generator().manual_seed(bits))
    lo, hi = signed_range(bits)
    step, least = lowest_error_steps(values, lo, hi, 0)
    assert float(least) == pytest.approx(error(values, step, lo, hi, 0), rel=1e-4)
    grid = torch.linspace(0.02, 1.2, 300) * values.abs().max() / hi
    assert float(least) <= 1.03 * min(error(values, s, lo, hi, 0) for s in grid)


def test_each_channel_gets_its_own_step_and_constants_get_a_positive_one() -> None:
    values = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.01], [1.0], [0.0]])
    steps, errors = lowest_error_steps(values, -2, 1, 0)
    assert (steps > 0).all() and float(steps[1] / steps[0]) == pytest.approx(100, rel=0.3) and float(errors[2]) == 0


def test_a_zero_point_lowers_the_error_of_a_skewed_tensor_and_never_raises_it() -> None:
    generator = torch.Generator().manual_seed(0)
    for shift in (-1.0, 0.0, 0.7):
        values = torch.randn(2000, generator=generator) + shift
        for bits in (2, 3, 4):
            lo, hi = signed_range(bits)
            point = lowest_error_zero_point(values, lo, hi)
            assert lo <= point <= hi
            errors = [float(lowest_error_steps(values[None], lo, hi, z)[1]) for z in (point, 0)]
            assert errors[0] <= errors[1]
            assert shift <= 0 or errors[0] < errors[1]  # codes reach further down than up: 0 may suit negative means


def test_a_signed_tensor_learns_its_zero_point_and_an_unsigned_one_keeps_zero() -> None:
    x = torch.linspace(-1, 3, 400)
    signed, unsigned = ElasticActivationQuantizer(3, True), ElasticActivationQuantizer(3, False)
    assert float((signed(x) - x).abs().max().detach()) < 0.5
    unsigned(x.clamp_min(0))
    frozen = signed.frozen(clip=True)
    assert 1 <= frozen.zero_point <= 2 and frozen.hi == 7 and unsigned.frozen(clip=True).zero_point == 0
    assert not hasattr(unsigned, "offset")


@pytest.mark.parametrize("name", ["resnet8", "mobilenetv2"])
def test_every_spec_runs_with_one_set_of_weights(name: str) -> None:
    net = elastic(name, weight_bits=(2, 8), activation_bits=(2, 8))
    x = torch.rand(4, 1, 28, 28)
    specs = [net.uniform(b, g, s) for b in (2, 8) for g in GRANULARITIES for s in SYMMETRIES]
    outputs = [net(x, spec).detach() for spec in specs]
    assert all(torch.isfinite(out).all() for out in outputs)
    assert len({out.numpy().tobytes() for out in outputs}) == len(specs)


def test_the_space_is_the_recipes() -> None:
    net = elastic(weight_bits=(2, 4), activation_bits=(4, 8), symmetry=("symmetric",))
    free = [layer for layer in net.space.layers if len(layer.weight_bits) > 1]
    assert net.space.layers[0].weight_bits == net.space.layers[-1].weight_bits == (8,)
    shared = [layer.layer for layer in free if layer.shares is not None]
    assert shared == [f"stages.{i}.0.shortcut.conv" for i in (1, 2)]  # they read what the block's first one reads
    assert net.space.size == (2 * 2) ** len(free) * 2 ** (len(free) - len(shared))
    assert net.uniform(2)["stages.0.0.first.conv"].activation_bits == 4  # the next width above
    for wrong in ({"width": 3}, {"width": 2, "symmetry": "asymmetric"}):
        with pytest.raises(RecipeError, match="choose from"):
            net.uniform(**wrong)  # type: ignore[arg-type]


def test_projection_keeps_steps_positive_and_offsets_among_the_codes() -> None:
    net = elastic("mobilenetv2", weight_bits=(2, 3), activation_bits=(2, 3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(-100.0)
    net.project()
    for name, parameter in net.named_parameters():
        if "step" in name or name.endswith("bn.weight"):
            assert (parameter > 0).all(), name
        elif name.startswith("weights") and "offset" in name:
            assert parameter.tolist() == [-2, -4]
        elif "offset" in name:
            assert float(parameter.detach()) == 0
