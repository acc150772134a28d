"""Fusion on the integer graph: fewer operators, the same codes.

A convolution's own quantizer stays what it is when an operator is fused into it, so every code is what it was without
fusion; codes that only the fused operator reads do not go to memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from qdeploy.compile.graph import Graph, Op, Operand, Then

ELEMENTWISE = ("requantize", "table", "add", "sub", "mul", "elementwise")
MAX_STEPS = 8  # operators in one table


def fuse(graph: Graph, lookup: bool) -> Graph:
    """All fusions; tables go into convolutions only where kernels can look up whole vectors (`lookup`)."""
    return epilogues(live(chains(graph)), lookup)


def operands(op: Op) -> Iterator[Operand]:
    """Everything that an operator, or one that is fused into it, reads."""
    yield from op.inputs
    for step in op.steps:
        yield from operands(step)
    if op.then is not None:
        yield from operands(op.then.op)


def parts(op: Op) -> tuple[Op, ...]:
    """The file's operators that `op` stands for, more than one after fusion."""
    if op.then is not None:
        return (op, *parts(op.then.op))
    return op.steps or (op,)


def chains(graph: Graph) -> Graph:
    """One table for each element-wise operator whose operands all depend on the same codes, as x * hard_sigmoid(x)."""
    made: dict[str, Op] = {}  # tensor -> the table that makes it of another tensor's codes
    ops = []
    for op in graph.ops:
        if op.kind in ELEMENTWISE:
            found = _one_table(op, made, graph)
            if found is not None:
                op = made[found.output] = found
        ops.append(op)
    return replace(graph, ops=tuple(ops))


def _one_table(op: Op, made: dict[str, Op], graph: Graph) -> Op | None:
    """`op` as a table over one tensor; None where it is none."""
    inputs = [made[o.tensor].inputs[0] if o.tensor in made else o for o in op.inputs]
    shapes = {graph.tensors[name].shape for name in (inputs[0].tensor, op.output)}
    if len({operand.tensor for operand in inputs}) > 1 or len(shapes) > 1:
        return None
    steps: dict[str, Op] = {}
    for operand in op.inputs:
        if operand.tensor in made:
            before = made[operand.tensor]
            steps |= {step.output: step for step in before.steps or (before,)}
    own = op if len(op.inputs) > 1 else replace(op, kind="table")
    if not steps or len(steps) >= MAX_STEPS:
        return own if own.kind == "table" else None
    source = next(o for o in inputs if o.tensor not in steps)
    return Op("table", op.name, (source,), op.output, steps=(*steps.values(), own))


def live(graph: Graph) -> Graph:
    """`graph` without operators that nothing reads any more."""
    output = graph.output if isinstance(graph.output, str) else graph.output.tensor
    needed, kept = {output}, []
    for op in reversed(graph.ops):
        if needed.intersection(op.writes):
            kept.append(op)
            needed.update(op.reads)
    steps = {step.output for op in kept for step in op.steps}
    tensors = {name: tensor for name, tensor in graph.tensors.items() if name in needed | steps}
    return replace(graph, ops=tuple(reversed(kept)), tensors=tensors)


def epilogues(graph: Graph, lookup: bool) -> Graph:
    """Tables and sums that are the only readers of a convolution's codes become its `then`."""
    output = graph.output if isinstance(graph.output, str) else graph.output.tensor
    readers = Counter(name for op in graph.ops for name in op.reads)
    readers[output] += 1
    place = {name: i for i, op in enumerate(graph.ops) for name in op.writes}
    fused: dict[str, Op] = {}  # output of a convolution -> the convolution that takes its place
    gone: set[str] = set()
    for op in graph.ops:
        for operand in op.inputs if op.kind == "add" or (lookup and op.kind == "table") else ():
            conv = graph.ops[place[operand.tensor]]
            if conv.kind != "conv" or readers[operand.tensor] > 1 or conv.output in fused:
                continue
            others = tuple(o for o in op.inputs if o is not operand)
            if op.kind == "add" and not _addable(graph, conv, others[0], place):
                continue
            then = Then(conv.output, op)
            fused[conv.output] = replace(conv, inputs=(*conv.inputs, *others), output=op.output, then=then)
            gone.add(op.output)
            break
    return replace(graph, ops=tuple(fused.get(op.output, op) for op in graph.ops if op.output not in gone))


def _addable(graph: Graph, conv: Op, other: Operand, place: dict[str, int]) -> bool:
    """Whether a convolution can add `other` to its codes: of the same shape, and there before it runs."""
    shapes = [graph.tensors[name].shape for name in (conv.output, other.tensor, conv.inputs[0].tensor)]
    depthwise = conv.groups > 1 and conv.groups == shapes[0][0] == shapes[2][0]
    return not depthwise and shapes[0] == shapes[1] and place[other.tensor] < place[conv.output]
