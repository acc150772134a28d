"""Every operator that is no convolution: codes equal the reference, and ONNX Runtime's where it rounds alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto

from qdeploy.compile.artifact import load_artifact
from qdeploy.compile.pipeline import compile_model
from qdeploy.compile.read.handlers import read_graph
from qdeploy.compile.reference import Evaluator
from qdeploy.errors import CompileError, DeviceError
from qdeploy.export.parity import EXACT_PRODUCTS
from qdeploy.qdq import arrays, canonical_bytes
from qdeploy.target import Target, load_target
from tests.qdq_models import Net, mobile_net, quantized

PORTABLE = load_target(Path(__file__).parents[2] / "targets" / "x86-64.toml")
HOST = Target("host", "x86_64", "llvm", "host")
S = np.float32(0.1)


def onnx_runtime(model: ModelProto, x: np.ndarray, fused: bool = False) -> np.ndarray:
    """Node by node as the file says, or as a stock session with its `fused` integer operators."""
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if fused else levels.ORT_DISABLE_ALL
    options.add_session_config_entry(*EXACT_PRODUCTS)
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def images(shape: tuple[int, ...], scale: float = 0.1, zero: int = 3) -> list[np.ndarray]:
    """Every code in order, noise, extremes and ties between two codes."""
    rng = np.random.default_rng(0)
    codes = (np.arange(np.prod(shape)) % 256).reshape(shape)
    ties = rng.integers(0, 255, shape) + 0.5
    steps = [codes, rng.normal(100, 90, shape), np.full(shape, 1e6), np.full(shape, -1e6), ties]
    return [((s - zero) * np.float64(scale)).astype(np.float32) for s in steps]


def differing(
    net: Net, output: str, folder: Path, rank: int = 4, opset: int = 13, target: Target = PORTABLE, fused: bool = False
) -> int:
    """Codes that differ from ONNX Runtime's, by one step at most, over `images`; none may differ from the reference."""
    return compared(net.model(output, rank, opset), images(net.shape), folder, target, fused)


def compared(model: ModelProto, inputs: list[np.ndarray], folder: Path, target: Target, fused: bool = False) -> int:
    (folder / "m.onnx").write_bytes(canonical_bytes(model))
    compile_model(folder / "m.onnx", target, folder / "artifact", force=True)
    loaded = load_artifact(folder / "artifact")
    packed, evaluator = loaded.prepare(arrays(model)), Evaluator(read_graph(model), arrays(model))
    scale = arrays(model)[evaluator.graph.output.grid.scale]
    count = 0
    for image in inputs:
        want, codes = evaluator.output(image)
        np.testing.assert_array_equal(loaded.codes(image, packed), codes)
        got = loaded.run(image, packed)
        np.testing.assert_array_equal(got, want)
        step = np.rint((got - onnx_runtime(model, image, fused)) / scale)
        assert np.abs(step).max() <= 1
        count += int(np.count_nonzero(step))
    return count


def chain(*operators: tuple[str, dict]) -> Callable[[Net, str], str]:
    def make(net: Net, x: str) -> str:
        for op, attributes in operators:
            x = net.node(op, x, **attributes)
        return x

    return make


def _silu(net: Net, x: str) -> str:
    return net.node("Mul", x, net.node("Sigmoid", x))


def _decomposed_silu(net: Net, x: str) -> str:
    one = net.store("one", np.float32(1))
    return net.node("Div", x, net.node("Add", net.node("Exp", net.node("Neg", x)), one))


def _decomposed_gelu(net: Net, x: str) -> str:
    root, half, one = (net.store(f"c{v}", np.float32(v)) for v in (2**0.5, 0.5, 1))
    erf = net.node("Add", net.node("Erf", net.node("Div", x, root)), one)
    return net.node("Mul", net.node("Mul", x, erf), half)


def _decomposed_hard_swish(net: Net, x: str) -> str:
    zero, three, six = (net.store(f"c{v}", np.float32(v)) for v in (0, 3, 6))
    relu6 = net.node("Clip", net.node("Add", x, three), zero, six)
    return net.node("Div", net.node("Mul", x, relu6), six)


def _polynomial(net: Net, x: str) -> str:
    two, three = (net.store(f"c{v}", np.float32(v)) for v in (2, 3))
    high = net.node("Min", net.node("Sub", three, x), net.store("top", np.float32(2.5)))
    return net.node("Max", net.node("Pow", high, two), net.node("PRelu", x, net.store("slope", np.float32([0.3]))))


CHAINS: dict[str, Callable[[Net, str], str]] = {
    "hard_swish": chain(("HardSwish", {})),
    "hard_sigmoid": chain(("HardSigmoid", {"alpha": 1 / 6})),
    "leaky": chain(("LeakyRelu", {"alpha": 0.1})),
    "negative": chain(("Neg", {}), ("Abs", {}), ("Relu", {}), ("LeakyRelu", {"alpha": -0.5})),
    "decomposed_hard_swish": _decomposed_hard_swish,
    "polynomial": _polynomial,
    "silu": _silu,
    "decomposed_silu": _decomposed_silu,
    "gelu": _decomposed_gelu,
    "tanh": chain(("Tanh", {}), ("Sigmoid", {})),
    "mish": chain(("Softplus", {}), ("Elu", {"alpha": 0.7})),
}


@pytest.mark.parametrize("activation", [np.uint8, np.int8])
def test_every_chain_is_one_table(activation: type, tmp_path: Path) -> None:
    """All chains side by side: each reads all 256 codes of its own grid."""
    net = Net((1, 4, 8, 8), activation)
    x = net.q("x", net.store("s1", np.float32(0.0437)), net.store("z1", activation(101)))
    s2, z2 = net.store("s2", np.float32(0.0317)), net.store("z2", activation(21))
    parts = [net.q(make(net, x), s2, z2) for make in CHAINS.values()]
    out = net.q(net.node("Concat", *parts, axis=1), s2, z2)
    graph = read_graph(net.model(out, opset=14))
    assert [op.kind for op in graph.ops] == ["quantize", *["table"] * len(CHAINS), "concat"]
    made = [op.table is not None for op in graph.ops if op.kind == "table"]
    assert made == [name in ("silu", "decomposed_silu", "gelu", "tanh", "mish") for name in CHAINS]
    assert differing(net, out, tmp_path, opset=14) <= 2


def test_a_table_of_a_function_belongs_to_its_input_grid(tmp_path: Path) -> None:
    net = Net((1, 4, 8, 8))
    out = net.q(net.node("Sigmoid", net.q("x", net.store("s_x", S))), net.store("s2", np.float32(1 / 256)))
    assert differing(net, out, tmp_path) == 0
    loaded, params = load_artifact(tmp_path / "artifact"), arrays(net.model(out))
    moved = params | {"s2": np.float32(1 / 128)}  # the output's grid is an argument like all others
    x = images(net.shape)[0]
    want = Evaluator(read_graph(net.model(out)), moved).output(x)[1]
    np.testing.assert_array_equal(loaded.codes(x, loaded.prepare(moved)), want)
    for other in ({"s_x": np.float32(0.2)}, {"z": np.uint8(4)}):
        with pytest.raises(DeviceError, match="the table of sigmoid3 is for other values of s_x and its zero point"):
            loaded.prepare(params | other)
        with pytest.raises(CompileError, match="the table of sigmoid3"):
            Evaluator(read_graph(net.model(out)), params | other).output(x)


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul"])
def test_every_pair_of_codes(op: str, tmp_path: Path) -> None:
    """A column and a row of all codes, broadcast; steps in whole ratios, so that many sums are ties."""
    net = Net((1, 1, 256, 256))
    for name, scale in (("s1", 0.1), ("s3", 0.3), ("s2", 0.2)):
        net.store(name, np.float32(scale))
    x = net.q("x", "s1")
    row = net.node("Pad", x, net.store("row", np.array([0, 0, 0, 0, 0, 0, -255, 0])))
    column = net.node("Pad", net.q("x", "s3"), net.store("column", np.array([0, 0, 0, 0, 0, 0, 0, -255])))
    out = net.q(net.node(op, net.q(row, "s1"), net.q(column, "s3")), "s2")
    shape = read_graph(net.model(out)).output_shape
    assert shape == (1, 1, 256, 256)
    assert differing(net, out, tmp_path, fused=True) == 0


def test_squeeze_and_excite_and_other_broadcasts(tmp_path: Path) -> None:
    """[C, 1, 1], [1, H, W], [1, 1, 1] and stored tensors against [C, H, W]; several operators without Q between."""
    for channels, target in ((19, PORTABLE), (35, HOST)):
        net = Net((1, channels, 6, 5))
        x, rng = net.q("x"), np.random.default_rng(channels)
        gate = net.q(net.node("GlobalAveragePool", x))
        gate = net.q(net.node("HardSigmoid", net.q(net.node("Conv", gate, *net.weight(channels, channels, 1, 1)))))
        plane = net.q(net.node("Conv", x, *net.weight(1, channels, 1, 1)))
        stored = net.store("c", rng.integers(-128, 128, (channels, 1, 1)).astype(np.int8))
        stored = net.node("DequantizeLinear", stored, net.store("cs", np.float32(0.02)), net.store("cz", np.int8(7)))
        y = net.q(net.node("Mul", gate, x))
        y = net.q(net.node("Add", plane, net.node("Mul", stored, y)))
        one = net.node(
            "DequantizeLinear", net.store("u", np.uint8([77])), net.store("us", S), net.store("uz", np.uint8(9))
        )
        out = net.q(net.node("Max", net.node("Relu", net.node("Sub", y, one)), x, plane))
        graph = read_graph(net.model(out))
        assert [op.kind for op in graph.ops if op.kind in ("mul", "elementwise", "constant")] == [
            "mul", "constant", "elementwise", "constant", "elementwise",
        ]  # fmt: skip
        assert differing(net, out, tmp_path, target=target, fused=True) <= 3


def test_concat_pad_and_resize(tmp_path: Path) -> None:
    net = Net((1, 5, 7, 6))
    net.store("s2", np.float32(0.0437))
    x = net.q("x")
    pads = net.store("pads", np.array([0, 0, 1, 2, 0, 0, 3, -1]))
    padded = net.node("Pad", net.q("x", "s2"), pads)
    a = net.q(net.node("Conv", x, *net.weight(8, 5, 3, 3), pads=[3, 1, 3, 2]))
    y = net.q(net.node("Concat", padded, a, padded, axis=1))
    y = net.q(net.node("Conv", y, *net.weight(4, 18, 3, 3), pads=[1, 1, 1, 1]))
    scales = net.store("scales", np.array([1, 1, 2, 3], np.float32))
    up = net.node(
        "Resize", y, "", scales, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    )
    out = net.q(net.node("Concat", net.q(up), up, axis=-3))
    assert differing(net, out, tmp_path) <= 3


def test_resize_with_half_pixels_and_sizes(tmp_path: Path) -> None:
    net = Net((1, 3, 4, 4))
    sizes = net.store("sizes", np.array([1, 3, 16, 8]))
    out = net.q(net.node("Resize", net.q("x"), "", "", sizes, mode="nearest"))
    assert differing(net, out, tmp_path) == 0


def test_renamed_axes_cost_nothing(tmp_path: Path) -> None:
    net = Net((1, 6, 4, 4))
    net.store("s2", np.float32(0.2))
    x = net.q(net.node("GlobalMaxPool", net.q("x")))
    x = net.q(net.node("Squeeze", x, net.store("hw", np.array([2, 3]))))
    x = net.q(net.node("Gemm", x, *net.weight(6, 6, axis=1)))
    x = net.node("Unsqueeze", x, net.store("there", np.array([-1, 2])))
    x = net.node("Reshape", net.q(x), net.store("back", np.array([0, 6, -1, 1])))
    out = net.q(net.node("Mul", x, net.q("x", "s2")))
    assert [op.kind for op in read_graph(net.model(out)).ops] == [
        "quantize", "max_pool", "conv", "quantize", "mul",
    ]  # fmt: skip
    assert differing(net, out, tmp_path) <= 1


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_softmax_quantized_and_as_the_output(scale: float, tmp_path: Path) -> None:
    net = Net((1, 10))
    x = net.q("x", net.store("s3", np.float32(scale)))
    quantized = net.q(net.node("Softmax", x, axis=1), net.store("s2", np.float32(1 / 256)))
    assert differing(net, quantized, tmp_path, 2) == 0
    net.nodes = net.nodes[:3]
    model = net.model(net.nodes[-1].output[0], 2)
    (tmp_path / "m.onnx").write_bytes(canonical_bytes(model))
    compile_model(tmp_path / "m.onnx", PORTABLE, tmp_path / "artifact", force=True)
    loaded = load_artifact(tmp_path / "artifact")
    packed, evaluator = loaded.prepare(arrays(model)), Evaluator(read_graph(model), arrays(model))
    for image in images(net.shape):
        want, codes = evaluator.output(image)
        np.testing.assert_array_equal(loaded.run(image, packed), want)
        np.testing.assert_array_equal(loaded.codes(image, packed), codes)
        np.testing.assert_allclose(want, onnx_runtime(model, image), rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize(("large", "opset", "signed"), [(False, 13, False), (True, 13, True), (True, 17, False)])
def test_mobile_networks_of_other_tools(large: bool, opset: int, signed: bool, tmp_path: Path) -> None:
    """torch's exporter and onnxruntime's quantizer; opset 13 spells hard-swish as HardSigmoid and Mul."""
    model = quantized(mobile_net(large), tmp_path, opset, signed)
    kinds = [op.kind for op in read_graph(model).ops]
    assert kinds.count("conv") == (19 if large else 13)
    assert (kinds.count("table"), kinds.count("mul")) == {13: (12, 12), 17: (12, 3)}[opset] if large else (0, 0)
    rng = np.random.default_rng(1)
    inputs = [rng.normal(0, 1, (1, 3, 20, 20)).astype(np.float32) for _ in range(6)]
    assert compared(model, [*inputs, np.full((1, 3, 20, 20), 9, np.float32)], tmp_path, HOST, fused=True) == 0
