"""export_onnx: a FrozenNet becomes a QDQ ONNX file and its sidecar, or nothing at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qdeploy.errors import DeviceError, ModelError
from qdeploy.export import contract
from qdeploy.export.float_graph import float_graph, simplified
from qdeploy.export.insert import insert_qdq
from qdeploy.export.parity import parity
from qdeploy.files import canonical_json, sha256, write_atomic
from qdeploy.frozen import FrozenNet
from qdeploy.qdq import canonical_bytes, graph_digest, parse_model

SIDECAR_FORMAT = "qdeploy-model/1"


def sidecar_path(path: Path) -> Path:
    """Where the sidecar of model file `path` lies: beside it, with `.json` added."""
    return Path(f"{path}.json")


def qdq_bytes(net: FrozenNet) -> bytes:
    """The canonical QDQ ONNX file of `net`; raises ModelError that lists every breach of the contract."""
    net.check()
    try:
        model = insert_qdq(net, simplified(float_graph(net)))
    except (TypeError, ValueError, KeyError, IndexError) as e:
        raise ModelError(f"the frozen network contradicts itself ({e!r}): make the subnet again") from e
    data = canonical_bytes(model)
    contract.check(parse_model(data), own=True)
    return data


def export_onnx(
    net: FrozenNet, path: Path, force: bool = False, echo: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Write `path` and its sidecar `path`.json (docs/handovers.md); returns the sidecar.

    Raises ModelError when the network is illegal or ONNX Runtime's codes differ from its goldens by more than the
    bound of `parity`, DeviceError when a file exists (without `force`) or cannot be written; nothing is written then.
    """
    path, say = Path(path), echo or (lambda text: None)
    for target in (path, sidecar_path(path)):
        if target.is_dir() or (target.exists() and not force):
            raise DeviceError(f"{target} exists: choose another name or add --force")
    data = qdq_bytes(net)
    say(f"{len(net.nodes)} operators, {len(data)} bytes; comparing codes with ONNX Runtime")
    measured = parity(data, net)
    say(measured.line())
    sidecar = {
        "format": SIDECAR_FORMAT,
        "model": sha256(data),
        "graph": graph_digest(data),
        "name": net.name,
        "spec": net.spec.to_json(),
        "spec_id": net.spec.id,
        "weights": {name: bits.to_json() for name, bits in net.weights.items()},
        "accuracy": net.report.get("accuracy"),
        "parity": measured.to_json(),
        "golden": {
            "input_sha256": sha256(net.golden[net.input].tobytes()),
            "output_sha256": sha256(net.golden[net.output].tobytes()),
        },
    }
    text = canonical_json(sidecar)
    write_atomic(path, data)
    try:
        write_atomic(sidecar_path(path), text)
    except DeviceError:
        path.unlink(missing_ok=True)  # a model without its sidecar would pass for a foreign one
        raise
    return sidecar
