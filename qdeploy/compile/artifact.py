"""A compiled artifact on the machine that runs it. Imports numpy and the standard library; tvm when one is loaded.

    artifact = load_artifact(folder)          # checks hashes, format and the cpu, loads lib.so once
    packed = artifact.prepare(params)         # one level's ONNX initializers -> what the kernels read
    logits = artifact.run(image, packed)      # float32 [1, C, H, W] -> float32

Weights and quantization parameters are arguments, so one artifact runs every level of the ladder with its graph
digest: prepare the next level's parameters while the old `packed` still runs, then use the new one.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.errors import CompileError, DeviceError
from qdeploy.files import parse_json, read_bytes, sha256
from qdeploy.target import TILE_FEATURES, missing_features, request_tiles

FORMAT = "qdeploy-artifact/1"
LIBRARY, DESCRIPTION = "lib.so", "artifact.json"
KEYS = {
    "format", "graph", "target", "inputs", "outputs", "params", "arena_bytes", "kernels", "versions", "files",
}  # fmt: skip


@dataclass(frozen=True)
class Param:
    """One argument of `prepare`: an ONNX initializer's name, numpy dtype name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """One level's parameters in the kernels' layout; opaque, immutable, belongs to the artifact that made it."""

    artifact: Artifact = field(repr=False)
    tensors: tuple[Any, ...] = field(repr=False)
    nbytes: int


class Artifact:
    """A loaded artifact. Its methods may be called from several threads; they run one after another."""

    def __init__(self, description: dict[str, Any], machine: Any) -> None:
        self.description = description
        self.graph: str = description["graph"]
        self.arena_bytes: int = description["arena_bytes"]
        self.params = [Param(p["name"], p["dtype"], tuple(p["shape"])) for p in description["params"]]
        self.input_shape = tuple(description["inputs"][0]["shape"])
        self.output_shape = tuple(description["outputs"][0]["shape"])
        self._machine = machine
        self._functions = {name: machine[name] for name in ("prepare", "main", "codes")}
        self._lock = threading.Lock()  # the VM keeps its registers and its arena in one frame

    def prepare(self, params: Mapping[str, np.ndarray]) -> Packed:
        """Pack one level. `params`: ONNX initializer name -> array; names that no kernel reads are ignored.

        Raises DeviceError that names the first parameter which is missing or has another dtype or shape.
        """
        import tvm

        tensors = [tvm.runtime.tensor(self._checked(param, params)) for param in self.params]
        packed = self._guarded("prepare", *tensors)
        parts = tuple(packed[i] for i in range(len(packed)))
        return Packed(self, parts, sum(part.numpy().nbytes for part in parts))

    def run(self, x: np.ndarray, packed: Packed) -> np.ndarray:
        """One inference: float32 `input_shape` -> float32 `output_shape`. Raises DeviceError for another shape."""
        return self._call("main", x, packed)

    def codes(self, x: np.ndarray, packed: Packed) -> np.ndarray:
        """As `run`, but the integer codes before the last Dequantize, in the dtype that the ONNX file gives them."""
        return self._call("codes", x, packed)

    def runner(self, x: np.ndarray, packed: Packed) -> Any:
        """A function without arguments that runs `main` on a fixed input, for timing: no copies in or out."""
        args = (self._input(x, packed), *packed.tensors)
        main = self._functions["main"]
        return lambda: main(*args)

    def _call(self, function: str, x: np.ndarray, packed: Packed) -> np.ndarray:
        return self._guarded(function, self._input(x, packed), *packed.tensors).numpy()

    def _guarded(self, function: str, *args: Any) -> Any:
        """Call into the VM; what it refuses shows that artifact.json and lib.so do not belong together."""
        try:
            with self._lock:
                return self._functions[function](*args)
        except (RuntimeError, ValueError, TypeError) as e:
            raise DeviceError(f"the artifact cannot run ({_reason(e)}): fetch or compile it again") from e

    def _input(self, x: np.ndarray, packed: Packed) -> Any:
        import tvm

        if packed.artifact is not self:
            raise DeviceError("these parameters were packed by another artifact: pack them with this one")
        x = np.asarray(x)
        if x.shape != self.input_shape or x.dtype != np.float32:
            raise DeviceError(f"the input is {x.dtype} {list(x.shape)}: give float32 {list(self.input_shape)}")
        return tvm.runtime.tensor(np.ascontiguousarray(x))

    @staticmethod
    def _checked(param: Param, params: Mapping[str, np.ndarray]) -> np.ndarray:
        if param.name not in params:
            raise DeviceError(
                f"parameter {param.name} is missing: this artifact needs {param.dtype} {list(param.shape)}"
            )
        array = np.asarray(params[param.name])
        if array.dtype.name != param.dtype or array.shape != param.shape:
            raise DeviceError(
                f"parameter {param.name} is {array.dtype} {list(array.shape)}: this artifact needs "
                f"{param.dtype} {list(param.shape)}, so it was compiled from another model"
            )
        return np.ascontiguousarray(array).reshape(param.shape)


def read_description(folder: Path) -> dict[str, Any]:
    """artifact.json of `folder`, its form and the hashes of all files checked; raises CompileError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CompileError(f"{folder} is not an artifact folder: make one with `qdeploy compile`")
    data = read_bytes(folder / DESCRIPTION, "the artifact's description", CompileError)
    head = parse_json(data, str(folder / DESCRIPTION), CompileError)
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        found = head.get("format") if isinstance(head, dict) else head
        raise CompileError(f"{folder / DESCRIPTION} has format {found!r}, not {FORMAT}: compile the model again")
    if problem := _description_problem(head):
        raise CompileError(f"{folder / DESCRIPTION} is damaged ({problem}): compile the model again")
    for name, digest in head["files"].items():
        if sha256(read_bytes(folder / name, "the artifact's file", CompileError)) != digest:
            raise CompileError(f"{folder / name} does not match {DESCRIPTION}: fetch or compile the artifact again")
    return head


def _description_problem(head: dict[str, Any]) -> str | None:
    """The first reason why artifact.json cannot be used."""
    if set(head) != KEYS:
        return f"its keys are not {', '.join(sorted(KEYS))}"
    if not (isinstance(head["files"], dict) and set(head["files"]) == {LIBRARY}):
        return f"its files are not just {LIBRARY}"
    features = head["target"].get("features") if isinstance(head["target"], dict) else None
    if not (isinstance(features, list) and all(isinstance(f, str) for f in features)):
        return "its target has no list of features"
    for key in ("inputs", "outputs", "params"):
        rows = head[key]
        if not isinstance(rows, list) or (key != "params" and len(rows) != 1):
            return f"{key} is not a list of the right length"
        for row in rows:
            if not isinstance(row, dict) or set(row) != {"name", "dtype", "shape"}:
                return f"an entry of {key} is not name, dtype and shape"
            if not all(isinstance(row[k], str) for k in ("name", "dtype")) or not _is_shape(row["shape"]):
                return f"an entry of {key} has a wrong type"
    if not isinstance(head["arena_bytes"], int) or not isinstance(head["graph"], str):
        return "arena_bytes or graph has a wrong type"
    if not isinstance(head["versions"], dict):
        return "versions is not an object"
    return None


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)


def load_artifact(folder: Path) -> Artifact:
    """Check and load an artifact folder (docs/handovers.md).

    Raises CompileError when a file is missing, damaged or edited, DeviceError when this machine cannot run it: an
    instruction set that its cpu lacks (checked before anything is loaded), or TVM absent or of another version.
    """
    folder = Path(folder)
    head = read_description(folder)
    if lacking := missing_features(head["target"]["features"]):
        name = head["target"].get("name")
        raise DeviceError(
            f"this machine's cpu lacks {', '.join(lacking)}, which target {name} needs: compile for another target"
        )
    if set(TILE_FEATURES) & set(head["target"]["features"]) and not request_tiles():
        raise DeviceError(
            "this system keeps AMX tiles from processes (Linux gives them from 5.16 on): "
            "compile for target x86-64-avx512"
        )
    _check_tvm(head["versions"])
    library = read_bytes(folder / LIBRARY, "the artifact's file", CompileError)
    if sha256(library) != head["files"][LIBRARY]:
        raise CompileError(f"{folder / LIBRARY} changed while it was read: try again")
    try:
        return Artifact(head, _machine(library))
    except (RuntimeError, ValueError, AttributeError, OSError) as e:
        raise DeviceError(
            f"{folder / LIBRARY} cannot be loaded ({_reason(e)}): compile the model on this machine"
        ) from e


def _machine(library: bytes) -> Any:
    """A virtual machine of exactly these bytes.

    They are loaded from a path of their own: for a path that it knows, dlopen gives back what was there before.
    """
    import tvm
    from tvm.runtime.vm import VirtualMachine

    with tempfile.TemporaryDirectory(prefix="qdeploy-") as folder:
        path = Path(folder) / LIBRARY
        path.write_bytes(library)
        return VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())


def _reason(e: Exception) -> str:
    """The telling line of an error of TVM's."""
    text = str(e).strip()
    return text.splitlines()[-1] if text else type(e).__name__


def _check_tvm(versions: dict[str, Any]) -> None:
    """The library's format belongs to one minor version of TVM."""
    try:
        have = version("apache-tvm")
    except PackageNotFoundError as e:
        raise DeviceError("running a compiled artifact needs the package apache-tvm: install it") from e
    want = str(versions.get("apache-tvm", ""))
    if have.split(".")[:2] != want.split(".")[:2]:
        raise DeviceError(
            f"the artifact was compiled by apache-tvm {want}, here is {have}: install that or compile again"
        )
