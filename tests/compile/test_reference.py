"""The numpy reference of the integer graph: equal to qdeploy.integer, and to ONNX Runtime but for rounding ties."""

from __future__ import annotations

import numpy as np
import pytest

from qdeploy.compile.read.handlers import read_graph
from qdeploy.compile.reference import Evaluator, exponentials
from qdeploy.export.write import qdq_bytes
from qdeploy.integer import dequantize, run
from qdeploy.qdq import arrays, parse_model
from tests.compile.test_pointwise import images, onnx_runtime
from tests.nets_frozen import random_frozen
from tests.qdq_models import Net


@pytest.mark.parametrize(
    "options",
    [
        {"depthwise": True, "max_pool": True, "width": 6, "size": 9},
        {"groups": 2, "dilation": 2, "width": 6, "size": 7, "bits": 8, "top": 8, "residual": False},
    ],
)
def test_it_is_the_integer_reference_on_frozen_networks(options: dict) -> None:
    net = random_frozen(7, **options)
    model = parse_model(qdq_bytes(net))
    evaluator, codes = Evaluator(read_graph(model), arrays(model)), net.golden[net.input]
    want = run(net, codes)
    for i, image in enumerate(dequantize(codes, net.activations[net.input].quantizer)):
        found = evaluator.codes(image[None])
        np.testing.assert_array_equal(evaluator.output(image[None])[1], want[net.output][i : i + 1])
        for name in set(found) & set(want):
            np.testing.assert_array_equal(found[name], want[name][i])


@pytest.mark.parametrize("activation", [np.uint8, np.int8])
def test_convolutions_and_pools_against_onnx_runtime(activation: type) -> None:
    """Weight zero points, asymmetric padding, strides, dilations, groups, ceil_mode and a bias in its own unit."""
    net = Net((1, 4, 9, 8), activation)
    rng = np.random.default_rng(1)
    s2 = net.store("s2", np.float32(0.21))
    stored = net.store("w", rng.integers(0, 256, (6, 2, 3, 2)).astype(np.uint8))
    zeros = net.store("wz", rng.integers(100, 140, 6).astype(np.uint8))
    w = net.node(
        "DequantizeLinear", stored, net.store("ws", rng.uniform(0.001, 0.01, 6).astype(np.float32)), zeros, axis=0
    )
    b = net.store("b", rng.integers(-99, 99, 6).astype(np.int32))
    b = net.node("DequantizeLinear", b, net.store("bs", np.float32(0.013)))
    conv = {"group": 2, "pads": [2, 0, 1, 1], "strides": [2, 1], "dilations": [1, 2]}
    x = net.q(net.node("Conv", net.q("x"), w, b, **conv), s2)
    x = net.q(net.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1), s2)
    x = net.node("AveragePool", x, kernel_shape=[2, 3], pads=[1, 1, 1, 0], count_include_pad=0)
    weight = net.store("fc", rng.normal(0, 0.3, (7, 72)).astype(np.float32))
    fc = (weight, net.store("fcs", np.float32(0.002)), net.store("fcz", np.int8(5)))
    weight = net.node("DequantizeLinear", net.node("QuantizeLinear", *fc), *fc[1:])
    bias = net.store("fcb", rng.normal(0, 1, 7).astype(np.float32))
    out = net.q(net.node("Gemm", net.node("Flatten", net.q(x)), weight, bias, transB=1), "s2")
    model = net.model(out, 2)
    evaluator = Evaluator(read_graph(model), arrays(model))
    steps = [np.rint((evaluator.output(i)[0] - onnx_runtime(model, i)) / 0.21) for i in images(net.shape)]
    assert np.abs(steps).max() <= 1 and np.count_nonzero(steps) <= 2


def test_exponentials() -> None:
    for scale in (1e-4, 0.0437, 1.0, 17.0):
        want = np.exp(-np.arange(256) * np.float64(np.float32(scale)))
        np.testing.assert_allclose(exponentials(np.float32(scale)), want, rtol=1e-11, atol=1e-300)
    assert exponentials(np.float32(1e9))[1] < 1e-110
