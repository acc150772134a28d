"""Timing an artifact through an RPC session of TVM's: its library is uploaded, a level is packed there, and run there.

`prepare` reads its parameters through addresses, which a client does not know: a function compiled for the server's
target tells where a buffer lies there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.tirx.script import builder as T

from qdeploy.compile.artifact import Description, read_description, read_file
from qdeploy.compile.codegen import library
from qdeploy.compile.kernels.emit import const, prim_func, store
from qdeploy.compile.llvm import resolve
from qdeploy.compile.program import aligned
from qdeploy.errors import DeviceError
from qdeploy.files import sha256
from qdeploy.profile.latency import BLOCK, summary
from qdeploy.profile.timing import ROUNDS, drift, quiet
from qdeploy.target import TILE_FEATURES, Target


def loadable(head: Description) -> Description:
    """The variant to send; raises DeviceError for one that a server cannot run."""
    if len(head["variants"]) > 1:
        raise DeviceError("an artifact for several targets cannot be sent: compile for the device's own target")
    variant: Description = head["variants"][0]
    if set(TILE_FEATURES) & set(variant["target"]["features"]):
        raise DeviceError("RPC servers cannot use AMX tiles: compile for target x86-64-avx512")
    if "gpu" in variant["target"]:
        raise DeviceError("a GPU's artifact is not run over RPC: run it on the machine with the GPU")
    return variant


def address_function(size: int) -> Any:
    """(uint8 [size], int64 [1]): the second becomes the address of the first."""

    def body(data: Any, out: Any) -> None:
        store(out, T.reinterpret("int64", T.address_of(data[const(0)])), const(0))

    return prim_func("address", [("data", (size,), "uint8"), ("out", (1,), "int64")], body)


def _sent(session: Any, name: str, data: bytes) -> Any:
    """A library, loaded there."""
    with tempfile.TemporaryDirectory(prefix="qdeploy-") as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        session.upload(str(path), name)
    return session.load_module(name)


def _packed(
    session: Any, prepare: Any, head: Description, variant: Description, params: Mapping[str, np.ndarray]
) -> Any:
    """A level packed there: one buffer of all parameters, their addresses, `prepare`."""
    arrays = []
    for row in head["params"]:
        if row["name"] not in params:
            raise DeviceError(f"parameter {row['name']} is missing: give the initializers of the artifact's model")
        array = np.asarray(params[row["name"]])
        if array.dtype.name != row["dtype"] or list(array.shape) != row["shape"]:
            raise DeviceError(f"parameter {row['name']} does not fit the artifact: it was compiled from another model")
        arrays.append(array)
    offsets = np.cumsum([0, *(aligned(array.nbytes) for array in arrays)])
    data = np.zeros(max(1, int(offsets[-1])), np.uint8)
    for array, at in zip(arrays, offsets, strict=False):
        data[at : at + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
    given = variant["target"]
    target = resolve(Target(given["name"], given["arch"], given["kind"], given["cpu"], tuple(given["features"])))
    code = library({}, {"address": address_function(len(data))}, target.tvm, sha256(b"address"))
    device = session.cpu()
    there, where = tvm.runtime.tensor(data, device), tvm.runtime.tensor(np.zeros(1, np.int64), device)
    _sent(session, "address.so", code)["address"](there, where)
    addresses = int(where.numpy()[0]) + offsets[:-1]
    packed = tvm.runtime.tensor(np.zeros(variant["packed_bytes"], np.uint8), device)
    prepare(tvm.runtime.tensor(addresses.astype(np.int64), device), packed)
    return packed


def timed_there(session: Any, folder: Path, params: Mapping[str, np.ndarray], limit: float) -> dict[str, Any]:
    """As `qdeploy.profile.timing.timed`; "machine" is for the caller to say. Clocks are the server's own."""
    head = read_description(folder)
    variant = loadable(head)
    module = _sent(session, "lib.so", read_file(folder, head, variant["library"]))
    packed = _packed(session, module["prepare"], head, variant, params)
    device, length = session.cpu(), sum(len(row["functions"]) for row in variant["kernels"])
    x = np.random.default_rng(0).standard_normal(head["inputs"][0]["shape"]).astype(np.float32)
    image = tvm.runtime.tensor(x, device)
    arena = tvm.runtime.empty((variant["arena_bytes"],), "uint8", device)
    output = tvm.runtime.empty(tuple(head["outputs"][0]["shape"]), "float32", device)
    ticks = tvm.runtime.empty((length,), "int64", device)
    profile: Callable[..., Any] = module["profile"]

    def runs(number: int) -> np.ndarray:
        """Seconds of so many runs, each by itself."""
        found = module.time_evaluator("main", device, number=1, repeat=number)
        return np.array(found(image, packed, arena, output).results)

    count = max(1, round(BLOCK / max(float(runs(20).min()), 1e-7)))

    def measure() -> tuple[np.ndarray, np.ndarray]:
        whole, calls = np.empty(ROUNDS), np.empty((ROUNDS, 5, length))
        for i in range(ROUNDS):
            whole[i] = np.median(runs(count)) * 1e3
            for k in range(calls.shape[1]):
                profile(image, packed, arena, output, ticks)
                calls[i, k] = ticks.numpy()
        return whole, calls[:, 1:].reshape(-1, length)  # the first of each round warmed the caches

    whole, calls = quiet(measure, lambda found: found[0], limit, "the device")
    kernels = np.percentile(calls / 1e6, (25, 50, 75), axis=0).T.tolist()
    found = {"latency": summary(whole), "kernels": kernels, "drift": drift(whole)}
    return found | {"packed_bytes": variant["packed_bytes"], "arena_bytes": variant["arena_bytes"]}
