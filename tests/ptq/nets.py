"""Small float networks as exporters write them, with random weights, for the quantizer's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, helper, numpy_helper
from onnx import TensorProto as TP


class FloatNet:
    """A float model by hand: node by node, weights drawn from a seed."""

    def __init__(self, shape: tuple[int | str, ...] = (1, 3, 16, 16), seed: int = 0) -> None:
        self.shape, self.random = shape, np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.arrays: dict[str, np.ndarray] = {}

    def store(self, array: object, dtype: type = np.float32) -> str:
        name = f"p{len(self.arrays)}"
        self.arrays[name] = np.asarray(array, dtype)
        return name

    def node(self, op: str, *inputs: str, outputs: int = 1, **attributes: object) -> str:
        n = len(self.nodes)
        names = [f"v{n}"] if outputs == 1 else [f"v{n}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, f"{op.lower()}{n}", **attributes))
        return names[0]

    def conv(self, x: str, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1,
             bias: bool = True) -> str:  # fmt: skip
        fan = inputs // groups * kernel * kernel
        weight = self.store(self.random.normal(0, (2 / fan) ** 0.5, (outputs, inputs // groups, kernel, kernel)))
        names = [x, weight, *([self.store(self.random.normal(0, 0.1, outputs))] if bias else [])]
        pad = [kernel // 2] * 4
        return self.node("Conv", *names, pads=pad, strides=[stride] * 2, group=groups, kernel_shape=[kernel] * 2)

    def norm(self, x: str, channels: int) -> str:
        r = self.random
        parts = (r.uniform(0.5, 1.5, channels), r.normal(0, 0.2, channels), r.normal(0, 0.2, channels))
        return self.node(
            "BatchNormalization", x, *map(self.store, parts), self.store(r.uniform(0.5, 2, channels)), epsilon=1e-3
        )

    def gemm(self, x: str, inputs: int, outputs: int, **attributes: object) -> str:
        shape = (outputs, inputs) if attributes.get("transB") else (inputs, outputs)
        weight = self.store(self.random.normal(0, inputs**-0.5, shape))
        return self.node("Gemm", x, weight, self.store(self.random.normal(0, 0.1, outputs)), **attributes)

    def model(self, output: str, opset: int = 13, rank: int = 2) -> ModelProto:
        graph = helper.make_graph(
            self.nodes, "g", [helper.make_tensor_value_info("x", TP.FLOAT, self.shape)],
            [helper.make_tensor_value_info(output, TP.FLOAT, [None] * rank)],
            [numpy_helper.from_array(array, name) for name, array in self.arrays.items()],
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)

    def head(self, x: str, channels: int, classes: int = 10) -> str:
        pooled = self.node("Flatten", self.node("GlobalAveragePool", x))
        return self.gemm(pooled, channels, classes, transB=1)


def residual() -> ModelProto:
    """Batch norms, a depthwise convolution, Relu6, a residual sum."""
    net = FloatNet()
    stem = net.node("Relu", net.norm(net.conv("x", 3, 8, stride=2, bias=False), 8))
    zero, six = net.store(0.0), net.store(6.0)
    wide = net.node("Clip", net.norm(net.conv(stem, 8, 16, 1, bias=False), 16), zero, six)
    deep = net.node("Clip", net.norm(net.conv(wide, 16, 16, 3, groups=16, bias=False), 16), zero, six)
    out = net.node("Add", stem, net.norm(net.conv(deep, 16, 8, 1, bias=False), 8))
    return net.model(net.head(out, 8))


def swish() -> ModelProto:
    """HardSwish as an operator and spelled out, SiLU, squeeze-and-excitation."""
    net = FloatNet()
    x = net.node("HardSwish", net.conv("x", 3, 8, stride=2))
    y = net.conv(x, 8, 8)
    spelled = net.node("Clip", net.node("Add", y, net.store(3.0)), net.store(0.0), net.store(6.0))
    x = net.node("Div", net.node("Mul", y, spelled), net.store(6.0))
    y = net.conv(x, 8, 8)
    x = net.node("Mul", y, net.node("Sigmoid", y))
    gate = net.conv(net.node("Relu", net.conv(net.node("GlobalAveragePool", x), 8, 4, 1)), 4, 8, 1)
    x = net.node("Mul", x, net.node("HardSigmoid", gate, alpha=1 / 6))
    return net.model(net.head(x, 8), opset=14)


def branches() -> ModelProto:
    """Concat, pools, Pad, Resize, a transposed convolution, a pre-activation batch norm, Relu with two readers."""
    net = FloatNet()
    x = net.node("Pad", "x", net.store([0, 0, 1, 1, 0, 0, 1, 1], np.int64))
    x = net.node("Relu", net.conv(x, 3, 8, stride=2))
    a = net.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    b = net.node("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = net.node("Concat", a, b, axis=1)
    y = net.conv(net.node("Relu", net.norm(x, 16)), 16, 16)
    x = net.node("Add", x, y)
    up = net.store(net.random.normal(0, 0.2, (16, 8, 2, 2)))
    up = net.node("ConvTranspose", x, up, strides=[2, 2], kernel_shape=[2, 2])
    same = net.node("Resize", net.node("Relu", x), "", net.store([1, 1, 2, 2]),
                    coordinate_transformation_mode="asymmetric", nearest_mode="floor")  # fmt: skip
    x = net.node("Concat", up, same, axis=1)
    return net.model(net.head(net.node("LeakyRelu", x, alpha=0.1), 24))


def sequence() -> ModelProto:
    """A matrix product with a bias over three axes, Gelu spelled out, a normalization that stays in float."""
    net = FloatNet((1, 12, 16))
    weight, bias = net.store(net.random.normal(0, 0.25, (16, 32))), net.store(net.random.normal(0, 0.1, 32))
    x = net.node("Add", bias, net.node("MatMul", "x", weight))
    half = net.node("Mul", x, net.store(0.5))
    x = net.node("Mul", half, net.node("Add", net.node("Erf", net.node("Mul", x, net.store(0.5**0.5))), net.store(1.0)))
    x = net.node("LayerNormalization", x, net.store(np.ones(32)), net.store(np.zeros(32)), axis=-1)
    x = net.node("Flatten", x)
    return net.model(net.node("Softmax", net.gemm(x, 384, 10), axis=1), opset=17)


NETWORKS: dict[str, Callable[[], ModelProto]] = {
    "residual": residual, "swish": swish, "branches": branches, "sequence": sequence,
}  # fmt: skip


def saved(model: ModelProto, folder: Path, name: str = "net.onnx") -> Path:
    """The model as a file."""
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def inputs(shape: tuple[int, ...], count: int = 24, seed: int = 1) -> np.ndarray:
    """Random float32 inputs [count, *shape[1:]]."""
    return np.random.default_rng(seed).normal(0, 1, (count, *shape[1:])).astype(np.float32)
