"""Hard-swish, hard-sigmoid and products: the reference against float64, and exported files against ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qdeploy import integer
from qdeploy.errors import ModelError
from qdeploy.export import contract
from qdeploy.export.parity import measure
from qdeploy.export.write import qdq_bytes
from qdeploy.frozen import FrozenNet, Node, Quantizer, Tensor, WeightBits
from qdeploy.qdq import parse_model
from qdeploy.space import SubnetSpec
from tests.nets_frozen import Builder, random_images


def gated(seed: int, bits: int = 8) -> FrozenNet:
    """conv, hard-swish, squeeze-excite, conv at `bits` bits, fully connected."""
    rng = np.random.default_rng(seed)
    b = Builder(rng, random_images(seed, 3, (3, 7, 7)))
    x = b.activation("swish", b.layer("stem", "image", (10, 3, 3, 3), 8, 8), "hard_swish")
    y = b.layer("reduce", b.pool("squeeze", x), (4, 10, 1, 1), 8, 8, relu=True, padding=[0, 0, 0, 0])
    y = b.layer("expand", y, (10, 4, 1, 1), 8, 8, padding=[0, 0, 0, 0])
    x = b.mul("scale", x, b.activation("gate", y, "hard_sigmoid"))
    x = b.requantize("low", x, bits) if bits < 8 else x
    x = b.activation("swish2", b.layer("body", x, (12, 10, 3, 3), min(bits, 4), 4), "hard_swish")
    x = b.flatten("flatten", b.pool("pool", x))
    return b.net(b.layer("fc", x, (5, 12), 8, 8)).check()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [8, 3])
def test_exported_codes_are_onnx_runtimes(seed: int, bits: int) -> None:
    net = gated(seed, bits)
    data = qdq_bytes(net)
    found = measure(data, net)
    assert not found.problems() and found.largest_step <= 1
    ops = {node.op_type for node in parse_model(data).graph.node}
    assert {"HardSwish", "HardSigmoid", "Mul"} <= ops
    assert parse_model(data).opset_import[0].version == 14


@pytest.mark.parametrize("op", ["hard_swish", "hard_sigmoid"])
@pytest.mark.parametrize("seed", range(5))
def test_all_codes_of_random_grids_against_float64(op: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    source = Quantizer(float(np.float32(rng.uniform(0.005, 0.08))), int(rng.integers(0, 256)))
    target = Quantizer(float(np.float32(rng.uniform(0.003, 0.05))), int(rng.integers(0, 200)))
    codes = np.arange(256, dtype=np.uint8)[None]
    node = Node("n", op, ("a",), "y")
    activations = {"a": Tensor("a", (256,), source), "y": Tensor("y", (256,), target)}
    parts = (activations, {"n": WeightBits(8, 8, 8)}, {}, {})
    net = FrozenNet("one", SubnetSpec.build("one", {"n": (8, 8)}), "a", "y", (node,), *parts)  # type: ignore[arg-type]
    got = integer.run_node(net, node, {"a": codes})
    x = (codes.astype(np.float64) - source.zero_point) * source.scale
    real = np.clip(x / 6 + 0.5, 0, 1) * (x if op == "hard_swish" else 1)
    exact = real / target.scale + target.zero_point
    tie = np.abs(exact - np.floor(exact) - 0.5) < 1e-3
    expected = np.clip(np.rint(exact), 0, 255)
    assert (got == expected)[~tie].all() and np.abs(got.astype(int) - expected).max() <= 1


def test_what_a_gate_may_not_read() -> None:
    model = parse_model(qdq_bytes(gated(0)))
    for kind in ("HardSwish", "Mul"):
        broken = type(model)()
        broken.CopyFrom(model)
        node = next(n for n in broken.graph.node if n.op_type == kind)
        source = next(n for n in broken.graph.node if node.input[0] in n.output)
        quantize = next(n for n in broken.graph.node if source.input[0] in n.output)
        node.input[0] = quantize.input[0]  # the float value in front of the quantizer
        assert any("must come from a DequantizeLinear" in text for text in contract.breaches(broken))


def test_a_product_needs_two_inputs() -> None:
    net = gated(0)
    nodes = tuple(replace(n, inputs=n.inputs[:1]) if n.op == "mul" else n for n in net.nodes)
    with pytest.raises(ModelError, match="mul with 1 inputs"):
        replace(net, nodes=nodes).check()
