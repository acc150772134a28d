"""The smallest ladders: one matrix multiplication between Q/DQ pairs, written with onnx alone; and artifact folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from qdeploy.bundle.manifest import Manifest
from qdeploy.bundle.write import write_bundle
from qdeploy.files import canonical_json, sha256
from qdeploy.ladder import read_ladder
from qdeploy.qdq import canonical_bytes, parse_model

TOP = np.random.default_rng(3).integers(-8, 8, (6, 8))  # raw codes of 4 bits


def container(bits: int, top: np.ndarray = TOP) -> np.ndarray:
    """Decision D1 with N = 4, C = 7."""
    middle = 2 ** (6 - bits) - 2**2
    return ((top >> (4 - bits)) * 2 ** (7 - bits) + middle).astype(np.int8)


def model_bytes(
    weight: np.ndarray,
    scale: float = 0.1,
    extra: Mapping[str, np.ndarray] | None = None,
    relu: bool = False,
    second: np.ndarray | None = None,
) -> bytes:
    """Canonical QDQ model x -> Q -> DQ -> MatMul(DQ(weight)) [-> MatMul(DQ(second))] [-> Relu]."""
    arrays = {
        "w.weight": weight,
        "w.weight_scale": np.float32(0.01),
        "x.scale": np.float32(scale),
        "x.zero_point": np.uint8(128),
        **(extra or {}),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "x.scale", "x.zero_point"], ["x.q"], "q"),
        helper.make_node("DequantizeLinear", ["x.q", "x.scale", "x.zero_point"], ["x.dq"], "dq"),
        helper.make_node("DequantizeLinear", ["w.weight", "w.weight_scale"], ["w.dq"], "wdq")
        if weight.dtype == np.int8
        else helper.make_node("DequantizeLinear", ["w.weight", "w.weight_scale", "w.zero"], ["w.dq"], "wdq"),
        helper.make_node("MatMul", ["x.dq", "w.dq"], ["y"], "matmul"),
    ]
    if second is not None:
        arrays["v.weight"] = second
        nodes.append(helper.make_node("DequantizeLinear", ["v.weight", "w.weight_scale"], ["v.dq"], "vdq"))
        nodes.append(helper.make_node("MatMul", ["y", "v.dq"], ["z"], "matmul2"))
    if relu:
        nodes.append(helper.make_node("Relu", [nodes[-1].output[0]], ["r"], "relu"))
    nodes[-1].output[0] = "output"
    if weight.dtype == np.uint8:
        arrays["w.zero"] = np.uint8(128)
    rows, columns = weight.shape[0], (weight if second is None else second).shape[1]
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, rows])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, columns])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return canonical_bytes(model)


def write_levels(folder: Path, bits: tuple[int, ...] = (2, 3, 4), top: np.ndarray = TOP) -> list[Path]:
    """One file a level, called w<bits>.onnx; each level has its own activation scale."""
    paths = []
    for width in bits:
        paths.append(folder / f"w{width}.onnx")
        paths[-1].write_bytes(model_bytes(container(width, top), scale=0.1 * width))
    return paths


def write_artifact(folder: Path, graph: str, target: str = "host", library: bytes = b"\x7fELF" + bytes(40)) -> Path:
    """A folder as `compile` writes it, as far as a bundle reads it."""
    folder.mkdir()
    (folder / "lib.so").write_bytes(library)
    head = {
        "format": "qdeploy-artifact/2",
        "graph": graph,
        "target": {"name": target, "arch": "x86_64", "cpu": "x86-64-v3", "features": ["avx2"]},
        "inputs": [{"name": "input", "dtype": "float32", "shape": [1, 6]}],
        "outputs": [{"name": "output", "dtype": "float32", "shape": [1, 8]}],
        "params": [{"name": "w.weight", "dtype": "int8", "shape": [6, 8]}],
        "variants": [
            {
                "library": "lib.so",
                "target": {"name": target, "features": ["avx2"]},
                "arena_bytes": 64,
                "kernels": [{"operator": "conv", "name": "fc", "arithmetic": "integer"}],
            }
        ],
        "versions": {"tvm": "0"},
        "files": {"lib.so": sha256(library)},
    }
    (folder / "artifact.json").write_bytes(canonical_json(head))
    return folder


def small_tree(folder: Path, write: Callable[..., list[Path]] = write_levels, artifact: bool = True) -> Manifest:
    """A published tree at folder/tree, its ONNX files beside it."""
    ladder = read_ladder(write(folder))
    artifacts = [write_artifact(folder / "artifact", ladder.graph)] if artifact else []
    return write_bundle(ladder, artifacts, folder / "tree")


def weight_of(data: bytes) -> np.ndarray:
    """The weight initializer of a model."""
    (tensor,) = (t for t in parse_model(data).graph.initializer if t.name == "w.weight")
    return numpy_helper.to_array(tensor)
