"""The integer reference against plain loops, and against ONNX Runtime's integer operators."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from qdeploy.compile.graph import swapped
from qdeploy.export.parity import EXACT_PRODUCTS
from qdeploy.frozen import FrozenNet, Node, Quantizer, Tensor, WeightBits
from qdeploy.integer import (
    accumulate,
    added,
    conv_accumulate,
    dequantize,
    fma,
    logits,
    multiplied,
    quantize,
    requantize,
    run,
    run_node,
)
from qdeploy.space import SubnetSpec
from tests.nets_frozen import ladder_of, random_frozen

F = np.float32
scales = st.floats(2.0**-13, 4.0, width=32)
codes8 = st.integers(0, 255)


def one_node(
    op: str, inputs: dict[str, tuple[np.ndarray, Quantizer]], target: Quantizer, **options: object
) -> np.ndarray:
    """Codes that `run_node` gives for a single node; `options` are tensors, relu and attributes."""
    tensors = options.pop("tensors", {})
    node = Node("n", op, tuple(inputs), "y", bool(options.pop("relu", False)), options)
    activations = {name: Tensor(name, codes.shape[1:], q) for name, (codes, q) in inputs.items()}
    activations["y"] = Tensor("y", (), target)
    spec = SubnetSpec.build("one", {"n": (8, 8)})
    parts = (activations, {"n": WeightBits(8, 8, 8)}, tensors, {})
    net = FrozenNet("one", spec, "a", "y", (node,), *parts)  # type: ignore[arg-type]
    return run_node(net, node, {name: codes for name, (codes, _) in inputs.items()})


def runtime(op: str, feeds: dict[str, np.ndarray], constants: list[object], **attributes: object) -> np.ndarray:
    """One ONNX Runtime operator; `constants` follow the order of its inputs, str for a fed one, None for an absent."""
    names, initializers = [], []
    kind_of = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feeds.items()}
    for i, value in enumerate(constants):
        names.append(value if isinstance(value, str) else "" if value is None else f"c{i}")
        if isinstance(value, np.ndarray):
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            initializers.append(helper.make_tensor(f"c{i}", kind, value.shape, value.tobytes(), raw=True))
    domain = "" if op == "QLinearConv" else "com.microsoft"
    graph = helper.make_graph(
        [helper.make_node(op, names, ["y"], domain=domain, **attributes)],
        "g",
        [helper.make_tensor_value_info(name, kind_of[name], array.shape) for name, array in feeds.items()],
        [helper.make_tensor_value_info("y", next(iter(kind_of.values())), None)],
        initializers,
    )
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry(*EXACT_PRODUCTS)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


# The fused multiply-add ----------------------------------------------------------------------------------------------

reals = st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)


def rounded(exact: Fraction) -> np.float32:
    """The float32 nearest to a rational number, ties to even."""
    near = F(float(exact))  # at most one step off
    candidates = [near, np.nextafter(near, F(np.inf)), np.nextafter(near, F(-np.inf))]
    return min(candidates, key=lambda v: (abs(Fraction(float(v)) - exact), int(v.view(np.uint32)) & 1))


@given(reals, reals, reals)
def test_fma_rounds_once(a: float, b: float, c: float) -> None:
    for third in (c, -float(F(a) * F(b))):  # also where the product is cancelled
        exact = Fraction(a) * Fraction(b) + Fraction(third)
        assert fma(F(a), F(b), F(third)) == rounded(exact)


@given(st.integers(0, 2**12), st.integers(-140, -20), st.booleans())
def test_fma_decides_ties_by_what_float64_loses(low: int, exponent: int, negative: bool) -> None:
    """(1 + 2^-12 m)^2 lies in the middle of two float32 numbers for odd m; c is far below float64's last bit."""
    a = F(1 + (2 * low + 1) * 2.0**-12)
    c = F((-1 if negative else 1) * 2.0**exponent)
    assert fma(a, a, c) == rounded(Fraction(float(a)) ** 2 + Fraction(float(c)))


def test_fma_broadcasts() -> None:
    out = fma(np.ones((3, 1), F), F(2), np.arange(4, dtype=F))
    assert out.shape == (3, 4) and out.dtype == F
    np.testing.assert_array_equal(out, np.broadcast_to(np.arange(4) + 2, (3, 4)))


# Against plain loops -------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-(2.0**20), 2.0**20, width=32), min_size=1, max_size=8), scales, codes8, codes8, codes8)
def test_quantize_against_python(values: list[float], scale: float, zero: int, a: int, b: int) -> None:
    q = Quantizer(scale, zero, min(a, b), max(a, b), True)
    got = quantize(np.array(values, F), q)
    for value, code in zip(values, got, strict=True):
        assert code == min(max(round(float(F(value) / F(scale))) + zero, q.lo), q.hi)  # Python rounds half to even


@given(scales, codes8)
def test_codes_survive_dequantize_and_quantize(scale: float, zero: int) -> None:
    q = Quantizer(scale, zero)
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(quantize(dequantize(every, q), q), every)


def naive_conv(x: np.ndarray, w: np.ndarray, a: dict[str, object]) -> np.ndarray:
    """Six loops, Python integers."""
    top, left, bottom, right = a["padding"]  # type: ignore[misc]
    (sh, sw), (dh, dw), groups = a["stride"], a["dilation"], a["groups"]  # type: ignore[misc]
    n, _, height, width = x.shape
    outputs, per_group, kh, kw = w.shape
    oh = (height + top + bottom - (kh - 1) * dh - 1) // sh + 1
    ow = (width + left + right - (kw - 1) * dw - 1) // sw + 1
    out = np.zeros((n, outputs, oh, ow), np.int64)
    for i, o, y, z in np.ndindex(out.shape):
        first = o // (outputs // groups) * per_group  # type: ignore[operator]
        for c, u, v in np.ndindex(per_group, kh, kw):
            row, column = y * sh + u * dh - top, z * sw + v * dw - left
            if 0 <= row < height and 0 <= column < width:
                out[i, o, y, z] += int(x[i, first + c, row, column]) * int(w[o, c, u, v])
    return out


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, dict[str, object]]:
    def pick(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    groups, kh, kw = pick(1, 3), pick(1, 3), pick(1, 3)
    attributes: dict[str, object] = {
        "stride": [pick(1, 3), pick(1, 3)],
        "padding": [pick(0, 2) for _ in range(4)],
        "dilation": [pick(1, 2), pick(1, 2)],
        "groups": groups,
    }
    rng = np.random.default_rng(pick(0, 2**31))
    shape = (pick(1, 2), groups * pick(1, 2), pick(5, 7), pick(5, 7))
    x = rng.integers(-255, 256, shape)
    w = rng.integers(-128, 128, (groups * pick(1, 2), shape[1] // groups, kh, kw)).astype(np.int8)
    return x, w, attributes


@settings(max_examples=25, deadline=None)
@given(convolutions())
def test_convolution_against_loops(case: tuple[np.ndarray, np.ndarray, dict[str, object]]) -> None:
    x, w, attributes = case
    got = conv_accumulate(x, w, Node("n", "conv", ("x",), "y", False, attributes))
    np.testing.assert_array_equal(got, naive_conv(x, w, attributes))


def test_accumulate_is_exact_beyond_float32() -> None:
    x = np.full((1, 9000), 255)
    w = np.full((1, 9000), -127, np.int8)
    x[0, 0] = 254
    assert accumulate(x, w)[0, 0] == -127 * (255 * 9000 - 1)


def test_requantize_rounds_half_to_even_and_clamps() -> None:
    acc = np.array([1, 3, 5, -1, -3, 1000, -1000])
    got = requantize(acc, np.array(0.5, F), Quantizer(1.0, 10, 5, 20, True))
    np.testing.assert_array_equal(got, [10, 12, 12, 10, 8, 20, 5])


def test_relu_raises_the_floor_to_the_zero_point() -> None:
    q = Quantizer(0.5, 100)
    codes = np.arange(256, dtype=np.uint8)[None]
    out = one_node("requantize", {"a": (codes, q)}, q, relu=True)
    np.testing.assert_array_equal(out, np.maximum(codes, 100))


def test_max_pool_ignores_its_padding() -> None:
    q = Quantizer(1.0, 200)
    codes = np.arange(16, dtype=np.uint8).reshape(1, 1, 4, 4)
    out = one_node("max_pool", {"a": (codes, q)}, q, kernel=[3, 3], stride=[2, 2], padding=[1, 1, 1, 1])
    np.testing.assert_array_equal(out[0, 0], [[5, 7], [13, 15]])


def test_logits_do_not_depend_on_the_batch() -> None:
    net = random_frozen(5, blocks=1, width=4, size=6, images=5)
    codes = net.golden[net.input]
    np.testing.assert_array_equal(logits(net, codes, batch=2), logits(net, codes))
    quantizer = net.activations[net.output].quantizer
    np.testing.assert_array_equal(logits(net, codes), dequantize(net.golden[net.output], quantizer))


def test_run_keeps_what_is_asked_for() -> None:
    net = random_frozen(6, blocks=2, width=4, size=8, images=2)
    every = run(net, net.golden[net.input])
    assert set(every) == set(net.activations)
    some = run(net, net.golden[net.input], ["stem.out", net.output])
    assert set(some) == {"stem.out", net.output}
    for name, codes in some.items():
        np.testing.assert_array_equal(codes, every[name])


def test_the_factory_spreads_codes_and_nests() -> None:
    low, high = ladder_of(7, (2, 4), blocks=1, width=8)
    for net in (low, high):
        for name, codes in net.golden.items():
            q = net.activations[name].quantizer
            assert codes.max() - codes.min() >= (q.hi - q.lo) // 2, name
    for name, bits in low.weights.items():
        a, b = low.tensors[f"{name}.weight"], high.tensors[f"{name}.weight"]
        np.testing.assert_array_equal(a >> (bits.container - bits.bits), b >> (bits.container - bits.bits))
        np.testing.assert_array_equal(low.tensors[f"{name}.weight_scale"], high.tensors[f"{name}.weight_scale"])
    assert low.nodes == high.nodes


# Against ONNX Runtime ------------------------------------------------------------------------------------------------


def quantizer(rng: np.random.Generator, scale: float) -> Quantizer:
    return Quantizer(float(F(scale * rng.uniform(0.5, 2))), int(rng.integers(0, 256)))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("limit", [64, 128])
def test_convolution_equals_onnx_runtime(seed: int, limit: int) -> None:
    rng = np.random.default_rng(seed)
    groups, channels = (1, 8) if seed % 2 else (4, 8)
    x = rng.integers(0, 256, (1, channels, 9, 11)).astype(np.uint8)
    w = rng.integers(-limit, limit, (12, channels // groups, 3, 3)).astype(np.int8)
    scale = rng.uniform(0.001, 0.01, 12).astype(F)
    bias = rng.integers(-5000, 5000, 12).astype(np.int32)
    source = quantizer(rng, 0.02)
    target = quantizer(rng, 0.02 * 0.005 * 255 * limit * np.sqrt(w[0].size) / 255)
    attributes = {"stride": [1 + seed % 2, 1], "padding": [1, 0, 2, 1], "dilation": [1, 1 + seed % 2], "groups": groups}
    tensors = {"n.weight": w, "n.weight_scale": scale, "n.bias": bias}
    got = one_node("conv", {"a": (x, source)}, target, tensors=tensors, **attributes)
    sx, zx, sy, zy = _parameters(source, target)
    constants = ["x", sx, zx, w, scale, np.zeros(12, np.int8), sy, zy, bias]
    a = attributes
    wanted = runtime(
        "QLinearConv",
        {"x": x},
        constants,
        strides=a["stride"],
        pads=a["padding"],
        dilations=a["dilation"],
        group=groups,
    )
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("seed", range(6))
def test_linear_equals_onnx_runtime(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (1, 130)).astype(np.uint8)
    w = rng.integers(-64, 64, (20, 130)).astype(np.int8)
    scale = rng.uniform(0.001, 0.01, 20).astype(F)
    bias = rng.integers(-5000, 5000, 20).astype(np.int32)
    source, target = quantizer(rng, 0.02), quantizer(rng, 0.05)
    tensors = {"n.weight": w, "n.weight_scale": scale, "n.bias": bias}
    got = one_node("linear", {"a": (x, source)}, target, tensors=tensors)
    sx, zx, sy, zy = _parameters(source, target)
    wanted = runtime("QGemm", {"x": x}, ["x", sx, zx, w, scale, np.zeros(20, np.int8), bias, sy, zy], transB=1)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("seed", range(8))
def test_global_average_pool_equals_onnx_runtime(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = (1, 2, 4, 7, 8, 14, 3, 5)[seed]
    x = rng.integers(0, 256, (1, 512, size, size)).astype(np.uint8)
    source = quantizer(rng, 0.02)
    target = source if seed % 2 else quantizer(rng, 0.01)  # equal scales give exact ties
    got = one_node("global_average_pool", {"a": (x, source)}, target)
    sx, zx, sy, zy = _parameters(source, target)
    wanted = runtime("QLinearGlobalAveragePool", {"x": x}, ["x", sx, zx, sy, zy])
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("seed", range(4))
def test_add_equals_onnx_runtime_over_all_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (np.ascontiguousarray(v.reshape(1, -1).astype(np.uint8)) for v in np.meshgrid(range(256), range(256)))
    qa, qb, target = quantizer(rng, 0.02), quantizer(rng, 0.02), quantizer(rng, 0.04)
    if seed % 2:  # scales in whole ratios, so that every second sum is a tie
        qa, qb = replace(qa, scale=target.scale / 2), replace(qb, scale=target.scale * 1.5)
    got = one_node("add", {"a": (a, qa), "b": (b, qb)}, target)
    sa, za, sy, zy = _parameters(qa, target)
    sb, zb, _, _ = _parameters(qb, target)
    wanted = runtime("QLinearAdd", {"a": a, "b": b}, ["a", sa, za, "b", sb, zb, sy, zy])
    np.testing.assert_array_equal(got, wanted)


SHAPES = [
    ((1, 61), (1, 61)), ((1, 1), (1, 9)), ((1, 4, 5, 6), (4, 1, 1)), ((4, 1, 1), (1, 4, 5, 6)),
    ((1, 1, 5, 6), (1, 4, 5, 6)), ((1, 4, 5, 1), (1, 4, 5, 6)), ((1, 4, 5, 1), (1, 1, 1, 6)),
    ((1, 4, 1, 1), (1, 1, 1, 1)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("shapes", SHAPES)
def test_sums_and_products_equal_onnx_runtime(dtype: type, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Broadcast, one value, short tails, one operand stored in the file; scales whose ratios give ties."""
    rng = np.random.default_rng(len(shapes[0]))
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    swap = swapped(*((1,) * (4 - len(s)) + s for s in shapes))
    for turn in range(60):
        a, b = (rng.integers(low, high + 1, shape).astype(dtype) for shape in shapes)
        scales = rng.integers(1, 2**8, 3) / F(2**12) if turn % 2 else rng.uniform(0.001, 0.1, 3)
        ga, gb, gy = ((F(scale), int(rng.integers(low, high + 1))) for scale in scales)
        parameters = [part for scale, zero in (ga, gb, gy) for part in (np.array(scale), np.array(zero, dtype))]
        feeds = {"a": a, "b": b} if turn % 3 else {"a": a}
        inputs = ["a", *parameters[:2], "b" if turn % 3 else b, *parameters[2:]]
        for op, real in (
            ("QLinearAdd", added(b, a, gb, ga, gy) if swap else added(a, b, ga, gb, gy)),
            ("QLinearMul", multiplied(a, b, ga, gb, gy)),
        ):
            got = np.clip(np.rint(real), low, high).astype(dtype)
            np.testing.assert_array_equal(got, runtime(op, feeds, inputs))


def _parameters(source: Quantizer, target: Quantizer) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return (
        np.array(source.scale, F), np.array(source.zero_point, np.uint8),
        np.array(target.scale, F), np.array(target.zero_point, np.uint8),
    )  # fmt: skip


@pytest.mark.parametrize("op", ["conv", "linear"])
def test_a_weight_zero_point_is_subtracted_from_every_code(op: str) -> None:
    """Weights with a zero point compute what centred ones do, also where a centred code would not fit int8."""
    net = random_frozen(0, blocks=1, width=4, size=4, images=2)
    node = next(node for node in net.nodes if node.op == op)
    codes, centred = net.golden[node.inputs[0]], net.tensors[f"{node.name}.weight"].astype(np.int64)
    weights = {f"{node.name}.weight": np.clip(centred + 90, -128, 127).astype(np.int8)}
    shifted = replace(net, tensors=net.tensors | weights | {f"{node.name}.weight_zero_point": np.array(90, np.int8)})
    kept = np.clip(centred + 90, -128, 127) - 90
    plain = replace(net, tensors=net.tensors | {f"{node.name}.weight": kept.astype(np.int8)})
    assert kept.min() >= -128
    np.testing.assert_array_equal(
        run_node(shifted, node, {node.inputs[0]: codes}), run_node(plain, node, {node.inputs[0]: codes})
    )
    low = replace(net, tensors=net.tensors | {f"{node.name}.weight_zero_point": np.array(-100, np.int8)})
    source, target = (net.activations[name].quantizer for name in (node.inputs[0], node.output))
    x = codes.astype(np.int64) - source.zero_point
    wide = centred + 100  # up to 227
    acc = conv_accumulate(x, wide, node) if op == "conv" else x @ wide.T
    bias = net.tensors[f"{node.name}.bias"]
    scale = F(source.scale) * net.tensors[f"{node.name}.weight_scale"] / F(target.scale)
    shape = (-1, 1, 1) if op == "conv" else (-1,)
    expected = requantize(acc + bias.reshape(shape), scale.reshape(shape), target)
    expected = np.maximum(expected, target.zero_point) if node.relu else expected
    np.testing.assert_array_equal(run_node(low, node, {node.inputs[0]: codes}), expected)
