"""Every kernel for GPUs, run thread by thread, against the reference: odd shapes, the ends of the ranges, batches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from qdeploy.compile.cuda.spec import TILES
from tests.compile.cuda.bench import check
from tests.compile.test_conv import SHAPES
from tests.compile.test_models import MODELS
from tests.qdq_models import Net

Rng = np.random.Generator
EXTREMES = ("random", "high", "low", "zero points", "steep")


def conv(net: Net, x: str, shape: tuple, extreme: str, rng: Rng) -> str:
    """A convolution of SHAPES, its weights and scales as `extreme` says; not yet quantized."""
    inputs, outputs, groups, _, _, window, _ = shape
    sizes = (outputs, inputs // groups, *window.kernel)
    weight = rng.integers(-128, 128, sizes)
    zeros, scale = np.zeros(outputs, np.int8), rng.uniform(0.01, 0.04, outputs)
    if extreme == "high":
        weight[:] = 127
    elif extreme == "low":
        weight[:] = -128
    elif extreme == "zero points":
        zeros = rng.integers(-128, 128, outputs).astype(np.int8)
    elif extreme == "steep":  # products far outside of int32
        scale = 10 ** rng.uniform(-3, 12, outputs)
    scale = scale.astype(np.float32)
    bias = rng.integers(-3000, 3000, outputs).astype(np.int32)
    w = net.node("DequantizeLinear", net.store("w", weight.astype(np.int8)), net.store("ws", scale),
                 net.store("wz", zeros), axis=0)  # fmt: skip
    b = net.node("DequantizeLinear", net.store("b", bias), net.store("bs", np.float32(0.1) * scale), axis=0)
    return net.node("Conv", x, w, b, group=groups, pads=list(window.padding), strides=list(window.stride),
                    dilations=list(window.dilation))  # fmt: skip


def images(net: Net, rng: Rng, extreme: str) -> np.ndarray:
    """Inputs whose codes are spread over the range, or all at an end of it."""
    if extreme in ("high", "low"):
        return np.full(net.shape, 1e3, np.float32)
    return rng.uniform(-4, 28, net.shape).astype(np.float32)


def conv_net(shape: tuple, extreme: str, batch: int, rng: Rng, kind: type = np.uint8) -> Net:
    """A network of one convolution whose codes are spread over the range."""
    inputs, height, width = shape[0], *shape[3:5]
    depth = inputs // shape[2] * np.prod(shape[5].kernel)
    net = Net((batch, inputs, height, width), kind)
    net.store("sy", np.float32(0.5 * np.sqrt(depth)))
    net.store("zy", kind(100))
    net.last = net.q(conv(net, net.q("x"), shape, extreme, rng), "sy", "zy")  # type: ignore[attr-defined]
    return net


@pytest.mark.parametrize("i", range(len(SHAPES)))
def test_convolutions(i: int) -> None:
    rng = np.random.default_rng(i)
    for k, extreme in enumerate(EXTREMES):
        net = conv_net(SHAPES[i], extreme, 1 + (i + k) % 2, rng, (np.uint8, np.int8)[k % 2])
        check(net.model(net.last), images(net, rng, extreme), tile=TILES[(i + k) % len(TILES)])  # type: ignore[attr-defined]


@pytest.mark.parametrize("tile", [TILES[0], TILES[-1]])
def test_products_of_newer_tensor_cores(tile: object) -> None:
    rng = np.random.default_rng(7)
    for i, extreme in ((2, "zero points"), (8, "random"), (15, "high")):
        net = conv_net(SHAPES[i], extreme, 2, rng)
        check(net.model(net.last), images(net, rng, extreme), "sm_90", tile)  # type: ignore[arg-type, attr-defined]


def hard_swish(net: Net, x: str) -> str:
    return net.q(net.node("HardSwish", x), "s2", "z2")


def added(net: Net, x: str) -> str:
    return net.q(net.node("Add", x, net.q(net.node("Relu", net.q("x")), "s2", "z2")), "s3", "z3")


def adding(net: Net, x: str) -> str:
    return net.q(net.node("Add", net.q(net.node("Relu", net.q("x")), "s2", "z2"), x), "s3", "z3")


@pytest.mark.parametrize("then", [hard_swish, added, adding])
@pytest.mark.parametrize("groups", [1, 8, 24])
@pytest.mark.parametrize("kind", [np.uint8, np.int8])
def test_what_convolutions_do_before_they_store(then: Callable, groups: int, kind: type) -> None:
    rng = np.random.default_rng(groups)
    net = Net((2, 24, 5, 3), kind)
    net.store("s2", np.float32(0.0737))
    net.store("z2", kind(9))
    net.store("s3", np.float32(0.0919))
    net.store("z3", kind(5))
    x = net.q("x")
    y = net.q(net.node("Conv", x, *net.weight(24, 24 // groups, 3, 3), group=groups, pads=[1] * 4), "s2", "z2")
    check(net.model(then(net, y), opset=14), rng.uniform(-4, 16, net.shape).astype(np.float32))


def test_few_pixels() -> None:
    """A fully connected layer's weights are read once, whatever part of a vector their depth ends in."""
    rng = np.random.default_rng(0)
    for inputs, outputs, extreme in ((3, 5, "random"), (70, 33, "zero points"), (1024, 10, "high"), (8, 1, "steep")):
        net = Net((3, inputs, 1, 1))
        net.store("sy", np.float32(0.5 * np.sqrt(inputs)))
        w = rng.integers(-128, 128, (inputs, outputs)).astype(np.int8) if extreme != "high" else np.full(
            (inputs, outputs), 127, np.int8)  # fmt: skip
        zero = rng.integers(-128, 128, outputs).astype(np.int8) * (extreme == "zero points")
        scale = np.full(outputs, 1e7 if extreme == "steep" else 0.03, np.float32)
        names = net.store("w", w), net.store("ws", scale), net.store("wz", zero.astype(np.int8))
        y = net.node("MatMul", net.node("Flatten", net.q("x")), net.node("DequantizeLinear", *names, axis=1))
        check(net.model(net.q(y, "sy"), 2), images(net, rng, extreme))


# Everything else -----------------------------------------------------------------------------------------------------


def pools(net: Net) -> str:
    x = net.q("x")
    a = net.q(net.node("MaxPool", x, kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1], ceil_mode=1))
    b = net.q(net.node("AveragePool", x, kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1], ceil_mode=1), "s2")
    return net.q(net.node("Concat", a, b, a, axis=1), "s3")


def counted(net: Net) -> str:
    pool = {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1}
    return net.q(net.node("AveragePool", net.q("x"), **pool), "s2")


def excited(net: Net) -> str:
    """Squeeze and excite: products with one pixel."""
    x = net.q("x")
    gate = net.q(net.node("Sigmoid", net.q(net.node("GlobalAveragePool", x), "s2")), "s3")
    return net.q(net.node("Mul", net.q(net.node("Relu", x)), gate))


def sums(net: Net) -> str:
    """All broadcasts of a sum, stored operands among them."""
    x, channels = net.q("x"), net.shape[1]
    rng = np.random.default_rng(5)
    for i, shape in enumerate(((1, channels, 1, 1), (1, 1, *net.shape[2:]), (1, 1, 1, 1), (1, *net.shape[1:]))):
        stored = net.store(f"stored{i}", rng.integers(0, 120, shape).astype(net.initializers["z"].dtype))
        other = net.node("DequantizeLinear", stored, "s2", "z")
        x = net.q(net.node("Add", *((x, other) if i % 2 else (other, x))), "s3" if i % 2 else "s")
    return x


def terms(net: Net) -> str:
    """Element-wise operators over several activations."""
    x = net.q("x")
    y = net.q(net.node("Relu", net.q(net.node("MaxPool", x, kernel_shape=[1, 1]), "s2")), "s3")
    z = net.q(net.node("Sub", x, y), "s2")
    z = net.q(net.node("Max", net.node("Mul", z, y), net.node("Div", x, net.store("c", np.float32(1.7)))), "s3")
    return net.q(net.node("Min", z, net.node("Sub", y, x)))


def softmax(net: Net) -> str:
    return net.q(net.node("Softmax", net.q("x"), axis=1), net.store("s4", np.float32(1 / 255)))


def probabilities(net: Net) -> str:
    return net.node("Softmax", net.q("x"), axis=1)


def padded(net: Net) -> str:
    pads = net.store("pads", np.array([0, 0, 1, 2, 0, 0, 0, 3], np.int64))
    scales = net.store("scales", np.array([1, 1, 2, 3], np.float32))
    attributes = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return net.q(net.node("Resize", net.q(net.node("Pad", net.q("x"), pads)), "", scales, **attributes))


OTHERS = {f.__name__: f for f in (pools, counted, excited, sums, terms, softmax, probabilities, padded)}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kind", [np.uint8, np.int8])
def test_other_operators(name: str, kind: type) -> None:
    for channels, height, width, batch in ((5, 7, 6, 1), (20, 4, 5, 3)):
        net = Net((batch, channels, height, width), kind)
        net.store("s2", np.float32(0.0737))
        net.store("s3", np.float32(0.0519))
        rng = np.random.default_rng(channels)
        check(net.model(OTHERS[name](net)), rng.normal(0, 6, net.shape).astype(np.float32))


@pytest.mark.parametrize("name", ["shuffled", "parts", "transposed", "groups", "depth", "permuted", "shapes"])
def test_moves(name: str) -> None:
    net = Net()
    model = net.model(MODELS[name][0](net), None)
    check(model, np.random.default_rng(0).normal(0, 5, net.shape).astype(np.float32))
