"""Fusion: fewer operators, the same codes, in the graph, in the reference and in every target's kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto

from qdeploy.compile.artifact import load_artifact
from qdeploy.compile.fuse import fuse
from qdeploy.compile.llvm import resolve
from qdeploy.compile.pipeline import compile_model
from qdeploy.compile.read.handlers import read_graph
from qdeploy.compile.reference import Evaluator
from qdeploy.qdq import arrays, canonical_bytes
from qdeploy.target import Target, missing_features, request_tiles
from tests.compile.test_pointwise import images
from tests.qdq_models import Net

CPUS = {
    "amx": ("x86-64-v4", ("avx512vnni", "avx512vbmi", "amx-tile", "amx-int8")),
    "avx512": ("x86-64-v4", ("avx512vnni",)),
    "avx2": ("x86-64-v3", ()),
    "sse2": ("x86-64", ()),
}
Build = Callable[[Net], str]


def grids(net: Net) -> None:
    for i, scale in enumerate((0.173, 0.31, 0.52, 0.2)):
        net.store(f"s{i}", np.float32(scale))
        net.store(f"z{i}", net.initializers["z"].dtype.type(17 * i + 5))


def conv(net: Net, x: str, shape: tuple[int, ...], i: int, **attributes: object) -> str:
    return net.q(net.node("Conv", x, *net.weight(*shape), **attributes), f"s{i}", f"z{i}")


def residual(net: Net) -> str:
    """Sums whose operands have borders of their own; the convolution is their second and their first operand."""
    grids(net)
    c = 17
    x = conv(net, net.q("x"), (c, net.shape[1], 1, 1), 0)
    y = conv(net, x, (c, c, 3, 3), 1, pads=[1, 1, 1, 1])
    x = net.q(net.node("Add", x, y), "s2", "z2")
    y = conv(net, x, (c, c, 1, 1), 3)
    x = net.q(net.node("Relu", net.node("Add", y, x)), "s1", "z1")
    y = conv(net, x, (c, c, 3, 3), 3, pads=[1, 2, 1, 0])
    z = conv(net, x, (c, c, 3, 3), 2, pads=[0, 0, 2, 2])
    return net.q(net.node("Add", y, z), "s0", "z0")


def wide(net: Net) -> str:
    """A sum of as many channels as tiles of matrices take, and its table behind."""
    grids(net)
    x = conv(net, net.q("x"), (96, net.shape[1], 1, 1), 0)
    y = conv(net, x, (96, 96, 1, 1), 1)
    x = net.q(net.node("Add", y, x), "s2", "z2")
    x = net.q(net.node("HardSwish", conv(net, x, (70, 96, 1, 1), 3)), "s1", "z1")
    return conv(net, x, (70, 70, 3, 3), 0, pads=[1, 1, 1, 1])


def chains(net: Net) -> str:
    """hard-swish and SiLU in parts, behind dense and depthwise convolutions; a requantizer and a table of a table."""
    grids(net)
    c = 40
    x = conv(net, net.q("x"), (c, net.shape[1], 3, 3), 0, pads=[1, 1, 1, 1])
    x = net.q(net.node("Mul", x, net.q(net.node("HardSigmoid", x), "s3", "z3")), "s1", "z1")
    x = conv(net, x, (c, 1, 3, 3), 2, group=c, pads=[1, 1, 1, 1])
    x = net.q(net.node("Mul", net.q(net.node("Sigmoid", x), "s0", "z0"), x), "s2", "z2")
    x = conv(net, x, (c, 1, 5, 5), 1, group=c, pads=[2, 2, 2, 2], strides=[2, 2])
    x = net.q(net.q(net.node("LeakyRelu", x), "s2", "z2"), "s3", "z3")
    gate = net.q(net.node("GlobalAveragePool", x))
    gate = net.q(net.node("HardSigmoid", conv(net, gate, (c, c, 1, 1), 0)), "s1", "z1")
    return net.q(net.node("Mul", x, gate), "s0", "z0")


def shared(net: Net) -> str:
    """What more than one operator reads, or is broadcast, stays."""
    grids(net)
    x = conv(net, net.q("x"), (8, net.shape[1], 1, 1), 0)
    y = conv(net, x, (8, 8, 1, 1), 1)
    table = net.q(net.node("HardSwish", y), "s2", "z2")
    bias = conv(net, net.q(net.node("GlobalAveragePool", y), "s1", "z1"), (8, 8, 1, 1), 3)
    return net.q(net.node("Add", net.q(net.node("Add", bias, table), "s1", "z1"), y), "s3", "z3")


NETS: dict[str, tuple[Build, list[str]]] = {
    "residual": (residual, ["quantize", "conv", "conv add", "conv add", "conv", "conv add"]),
    "wide": (wide, ["quantize", "conv", "conv add", "conv table", "conv"]),
    "chains": (
        chains, ["quantize", "conv table", "conv table", "conv table", "mean", "conv table", "mul"],
    ),
    "shared": (shared, ["quantize", "conv", "conv", "table", "mean", "conv", "add", "add"]),
}  # fmt: skip


def model_of(name: str, zero: type = np.uint8) -> tuple[Net, ModelProto]:
    net = Net((1, 5, 9, 11), zero)
    return net, net.model(NETS[name][0](net), opset=14)


@pytest.mark.parametrize("name", NETS)
def test_a_fused_graph_makes_the_same_codes(name: str) -> None:
    net, model = model_of(name)
    graph = read_graph(model)
    fused = fuse(graph, lookup=True)
    kinds = [op.kind if op.then is None else f"{op.kind} {op.then.op.kind}" for op in fused.ops]
    assert kinds == NETS[name][1]
    plain, less = Evaluator(graph, arrays(model)), Evaluator(fused, arrays(model))
    for image in images(net.shape):
        want, got = plain.codes(image), less.codes(image)
        assert len(set(want) & set(got)) >= len(fused.ops)
        for tensor in set(want) & set(got):
            np.testing.assert_array_equal(got[tensor], want[tensor])


def test_without_vector_tables_only_sums_are_fused() -> None:
    fused = fuse(read_graph(model_of("wide")[1]), lookup=False)
    assert [op.then.op.kind for op in fused.ops if op.then is not None] == ["add"]
    assert [op.kind for op in fused.ops].count("table") == 1


def test_a_chain_of_many_tables_is_cut() -> None:
    net = Net((1, 5, 9, 11))
    grids(net)
    x = net.q("x")
    for i in range(20):
        x = net.q(net.node("LeakyRelu", x, alpha=0.9), f"s{i % 4}", f"z{i % 4}")
    graph = read_graph(net.model(x))
    assert [op.kind for op in fuse(graph, lookup=True).ops] == ["quantize", "table", "table", "table"]


@pytest.mark.parametrize(
    ("cpu", "name", "zero"),
    [
        ("amx", "residual", np.int8), ("amx", "wide", np.uint8), ("amx", "chains", np.uint8),
        ("avx512", "residual", np.uint8), ("avx512", "chains", np.uint8), ("avx2", "residual", np.int8),
        ("avx2", "chains", np.uint8), ("avx2", "shared", np.uint8), ("sse2", "residual", np.uint8),
    ],
)  # fmt: skip
def test_kernels_make_the_same_codes(cpu: str, name: str, zero: type, tmp_path: Path) -> None:
    target = Target("test", "x86_64", "llvm", CPUS[cpu][0], CPUS[cpu][1])
    resolved = resolve(target)
    if lacking := missing_features(resolved.features):
        pytest.skip(f"this machine has no {', '.join(lacking)}")
    if resolved.dot.tiles and not request_tiles():
        pytest.skip("the kernel of this machine does not give tiles")
    net, model = model_of(name, zero)
    (tmp_path / "m.onnx").write_bytes(canonical_bytes(model))
    compile_model(tmp_path / "m.onnx", target, tmp_path / "artifact")
    loaded = load_artifact(tmp_path / "artifact")
    packed, evaluator = loaded.prepare(arrays(model)), Evaluator(read_graph(model), arrays(model))
    for image in images(net.shape):
        np.testing.assert_array_equal(loaded.codes(image, packed), evaluator.output(image)[1])
