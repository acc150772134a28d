"""The compile report: what of an artifact is not integer, why, and what share of the time it takes on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.errors import DeviceError
from qdeploy.profile.latency import load_pair
from qdeploy.profile.layers import by_row, called, repeated

REPEATS = 5  # runs: enough to tell a tenth of the time from a hundredth
NAMED = 12  # operators, and parts of a region, that are printed


def lint(artifact: Path, onnx_path: Path, description: Mapping[str, Any]) -> dict[str, Any]:
    """What `artifact` (of artifact.json's content `description`) computes in float, timed with the level `onnx_path`.

    {"target": whose code ran, "operators": their number, "share": of the time that all of these take, "rows": those of
    `kernels` whose arithmetic is float, slowest first, each with its "share", "unmeasured": None}. Where this machine
    cannot run the artifact, or its parameters do not go together, the rows are the first variant's in call order, all
    shares are None, and "unmeasured" says why.
    """
    why: str | None = None
    try:
        loaded, packed, _ = load_pair(artifact, onnx_path)
        x = np.random.default_rng(0).standard_normal(loaded.input_shape).astype(np.float32)
        times, _ = repeated(loaded.ticks(x, packed), loaded.runner(x, packed), REPEATS)
    except DeviceError as e:
        variant, why = description["variants"][0], str(e)
        kernels = [{**row, "share": None} for row in called(variant["kernels"])]
    else:
        variant = loaded.description
        medians = np.median(by_row(times, variant["kernels"]), axis=0)
        shares = (medians / medians.sum()).tolist()
        kernels = [{**row, "share": share} for row, share in zip(called(variant["kernels"]), shares, strict=True)]
        kernels.sort(key=lambda row: -row["share"])
    rows = [row for row in kernels if row["arithmetic"] != "integer"]
    found = {"target": variant["target"]["name"], "operators": len(kernels), "rows": rows, "unmeasured": why}
    return found | {"share": None if why else sum(row["share"] for row in rows)}


def lint_lines(found: Mapping[str, Any]) -> list[str]:
    """`lint`'s value as text: a line for each operator, and below a region's the operators of the file in it."""
    rows, why = found["rows"], found["unmeasured"]
    how = f"share of the time not measured here: {why}" if why else f"{found['share']:.1%} of the time here"
    lines = [f"not integer on {found['target']}: {len(rows)} of {found['operators']} operators, {how}"]
    for row in rows[:NAMED]:
        share = "     -" if row["share"] is None else f"{row['share']:6.1%}"
        nodes = row.get("nodes", [])
        what = "these operators of the file, compiled in float" if nodes else row["reason"]
        lines.append(f"  {share}  {row['operator']} {row['name']}: {what}")
        lines += [f"            {node['operator']} {node['name']}: {node['reason']}" for node in nodes[:NAMED]]
        if len(nodes) > NAMED:
            lines.append(f"            and {len(nodes) - NAMED} more")
    if len(rows) > NAMED:
        more = "" if why else f", {sum(row['share'] for row in rows[NAMED:]):.1%}"
        lines.append(f"  {len(rows) - NAMED} more{more}")
    return lines
