"""A search folder: what was asked for, tables, the state of each round. JSON and plain arrays, no pickles."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.errors import ModelError
from qdeploy.files import canonical_json, parse_json, read_bytes, write_atomic
from qdeploy.search.geometry import Geometry
from qdeploy.search.strategy import State

REQUEST, GEOMETRY = "search.json", "geometry.npz"
SPECS, SCORES, HISTORY, FORETOLD = "specs.jsonl", "scores.jsonl", "history.csv", "foretold.jsonl"


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Several arrays as one .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name.replace("/", "|"): array for name, array in arrays.items()})  # type: ignore[arg-type]
    write_atomic(path, buffer.getvalue())


def read_arrays(path: Path) -> State:
    """Inverse of `write_arrays`; raises ModelError."""
    try:
        with np.load(io.BytesIO(read_bytes(path, "the arrays", ModelError)), allow_pickle=False) as found:
            return {name.replace("|", "/"): found[name] for name in found.files}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise ModelError(f"{path} is damaged ({e}): remove it, what it held is made again") from e


def claim(out: Path, request: Mapping[str, Any]) -> None:
    """Make `out` the folder of this search; ModelError when it holds another one."""
    path = out / REQUEST
    if path.exists():
        held = parse_json(read_bytes(path, "the search", ModelError), str(path), ModelError)
        if isinstance(held, dict) and held != request:
            different = sorted(k for k in {*held, *request} if held.get(k) != request.get(k))
            raise ModelError(f"{out} holds another search ({', '.join(different)} differ): choose another folder")
        if held == request:
            return
        raise ModelError(f"{path} is damaged: choose another folder")
    if out.is_dir() and any(out.iterdir()):
        raise ModelError(f"{out} is not empty and holds no search: choose another folder")
    write_atomic(path, canonical_json(dict(request)))


def kept_geometry(path: Path) -> Geometry | None:
    """What `keep_geometry` wrote; None where it did not, or another version's did."""
    names = [field.name for field in fields(Geometry)]
    if not path.exists() or (arrays := read_arrays(path)).keys() != set(names):
        return None
    return Geometry(*(arrays[name] for name in names))


def keep_geometry(path: Path, geometry: Geometry) -> None:
    """Inverse of `kept_geometry`."""
    names = [field.name for field in fields(Geometry)]
    write_arrays(path, dict(zip(names, astuple(geometry), strict=True)))
