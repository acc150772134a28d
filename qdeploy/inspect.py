"""What is this file or folder? Any hand-over of docs/handovers.md as a plain value, and as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.bundle.manifest import manifest_bytes
from qdeploy.bundle.planes import entropy_bytes
from qdeploy.bundle.store import (
    ReadPiece,
    artifact_pieces,
    load_tree,
    pieces_of,
    remembering,
    tensor_prefix,
    tree_reader,
)
from qdeploy.bundle.tables import Manifest, Tensor
from qdeploy.bundle.validate import packed_weights
from qdeploy.errors import BundleError, ModelError, QDeployError
from qdeploy.files import canonical_json, parse_json, read_bytes, sha256
from qdeploy.frozen import load_frozen
from qdeploy.space import SubnetSpec

Description = dict[str, Any]


def describe(path: Path) -> Description:
    """A training run, subnet spec, FrozenNet folder, QDQ ONNX file, artifact folder or published tree as a JSON value
    with `kind`.

    Raises the error class of the hand-over when it is damaged, ModelError when `path` is none of these.
    """
    path = Path(path)
    if path.is_dir():
        for marker, reader in FOLDERS.items():
            if (path / marker).is_file():
                return reader(path)
        raise ModelError(f"{path} is no folder of qdeploy: none of {', '.join(FOLDERS)} is in it")
    if not path.is_file():
        raise ModelError(f"{path} does not exist: name a file or folder that qdeploy made, or a QDQ ONNX file")
    with open(path, "rb") as file:
        is_json = file.read(1) == b"{"
    return _spec(path) if is_json else _onnx(path)


def render(description: Description) -> str:
    """`describe`'s value as text for people."""
    lines: list[str] = []
    for key, value in description.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines += ["", f"{key}:", *_table(value)]
        elif isinstance(value, dict):
            lines += [f"{key}: " + ", ".join(f"{name} {_text(entry)}" for name, entry in value.items())]
        else:
            lines.append(f"{key}: {_text(value)}")
    return "\n".join(lines)


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns of the union of the rows' keys, numbers to the right."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_text(row.get(head, "")) for head in heads] for row in rows]
    widths = [max(len(head), *(len(row[i]) for row in cells)) for i, head in enumerate(heads)]
    left = [any(isinstance(row.get(head), str) for row in rows) for head in heads]
    out = []
    for row in [heads, *cells]:
        columns = zip(row, widths, left, strict=True)
        out.append("  " + "  ".join(c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in columns).rstrip())
    return out


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, list | tuple):
        return " ".join(_text(entry) for entry in value) or "none"
    if isinstance(value, dict):
        return "; ".join(f"{key} {_text(entry)}" for key, entry in value.items()) or "none"
    return "-" if value is None else str(value)


# --- bundle ----------------------------------------------------------------------------------------------------------


def bundle_planes(manifest: Manifest, read: ReadPiece) -> list[Description]:
    """A row per tensor and part: planes, coded bytes, bytes of the manifest that frame it, ideal bytes (entropy).

    Parts that share a piece share its coded bytes and its framing in proportion to their ideal bytes.
    """
    rows, read = [], remembering(read)
    for i, (tensor, area) in enumerate(zip(manifest.tensors, manifest.of_kind("planes"), strict=True)):
        u = _left_aligned(tensor_prefix(tensor, area, tensor.bits, read), tensor)
        bounds = entropy_bytes(u, tensor.bits, [part.bits for part in tensor.parts], tensor.caps)
        lowest = min((level.tensors[i].bits for level in manifest.levels if level.tensors[i].bits), default=tensor.bits)
        first = 0
        for part, bound in zip(tensor.parts, bounds, strict=True):
            packed = packed_weights(tensor, area.shape, first)
            row: Description = {"tensor": tensor.name, "weights": packed, "planes": _span(first, part.bits)}
            row |= {"layout": part.layout, "codec": manifest.pieces[part.piece].codec}
            row |= {"bound": bound, "base": first < lowest, "piece": part.piece}
            rows.append(row | {"framing": len(canonical_json([part.bits, part.layout, part.piece, part.start]))})
            first += part.bits
    for index, piece in enumerate(manifest.pieces):
        members = [row for row in rows if row["piece"] == index]
        ideal = sum(row["bound"] for row in members)
        frame = [piece.object, piece.offset, piece.size, piece.raw, piece.codec, piece.sha256]
        for row in members:
            share = row["bound"] / ideal if ideal else 1 / len(members)
            row["coded"] = share * piece.size
            row["framing"] += share * len(canonical_json(frame))
    return rows


def _span(first: int, bits: int) -> str:
    return str(first) if bits == 1 else f"{first}-{first + bits - 1}"


def _left_aligned(prefix: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Prefixes of capped channels moved to the high end, as `entropy_bytes` takes them."""
    if tensor.caps is None:
        return prefix
    spare = (tensor.bits - np.asarray(tensor.caps)).astype(np.uint8)
    return prefix << spare.reshape(-1, *[1] * (prefix.ndim - 1))


def plane_summary(rows: Sequence[Description]) -> list[Description]:
    """Coded and framing bytes against the bound: base, each later plane, all; `over`: per cent, framing included."""
    later = sorted({row["planes"] for row in rows if not row["base"]}, key=lambda span: int(span.split("-")[0]))
    parts = {"base": [row for row in rows if row["base"]]}
    parts |= {span: [row for row in rows if row["planes"] == span and not row["base"]] for span in later}
    out = []
    for name, members in (parts | {"all": list(rows)}).items():
        coded, framing, bound = (sum(row[key] for row in members) for key in ("coded", "framing", "bound"))
        tensors: dict[str, int] = {}
        for row in members:
            tensors[row["tensor"]] = max(row["weights"], tensors.get(row["tensor"], 0))
        line: Description = {
            "planes": name,
            "weights": sum(tensors.values()),
            "coded": round(coded),
            "framing": round(framing),
        }
        over = round(100 * ((coded + framing) / bound - 1), 2) if bound else None
        out.append(line | {"bound": round(bound), "over": over})
    return out


def mean_bits(tensor: Tensor, bits: int) -> float:
    """Planes a weight at `bits`: a capped channel (all have one size) holds no more than its cap."""
    return bits if tensor.caps is None else sum(min(bits, cap) for cap in tensor.caps) / len(tensor.caps)


def _levels(manifest: Manifest) -> list[Description]:
    weights = [area.count for area in manifest.of_kind("planes")]
    size = lambda pieces: sum(manifest.pieces[piece].size for piece in pieces)  # noqa: E731
    rows, have = [], set[int]()
    for level in manifest.levels:
        pieces = pieces_of(manifest, level.name)
        held = [mean_bits(tensor, entry.bits) for tensor, entry in zip(manifest.tensors, level.tensors, strict=True)]
        bits = sum(number * count for number, count in zip(held, weights, strict=True))
        rows.append(
            {
                "level": level.name,
                "bits a weight": round(bits / sum(weights), 3) if weights else 0.0,
                "step bytes": size(set(pieces) - have),
                "total bytes": size(pieces),
                "side bytes": manifest.pieces[level.side].size if level.side is not None else 0,
                "sha256": level.sha256[:12],
                **level.info,
            }
        )
        have |= set(pieces)
    return rows


def _bundle(path: Path) -> Description:
    manifest = load_tree(path)
    rows = bundle_planes(manifest, tree_reader(path, manifest))
    bits = [
        {"tensor": tensor.name, "weights": area.count, "top": tensor.bits}
        | {level.name: round(mean_bits(tensor, level.tensors[i].bits), 3) for level in manifest.levels}
        for i, (tensor, area) in enumerate(zip(manifest.tensors, manifest.of_kind("planes"), strict=True))
    ]
    artifacts = [
        {
            "target": artifact.target.get("name", artifact.target),
            "files": [name for name, _ in artifact.files],
            "bytes": sum(manifest.pieces[piece].size for piece in artifact_pieces(manifest, i)),
        }
        for i, artifact in enumerate(manifest.artifacts)
    ]
    return {
        "kind": "bundle",
        "model": manifest.model,
        "release": manifest.release,
        "graph": manifest.graph,
        "onnx bytes": manifest.size,
        "manifest bytes": len(manifest_bytes(manifest)),
        "skeleton bytes": manifest.pieces[manifest.skeleton].size,
        "levels": _levels(manifest),
        "planes against their entropy": plane_summary(rows),
        "tensors": bits,
        "parts": [_rounded(row) for row in rows],
        "objects": [{"sha256": entry.sha256, "size": entry.size} for entry in manifest.objects],
        "artifacts": artifacts,
    }


def _rounded(row: Description) -> Description:
    numbers = {key: round(row[key]) for key in ("coded", "framing", "bound")}
    return {key: value for key, value in row.items() if key != "base"} | numbers


# --- the other hand-overs --------------------------------------------------------------------------------------------


def _onnx(path: Path) -> Description:
    from qdeploy import qdq

    data, model = qdq.load_model(path)
    canonical = qdq.canonical_bytes(model)
    roles, arrays = qdq.numeric_roles(model), qdq.arrays(model)
    weights = []
    for name, array in arrays.items():
        if roles.get(name) == "weight" and array.dtype.name in ("int8", "uint8"):
            flat = array.reshape(array.shape[0] if array.ndim else 1, -1).view(np.uint8)
            ideal = entropy_bytes(flat, 8, [8])[0] if array.size else 0.0
            row = {"tensor": name, "shape": list(array.shape), "dtype": array.dtype.name}
            weights.append(row | {"codes": len(np.unique(array)), "bound": round(ideal, 1)})
    if not weights:
        raise ModelError(f"{path} is ONNX without int8 or uint8 weights behind DequantizeLinear: it is not a QDQ model")
    description = {
        "kind": "QDQ ONNX model",
        "bytes": len(data),
        "sha256": sha256(data),
        "graph": qdq.graph_digest(data),
        "canonical": "yes" if canonical == data else "no (the bundle keeps its canonical form)",
        "opset": max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
        "nodes": len(model.graph.node),
    }
    sidecar = path.with_name(path.name + ".json")
    if sidecar.is_file():
        value = parse_json(read_bytes(sidecar, "the sidecar", ModelError), str(sidecar), ModelError)
        if not isinstance(value, dict) or value.get("model") != sha256(data):
            raise ModelError(f"{sidecar} belongs to another file than {path.name}: export the model again or remove it")
        description |= {key: value[key] for key in ("name", "spec_id", "accuracy") if key in value}
    return description | {"weights": weights}


def _frozen(path: Path) -> Description:
    net = load_frozen(path)
    layers = [
        {"layer": name, "shape": list(net.tensors[f"{name}.weight"].shape)}
        | {"bits": bits.bits, "top": bits.top, "container": bits.container}
        | ({} if bits.channels is None else {"mean bits": round(sum(bits.channels) / len(bits.channels), 3)})
        for name, bits in net.weights.items()
    ]
    return {
        "kind": "frozen network",
        "name": net.name,
        "spec id": net.spec.id,
        "nodes": len(net.nodes),
        "input": list(net.activations[net.input].shape),
        "golden images": len(net.golden[net.input]),
        "report": dict(net.report),
        "layers": layers,
    }


def _artifact(path: Path) -> Description:
    head = parse_json(read_bytes(path / "artifact.json", "the artifact's", BundleError), str(path), BundleError)
    try:
        files = []
        for name, digest in sorted(head["files"].items()):
            data = read_bytes(path / Path(name).name, "the artifact's file", BundleError)
            if sha256(data) != digest:
                raise BundleError(f"{path / name} is not the file that artifact.json names: compile it again")
            files.append({"file": name, "bytes": len(data), "sha256": digest})
        kernels = head["variants"][0]["kernels"]
        reasons = [
            {key: row[key] for key in ("operator", "name", "reason")}
            for kernel in kernels
            if kernel["arithmetic"] != "integer"
            for row in kernel.get("nodes", [kernel])
        ]
        return {
            "kind": "compiled artifact",
            "graph": head["graph"],
            "target": dict(head["target"]),
            "variants": [variant["target"]["name"] for variant in head["variants"]],
            "arena bytes": head["variants"][0]["arena_bytes"],
            "parameters": len(head["params"]),
            "versions": dict(head["versions"]),
            "files": files,
            "not integer": reasons,
            "kernels": [{key: value for key, value in kernel.items() if key != "nodes"} for kernel in kernels],
        }
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as e:
        raise BundleError(f"{path}/artifact.json is damaged ({e!r}): compile it again") from e


def _spec(path: Path) -> Description:
    try:
        spec = SubnetSpec.parse(read_bytes(path, "the subnet spec", ModelError))
    except QDeployError as e:
        raise ModelError(f"{path} is JSON, but no subnet spec ({e}); for a bundle name its folder") from e
    layers = [
        {"layer": x.layer, "weight bits": x.weight_bits, "activation bits": x.activation_bits}
        | {key: value for key in ("granularity", "symmetry") if (value := getattr(x, key)) is not None}
        for x in spec.layers
    ]
    found: Description = {"kind": "subnet spec", "network": spec.network, "id": spec.id}
    if spec.architecture is not None:
        found["architecture"] = spec.architecture.to_json()
    return found | {"layers": layers}


def _run(path: Path) -> Description:
    from qdeploy.recipe import from_dict

    def value(name: str, what: str) -> Any:
        return parse_json(read_bytes(path / name, what, ModelError), str(path / name), ModelError)

    recipe = from_dict(value("recipe.json", "the run's recipe"))
    phases = [
        {"phase": name, "bytes": (path / f"{name}.checkpoint").stat().st_size}
        for name in ("float", "mixed", "uniform", "precision", "quantized")
        if (path / f"{name}.checkpoint").is_file()
    ]
    found: Description = {
        "kind": "training run",
        "name": recipe.name,
        "network": recipe.network.name,
        "data": recipe.data.name,
        "method": recipe.quantization.method,
        "widths": list(recipe.quantization.widths),
        "checkpoints": phases,
    }
    if (path / "report.json").is_file():
        report = value("report.json", "the run's report")
        try:
            accuracy: dict[str, Any] = {"float": float(report["float"])} | dict(report["levels"])
        except (KeyError, TypeError, ValueError) as e:
            raise ModelError(f"{path / 'report.json'} is damaged: run `qdeploy train` on {path} again") from e
        found["accuracy %"] = accuracy
        if isinstance(report.get("size_kib"), dict):
            found["size KiB"] = report["size_kib"]
    return found


# the file that tells what a folder is
FOLDERS: dict[str, Callable[[Path], Description]] = {
    "release.json": _bundle,
    "frozen.json": _frozen,
    "artifact.json": _artifact,
    "recipe.json": _run,
}
