import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qdeploy.errors import RecipeError
from qdeploy.nets import build
from qdeploy.ptq.mixquant import error_table
from qdeploy.quant.differentiable import KIB, DifferentiableNet, least_shift
from qdeploy.quant.gradients import GradientScaling
from qdeploy.quant.graph import read_graph
from qdeploy.quant.learned import LearnedActivation, LearnedRange, LearnedWeight
from qdeploy.recipe import DifferentiableQuantization, Schedule

PHASE = Schedule(1, 0.01, 1e-4)
STE = GradientScaling("ste", 5e-3, 1.8)


def learned(name: str = "resnet8", shape: tuple[int, ...] = (1, 28, 28), **changes: Any) -> DifferentiableNet:
    """A network with random weights and ample budgets."""
    torch.manual_seed(0)
    network = build(name, shape[0], 10, 8, 2)
    graph = read_graph(network, torch.zeros(1, *shape))
    fields = {"weight_kib": 100.0, "activation_kib": 100.0, "uniform_phase": PHASE}
    fields |= {} if "allocation" in changes else {"precision_phase": PHASE}
    choice = DifferentiableQuantization("differentiable", **(fields | changes))  # type: ignore[arg-type]
    return DifferentiableNet(network, graph, name, choice, shape)


def scatter(net: DifferentiableNet, seed: int = 0) -> None:
    """Random widths, and ranges of which the codes use a part."""
    torch.manual_seed(seed)
    for entry in net.ranges():
        entry.log_step.data.copy_(entry.log_range.data - torch.rand(entry.log_step.shape) * 5.9 - 1)


# ---- quantizers ------------------------------------------------------------------------------------------------------


def test_weights_start_at_three_deviations_of_each_channel() -> None:
    weight = torch.randn(4, 5000) * torch.tensor([[0.1], [1.0], [2.0], [0.0]]) + 0.01
    quantizer = LearnedWeight(weight, 3, STE)
    ranges = quantizer.log_range.detach().exp2()
    assert ranges[:3].tolist() == pytest.approx([0.31, 3.01, 6.01], rel=0.05) and ranges[3] > 1e-3
    assert quantizer.width.tolist() == [3] * 4 and quantizer.codes().tolist() == [3] * 4


@pytest.mark.parametrize("signed", [True, False])
def test_activations_start_at_a_percentile(signed: bool) -> None:
    quantizer = LearnedActivation(4, signed, 99.0, STE)
    x = torch.arange(-1000.0, 1000.0) if signed else torch.arange(0.0, 1000.0)
    quantizer(x)
    assert float(quantizer.range.log_range.detach().exp2()) == pytest.approx(990, abs=2)
    frozen = quantizer.frozen(clip=True)
    assert (frozen.lo, frozen.zero_point, frozen.hi) == ((1, 8, 15) if signed else (0, 0, 15))


def test_a_move_goes_against_the_gradients_within_the_legal_widths() -> None:
    entry = LearnedRange((3,), signed=True)
    entry.start(torch.ones(3), 4)
    entry.pending.copy_(torch.tensor([[1.0, 0.0, -100.0], [0.0, -1.0, 100.0]]))
    before = entry.log_step.detach().clone(), entry.log_range.detach().clone()
    entry.move(0.1)
    assert (entry.log_step - before[0]).tolist() == pytest.approx([-0.1, 0, 0.5])
    assert (entry.log_range - before[1]).tolist() == pytest.approx([0, 0.1, -0.5], abs=1e-6)
    for _ in range(9):
        entry.pending.copy_(torch.tensor([[1.0, 0.0, 1.0], [-1.0, 0.0, 1.0]]) * 9)
        entry.move(1.0)
    expected = [math.log2(127), math.log2(7) + 0.1, math.log2(7) - 1]
    assert entry.octaves.tolist() == pytest.approx(expected, abs=1e-5) and not entry.pending.any()


def test_one_width_is_kept_while_step_and_range_move() -> None:
    entry = LearnedRange((50,), signed=False)
    entry.start(torch.rand(50) + 0.1, 5)
    for _ in range(200):
        entry.pending.copy_(torch.randn(2, 50))
        entry.keep_width()
        entry.move(0.3)
    assert entry.codes().tolist() == [31] * 50


def test_settling_uses_every_code_of_the_width_and_keeps_the_range() -> None:
    entry = LearnedRange((4,), signed=True)
    entry.start(torch.ones(4), 2)
    entry.log_step.data.copy_(-torch.tensor([1.2, 4.4, 7.0, 100.0]).log2())
    assert entry.width.tolist() == [2, 4, 4, 8] and entry.coarser_width(1.0).tolist() == [2, 3, 4, 7]
    entry.settle(0.0)
    assert entry.codes().tolist() == [1, 7, 7, 127] and entry.log_range.tolist() == [0] * 4


# ---- the network -----------------------------------------------------------------------------------------------------


def test_sizes_are_counted_by_hand() -> None:
    net = learned("tiny", (1, 12, 12))  # conv 1 -> 8 (12 x 12 -> 6 x 6), conv 8 -> 16 (-> 3 x 3), linear 16 -> 10
    weights = 8 * 9 * 8 + 4 * 16 * 72 + 8 * 160
    activations = 8 * 144 + 4 * 8 * 36 + 8 * 16
    expected = {"weights": weights, "activations": activations, "batch norms": 32 * 24, "biases": 32 * 10}
    sizes = net.size_kib()
    assert {name: sizes[name] for name in expected} == {k: round(v / KIB, 3) for k, v in expected.items()}
    assert sizes["all"] == pytest.approx(sum(expected.values()) / KIB, abs=1e-3)
    net.learned(net.learned_layers[0]).log_step.data[:4] += 0.8  # from codes up to 7 to 4.02, and then to 2.84
    net.learned(net.learned_layers[0]).log_step.data[4:6] += 1.3
    assert float(net.weight_bits().detach()) == weights - 2 * 72


def test_the_size_of_a_channel_has_the_gradient_of_its_width() -> None:
    net = learned("tiny", (1, 12, 12))
    net.weight_bits().backward()
    grad = net.learned(net.learned_layers[0]).log_range.grad
    assert grad is not None and grad.tolist() == pytest.approx([72 * 7 / 8] * 16)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.8, 1.0, 1.3])
def test_settling_fills_the_budgets(seed: int, share: float) -> None:
    net = learned()
    scatter(net, seed)
    sizes = net.size_kib()
    object.__setattr__(net.choice, "weight_kib", sizes["weights"] * share)
    object.__setattr__(net.choice, "activation_kib", sizes["activations"] * 2 - share)
    net.settle()
    after = net.size_kib()
    assert 0.94 * share * sizes["weights"] < after["weights"] <= share * sizes["weights"] + 1e-3
    assert sizes["activations"] <= after["activations"] <= 2 * sizes["activations"] - share


def test_settling_leaves_given_widths() -> None:
    net = learned(allocation="uniform", weight_kib=1000.0)
    before = net.size_kib()
    net.settle()
    assert net.size_kib() == before


def test_the_least_shift_is_found() -> None:
    assert least_shift(lambda s: torch.tensor(10.0 - s), 7.5, 0.0) == pytest.approx(2.5, abs=1e-6)
    assert least_shift(lambda s: torch.tensor(10.0 - s), 11, 0.0) == 0
    assert least_shift(lambda s: torch.tensor(10.0 - s), 11, -8.0) == pytest.approx(-1, abs=1e-6)
    assert least_shift(lambda s: torch.tensor(10.0 - s), 30, -8.0) == -8


def test_a_budget_below_the_least_size_is_refused_with_the_least() -> None:
    with pytest.raises(RecipeError, match=r"quantization.weight_kib is 1: the least is 5\.04, with 2 bits"):
        learned(weight_kib=1.0)
    with pytest.raises(RecipeError, match=r"quantization.activation_kib is 0\.5: the least is"):
        learned(activation_kib=0.5)
    assert learned(weight_kib=5.04).size_kib()["weights"] > 5.04  # 4 bits at the start, which are to fall


def test_equal_widths_and_mixquant_use_the_budgets() -> None:
    uniform = learned(allocation="uniform", weight_kib=8.0, activation_kib=6.0)
    assert {e.weight_bits for e in uniform.only.layers[1:-1]} == {3} and uniform.size_kib()["weights"] <= 8
    mixed = learned(allocation="mixquant", weight_kib=8.0, activation_kib=6.0)
    widths = {e.layer: e.weight_bits for e in mixed.only.layers[1:-1]}
    assert mixed.size_kib()["weights"] <= 8 and len(set(widths.values())) > 1
    assert {e.activation_bits for e in mixed.only.layers} == {e.activation_bits for e in uniform.only.layers}
    tensors = {step.name: step.module.weight.detach().numpy() for step in mixed.learned_layers}  # type: ignore[union-attr]
    table = error_table(tensors)
    ratios = {name: table[name][bits - 2] / table[name][-1] for name, bits in widths.items()}
    better = {name: table[name][bits - 3] / table[name][-1] for name, bits in widths.items() if bits > 2}
    assert max(ratios.values()) < min(better.values())  # one multiplier made them all


def test_codes_of_narrow_channels_stand_on_a_coarser_grid() -> None:
    net = learned()
    scatter(net)
    net.settle()
    for step in net.learned_layers:
        found, quantizer = net.layer_codes(step, net.only), net.learned(step)
        widths = quantizer.width.int().tolist()
        assert (
            found.bits.channels == tuple(widths) and found.bits.bits == max(widths) == net.only[step.name].weight_bits
        )
        for codes, width in zip(found.codes, widths, strict=True):
            raw = codes >> (found.bits.container - width)
            assert (raw << (found.bits.container - width) == codes).all() and abs(raw.astype(int)).max() < 2 ** (
                width - 1
            )
        real = found.codes * found.step.reshape(-1, 1, 1, 1)
        assert np.allclose(real, net.weight(step, net.only).detach().numpy(), atol=1e-7)


def test_only_the_learned_spec_is_taken() -> None:
    net = learned()
    net.check_spec(net.only)
    other = learned(start_bits=5).only
    with pytest.raises(RecipeError, match="is not what the run learned"):
        net.check_spec(other)
    with pytest.raises(RecipeError, match="no uniform levels"):
        net.uniform(4)


def test_a_network_of_two_layers_has_no_width_to_learn() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(400, 10))
    choice = DifferentiableQuantization("differentiable", 9.0, 9.0, PHASE, PHASE)
    with pytest.raises(RecipeError, match="no layer but the first and the last"):
        DifferentiableNet(network, read_graph(network), "two", choice, (1, 12, 12))
