"""Integer graph -> Program for a GPU: launches of the kernels in device/, `prepare` on the host as for processors.

Activations of a whole batch are [image][h][w][pitch] uint8; there is no border, since windows are cut while they are
read. Float regions run on the host, one image at a time, by the same code as in an artifact for the processor.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

from qdeploy.compile.cuda.launch import NOTHING, HostCall, Launch, covering
from qdeploy.compile.cuda.spec import CudaConv, Gpu, Tile, cuda_conv, pitch_of
from qdeploy.compile.expression import Term
from qdeploy.compile.floating import compile_region
from qdeploy.compile.graph import Graph, Op, Operand, swapped
from qdeploy.compile.kernels.layout import Layout
from qdeploy.compile.llvm import Dot
from qdeploy.compile.lower import INPUT, OUTPUT, Lowering, _bytes
from qdeploy.compile.program import Call, Place, Program
from qdeploy.errors import CompileError

HANDLE = 64  # bytes before packed parameters, where host.cc keeps what it knows of their copy on the GPU
MOST_BYTES = 2**31 - 1  # of a tensor of a batch: kernels count bytes in int32
MOST_RANK = 8  # sizes of a shuffle
MOST_OPERANDS = 16  # of an element-wise operator
THEN = {"table": 1, "add": 2}  # numbers of device/conv.cuh


@dataclass(frozen=True)
class CudaProgram(Program):
    """`body` and the ways out are launches and host calls.

    `entries`: CUDA C++ for each kernel; `image_bytes`: of each activation, of one of the `batch` images.
    """

    entries: tuple[str, ...]
    image_bytes: dict[str, int]
    batch: int


class CudaLowering(Lowering):
    """Makes one program; packing is inherited, with weights as spec.py lays them out."""

    def __init__(self, graph: Graph, dot: Dot, gpu: Gpu) -> None:
        super().__init__(graph, dot, 1, False, {})
        self.graph, self.gpu = graph, gpu  # windows are cut in kernels: no copies for the sake of borders
        self.layouts = {name: Layout(*tensor.shape) for name, tensor in graph.tensors.items()}
        self.packed_bytes = HANDLE
        self.constants = {op.output for op in graph.ops if op.kind == "constant"}
        self.copies: dict[str, str] = {}  # constants that kernels read as activations
        self.entries: dict[str, str] = {}  # kernel -> CUDA C++
        self.terms: dict[tuple[Term, int], str] = {}  # element-wise operators with a kernel of their own
        self.image_bytes: dict[str, int] = {}  # of each activation, one image

    # sizes

    def _pitch(self, tensor: str) -> int:
        """Bytes from pixel to pixel; constants are packed without gaps."""
        channels = self.layouts[tensor].channels
        return channels if tensor in self.constants else pitch_of(channels)

    def _image(self, tensor: str) -> int:
        """Bytes from image to image: 0 for constants."""
        layout = self.layouts[tensor]
        return 0 if tensor in self.constants else layout.height * layout.width * self._pitch(tensor)

    def _pixels(self, tensor: str) -> int:
        return self.batch * self.layouts[tensor].height * self.layouts[tensor].width

    def _sizes(self, ops: Sequence[Op]) -> dict[str, int]:
        """Bytes of every activation of a batch."""
        found = {op.output: self._image(op.output) for op in ops if op.output in self.layouts}
        for tensor, name in self.copies.items():
            layout = self.layouts[tensor]
            found[name] = layout.height * layout.width * pitch_of(layout.channels)
        found |= {name: _bytes(kind.shape, kind.dtype) for name, kind in self.graph.floats.items()}
        for region in self.regions.values():
            found |= {name: _bytes(*kind) for name, kind in region.values.items()}
        for name, size in found.items():
            if size * self.batch > MOST_BYTES:
                raise CompileError(f"tensor {name} of {self.batch} images has {size * self.batch} bytes: use fewer")
        self.image_bytes = found
        return {name: size * self.batch for name, size in found.items()}

    # the program

    def program(self) -> CudaProgram:
        """All calls; raises CompileError for an operator without a kernel, or a tensor that is too large."""
        regions = [op for op in self.graph.ops if op.region is not None]
        self.regions = {op.output: compile_region(op, f"float{i}") for i, op in enumerate(regions)}
        prepare = self._prepare()
        ops = [op for op in self.graph.ops if op.kind != "constant"]
        body = [call for op in ops for call in self._calls(op)]
        way_out = self._way_out()
        codes_out = () if isinstance(self.graph.output, str) else (self._codes_out(self.graph.output),)
        values = self._sizes(ops)
        specs: dict[str, CudaConv] = {op.output: self._conv_spec(op) for op in ops if op.kind == "conv"}
        calls = [replace(call, bytes=self._touched(call, specs)) for call in body]
        return CudaProgram(
            self.graph, self.kernels, tuple(prepare), tuple(calls), (way_out,), codes_out, values, self.packed_bytes,
            dict(specs), tuple(self.entries.values()), self.image_bytes, self.batch,
        )  # fmt: skip

    def _touched(self, call: Call, specs: dict[str, CudaConv]) -> int:
        """Bytes of activations and weights that a call touches, for one image."""
        weights = specs[call.op].weight_bytes if call.op in specs else 0
        return weights + sum(self.image_bytes[str(place.at)] for place in call.args if place.area == "values")

    def _launch(
        self, kernel: str, struct_name: str, body: str, args: Sequence[Place], numbers: Sequence[int], op: str,
        grid: tuple[int, int, int], block: int = 128,
    ) -> Launch:  # fmt: skip
        """A launch of `body`, a device function over `struct_name`."""
        self.entries[kernel] = f"KERNEL({kernel}, {struct_name}, {block}, kernels::{body})"
        return Launch(kernel, tuple(args), 0, op, "", tuple(numbers), grid, block)

    def _conv_spec(self, op: Op) -> CudaConv:
        return self._conv_tile(op)[0]

    def _conv_tile(self, op: Op) -> tuple[CudaConv, Tile | None]:
        x, y = self.layouts[op.inputs[0].tensor], self.layouts[op.output]
        return cuda_conv(x, y, op.window, op.groups, self.batch, self.gpu)

    # one batch

    def _calls(self, op: Op) -> list[Call]:
        if op.region is not None:
            return self._region(op)
        makers: dict[str, Callable[[Op], Launch]] = {
            "conv": self._conv, "quantize": self._quantize, "dequantize": self._dequantize, "codes": self._own_codes,
            "max_pool": self._pool, "average_pool": self._pool, "mean": self._mean, "table": self._table,
            "softmax": self._softmax, "move": self._move, "insert": self._move, "shuffle": self._shuffle,
        }  # fmt: skip
        if op.kind == "concat":
            return list(self._concat(op))
        reads = [*op.inputs[:1]] if op.kind in ("conv", "max_pool", "average_pool", "mean", "table") else []
        reads += op.inputs[1:] if op.kind == "conv" else []
        copies = [copy for operand in reads for copy in self._copy(operand.tensor, op.output)]
        return [*copies, makers.get(op.kind, self._elementwise)(op)]

    def _region(self, op: Op) -> list[Call]:
        calls = super()._region(op)
        assert op.region is not None
        reads = tuple(name for name in op.region.inputs if name != self.graph.input)
        found = [HostCall(call.kernel, call.args, 0, call.op) for call in calls]
        found[0] = replace(found[0], reads=reads)
        found[-1] = replace(found[-1], writes=op.region.outputs)
        return list(found)

    def _copy(self, tensor: str, op: str) -> list[Launch]:
        """A constant as an activation, for kernels that read whole words; nothing for others."""
        if tensor not in self.constants or tensor in self.copies:
            return []
        self.copies[tensor] = f"{tensor}.copy"
        x = self.layouts[tensor]
        target = Place("values", self.copies[tensor])
        numbers = [
            *(self._pixels(tensor), x.height, x.width, x.height, x.width, x.channels, pitch_of(x.channels)),
            *(x.channels, 0, 1, 1, 0, 0, 0),
        ]
        args = [self.packed[tensor][0], self._quantizer(tensor), target]
        grid = covering(self._pixels(tensor) * x.channels)
        return [self._launch("move", "MoveArgs", "move", args, numbers, op, grid)]

    def _words(self, tensor: str) -> Place:
        """Where an activation lies with its pitch, constants too."""
        return Place("values", self.copies.get(tensor, tensor))

    # convolutions

    def _conv(self, op: Op) -> Launch:
        spec, tile = self._conv_tile(op)
        x, y, window = spec.x, spec.y, spec.window
        weights, integers, scale = self.packed[op.own]
        args = [self._words(op.inputs[0].tensor), weights, integers, scale, self._grid(op.inputs[0])]
        then, then_args, then_numbers = self._then(op)
        args += [self._quantizer(op.own), *then_args, Place("values", op.output)]
        pixels = self._pixels(op.output)
        numbers = [
            *(pixels, y.height, y.width, x.height, x.width, pitch_of(x.channels), self._pitch(op.output)),
            *(window.kernel[1], prod(window.kernel), *window.stride, *window.padding[:2], *window.dilation),
            *(spec.tap_bytes, spec.inputs, spec.outputs, spec.groups, spec.padded, then, *then_numbers),
        ]
        kernel, name, block = spec.kernel, spec.kernel, 128
        if tile is not None:
            block = tile.threads
            name = f"conv_gemm<{tile.rows}, {tile.columns}, {tile.slices}, {spec.vector}>"
            grid = (-(-pixels // tile.pixels), -(-spec.outputs // tile.channels), spec.groups)
        elif spec.depthwise:
            lines = self.batch * y.height
            grid = covering(lines * -(-y.width // 4) * (spec.padded // 4))
        elif kernel == "conv_grouped":
            grid = covering(pixels * y.channels)
        else:
            name, grid = f"conv_gemv<{spec.vector}>", (-(-spec.outputs // 4), pixels, 1)
        return self._launch(kernel, "ConvArgs", name, args, numbers, op.output, grid, block)

    def _then(self, op: Op) -> tuple[int, list[Place], list[int]]:
        """What a convolution does to its codes: kind, pointers (table, other, three quantizers), numbers."""
        if op.then is None:
            return 0, [NOTHING] * 5, [0] * 4
        then = op.then.op
        if then.kind == "table":
            return THEN["table"], [self.packed[op.output][0], *[NOTHING] * 4], [0] * 4
        a, b = then.inputs
        signed = [a.grid.signed, b.grid.signed, self.graph.tensors[op.output].quantizer.signed]
        args = [NOTHING, self._words(op.inputs[-1].tensor), self._grid(a), self._grid(b), self._quantizer(op.output)]
        return THEN["add"], args, [int(a.tensor == op.then.tensor), *map(int, signed)]

    # pools

    def _pool_args(self, op: Op) -> tuple[list[Place], list[int]]:
        """PoolArgs of device/pointwise.cuh."""
        operand, window = op.inputs[0], op.window
        x, y = self.layouts[operand.tensor], self.layouts[op.output]
        args = [
            self._words(operand.tensor),
            self._grid(operand),
            self._quantizer(op.output),
            Place("values", op.output),
        ]
        signed = self.graph.tensors[op.output].quantizer.signed
        return args, [
            *(self._pixels(op.output), y.height, y.width, x.height, x.width, pitch_of(x.channels)),
            *(self._pitch(op.output), x.channels, *window.kernel, *window.stride, *window.padding[:2]),
            *(*window.dilation, int(op.count_padding), int(signed)),
        ]

    def _pool(self, op: Op) -> Launch:
        args, numbers = self._pool_args(op)
        grid = covering(self._pixels(op.output) * -(-self.layouts[op.output].channels // 4))
        return self._launch(op.kind, "PoolArgs", op.kind, args, numbers, op.output, grid)

    def _mean(self, op: Op) -> Launch:
        args, numbers = self._pool_args(op)
        grid = (-(-self.layouts[op.output].channels // 128), self.batch, 1)
        return self._launch("mean", "PoolArgs", "mean", args, numbers, op.output, grid, 256)

    # edges

    def _edge(self, kernel: str, tensor: str, x: Place, quant: Place, y: Place, signed: bool, op: str) -> Launch:
        """quantize, dequantize or own_codes; `tensor`: the one of codes."""
        layout = self.layouts[tensor]
        if tensor in self.constants:
            raise CompileError(f"tensor {tensor} is the same for every input: a network that returns it needs no GPU")
        numbers = [self._pixels(tensor), layout.channels, layout.height, layout.width, self._pitch(tensor), int(signed)]
        count = self._pixels(tensor) * (1 if kernel == "quantize" else layout.channels)
        return self._launch(kernel, "EdgeArgs", kernel, [x, quant, y], numbers, op, covering(count))

    def _quantize(self, op: Op) -> Launch:
        source = INPUT if op.source is None else Place("values", op.source)
        target = Place("values", op.output)
        return self._edge("quantize", op.output, source, self._quantizer(op.output), target, False, op.output)

    def _dequantize(self, op: Op) -> Launch:
        operand = op.inputs[0]
        args = (self._codes(operand.tensor), self._grid(operand), Place("values", op.output))
        return self._edge("dequantize", operand.tensor, *args, False, op.output)

    def _own_codes(self, op: Op) -> Launch:
        operand = op.inputs[0]
        args = (self._codes(operand.tensor), NOTHING, Place("values", op.output))
        return self._edge("own_codes", operand.tensor, *args, operand.grid.signed, op.output)

    def _way_out(self) -> Launch:
        operand = self.graph.output
        if isinstance(operand, str):
            count = prod(self.graph.output_shape)
            args = [Place("values", operand), OUTPUT]
            return self._launch("copy_words", "CopyArgs", "copy_words", args, [count], "", covering(count))
        if self.graph.softmax:
            return self._softmax_launch(operand.tensor, self.packed["softmax"][0], NOTHING, OUTPUT, 0, "")
        codes, quant = self._codes(operand.tensor), self._grid(operand)
        return self._edge("dequantize", operand.tensor, codes, quant, OUTPUT, False, "")

    def _codes_out(self, operand: Operand) -> Launch:
        codes = self._codes(operand.tensor)
        return self._edge("own_codes", operand.tensor, codes, NOTHING, OUTPUT, operand.grid.signed, "")

    # element-wise

    def _table(self, op: Op) -> Launch:
        source = op.inputs[0].tensor
        words = -(-self.layouts[op.output].channels // 4)
        args = [self._words(source), self.packed[op.output][0], Place("values", op.output)]
        numbers = [self._pixels(op.output), words, pitch_of(self.layouts[source].channels), self._pitch(op.output)]
        grid = covering(self._pixels(op.output) * words)
        return self._launch("look_up", "TableArgs", "look_up", args, numbers, op.output, grid)

    def _elementwise(self, op: Op) -> Launch:
        """add, mul, or any term: then the kernel is written for it."""
        if op.term is None or len(op.inputs) > MOST_OPERANDS:
            raise CompileError(
                f"operator {op.name}: there is no CUDA kernel for {op.kind} of {len(op.inputs)} operands"
            )
        y, operands, count = self.layouts[op.output], list(op.inputs), len(op.inputs)
        shapes = [self.layouts[operand.tensor].shape for operand in operands]
        if op.kind == "add" and swapped(*shapes):
            operands.reverse()
        kernel = op.kind
        if op.kind not in ("add", "mul"):
            kernel = self.terms.setdefault((op.term, count), f"elementwise_{len(self.terms)}")
        words = -(-y.channels // 4)
        args = [*(self._codes(o.tensor) for o in operands), *(self._grid(o) for o in operands)]
        args += [self._quantizer(op.output), Place("values", op.output)]
        numbers = [self._pixels(op.output), y.height, y.width, words, self._pitch(op.output)]
        for operand in operands:
            numbers += self._strides(operand.tensor)
        quantizers = [*(o.grid for o in operands), self.graph.tensors[op.output].quantizer]
        numbers += [int(quantizer.signed) for quantizer in quantizers]
        compute, grid = kernel.capitalize(), covering(self._pixels(op.output) * words)
        name = f"elementwise<{count}, {compute}>"
        launch = self._launch(kernel, f"ElementArgs<{count}>", name, args, numbers, op.output, grid)
        if op.kind not in ("add", "mul"):
            self.entries[kernel] = f"{term_struct(compute, op.term, count)}\n{self.entries[kernel]}"
        return launch

    def _strides(self, tensor: str) -> list[int]:
        """Bytes between images, rows, columns and channels: 0 along what has one place and is broadcast."""
        layout, pitch = self.layouts[tensor], self._pitch(tensor)
        row = layout.width * pitch if layout.height > 1 else 0
        return [self._image(tensor), row, pitch if layout.width > 1 else 0, int(layout.channels > 1)]

    def _concat(self, op: Op) -> list[Launch]:
        y, start, found = self.layouts[op.output], 0, []
        for operand in op.inputs:
            channels = self.layouts[operand.tensor].channels
            args = [self._codes(operand.tensor), self._grid(operand), self._quantizer(op.output)]
            numbers = [
                *(self._pixels(op.output), channels, start, y.height * y.width, self._image(operand.tensor)),
                *(self._pitch(operand.tensor), self._pitch(op.output)),
            ]
            args.append(Place("values", op.output))
            grid = covering(self._pixels(op.output) * channels)
            found.append(self._launch("concat_part", "PartArgs", "concat_part", args, numbers, op.output, grid))
            start += channels
        return found

    # moves and softmax

    def _move(self, op: Op) -> Launch:
        operand, window = op.inputs[0], op.window
        x, y = self.layouts[operand.tensor], self.layouts[op.output]
        numbers = [
            *(self._pixels(op.output), y.height, y.width, x.height, x.width, self._pitch(operand.tensor)),
            *(self._pitch(op.output), y.channels, self._image(operand.tensor), *window.stride, *window.padding[:2]),
            int(op.kind == "insert"),
        ]
        args = [self._codes(operand.tensor), self._quantizer(op.output), Place("values", op.output)]
        grid = covering(self._pixels(op.output) * y.channels)
        return self._launch("move", "MoveArgs", "move", args, numbers, op.output, grid)

    def _shuffle(self, op: Op) -> Launch:
        move, source = op.shuffle, op.inputs[0].tensor
        assert move is not None
        if len(move.sizes) > MOST_RANK:
            raise CompileError(f"operator {op.name}: there is no CUDA kernel for a move along {len(move.sizes)} axes")
        x, y = self.layouts[source], self.layouts[op.output]
        per_image, fill = prod(y.shape), [1] * (MOST_RANK - len(move.sizes))
        numbers = [
            *(self.batch * per_image, x.height * x.width, y.height * y.width, self._pitch(source)),
            *(self._pitch(op.output), self._image(source), self._image(op.output), per_image),
            *(len(move.sizes), move.offset, *move.sizes, *fill, *move.steps, *fill),
        ]
        args, grid = [self._codes(source), Place("values", op.output)], covering(self.batch * per_image)
        return self._launch("shuffle", "ShuffleArgs", "shuffle", args, numbers, op.output, grid)

    def _softmax(self, op: Op) -> Launch:
        target, quant = Place("values", op.output), self._quantizer(op.output)
        exponentials = self.packed[op.output][0]
        return self._softmax_launch(
            op.inputs[0].tensor, exponentials, quant, target, self._pitch(op.output), op.output
        )  # fmt: skip

    def _softmax_launch(
        self, tensor: str, exponentials: Place, quant: Place, target: Place, pitch: int, op: str
    ) -> Launch:  # fmt: skip
        x, pixels = self.layouts[tensor], self._pixels(tensor)
        numbers = [pixels, x.channels, x.height, x.width, self._pitch(tensor), pitch]
        args = [self._codes(tensor), exponentials, quant, target]
        return self._launch("softmax", "SoftmaxArgs", "softmax", args, numbers, op, (pixels, 1, 1))


# Terms ---------------------------------------------------------------------------------------------------------------


def term_struct(name: str, term: Term, count: int) -> str:
    """CUDA C++ of a Compute of device/elementwise.cuh: `term` over real values, each operation rounded by itself."""
    known: dict[Term, str] = {}
    lines: list[str] = []
    functions = {
        "add": "__fadd_rn", "sub": "__fsub_rn", "mul": "__fmul_rn", "div": "__fdiv_rn", "min": "fminf", "max": "fmaxf",
    }  # fmt: skip

    def value(t: Term) -> str:
        if t.op == "operand":
            return f"r{int(t.value)}"
        if t.op == "constant":
            return f"__uint_as_float(0x{struct.unpack('<I', struct.pack('<f', t.value))[0]:08x}u)"
        if t not in known:
            a, b = (value(arg) for arg in t.args)
            known[t] = f"v{len(known)}"
            lines.append(f"    float {known[t]} = {functions[t.op]}({a}, {b});")
        return known[t]

    result = value(term)
    reals = [f"    float r{i} = real_of(x[{i}], from[{i}]);" for i in range(count)]
    return "\n".join([
        f"struct {name} {{",
        f"  Quant from[{count}], q;",
        f"  __device__ __forceinline__ explicit {name}(const ElementArgs<{count}>& a) : q(load_quant(a.quant)) {{",
        f"    for (int i = 0; i < {count}; i++) from[i] = load_quant(a.quants[i]);",
        "  }",
        "  __device__ __forceinline__ int code(const int* x) const {",
        *reals, *lines,
        f"    return to_code(__fdiv_rn({result}, q.scale), q);",
        "  }",
        "};",
    ])  # fmt: skip


def lower_cuda(graph: Graph, dot: Dot, gpu: Gpu) -> CudaProgram:
    """The program of a fused `graph` for a `gpu`; `dot`: of the host's processor, for what is packed there."""
    return CudaLowering(graph, dot, gpu).program()
