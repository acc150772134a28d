"""QDQ models as other tools write them, by hand and out of a quantizer, for the compiler's tests."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, helper, numpy_helper
from onnx import TensorProto as TP

from qdeploy.qdq import canonical_bytes, parse_model


class Net:
    """A QDQ model by hand: activations have the quantizer `s`, `z` unless said otherwise."""

    def __init__(self, shape: tuple[int, ...] = (1, 4, 6, 6), zero: type = np.uint8) -> None:
        self.shape, self.nodes, self.count = shape, [], 0
        self.initializers = {"s": np.float32(0.1), "z": zero(3)}

    def store(self, name: str, array: np.ndarray) -> str:
        self.initializers[name] = np.asarray(array)
        return name

    def node(self, op: str, *inputs: str, **attributes: object) -> str:
        self.count += 1
        self.nodes.append(helper.make_node(op, inputs, [f"v{self.count}"], f"{op.lower()}{self.count}", **attributes))
        return f"v{self.count}"

    def q(self, value: str, s: str = "s", z: str = "z") -> str:
        return self.node("DequantizeLinear", self.node("QuantizeLinear", value, s, z), s, z)

    def weight(self, *shape: int, axis: int = 0, bias: bool = True) -> list[str]:
        n = len(self.initializers)
        rng = np.random.default_rng(n)
        channels = shape[axis]
        w = self.store(f"w{n}", rng.integers(-64, 65, shape).astype(np.int8))
        s = self.store(f"ws{n}", rng.uniform(0.01, 0.02, channels).astype(np.float32))
        out = [self.node("DequantizeLinear", w, s, self.store(f"wz{n}", np.zeros(channels, np.int8)), axis=axis)]
        if bias:
            b = self.store(f"b{n}", rng.integers(-99, 99, channels).astype(np.int32))
            bs = self.store(f"bs{n}", np.float32(0.1) * self.initializers[s])
            out.append(self.node("DequantizeLinear", b, bs, axis=0))
        return out

    def model(self, output: str, rank: int | None = 4, opset: int = 13) -> ModelProto:
        graph = helper.make_graph(
            self.nodes, "g", [helper.make_tensor_value_info("x", TP.FLOAT, self.shape)],
            [helper.make_tensor_value_info(output, TP.FLOAT, None if rank is None else [None] * rank)],
            [numpy_helper.from_array(np.asarray(a), name) for name, a in self.initializers.items()],
        )  # fmt: skip
        domains = sorted({node.domain for node in self.nodes} - {""})
        opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        if rank is None:
            model = onnx.shape_inference.infer_shapes(model)
        return parse_model(canonical_bytes(model))


# torch -> onnxruntime.quantization -----------------------------------------------------------------------------------


def mobile_net(large: bool) -> Any:
    """An inverted-residual network with seeded weights: MobileNetV2's Relu6, or V3's hard-swish and squeeze-excite."""
    import torch
    from torch import nn

    activation = nn.Hardswish if large else nn.ReLU6

    class Excite(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.gate = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 8, 1), nn.ReLU(), nn.Conv2d(8, channels, 1),
                nn.Hardsigmoid(),
            )  # fmt: skip

        def forward(self, x: Any) -> Any:
            return x * self.gate(x)

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
            super().__init__()
            wide = inputs * 3
            depthwise = nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide)
            parts = [nn.Conv2d(inputs, wide, 1), activation(), depthwise, activation()]
            self.body = nn.Sequential(*parts, Excite(wide) if large else nn.Identity(), nn.Conv2d(wide, outputs, 1))
            self.residual = stride == 1 and inputs == outputs

        def forward(self, x: Any) -> Any:
            return x + self.body(x) if self.residual else self.body(x)

    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 24), activation(), nn.Dropout(), nn.Linear(24, 10)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), activation(), Block(8, 8, 3, 1), Block(8, 12, 5, 2), Block(12, 12, 5, 1),
        nn.Conv2d(12, 40, 1), activation(), *head,
    ).eval()  # fmt: skip


def quantized(network: Any, folder: Path, opset: int, signed: bool, size: int = 20) -> ModelProto:
    """`network` through torch's exporter and onnxruntime's static quantization, per channel, calibrated on noise."""
    import torch
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Noise(CalibrationDataReader):
        def __init__(self) -> None:
            rng = np.random.default_rng(0)
            images = [rng.normal(0, 1, (1, 3, size, size)).astype(np.float32) for _ in range(4)]
            self.images: Iterator[dict[str, np.ndarray]] = iter([{"x": image} for image in images])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.images, None)

    names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "opset_version": opset}
    kind = QuantType.QInt8 if signed else QuantType.QUInt8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, torch.zeros(1, 3, size, size), str(folder / "f.onnx"), dynamo=False, **names)
        quantize_static(
            str(folder / "f.onnx"), str(folder / "q.onnx"), Noise(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=kind, weight_type=QuantType.QInt8,
        )  # fmt: skip
    return parse_model(canonical_bytes(onnx.load(folder / "q.onnx")))
