"""Estimated cycles of a model's convolutions on ARM cores, for every way to multiply and the best register tiles.

    python tools/estimate_arm.py MODEL.onnx [--target NAME ...]

Estimates, not measurements: instructions of the kernels' loops over what each core starts in a cycle, as its
optimization guide has it (qdeploy/compile/kernels/arm_tiles.py). Nothing waits for a result or for memory in them, so
they compare ways to compute one layer; real times are longer. With --mca llvm-mca counts the chosen tile's loop too.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from dataclasses import replace
from math import prod
from pathlib import Path

from qdeploy.compile.codegen import PHASES, write_object
from qdeploy.compile.fuse import fuse
from qdeploy.compile.kernels.arm_tiles import CORES, work
from qdeploy.compile.kernels.conv import conv_kernel, cycles, register_tiles
from qdeploy.compile.kernels.emit import on_pointers
from qdeploy.compile.kernels.spec import ConvSpec
from qdeploy.compile.llvm import Resolved, resolve
from qdeploy.compile.lower import convolutions
from qdeploy.compile.read.handlers import read_graph
from qdeploy.qdq import load_model, parse_model
from qdeploy.target import SHIPPED, load_target

TARGETS = ("raspberry-pi-4", "raspberry-pi-5", "neoverse-v1")
SHOWN = 4  # register tiles of a layer
PRODUCTS = ("sdot", "usdot", "sudot", "usmmla", "smull", "smlal")


def alternatives(spec: ConvSpec, resolved: Resolved) -> list[ConvSpec]:
    """A dense convolution with each product that the target has."""
    names = {"usmmla": ("usmmla", "usdot", "sdot", "smull"), "sdot": ("sdot", "smull"), "smull": ("smull",)}
    found = []
    for name in names[resolved.dot.instruction]:
        one = replace(spec, dot=replace(resolved.dot, instruction=name), narrow=False, then=None)
        found += [one, replace(one, narrow=True)] if name == "smull" else [one]
    return [one for one in found if one.multiply.instruction == "usmmla" or one.dot.instruction != "usmmla"]


def whole(spec: ConvSpec, pixels: int, blocks: int) -> float:
    """Estimated cycles of a layer with tiles of `pixels` x `blocks`."""
    rows, width = spec.lines
    runs = [(pixels, width // pixels), (width % pixels, 1)]
    columns = [(blocks, spec.blocks // blocks), (spec.blocks % blocks, 1)]
    each = sum(n * k * cycles(spec, m, b) for m, n in runs for b, k in columns if m and b)
    return spec.groups * rows * each


def describe(spec: ConvSpec) -> str:
    """A layer's geometry."""
    (kh, kw), stride = spec.window.kernel, spec.window.stride[0]
    groups = f", {spec.groups} groups" if spec.groups > 1 else ""
    return f"{spec.x.channels} x {spec.x.height} x {spec.x.width} -> {spec.y.channels}, {kh}x{kw}/{stride}{groups}"


def report(spec: ConvSpec, resolved: Resolved) -> None:
    """A layer's ways, the least cycles first."""
    adds = prod(spec.y.shape) * prod(spec.window.kernel) * spec.inputs
    print(f"{describe(spec)}: {adds:,} multiply-adds")
    if spec.family != "dense":
        print(f"    {spec.family} ({spec.multiply.instruction})")
        return
    for one in alternatives(spec, resolved):
        tiles = [(pixels, blocks, whole(one, pixels, blocks)) for pixels, blocks in register_tiles(one)[:SHOWN]]
        text = ", ".join(f"{pixels}x{4 * blocks}: {cost:,.0f}" for pixels, blocks, cost in tiles)
        best = adds / tiles[0][2]
        print(f"    {one.multiply.instruction:7}{text}  ({best:.1f} multiply-adds a cycle)")


def peaks() -> None:
    """What the inner loop of each way reaches at most, by its instructions alone."""
    print("inner loops, estimated: pixels x channels, multiply-adds a cycle")
    for name, core in CORES.items():
        spec = _square(name)
        for pixels, blocks in register_tiles(spec)[:SHOWN]:
            done = 4 * 16 * pixels * blocks
            print(f"    {name:7}{pixels}x{4 * blocks}: {done / work(spec, pixels, blocks).cycles(core):.1f}")


def _square(instruction: str) -> ConvSpec:
    """A large 1x1 convolution multiplied by `instruction`."""
    from qdeploy.compile.graph import Window
    from qdeploy.compile.kernels.layout import Layout
    from qdeploy.compile.llvm import Dot

    short = instruction == "smlal"
    dot = Dot("smull" if short else instruction, 4, 32, lookup="tbl")
    return ConvSpec(Layout(512, 60, 60), Layout(480, 60, 60), Window((1, 1)), 1, dot, narrow=short)


def counted(spec: ConvSpec, resolved: Resolved, mca: str) -> str:
    """llvm-mca's cycles for one turn of the loop with most products."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.o"
        write_object({"k": on_pointers(conv_kernel("k", spec))}, PHASES, resolved.tvm, path, None)
        dump = subprocess.run(
            ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", "--section=.text", str(path)],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    body = inner_loop(dump)
    if not body:
        return "llvm-mca: no loop: all products are written out"
    command = [mca, "-mtriple=aarch64", f"-mcpu={resolved.cpu}", "-mattr=+dotprod,+i8mm", "-iterations=100"]
    done = subprocess.run(command, input="\n".join(body), capture_output=True, text=True, check=False)
    total = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    if total is None:
        return f"llvm-mca: {done.stderr.strip().splitlines()[0] if done.stderr.strip() else 'no result'}"
    products = sum(line.split()[0] in PRODUCTS for line in body)
    return f"llvm-mca: {int(total[1]) / 100:.0f} cycles for {products} products, {len(body)} instructions (estimate)"


def inner_loop(dump: str) -> list[str]:
    """Instructions of the innermost loop with most products."""
    lines = re.findall(r"^\s*([0-9a-f]+):\s+(.*)$", dump, re.MULTILINE)
    places = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    best: list[str] = []
    for i, (_, text) in enumerate(lines):
        jump = re.match(r"(?:b\.\w+|cbn?z\s+\w+,|tbn?z\s+\w+, #\w+,)\s+([0-9a-f]+)", text)
        if jump and (start := places.get(int(jump[1], 16), i)) < i:
            body = [line for _, line in lines[start:i]]
            inner = not any(re.match(r"(b\.|cbn?z|tbn?z)", line) for line in body)
            if inner and _products(body) > _products(best):
                best = body
    return best


def _products(body: list[str]) -> int:
    return sum(line.split()[0] in PRODUCTS for line in body)


def main() -> None:
    """Print estimates of all convolutions of a model, or of the inner loops alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="QDQ ONNX file; without one, the inner loops alone")
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all three")
    parser.add_argument("--mca", action="store_true", help="count the chosen loops with llvm-mca too (package llvm)")
    given = parser.parse_args()
    peaks()
    if given.model is None:
        return
    mca = shutil.which("llvm-mca") if given.mca else None
    if given.mca and mca is None:
        parser.error("there is no llvm-mca: apt install llvm")
    data, _ = load_model(given.model)
    graph = read_graph(parse_model(data, str(given.model)))
    for name in given.target or TARGETS:
        resolved = resolve(load_target(SHIPPED / f"{name}.toml"))
        print(f"{name} ({resolved.cpu}), estimated cycles: pixels x channels of a tile: cycles of the layer")
        for spec in dict.fromkeys(convolutions(fuse(graph, True), resolved.dot)):
            report(spec, resolved)
            if mca is not None and spec.family == "dense":
                print(f"    {counted(replace(spec, then=None), resolved, mca)}")


if __name__ == "__main__":
    main()
