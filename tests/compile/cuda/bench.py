"""Kernels by themselves: every launch of a small network, run by emulated kernels on arrays that numpy packed."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto

from qdeploy.compile.cuda import spec as spec_module
from qdeploy.compile.cuda.launch import NOTHING, Launch
from qdeploy.compile.cuda.library import device_source
from qdeploy.compile.cuda.lower import CudaLowering
from qdeploy.compile.cuda.spec import GPUS, TILES, CudaConv, Tile, tiles
from qdeploy.compile.fuse import fuse
from qdeploy.compile.graph import Graph, Op
from qdeploy.compile.llvm import Dot
from qdeploy.compile.program import Place
from qdeploy.compile.read.handlers import read_graph
from qdeploy.compile.reference import SHIFT, Evaluator, exponentials
from qdeploy.qdq import arrays
from tests.compile.cuda.emulate import HERE, compiled

HOST = Dot("pmaddwd", 4, 16)
SLACK = 64  # bytes behind constants
PLAIN = {
    "quantize": "EdgeArgs", "dequantize": "EdgeArgs", "own_codes": "EdgeArgs", "copy_words": "CopyArgs",
    "max_pool": "PoolArgs", "average_pool": "PoolArgs", "mean": "PoolArgs", "softmax": "SoftmaxArgs",
    "move": "MoveArgs", "shuffle": "ShuffleArgs", "look_up": "TableArgs", "concat_part": "PartArgs",
    "conv_depthwise": "ConvArgs", "conv_grouped": "ConvArgs",
}  # fmt: skip


def entries(arch: str) -> list[str]:
    """Every kernel that is not written for one network; but for sm_75 only those that differ there, and the edges."""
    found = [f"KERNEL({name}, {args}, 256, kernels::{name})" for name, args in PLAIN.items()]
    found += [f"KERNEL(conv_gemv_{n}, ConvArgs, 128, kernels::conv_gemv<{n}>)" for n in (4, 16)]
    found += [f"KERNEL({n}, ElementArgs<2>, 128, kernels::elementwise<2, {n.capitalize()}>)" for n in ("add", "mul")]
    if arch != "sm_75":
        found = [entry for entry in found if "quantize" in entry]
    for n in (4, 16):
        for tile in tiles(n) if arch == "sm_75" else (TILES[0], TILES[-1]):
            shape = f"{tile.rows}, {tile.columns}, {tile.slices}"
            name = f"conv_gemm_{tile.pixels}x{tile.channels}_{n}"
            found.append(f"KERNEL({name}, ConvArgs, {tile.threads}, kernels::conv_gemm<{shape}, {n}>)")
    return found


@functools.cache
def kernels(arch: str, texts: tuple[str, ...]) -> ctypes.CDLL:
    """Emulated kernels for an architecture."""
    number = arch.removeprefix("sm_")
    ptx = f"#define __CUDA_ARCH__ {number}0\n" + Path(HERE, "ptx.cuh").read_text()
    return ctypes.CDLL(str(compiled(device_source(texts, ptx), "bench")))


class Bench(CudaLowering):
    """One network on arrays; `values`: the file's initializers."""

    def __init__(self, graph: Graph, values: Mapping[str, np.ndarray], arch: str) -> None:
        super().__init__(fuse(graph, True), HOST, GPUS[arch])
        self.arch, self.evaluator = arch, Evaluator(self.graph, values)
        self.kept: list[np.ndarray] = []
        for quantizer in self._quantizers():
            grid = self.evaluator.grid(quantizer)
            row = np.array([grid.scale, grid.zero_point, grid.low, grid.high], np.float32)
            self.packed[quantizer] = (self.place(row),)
        for op in self.graph.ops:
            self.pack(op)
        if self.graph.softmax and not isinstance(self.graph.output, str):
            self.packed["softmax"] = (self.place(exponentials(self.evaluator.grid(self.graph.output.grid).scale)),)

    def place(self, array: np.ndarray) -> Place:
        """Where an array lies, as an absolute address."""
        self.kept.append(np.ascontiguousarray(array))
        return Place("packed", self.kept[-1].ctypes.data)

    def pack(self, op: Op) -> None:
        """What an operator reads beside codes and quantizers."""
        codes = np.arange(256, dtype=np.uint8)
        if op.weights is not None:
            self.packed[op.own] = tuple(self.place(part) for part in self.weights(op))
        table = op if op.then is None else op.then.op
        if table.kind == "table":
            found = self.evaluator._elementwise(table, [codes.reshape(256, 1, 1)])
            self.packed[op.output] = (self.place(found.reshape(256).astype(np.uint8)),)
            if op.then is not None:  # the convolution's own stand under the tensor before the table
                assert op.own != op.output
        elif op.kind == "softmax":
            self.packed[op.output] = (self.place(exponentials(self.evaluator.grid(op.inputs[0].grid).scale)),)
        elif op.kind == "constant":
            stored = self.evaluator._constant(op, []).transpose(1, 2, 0).reshape(-1)
            self.packed[op.output] = (self.place(np.concatenate([stored, np.zeros(SLACK, np.uint8)])),)

    def weights(self, op: Op) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weights, integers and scales as device/conv.cuh reads them."""
        spec, evaluator, w = self._conv_spec(op), self.evaluator, op.weights
        assert w is not None
        centred, scale = evaluator._weight(w)
        zeros = evaluator.params[w.zero_point].astype(np.int64).reshape(-1) if w.zero_point is not None else np.zeros(1)
        zeros = np.broadcast_to(zeros, w.channels).astype(np.int64)
        codes = centred + zeros.reshape(-1, *[1] * (centred.ndim - 1))
        offset = 0 if w.signed else SHIFT
        codes, zeros = (codes - offset).reshape(w.channels, -1, spec.segments), zeros - offset
        x, y = evaluator.grid(op.inputs[0].grid), evaluator.grid(self.graph.tensors[op.own].quantizer)
        unit = x.scale * scale
        integers = np.zeros(2 * spec.padded + 1, np.int32)
        sums = centred.reshape(w.channels, -1).sum(1)
        integers[: w.channels] = evaluator._bias(w, unit) - x.zero_point * sums
        integers[spec.padded : spec.padded + w.channels] = zeros
        integers[-1] = zeros.any()
        scales = np.zeros(spec.padded, np.float32)
        scales[: w.channels] = np.minimum(unit / y.scale, np.float32(512))
        return self.arranged(spec, codes).astype(np.int8), integers, scales

    @staticmethod
    def arranged(spec: CudaConv, codes: np.ndarray) -> np.ndarray:
        """[output, input, tap] -> the order of kernels."""
        if spec.depthwise:
            codes = np.pad(codes[:, 0], ((0, -len(codes) % 4), (0, 0)))
            return codes.reshape(-1, 4, codes.shape[1]).transpose(0, 2, 1)
        return np.pad(codes.transpose(0, 2, 1), ((0, 0), (0, 0), (0, spec.tap_bytes - spec.inputs)))

    def run(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """Codes of every tensor, [image, C, H, W], and the output as "out"."""
        ops = [op for op in self.graph.ops if op.kind != "constant"]
        calls = [call for op in ops for call in self._calls(op)] + [self._way_out()]
        rng = np.random.default_rng(0)
        values = {name: rng.integers(0, 256, size + 8).astype(np.uint8) for name, size in self._sizes(ops).items()}
        out = np.full(self.graph.output_shape, np.nan, np.float32)
        x = np.ascontiguousarray(x, np.float32)
        areas = {"input": x.ctypes.data, "output": out.ctypes.data}
        common = entries(self.arch)
        own = set(self.entries) - {entry.split("(")[1].split(",")[0] for entry in common}
        library = kernels(self.arch, tuple(self.entries.values() if own else common))
        for call in calls:
            assert isinstance(call, Launch)
            blob = bytearray(call.blob)
            for i, place in enumerate(call.args):
                if place != NOTHING:
                    at = areas.get(place.area, place.at)
                    if place.area == "values":
                        at = values[str(place.at)].ctypes.data
                    blob[8 * i : 8 * i + 8] = int(at).to_bytes(8, "little")
            assert library[call.kernel](bytes(blob), (ctypes.c_uint * 3)(*call.grid), call.block) == 0
        return {op.output: self.planes(op.output, values[op.output]) for op in ops if op.output in self.layouts} | {
            "out": out
        }

    def planes(self, tensor: str, data: np.ndarray) -> np.ndarray:
        """A buffer of codes -> [image, C, H, W]."""
        layout, pitch = self.layouts[tensor], self._pitch(tensor)
        shape = (self.batch, layout.height, layout.width, pitch)
        return data[: np.prod(shape)].reshape(shape)[..., : layout.channels].transpose(0, 3, 1, 2)


def check(model: ModelProto, x: np.ndarray, arch: str = "sm_75", tile: Tile | None = None) -> Bench:
    """Compare every code of every tensor, and the output, with the reference; `tile`: of all matrix products."""
    values = arrays(model)
    with pytest.MonkeyPatch.context() as patch:
        if tile is not None:
            patch.setattr(spec_module, "best_tile", lambda *args: tile if tile in tiles(args[-1]) else TILES[0])
        bench = Bench(read_graph(model, None), values, arch)
        got = bench.run(x)
    for i, image in enumerate(np.split(x, bench.batch)):
        want = bench.evaluator.codes(image)
        for op in bench.graph.ops:
            if op.output in got:
                assert np.array_equal(got[op.output][i], want[op.output]), f"{op.kind} {op.output}, image {i}"
    assert np.array_equal(got["out"], bench.evaluator.output(x)[0])
    return bench
