"""Why is int8 (not) faster here? Sentences from measured numbers, and the per-layer table as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SMALL = 0.05  # shares of the time below this are not worth a sentence
EVEN = 0.1  # ratios within this of 1 are called equal


def grouped(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sums over layers of one kind: "operator", "layers", "ms", "share", "macs", "bytes"; slowest first."""
    sums: dict[str, dict[str, Any]] = {}
    for layer in layers:
        name = layer["operator"]
        group = sums.setdefault(name, {"operator": name, "layers": 0, "ms": 0.0, "share": 0.0, "macs": 0, "bytes": 0})
        group["layers"] += 1
        for key in ("ms", "share", "macs", "bytes"):
            group[key] += layer[key]
    return sorted(sums.values(), key=lambda group: -group["ms"])


def times_word(ratio: float) -> str:
    """`ratio` = other time / ours, in words."""
    if abs(ratio - 1) <= EVEN:
        return "as fast as"
    return f"{ratio:.1f} times faster than" if ratio > 1 else f"{1 / ratio:.1f} times slower than"


def headline(found: Mapping[str, Any]) -> str:
    """int8 against fp32, the measured answer."""
    ours, theirs = found["artifact"]["median"], found["float"]["median"]
    text = f"int8 here is {times_word(theirs / ours)} fp32 ONNX Runtime ({ours:.3f} against {theirs:.3f} ms)"
    other = found["onnxruntime"]["median"]
    return f"{text}; ONNX Runtime's own int8 is {times_word(theirs / other)} its fp32 ({other:.3f} ms)."


def counted(number: int, noun: str) -> str:
    """1 layer, 2 layers."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def group_sentence(group: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What one kind of layer does with its time."""
    peak, total = found["peak"], sum(layer["macs"] for layer in found["layers"])
    text = f"{counted(group['layers'], group['operator'] + ' layer')}: {group['share']:.0%} of the time"
    moved = f"{group['bytes'] / 1e3:,.0f} kB at {group['bytes'] / group['ms'] / 1e6:.1f} GB/s"
    if not group["macs"]:
        return f"{text} without a multiply-add; they only move {moved}."
    gops = 2 * group["macs"] / group["ms"] / 1e6
    text += f" for {group['macs'] / total:.0%} of the multiply-adds, {gops:,.0f} GOPS, "
    text += f"{gops / peak['gops']:.0%} of this machine's dot-product peak"
    if group["operator"] == "depthwise conv":
        fastest = max(copy["gbytes_s"] for copy in peak["copies"])
        text += "; an input byte of theirs goes into one output channel only, so dot products cannot help and memory "
        text += f"is their limit: they move {moved}, where a copy reaches {fastest:.0f}"
    return text + "."


def sentences(found: Mapping[str, Any]) -> list[str]:
    """`found` is what `layer_profile` returns; the most telling first."""
    layers = found["layers"]
    lines = [headline(found)]
    lines += [group_sentence(g, found) for g in grouped(layers) if g["share"] >= SMALL]
    floating = [layer for layer in layers if layer["arithmetic"] != "integer"]
    share = sum(layer["share"] for layer in floating)
    if share >= SMALL:
        reasons = ", ".join(sorted({str(layer["reason"]) for layer in floating if layer["reason"]}))
        lines.append(f"{counted(len(floating), 'kernel')} with float steps, {share:.0%} of the time ({reasons}).")
    memory = [layer for layer in layers if layer["bound"] == "memory"]
    if sum(layer["share"] for layer in memory) >= SMALL:
        worst = ", ".join(layer["layer"] for layer in memory[:3])
        lines.append(
            f"{counted(len(memory), 'kernel')} at the speed of memory, {sum(m['share'] for m in memory):.0%} of the "
            f"time (most: {worst}): fewer bits in memory would help them, faster arithmetic would not."
        )
    idle = [layer for layer in layers if layer["bound"] == "neither"]
    if (share := sum(layer["share"] for layer in idle)) >= SMALL:
        worst = ", ".join(layer["layer"] for layer in idle[:3])
        lines.append(
            f"{counted(len(idle), 'kernel')}, {share:.0%} of the time, near neither the arithmetic's nor the memory's "
            f"limit (most: {worst}): too small to fill the machine, or a kernel that could be better."
        )
    whole, between = found["run"]["whole"], found["run"]["between"]
    if between > SMALL * whole:
        lines.append(f"{between / whole:.0%} of a run, {between:.3f} ms, passes between the kernels: calls and checks.")
    return lines


def layer_lines(found: Mapping[str, Any], most: int | None = None) -> list[str]:
    """The table, slowest first, and the sentences behind it."""
    layers, peak = found["layers"], found["peak"]
    copies = ", ".join(f"{copy['gbytes_s']:.0f} GB/s at {copy['bytes'] // 1024} KiB" for copy in peak["copies"])
    lines = [
        f"measured here at most: {peak['gops']:,.0f} GOPS with {peak['dot']}; copies {copies}",
        f"{'layer':34} {'operator':16} {'us':>9} {'share':>6} {'GOPS':>8} {'of peak':>7} {'GB/s':>7} {'limit':10} lint",
    ]
    for layer in layers[:most]:
        name = layer["layer"] if len(layer["layer"]) <= 34 else "..." + layer["layer"][-31:]
        gops = f"{layer['gops']:8.1f} {layer['peak_share']:7.0%}" if layer["macs"] else f"{'-':>8} {'-':>7}"
        lint = layer["arithmetic"] + (f": {layer['reason']}" if layer["reason"] else "")
        lines.append(
            f"{name:34} {layer['operator']:16} {layer['ms'] * 1e3:9.1f} {layer['share']:6.1%} {gops} "
            f"{layer['gbytes_s']:7.1f} {layer['bound']:10} {lint}"
        )
    if most is not None and most < len(layers):
        rest = sum(layer["share"] for layer in layers[most:])
        lines.append(f"{len(layers) - most} more, {rest:.1%} of the time")
    return [*lines, "", *sentences(found)]
