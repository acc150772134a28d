"""The phases of a compilation as text, for people: `--dump DIR` writes each of them (codegen.py writes the later ones).

1-read.txt   the integer graph as the file has it
2-fused.txt  the same after fusion
3-calls.txt  all kernel calls with their arguments
4-plan.txt   where activations lie in the arena
"""

from __future__ import annotations

from pathlib import Path

from qdeploy.compile.graph import Graph, Op, Window
from qdeploy.compile.plan import Plan
from qdeploy.compile.program import Call, Program
from qdeploy.files import write_atomic


def write_phases(folder: Path, graph: Graph, fused: Graph, program: Program, memory: Plan) -> None:
    """The four files; raises DeviceError where they cannot be written."""
    texts = {
        "1-read": graph_text(graph), "2-fused": graph_text(fused), "3-calls": calls_text(program),
        "4-plan": plan_text(program, memory),
    }  # fmt: skip
    for name, text in texts.items():
        write_atomic(folder / f"{name}.txt", text.encode())


def graph_text(graph: Graph) -> str:
    """A line for each operator, indented ones for what is fused into it or runs in float inside it."""
    shape = "x".join(map(str, graph.input_shape))
    lines = [f"{graph.input} [{shape}] -> {graph.output_name}: {len(graph.ops)} operators"]
    for op in graph.ops:
        lines.append(op_text(graph, op))
        lines += [f"    step {step.kind} {step.name}" for step in op.steps]
        if op.then is not None:
            lines.append(f"    then {op.then.op.kind} {op.then.op.name}")
            lines += [f"        step {step.kind} {step.name}" for step in op.then.op.steps]
        if op.region is not None:
            lines += [f"    {kind} {name}: {reason}" for kind, name, reason in op.region.nodes]
    tail = graph.result + (" (softmax)" if graph.softmax else "")
    return "\n".join([*lines, f"output {tail}"]) + "\n"


def op_text(graph: Graph, op: Op) -> str:
    """One operator: what it reads and writes, and its geometry."""
    outs = ", ".join(f"{name} [{'x'.join(map(str, graph.shape_of(name)))}]" for name in op.writes)
    parts = [f"{op.kind} {op.name}: {', '.join(op.reads) or op.stored or graph.input} -> {outs}"]
    if op.window != Window((1, 1)):
        window = op.window
        parts.append(f"kernel {window.kernel} stride {window.stride} padding {window.padding}")
        if window.dilation != (1, 1):
            parts.append(f"dilation {window.dilation}")
    if op.groups > 1:
        parts.append(f"groups {op.groups}")
    if op.weights is not None:
        parts.append(f"weight {op.weights.weight}")
    return ", ".join(parts)


def calls_text(program: Program) -> str:
    """The program: each call with its arguments."""

    def line(call: Call) -> str:
        return f"{call.kernel}({', '.join(f'{place.area}:{place.at}' for place in call.args)})"

    parts = [
        ("prepare", program.prepare), ("image", program.body), ("main", program.way_out), ("codes", program.codes_out),
    ]  # fmt: skip
    return "".join(f"{name}:\n" + "".join(f"  {line(call)}\n" for call in calls) for name, calls in parts)


def plan_text(program: Program, memory: Plan) -> str:
    """Offset, bytes, first and last call of each activation."""
    lives = program.lives()
    rows = sorted(memory.offsets.items(), key=lambda row: (row[1], row[0]))
    lines = [f"arena: {memory.bytes} bytes, by size {memory.by_size}, bound {memory.bound}"]
    lines += [f"{at:>10} {program.values[n]:>10} {lives[n][0]:>4} {lives[n][1]:>4} {n}" for n, at in rows]
    return "\n".join(lines) + "\n"
