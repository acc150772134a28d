import pytest
import torch

from qdeploy.errors import RecipeError
from qdeploy.nets import build
from qdeploy.quant.graph import read_graph
from qdeploy.quant.network import QuantNet, levels
from qdeploy.recipe import Quantization
from qdeploy.space import SubnetSpec


def quantized(name: str = "resnet8", **changes: object) -> QuantNet:
    torch.manual_seed(0)
    network = build(name, 1, 10)
    return QuantNet(network, read_graph(network), name, Quantization(**changes))  # type: ignore[arg-type]


def test_the_residual_stream_has_eight_bits_and_low_readers_share_one_quantizer() -> None:
    net = quantized()
    add = net.placements["add"]
    assert add.stream and add.low and add.low_name == "add.low" and not add.signed
    inner = net.placements["stages.0.0.first.conv"]  # only a convolution of the level's width reads it
    assert inner.low and not inner.stream
    branch = net.placements["stages.0.0.second.conv"]  # into the addition
    assert branch.stream and not branch.low and branch.signed
    assert not net.placements[net.graph.output].low


def test_eight_bit_activations_need_no_second_quantizer() -> None:
    net = quantized(activation_bits=8)
    assert not len(net.lows)
    assert all(entry.activation_bits == 8 for entry in net.uniform(2).layers)


@pytest.mark.parametrize("name", ["resnet8", "mobilenetv2", "tiny"])
def test_every_width_runs_and_differs(name: str) -> None:
    net = quantized(name)
    x = torch.rand(8, 1, 28, 28)
    outputs = [net(x, spec) for spec in levels(net).values()]
    assert all(torch.isfinite(out).all() for out in outputs)
    assert not torch.equal(outputs[0], outputs[1])


def test_widths_own_their_norms_and_steps_and_share_the_weights() -> None:
    net = quantized()
    own = [{id(p) for p in net.own_parameters(w)} for w in (2, 3, 4)]
    shared = {id(p) for p in net.shared_parameters()}
    assert not (own[0] & own[1] | own[1] & own[2] | own[0] & shared)
    used = own[0] | own[1] | own[2] | shared
    unused = [name for name, p in net.named_parameters() if id(p) not in used]
    assert all(name.startswith("network.") for name in unused)  # the float network's batch norms, which were copied


def test_a_spec_outside_the_space_is_refused_by_name() -> None:
    net = quantized()
    bits = {entry.layer: (entry.weight_bits, entry.activation_bits) for entry in net.uniform(3).layers}
    for layer, pair, text in [
        ("stem.conv", (3, 3), "weight_bits of stem.conv is 3: choose from .8."),
        ("stages.0.0.first.conv", (5, 3), "weight_bits of stages.0.0.first.conv is 5"),
        ("stages.1.0.first.conv", (3, 2), "read one tensor"),
    ]:
        with pytest.raises(RecipeError, match=text):
            net.check_spec(SubnetSpec.build("resnet8", bits | {layer: pair}))
    with pytest.raises(RecipeError, match="layers are not the network's"):
        net.check_spec(SubnetSpec.build("resnet8", {"stem.conv": (8, 8)}))


def test_projection_keeps_steps_and_norm_factors_positive() -> None:
    net = quantized()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(-1.0)
    net.project()
    assert all(bool(p > 0) for n, p in net.named_parameters() if n.endswith("step"))
    assert all((p > 0).all() for n, p in net.norms.named_parameters() if n.endswith("weight"))
