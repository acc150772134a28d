"""`qdeploy report`: which command made a folder, and what of it a reader wants to see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qdeploy.bundle.store import artifact_pieces, load_tree, pieces_of
from qdeploy.bundle.tables import Manifest
from qdeploy.errors import ModelError, QDeployError
from qdeploy.inspect import describe
from qdeploy.report.demo import demo_blocks, demo_sources
from qdeploy.report.front import Missing, merged, search_blocks
from qdeploy.report.grids import bits_plot
from qdeploy.report.ladder import Rung, accuracy_plot, climb_plot, levels_plot, planes_plot
from qdeploy.report.layers import lint_table, time_plot
from qdeploy.report.page import SECTIONS, Block, Cell, Table, lacking, names, number
from qdeploy.report.reading import expecting, load, load_lines, sane
from qdeploy.report.sensitivity import sensitivity_block
from qdeploy.report.training import training_plot
from qdeploy.report.write import write_page

PROFILE, SIDECARS = "profile.json", "*.onnx.json"
Read = tuple[list[Block], Missing]


@dataclass
class Found:
    """What was recognized in a folder: (kind, what one line says of it), blocks, and what is missing and why."""

    kinds: list[tuple[str, str]] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    missing: Missing = field(default_factory=dict)


def _search(folder: Path) -> Read:
    return search_blocks(folder)


def _title(folder: Path, what: object) -> str:
    return f"{folder.name or folder}: {what}"


def _demo(folder: Path) -> Read:
    path = folder / "demo.json"
    result = load(path)
    if result == {}:
        raise ModelError(f"{path} is empty, the demo has not ended: run `qdeploy demo -o {folder}` again")
    with expecting(path, f"run `qdeploy demo -o {folder}` again"):
        blocks = demo_blocks(result)
        text = demo_sources(result)
        blocks[0] = Block("front", blocks[0].source, [*text, *blocks[0].text], blocks[0].plots, blocks[0].tables)
    missing: Missing = {}
    if (folder / "artifact" / "artifact.json").is_file():
        more, missing = _artifact(folder / "artifact")
        blocks += more
    return blocks, missing


def _rungs(manifest: Manifest) -> list[Rung]:
    """What each level's device fetches from the rung below on."""
    sides, have, rungs = {level.side for level in manifest.levels}, set[int](), []
    for level in manifest.levels:
        fetched = {"graph": 0, "planes": 0, "scales and biases": 0}
        for piece in set(pieces_of(manifest, level.name)) - have:
            kind = "graph" if piece == manifest.skeleton else "scales and biases" if piece in sides else "planes"
            fetched[kind] += manifest.pieces[piece].size
        have |= set(pieces_of(manifest, level.name))
        accuracy = level.info.get("accuracy")
        rungs.append(Rung(level.name, fetched, float(accuracy) if isinstance(accuracy, int | float) else None))
    return rungs


def _bundle(folder: Path) -> Read:
    manifest, described = load_tree(folder), describe(folder)
    sane(described, folder)
    name = _title(folder, f"{manifest.model}, release {manifest.release}")
    rungs = _rungs(manifest)
    climbing = sum(rung.bytes for rung in rungs)
    anew = sum(sum(manifest.pieces[i].size for i in pieces_of(manifest, level.name)) for level in manifest.levels)
    text = [
        f"{len(rungs)} rungs. Climbing through all of them fetches {climbing:,} bytes; a device that pulled each rung "
        f"anew would fetch {anew:,}. Going down fetches 0."
    ]
    programs = [
        sum(manifest.pieces[i].size for i in artifact_pieces(manifest, n)) for n in range(len(manifest.artifacts))
    ]
    if programs:
        text.append(f"The compiled program ({', '.join(f'{size:,} bytes' for size in programs)}) is the same for all "
                    "rungs and is fetched once.")  # fmt: skip
    plots = [climb_plot(rungs)]
    missing: Missing = {}
    if any(rung.accuracy is not None for rung in rungs):
        plots.append(accuracy_plot(rungs))
    else:
        missing[f"Accuracy of each rung ({folder.name})"] = (
            "`qdeploy subnet` and `qdeploy export` write levels that have it; bundle those"
        )
    planes = [row for row in described["planes against their entropy"] if row["planes"] != "all"]
    plots.append(planes_plot([r["planes"] for r in planes], [r["coded"] for r in planes], [r["bound"] for r in planes]))
    blocks = [Block("ladder", name, text, plots)]
    levels, tensors = [level.name for level in manifest.levels], described["tensors"]
    if tensors:
        short = [row["tensor"].removesuffix(".weight") for row in tensors]
        widths = [{n: float(row[level]) for n, row in zip(short, tensors, strict=True)} for level in levels]
        blocks.append(
            Block("bits", name, ["Columns are the weights by name."], [bits_plot(levels, widths, None, short)])
        )
    return blocks, missing


def _artifact(folder: Path) -> Read:
    described = describe(folder)
    path = folder / "artifact.json"
    with expecting(path, "compile it again"):
        where = described["target"]["name"]
        rows, kernels = described["not integer"], described["kernels"]
        integer = sum(kernel["arithmetic"] == "integer" for kernel in kernels)
        text = [f"Compiled for {where}: {len(kernels)} kernels, {integer} of them in integers."]
        found = None
        missing: Missing = {}
        if (folder / PROFILE).is_file():
            found = load(folder / PROFILE)
        else:
            missing[f"Time of each operator ({folder.name})"] = SECTIONS["time"].made_by
        shares = {} if found is None else {row["layer"]: row["share"] for row in found.get("layers", [])}
        tables = [lint_table(rows, shares)] if rows else []
        if not rows:
            text.append("Every operator has an integer kernel.")
    blocks = [Block("time", _title(folder, where), text, [], tables)]
    if found is not None:
        more, lost = _profile(folder)
        blocks, missing = blocks + more, missing | lost
    return blocks, missing


def _profile(folder: Path) -> Read:
    path = folder / PROFILE
    found = load(path)
    with expecting(path, SECTIONS["time"].made_by):
        name = _title(folder, f"profile on {found['machine']['cpu']}")
        if "layers" not in found:
            why = f"{PROFILE} was made without --layers: {SECTIONS['time'].made_by}"
            return [], {f"Time of each operator ({folder.name})": why}
        text = [str(line) for line in found.get("why", [])]
        return [Block("time", name, text, [time_plot(found["layers"])])], {}


def _sensitivity(folder: Path) -> Read:
    path = folder / "sensitivity.json"
    found = load(path)
    with expecting(path, SECTIONS["sensitivity"].made_by):
        return [sensitivity_block(found, _title(folder, "sensitivity"))], {}


def _run(folder: Path) -> Read:
    path, remedy = folder / "metrics.jsonl", "run `qdeploy train` on it again"
    described: Mapping[str, Any] = (
        describe(folder) if (folder / "recipe.json").is_file() else {"name": "a training run"}
    )
    tables: list[Table] = []
    if "accuracy %" in described:
        with expecting(folder / "report.json", remedy):
            levels: list[list[Cell]] = [[str(level), float(value)] for level, value in described["accuracy %"].items()]
            sane(levels, folder / "report.json")
            tables.append(Table(["level", "accuracy on the test images (%)"], levels))
    plots, missing = [], {}
    if path.is_file():
        with expecting(path, remedy):
            rows = [(str(r["phase"]), int(r["epoch"]), {str(k): float(v) for k, v in r["loss"].items()},
                     float(r["images_per_second"])) for r in load_lines(path)]  # fmt: skip
            if not rows:
                raise ValueError("no epoch has ended")
            plots.append(training_plot(rows))
    else:
        why = f"no metrics.jsonl: {SECTIONS['training'].made_by} writes it"
        missing[f"Curves of the training ({folder.name})"] = why
    if not plots and not tables:
        return [], missing
    return [Block("training", _title(folder, described["name"]), [], plots, tables)], missing


def _frozen(folder: Path) -> Read:
    described = describe(folder)
    widths = {row["layer"]: float(row.get("mean bits", row["bits"])) for row in described["layers"]}
    name = _title(folder, described["name"])
    return [
        Block(
            "bits", name, [f"Subnet {described['spec id']}."], [bits_plot([folder.name], [widths], None, list(widths))]
        )
    ], {}


def _files(folder: Path) -> Read:
    """QDQ ONNX files by their sidecars: widths of their weights, and what quantizing did to the outputs."""
    paths = sorted(folder.glob(SIDECARS))
    sidecars = [(path.name.removesuffix(".onnx.json"), load(path)) for path in paths]
    with expecting(folder, "write its files again"):
        sidecars.sort(key=lambda pair: sum(float(w["bits"]) for w in pair[1]["weights"].values()))
        widths: list[dict[str, float]] = [
            {k: float(w["bits"]) for k, w in sidecar["weights"].items()} for _, sidecar in sidecars
        ]
        if not any(widths):
            raise ValueError("no weights")
        labels = [name for name, _ in sidecars]
        order = merged([list(row) for row in widths])
        title = _title(folder, "QDQ ONNX files")
        blocks = [Block("bits", title, [], [bits_plot(labels, widths, None, order)])]
        measured = [(name, s) for name, s in sidecars if s.get("float_output")]
        if measured:
            head = [
                "file",
                "bits a weight",
                "weights (bytes)",
                "output error (%)",
                "float network's class (%)",
                "accuracy (%)",
            ]
            rows = [[name, float(s["average_bits"]), int(s["weight_bytes"]), 100 * float(s["float_output"]["error"]),
                     float(s["float_output"]["agreement"]), s["accuracy"]] for name, s in measured]  # fmt: skip
            text = [f"Measured on {number(measured[0][1]['float_output']['images'])} images. Bundle the levels of one "
                    "ladder to see what a climb costs."]  # fmt: skip
            plot = levels_plot([n for n, _ in measured], [r[2] for r in rows], [r[4] for r in rows])
            blocks.append(Block("ladder", title, text, [plot], [Table(head, rows)]))
        return blocks, {}


# marker: (what the folder is, its reader); a folder may be several of these
KINDS: dict[str, tuple[str, Callable[[Path], Read]]] = {
    "demo.json": ("demo", _demo),
    "search.json": ("search", _search),
    "front.json": ("search", _search),
    "release.json": ("bundle", _bundle),
    "artifact.json": ("compiled artifact", _artifact),
    PROFILE: ("profile", _profile),
    "sensitivity.json": ("sensitivity", _sensitivity),
    "recipe.json": ("training run", _run),
    "metrics.jsonl": ("training run", _run),
    "frozen.json": ("frozen network", _frozen),
    SIDECARS: ("QDQ ONNX files", _files),
}


def recognized(folder: Path) -> dict[str, Callable[[Path], Read]]:
    """{kind: its reader} of all that a folder is; raises ModelError when it is none."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder: name a folder that a command of qdeploy wrote")
    found = {kind: reader for marker, (kind, reader) in KINDS.items() if any(p.is_file() for p in folder.glob(marker))}
    if "compiled artifact" in found:
        found.pop("profile", None)  # the artifact's reader takes it along
    if not found:
        raise ModelError(f"{folder} is no folder that a report knows: none of {', '.join(KINDS)} is in it")
    return found


def read(folder: Path) -> Found:
    """All that a folder shows; what is damaged is `missing`. Raises ModelError when nothing is left to show."""
    found = Found()
    for kind, reader in recognized(folder).items():
        try:
            blocks, missing = reader(folder)
        except QDeployError as e:
            found.missing[f"{kind} ({folder.name})"] = str(e)
            continue
        found.missing |= missing
        found.blocks += blocks
        shown = dict.fromkeys(SECTIONS[block.section].title for block in blocks)
        found.kinds.append((kind, ", ".join(shown).lower()))
    if not found.blocks:
        raise ModelError("; ".join(found.missing.values()))
    return found


def report(folders: Sequence[Path], out: Path, plots: Path | None) -> dict[str, Any]:
    """Write one page about `folders`, and its plots into the folder `plots`; what was recognized and written, as JSON.

    Raises ModelError when a folder shows nothing.
    """
    found = {folder: read(folder) for folder in dict.fromkeys(folders)}
    blocks = [block for one in found.values() for block in one.blocks]
    missing = {key: why for one in found.values() for key, why in one.missing.items()}
    sources = [f"{folder}: {kind} ({shown})" for folder, one in found.items() for kind, shown in one.kinds]
    left = lacking(blocks, missing)
    title = "Report on " + ", ".join(folder.resolve().name for folder in found)
    files = write_page(title, sources, blocks, missing | left, out, plots)
    return {
        "report": str(out),
        "folders": [_row(folder, one) for folder, one in found.items()],
        "plots": [str(path) for path in files],
        "figures": list(names(plot for block in blocks for plot in block.plots)),
        "missing": missing | left,
    }


def _row(folder: Path, found: Found) -> Mapping[str, Any]:
    sections = dict.fromkeys(block.section for block in found.blocks)
    return {"folder": str(folder), "kinds": [kind for kind, _ in found.kinds], "sections": list(sections)}
