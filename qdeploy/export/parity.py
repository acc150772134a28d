"""The parity gate: golden integer codes of a FrozenNet against ONNX Runtime, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from qdeploy.errors import DeviceError, ModelError
from qdeploy.export.float_graph import INPUT, OUTPUT
from qdeploy.export.insert import codes_name
from qdeploy.frozen import FrozenNet
from qdeploy.integer import dequantize
from qdeploy.qdq import parse_model

MAX_STEP = 1  # a code may differ by one step
MAX_FRACTION = 1e-3  # in at most this part of all codes

# x86 processors without VNNI add pairs of u8 x s8 products in 16 bits, which saturates for 8-bit weights; with this
# setting they do not. Elsewhere it changes nothing.
EXACT_PRODUCTS = ("session.x64quantprecision", "1")

Run = Callable[[dict[str, np.ndarray]], list[np.ndarray]]


@dataclass(frozen=True)
class TensorParity:
    """Codes of one tensor: how many were compared, how many differ, the largest difference in steps."""

    name: str
    codes: int
    differing: int
    largest_step: int


@dataclass(frozen=True)
class Parity:
    """What ONNX Runtime makes of the golden images.

    `unoptimized` and `fused` take every operator by itself: it reads golden codes and its output codes are compared, so
    that a rounding tie is counted once, where it happens (one step in a 2-bit code moves a later 8-bit one by tens).
    `output` is the model as a user runs it, from float image to output, in a stock session.
    """

    unoptimized: tuple[TensorParity, ...]  # graph order; float operators between the quantizers
    fused: tuple[TensorParity, ...]  # graph order; the integer kernels of a stock session
    output: TensorParity
    unexplained: int  # images whose output differs although no fused operator rounds differently on them

    @property
    def codes(self) -> int:
        """Codes compared in the fused run and the output."""
        return sum(t.codes for t in (*self.fused, self.output))

    @property
    def differing(self) -> int:
        """Those of them that differ."""
        return sum(t.differing for t in (*self.fused, self.output))

    @property
    def largest_step(self) -> int:
        """Their largest difference."""
        return max(t.largest_step for t in (*self.fused, self.output))

    def line(self) -> str:
        """One line for people."""
        ties = sum(t.differing for t in self.unoptimized)
        tail = f" (without fused kernels {ties})"
        if not self.differing:
            return f"parity: all {self.codes} codes of {len(self.fused)} tensors equal{tail}"
        first = next(t.name for t in (*self.fused, self.output) if t.differing)
        return (
            f"parity: {self.differing} of {self.codes} codes differ, by at most {self.largest_step}, "
            f"first in {first}; {self.output.differing} of {self.output.codes} outputs{tail}"
        )

    def to_json(self) -> dict[str, Any]:
        """For the sidecar; per tensor [differing, codes, largest step], only those that differ."""

        def row(t: TensorParity) -> list[int]:
            return [t.differing, t.codes, t.largest_step]

        return {
            "tensors": len(self.fused),
            "codes": self.codes,
            "differing": self.differing,
            "largest_step": self.largest_step,
            "output": row(self.output),
            "fused": {t.name: row(t) for t in self.fused if t.differing},
            "unoptimized": {t.name: row(t) for t in self.unoptimized if t.differing},
        }

    def problems(self) -> list[str]:
        """What exceeds the bounds of `parity`."""
        found = []
        for what, run in (("without graph optimizations", self.unoptimized), ("in fused kernels", self.fused)):
            codes, differing = sum(t.codes for t in run), sum(t.differing for t in run)
            step = max(t.largest_step for t in run)
            if step > MAX_STEP or differing > MAX_FRACTION * codes:
                first = next(t for t in run if t.differing)
                found.append(
                    f"{what} {differing} of {codes} codes differ, by up to {step} steps; the first tensor that "
                    f"differs is {first.name} ({first.differing} of {first.codes}, by up to {first.largest_step})"
                )
        if self.unexplained:
            found.append(
                f"in a stock session {self.unexplained} images give another output ({self.output.differing} codes, by "
                f"up to {self.output.largest_step} steps) although every operator agrees on them"
            )
        return found


def stock_session(data: bytes, optimize: bool = True) -> Run:
    """A single-threaded ONNX Runtime CPU session over a model's bytes, as a function of its inputs.

    Its integer products are exact on every processor (`EXACT_PRODUCTS`).

    Raises DeviceError when onnxruntime is missing, ModelError when it refuses the model.
    """
    try:
        import onnxruntime
    except ImportError as e:
        raise DeviceError("the parity gate needs the package onnxruntime: install it beside qdeploy") from e
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry(*EXACT_PRODUCTS)
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime raises a family of its own, without a common base
        raise ModelError(f"ONNX Runtime refuses the model: {str(e).splitlines()[0]}") from e

    def run(feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        return session.run(None, feeds)

    return run


def isolated(data: bytes, net: FrozenNet) -> bytes:
    """The model cut at every activation tensor: `codes_name(T)` + ".in" is an input that T's readers read, and the
    codes that T's maker writes are an output; both in the order of `net.activations`."""
    model = parse_model(data)
    codes = {codes_name(name) for name in net.activations}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in codes:
            node.input[0] += ".in"
    del model.graph.output[:]
    for name, tensor in net.activations.items():
        for values, suffix in ((model.graph.input, ".in"), (model.graph.output, "")):
            value = helper.make_tensor_value_info(codes_name(name) + suffix, TensorProto.UINT8, [1, *tensor.shape])
            values.append(value)
    return model.SerializeToString()


def compare(name: str, got: np.ndarray, wanted: np.ndarray) -> TensorParity:
    """Codes of one tensor, [n, ...]."""
    steps = np.abs(got.astype(np.int64) - wanted.astype(np.int64))
    return TensorParity(name, steps.size, int(np.count_nonzero(steps)), int(steps.max(initial=0)))


def _images_that_differ(got: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """bool [n]"""
    return (got != wanted).reshape(len(wanted), -1).any(1)


def _operators(data: bytes, net: FrozenNet, images: np.ndarray, optimize: bool) -> dict[str, np.ndarray]:
    """Codes of every activation tensor [n, ...], each operator reading golden codes."""
    run = stock_session(isolated(data, net), optimize)
    rows = []
    for i, image in enumerate(images):
        feeds = {f"{codes_name(name)}.in": net.golden[name][i : i + 1] for name in net.activations}
        rows.append(run(feeds | {INPUT: image[None]}))
    return {name: np.concatenate(column) for name, column in zip(net.activations, zip(*rows, strict=True), strict=True)}


def measure(data: bytes, net: FrozenNet) -> Parity:
    """Run the golden images, one by one, without judging the result."""
    images = dequantize(net.golden[net.input], net.activations[net.input].quantizer)
    plain, fused = (_operators(data, net, images, optimize) for optimize in (False, True))
    differs = np.any([_images_that_differ(codes, net.golden[name]) for name, codes in fused.items()], axis=0)
    stock = stock_session(data)
    real = np.concatenate([stock({INPUT: image[None]})[0] for image in images])
    quantizer, wanted = net.activations[net.output].quantizer, net.golden[net.output]
    got = np.rint(real / np.float32(quantizer.scale)) + quantizer.zero_point
    wrong = _images_that_differ(got, wanted)
    return Parity(
        tuple(compare(name, codes, net.golden[name]) for name, codes in plain.items()),
        tuple(compare(name, codes, net.golden[name]) for name, codes in fused.items()),
        compare(OUTPUT, got, wanted),
        int(np.count_nonzero(wrong & ~differs)),
    )


def parity(data: bytes, net: FrozenNet) -> Parity:
    """Compare the codes of model file `data` with the goldens of `net`, and hold them to the bounds.

    Every operator, with and without fused kernels: no code off by more than one step, at most 0.1% of all codes. The
    stock session's output: equal wherever no operator differs. Raises ModelError that names the first tensor at fault.
    """
    if not len(net.golden[net.input]):
        raise ModelError("the frozen network has no golden images: make the subnet again")
    result = measure(data, net)
    if found := result.problems():
        raise ModelError("ONNX Runtime disagrees with the frozen network: " + "; ".join(found))
    return result
