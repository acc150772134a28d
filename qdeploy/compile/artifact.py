"""A compiled artifact on the machine that runs it. Imports numpy and the standard library; tvm when one is loaded.

    artifact = load_artifact(folder)          # checks hashes, format and the cpu, loads a library once
    packed = artifact.prepare(params)         # one level's ONNX initializers -> what the kernels read
    logits = artifact.run(images, packed)     # float32 [N, C, H, W] -> float32

Weights and quantization parameters are arguments, so one artifact runs every level of the ladder with its graph
digest: prepare the next level's parameters while the old `packed` still runs, then use the new one. An artifact that
was compiled with its constants has a level of its own: `artifact.run(images)`.
"""

from __future__ import annotations

import os
import platform
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.errors import CompileError, DeviceError
from qdeploy.files import canonical_json, parse_json, read_bytes, sha256
from qdeploy.target import TILE_FEATURES, missing_features, request_tiles

FORMAT = "qdeploy-artifact/2"
DESCRIPTION = "artifact.json"
KEYS = {
    "format", "graph", "target", "threads", "constant", "inputs", "outputs", "params", "variants", "versions", "files",
}  # fmt: skip
THREAD_VARIABLES = ("TVM_NUM_THREADS", "OMP_NUM_THREADS")  # what TVM reads
JOIN_LAYOUTS = ("tight", "spaced", "sorted")  # kernels/join.py's numbers for them
VARIANT_KEYS = {"library", "target", "arena_bytes", "packed_bytes", "packed", "kernels"}
Description = dict[str, Any]


@dataclass(frozen=True)
class Param:
    """One argument of `prepare`: an ONNX initializer's name, numpy dtype name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """One level's parameters in the kernels' layout; opaque, immutable, belongs to the artifact that made it.

    Any number of threads may run one at once.
    """

    artifact: Artifact = field(repr=False)
    tensor: Any = field(repr=False)  # tvm.runtime.Tensor, uint8
    nbytes: int


class Artifact:
    """A loaded artifact. Its methods may be called from several threads at once: each call has buffers to itself."""

    def __init__(self, head: Description, variant: Description, library: Any, packed: bytes | None = None) -> None:
        """`library`: the loaded module; `variant`: its entry of artifact.json; `packed`: the stored level."""
        self.description = head | variant
        self.graph: str = head["graph"]
        self.arena_bytes: int = variant["arena_bytes"]
        self.params = [Param(p["name"], p["dtype"], tuple(p["shape"])) for p in head["params"]]
        self.input_shape = tuple(head["inputs"][0]["shape"])
        self.output_shape = tuple(head["outputs"][0]["shape"])
        self._codes: str = head["outputs"][0]["codes"]  # "": the output has none
        self._on_gpu = "gpu" in variant["target"]
        self._arena = 1 if self._on_gpu else self.arena_bytes  # the GPU's own memory is the library's concern
        gpu = ["device", "upload", "release"] if self._on_gpu else []
        parts = ("prepare", "prepare_part", "prepare_reads", "join")
        names = (*parts, "main", "profile", *(["codes"] if self._codes else []), *gpu)
        self._functions = {name: library[name] for name in names}
        self._free: dict[str, list[tuple[_Shared, _Shared, _Shared]]] = {}  # by function: `_buffers`
        self._constant = None if packed is None else self._packed(np.frombuffer(packed, np.uint8))

    def prepare(self, params: Mapping[str, np.ndarray]) -> Packed:
        """Pack one level. `params`: ONNX initializer name -> array; names that no kernel reads are ignored.

        For a GPU they are copied to it, once. Raises DeviceError that names the first parameter which is missing or has
        another dtype or shape, or what is wrong with the GPU.
        """
        return self._uploaded(self.pack(params))

    def prepare_each(self, read: Callable[[str], np.ndarray], into: Packed | None = None) -> Packed:
        """`prepare`, with no more parameters in memory at once than one kernel of it reads: nearly always one layer's.

        `read` gives the array of an ONNX initializer; it is asked once for each, in the order of their use. `into`: a
        level of this artifact that is overwritten (its inference must rest until this returns, also when it raises);
        not on a GPU. Raises DeviceError as `prepare`, and what `read` raises.
        """
        if into is not None and (self._on_gpu or into.artifact is not self):
            raise DeviceError("only a level of the same artifact, not on a GPU, can be overwritten: prepare a new one")
        packed = into or self._empty_packed()
        table, bounds = _Shared((2 * len(self.params),), "int32"), _Shared((2,), "int32")
        self._guarded("prepare_reads", table.tensor)
        first, last = table.array.reshape(-1, 2).T
        addresses, held = _Shared((len(self.params),), "int64"), {}
        for begin in (order := sorted({0, *(int(k) for k in first if k >= 0)})):
            end = next((k for k in order if k > begin), 1 << 30)
            for i in np.flatnonzero(first == begin):
                held[i] = self._checked(self.params[i], {self.params[i].name: read(self.params[i].name)})
                addresses.array[i] = held[i].ctypes.data
            bounds.array[:] = begin, end
            self._pack("prepare_part", addresses.tensor, packed.tensor, bounds.tensor)
            held = {i: array for i, array in held.items() if last[i] >= end}
        return packed if into is not None else self._uploaded(packed)

    def _pack(self, function: str, *args: Any) -> None:
        try:
            self._functions[function](*args)
        except (RuntimeError, ValueError, TypeError) as e:
            raise DeviceError(f"these parameters do not fit the artifact: {_reason(e)}") from e

    def _empty_packed(self) -> Packed:
        shared = _Shared((self.description["packed_bytes"],), "uint8")
        shared.array[...] = 0
        return Packed(self, shared.tensor, shared.array.nbytes)

    def connect(self) -> str | None:
        """The name of the GPU that this artifact runs on, its stored level copied to it; None for processors.

        Raises DeviceError where there is no driver, no GPU, or one of another architecture.
        """
        if not self._on_gpu:
            return None
        name = _Shared((256,), "uint8")
        self._guarded("device", name.tensor)
        if self._constant is not None:
            self._uploaded(self._constant)
        return name.array.tobytes().rstrip(bytes(1)).decode(errors="replace")

    def _uploaded(self, packed: Packed) -> Packed:
        """`packed`, for a GPU in its memory until nobody refers to it any more."""
        if self._on_gpu:
            self._guarded("upload", packed.tensor)
            weakref.finalize(packed, self._functions["release"], packed.tensor).atexit = False
        return packed

    def pack(self, params: Mapping[str, np.ndarray]) -> Packed:
        """`prepare` without a GPU: what it returns can be stored, not run there."""
        arrays = [self._checked(param, params) for param in self.params]
        addresses = np.array([array.ctypes.data for array in arrays], np.int64)
        packed = self._empty_packed()
        self._pack("prepare", _tensor(addresses), packed.tensor)
        return packed

    def join(
        self, parts: Iterable[tuple[int, str, bytes]], count: int, shift: int, bias: int, planes: int
    ) -> np.ndarray:
        """Bit planes of a weight tensor -> uint8 [count], its container codes (int8 ones as their bytes).

        `parts` are (planes, layout, inflated bytes) as qdeploy/bundle/FORMAT.md has them, in their order, `planes` in
        all; those of an iterator are in memory one at a time. With b planes, symbols u become (u << shift) + bias mod
        256; a level [b, shift, offset] has bias offset - (2^(b-1) << shift). Raises DeviceError when a part has another
        length than its layout says.
        """
        codes, held, left = _Shared((count,), "uint8"), 0, planes
        codes.array[...] = 0
        for bits, layout, raw in parts:
            left -= bits
            numbers = (bits, JOIN_LAYOUTS.index(layout), held, shift + left, 0, 0 if left else bias)
            self._guarded("join", _tensor(np.frombuffer(raw, np.uint8)), codes.tensor, *numbers)
            held += bits
        return codes.array

    def run(self, x: np.ndarray, packed: Packed | None = None) -> np.ndarray:
        """One inference: float32 `input_shape` -> float32 `output_shape`. Raises DeviceError for another shape."""
        return self._call("main", x, packed, "float32")

    def codes(self, x: np.ndarray, packed: Packed | None = None) -> np.ndarray:
        """As `run`, but the integer codes before the last Dequantize, in the dtype that the ONNX file gives them.

        Raises DeviceError where the network's output is not quantized.
        """
        if not self._codes:
            raise DeviceError("the network's output is not quantized, so it has no codes: use run")
        return self._call("codes", x, packed, self._codes)

    def runner(self, x: np.ndarray, packed: Packed | None = None) -> Callable[[], Any]:
        """A function without arguments that runs `main` on a fixed input, for timing: no copies in or out."""
        image, level, arena = self._input(x), self._level(packed), _empty((self._arena,), "uint8")
        output, main = _empty(self.output_shape, "float32"), self._functions["main"]
        return lambda: main(image, level.tensor, arena, output)

    def ticks(self, x: np.ndarray, packed: Packed | None = None) -> Callable[[], np.ndarray]:
        """A function without arguments that runs on a fixed input: int64 [calls], nanoseconds in each kernel.

        In the order of the `functions` of artifact.json's `kernels`.
        """
        count = sum(len(row["functions"]) for row in self.description["kernels"])
        times, output = _empty((count,), "int64"), _empty(self.output_shape, "float32")
        image, level, arena = self._input(x), self._level(packed), _empty((self._arena,), "uint8")

        def run() -> np.ndarray:
            self._guarded("profile", image, level.tensor, arena, output, times)
            return np.array(times.numpy())

        return run

    def _call(self, function: str, x: np.ndarray, packed: Packed | None, dtype: str) -> np.ndarray:
        level, x = self._level(packed), self._checked_input(x)
        with self._buffers(function, dtype) as (image, arena, output):
            image.array[...] = x
            self._guarded(function, image.tensor, level.tensor, arena.tensor, output.tensor)
            return output.array.copy()

    @contextmanager
    def _buffers(self, function: str, dtype: str) -> Iterator[tuple[_Shared, _Shared, _Shared]]:
        """Input, arena and output that no other call uses now; as many are kept as calls ran at once."""
        free = self._free.setdefault(function, [])
        try:
            found = free.pop()
        except IndexError:
            found = (
                _Shared(self.input_shape, "float32"), _Shared((self._arena,), "uint8"),
                _Shared(self.output_shape, dtype),
            )  # fmt: skip
        try:
            yield found
        finally:
            free.append(found)

    def _packed(self, data: np.ndarray) -> Packed:
        return Packed(self, _tensor(data), data.nbytes)

    def _guarded(self, function: str, *args: Any) -> None:
        """Call into the library; what it refuses is an error of the parameters or of the artifact."""
        try:
            self._functions[function](*args)
        except (RuntimeError, ValueError, TypeError) as e:
            if self._on_gpu:
                raise DeviceError(_reason(e)) from e
            raise DeviceError(f"the artifact cannot run ({_reason(e)}): fetch or compile it again") from e

    def _level(self, packed: Packed | None) -> Packed:
        level = packed or self._constant
        if level is None:
            raise DeviceError("the artifact holds no level: give what `prepare` returned, or compile with --constant")
        if level.artifact is not self:
            raise DeviceError("these parameters were packed by another artifact: pack them with this one")
        return level

    def _checked_input(self, x: np.ndarray) -> np.ndarray:
        x = np.asarray(x)
        if x.shape != self.input_shape or x.dtype != np.float32:
            raise DeviceError(f"the input is {x.dtype} {list(x.shape)}: give float32 {list(self.input_shape)}")
        return x

    def _input(self, x: np.ndarray) -> Any:
        return _tensor(np.ascontiguousarray(self._checked_input(x)))

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
        return np.ascontiguousarray(array, array.dtype.newbyteorder("="))


class _Shared:
    """A tensor of TVM's and a numpy array on the same bytes."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.tensor = _empty(shape, dtype)
        self.array: np.ndarray = np.from_dlpack(self.tensor)


def _tensor(array: np.ndarray) -> Any:
    import tvm

    return tvm.runtime.tensor(array)


def _empty(shape: tuple[int, ...], dtype: str) -> Any:
    import tvm

    return tvm.runtime.empty(shape, dtype)


# artifact.json -------------------------------------------------------------------------------------------------------


def identity(head: Description, variant: Description) -> str:
    """Hex digits that the library of `variant` carries as its build id: it belongs to this description alone.

    So nobody's edit of a shape, or of the instruction sets that the code uses, reaches the code.
    """
    shared = {key: head[key] for key in ("format", "graph", "threads", "constant", "inputs", "outputs", "params")}
    return sha256(canonical_json(shared | variant))


def carries(library: bytes, digits: str) -> bool:
    """Whether an ELF library has the build id `digits`: a note of type 3 by GNU."""
    value = bytes.fromhex(digits)
    note = b"".join(n.to_bytes(4, "little") for n in (4, len(value), 3)) + b"GNU\0" + value
    return note in library


def read_description(folder: Path) -> Description:
    """artifact.json of `folder`, its form and the hashes of all files checked; raises CompileError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CompileError(f"{folder} is not an artifact folder: make one with `qdeploy compile`")
    data = _bytes(folder / DESCRIPTION)
    head = parse_json(data, str(folder / DESCRIPTION), CompileError)
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        found = head.get("format") if isinstance(head, dict) else head
        raise CompileError(f"{folder / DESCRIPTION} has format {found!r}, not {FORMAT}: compile the model again")
    if problem := _description_problem(head):
        raise CompileError(f"{folder / DESCRIPTION} is damaged ({problem}): compile the model again")
    for name in head["files"]:
        read_file(folder, head, name)
    return head


def read_file(folder: Path, head: Description, name: str) -> bytes:
    """A file of the artifact, compared with its digest; raises CompileError."""
    data = _bytes(folder / name)
    if sha256(data) != head["files"][name]:
        raise CompileError(f"{folder / name} does not match {DESCRIPTION}: fetch or compile the artifact again")
    return data


def _bytes(path: Path) -> bytes:
    """A regular file's content; reading anything else (a pipe) might never end. Raises CompileError."""
    if path.exists() and not path.is_file():
        raise CompileError(f"{path} is no file: fetch or compile the artifact again")
    return read_bytes(path, "the artifact's file", CompileError)


def _description_problem(head: Description) -> str | None:
    """The first reason why artifact.json cannot be used."""
    if set(head) != KEYS:
        return f"its keys are not {', '.join(sorted(KEYS))}"
    for key in ("inputs", "outputs", "params"):
        rows = head[key]
        if not isinstance(rows, list) or (key != "params" and len(rows) != 1):
            return f"{key} is not a list of the right length"
        if problem := _rows_problem(key, rows, {"codes"} if key == "outputs" else set()):
            return problem
    for key, kind in (("graph", str), ("versions", dict), ("files", dict), ("variants", list), ("constant", bool)):
        if not isinstance(head[key], kind):
            return f"{key} has a wrong type"
    if not _is_shape([head["threads"]]):
        return "threads has a wrong type"
    if not head["variants"]:
        return "it has no variants"
    wanted: set[str] = set()
    for variant in head["variants"]:
        if problem := _variant_problem(variant, head["constant"]):
            return problem
        wanted |= {name for name in (variant["library"], variant["packed"]) if name is not None}
    if set(head["files"]) != wanted or any(Path(name).name != name for name in wanted):
        return f"its files are not just {', '.join(sorted(wanted))}"
    return None


def _rows_problem(key: str, rows: list[Any], more: set[str]) -> str | None:
    """What is wrong with the rows of inputs, outputs or params."""
    for row in rows:
        if not isinstance(row, dict) or set(row) != {"name", "dtype", "shape"} | more:
            return f"an entry of {key} is not {', '.join(sorted({'name', 'dtype', 'shape'} | more))}"
        if not all(isinstance(row[k], str) for k in {"name", "dtype"} | more) or not _is_shape(row["shape"]):
            return f"an entry of {key} has a wrong type"
    return None


def _variant_problem(variant: Any, constant: bool) -> str | None:
    """What is wrong with one entry of variants."""
    if not isinstance(variant, dict) or set(variant) != VARIANT_KEYS:
        return f"a variant is not {', '.join(sorted(VARIANT_KEYS))}"
    features = variant["target"].get("features") if isinstance(variant["target"], dict) else None
    if not (isinstance(features, list) and all(isinstance(f, str) for f in features)):
        return "a target has no list of features"
    if not isinstance(variant["library"], str) or isinstance(variant["packed"], str) != constant:
        return "a variant's library or packed has a wrong type"
    if not _is_shape([variant["arena_bytes"], variant["packed_bytes"]]):
        return "arena_bytes or packed_bytes has a wrong type"
    rows = variant["kernels"]
    return None if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) else "kernels has a wrong type"


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)


# Loading -------------------------------------------------------------------------------------------------------------


def load_artifact(folder: Path) -> Artifact:
    """Check and load an artifact folder (docs/handovers.md): the first of its variants that this machine can run.

    Raises CompileError when a file is missing, damaged or edited, DeviceError when this machine cannot run it: an
    instruction set that its cpu lacks (checked before anything is loaded), or TVM absent or of another version.
    """
    folder = Path(folder)
    head = read_description(folder)
    variant = _suited(head["variants"])
    _check_tvm(head["versions"])
    library = read_file(folder, head, variant["library"])
    if not carries(library, identity(head, variant)):
        raise CompileError(
            f"{folder / variant['library']} was not made with this {DESCRIPTION}: fetch or compile the artifact again"
        )
    packed = read_file(folder, head, variant["packed"]) if head["constant"] else None
    if packed is not None and len(packed) != variant["packed_bytes"]:
        raise CompileError(f"{folder / variant['packed']} has another length than {DESCRIPTION} says: compile again")
    artifact = opened(head, variant, library, packed)
    artifact.connect()
    return artifact


def _suited(variants: list[Description]) -> Description:
    """The first variant that this machine can run; raises DeviceError that says what each lacks."""
    reasons, machine = [], platform.machine()
    for variant in variants:
        name, features = variant["target"].get("name"), variant["target"]["features"]
        if (arch := variant["target"].get("arch", machine)) != machine:  # without one, the library's identity is wrong
            reasons.append(f"target {name} is for {arch} machines, this one is {machine}")
        elif lacking := missing_features(features):
            reasons.append(f"this machine's cpu lacks {', '.join(lacking)}, which target {name} needs")
        elif set(TILE_FEATURES) & set(features) and not request_tiles():
            reasons.append(f"this system keeps AMX tiles from processes (Linux gives them from 5.16 on), for {name}")
        else:
            return variant
    raise DeviceError(f"{'; '.join(reasons)}: compile for another target")


def opened(head: Description, variant: Description, library: bytes, packed: bytes | None = None) -> Artifact:
    """The artifact of exactly these bytes; raises DeviceError when they cannot be loaded.

    They are loaded from a path of their own: for a path that it knows, dlopen gives back what was there before. Where
    the environment does not say how many workers TVM starts in each thread that runs kernels, the artifact does.
    """
    import tvm

    if head["threads"] > 1 and not any(name in os.environ for name in THREAD_VARIABLES):
        os.environ["TVM_NUM_THREADS"] = str(head["threads"])  # TVM's own choice is half the processors
    with tempfile.TemporaryDirectory(prefix="qdeploy-") as folder:
        path = Path(folder) / "lib.so"
        path.write_bytes(library)
        try:
            return Artifact(head, variant, tvm.runtime.load_module(str(path)), packed)
        except (RuntimeError, ValueError, AttributeError, OSError) as e:
            raise DeviceError(
                f"{variant['library']} cannot be loaded ({_reason(e)}): compile the model on this machine"
            ) from e


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
