"""Program -> a shared library of the host that holds machine code for a GPU and what launches it (host.cc)."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from importlib.resources import files
from math import prod
from pathlib import Path

import tvm_ffi

from qdeploy.compile.codegen import arch_of, library, linker
from qdeploy.compile.cuda.launch import NOTHING, POINTER, HostCall, Launch
from qdeploy.compile.cuda.lower import CudaProgram
from qdeploy.compile.cuda.toolchain import compiler_for, cubin, telling
from qdeploy.compile.entry import arena_bytes, prepare_functions
from qdeploy.compile.kernels.join import join_kernel
from qdeploy.compile.llvm import Resolved
from qdeploy.compile.plan import Plan
from qdeploy.compile.program import Call, Place
from qdeploy.errors import CompileError
from qdeploy.files import write_atomic

HERE = files("qdeploy.compile.cuda")
DEVICE = (
    "codes",
    "conv",
    "conv_gemm",
    "conv_direct",
    "pointwise",
    "elementwise",
)  # device/*.cuh behind ptx.cuh, in order
HOST_OPTIONS = ["-c", "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall"]
AREAS = {"packed": "PACKED", "values": "ARENA", "input": "INPUT", "output": "OUTPUT"}


def cuda_library(program: CudaProgram, memory: Plan, resolved: Resolved, identity: str, dump: Path | None) -> bytes:
    """The library; `identity`: hex digits that it carries as its build id. `dump`: a folder for what is compiled.

    Raises CompileError where there is no compiler for the GPU or for the host, or one of them fails.
    """
    arch = resolved.target.gpu
    source = device_source(program.entries)
    inc = Tables(program, memory, arch, compiler_for(arch).version).text()
    if dump is not None:
        write_atomic(dump / "5-kernels.cu", source.encode())
        write_atomic(dump / "5-program.inc", inc.encode())
    entries = prepare_functions(program.graph, program)
    common = {"join": join_kernel("join", resolved.features)}
    host = host_object(linker(arch_of(resolved.tvm)), inc, cubin(source, arch))
    return library(program.kernels, entries, resolved.tvm, identity, dump, common, [host])


def device_source(entries: Iterable[str], ptx: str | None = None) -> str:
    """CUDA C++ of the kernels `entries`; `ptx` stands in for device/ptx.cuh where they are to run without a GPU."""
    inside = ["namespace kernels {", *(_text(f"device/{name}.cuh") for name in DEVICE), "}  // namespace kernels"]
    first = ptx if ptx is not None else _text("device/ptx.cuh")
    return "\n".join([first, *inside, "using namespace kernels;", *entries]) + "\n"


def _text(name: str) -> str:
    return HERE.joinpath(name).read_text(encoding="utf-8")


def host_object(compiler: str, inc: str, machine_code: bytes) -> bytes:
    """host.cc as an object file, with its tables and the machine code; raises CompileError."""
    include = Path(tvm_ffi.__file__).parent / "include"
    with tempfile.TemporaryDirectory() as folder:
        contents = {"program.inc": inc, "driver.h": _text("driver.h"), "host.cc": _text("host.cc")}
        for name, text in contents.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        Path(folder, "machine_code.bin").write_bytes(machine_code)
        command = [compiler, *HOST_OPTIONS, f"-I{include}", "-o", "host.o", "host.cc"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        except OSError as e:
            raise CompileError(f"{compiler} cannot run ({e}): install a C++ compiler") from e
        if done.returncode:
            raise CompileError(f"{compiler} cannot compile the host side: {telling(done.stderr)}")
        return Path(folder, "host.o").read_bytes()


class Tables:
    """program.inc of host.cc: kernels, their arguments with the places of pointers, and the order of steps."""

    def __init__(self, program: CudaProgram, memory: Plan, arch: str, toolkit: str) -> None:
        self.program, self.memory, self.toolkit = program, memory, toolkit
        self.number = int(arch.removeprefix("sm_"))
        self.kernels: list[str] = []
        self.lines: list[str] = []
        self.count = 0

    def text(self) -> str:
        """C++."""
        program = self.program
        rows = {name: [self._step(call) for call in calls] for name, calls in (
            ("Body", program.body), ("Main", program.way_out), ("Codes", program.codes_out))}  # fmt: skip
        steps = [line for name, found in rows.items() for line in _steps(name, found)]
        names = ", ".join(f'"{name}"' for name in self.kernels)
        graph = program.graph
        sizes = {
            "Batch": program.batch, "PackedBytes": program.packed_bytes, "ArenaBytes": arena_bytes(self.memory),
            "InputBytes": 4 * prod(graph.input_shape), "OutputBytes": 4 * prod(graph.output_shape),
            "CodesBytes": prod(graph.output_shape),
        }  # fmt: skip
        hosted = any(isinstance(call, HostCall) for call in program.body)
        return "\n".join([
            f"#define QDEPLOY_CODES {int(bool(program.codes_out))}",
            f"constexpr int kMajor = {self.number // 10}, kMinor = {self.number % 10};",
            f'constexpr const char* kToolkit = "{self.toolkit}";',
            *(f"constexpr uint64_t k{name} = {size}ull;" for name, size in sizes.items()),
            f"constexpr bool kHostSteps = {str(hosted).lower()};",
            f"const char* const kKernels[] = {{{names}}};",
            *self.lines, *steps, "",
        ])  # fmt: skip

    def _step(self, call: Call) -> str:
        """Declares what a step needs; its initializer."""
        self.count += 1
        return self._launch(call) if isinstance(call, Launch) else self._host(call)

    def _launch(self, call: Launch) -> str:
        if call.kernel not in self.kernels:
            self.kernels.append(call.kernel)
        blob, i = call.blob, self.count
        patches = [
            f"{{{POINTER * k}, {AREAS[place.area]}, {self._offset(place)}ull}}"
            for k, place in enumerate(call.args)
            if place != NOTHING
        ]
        self.lines.append(f"alignas(8) const uint8_t kArgs{i}[] = {{{', '.join(map(str, blob))}}};")
        self.lines.append(f"const Patch kPatches{i}[] = {{{', '.join(patches)}}};")
        grid = ", ".join(map(str, call.grid))
        kernel = self.kernels.index(call.kernel)
        head = f"{kernel}, {{{grid}}}, {call.block}, kArgs{i}, {len(blob)}, kPatches{i}, {len(patches)}"
        return f"{{{head}, nullptr, nullptr, nullptr, 0, 0}}"

    def _offset(self, place: Place) -> int:
        return self.memory.offsets[str(place.at)] if place.area == "values" else int(place.at)

    def _host(self, call: Call) -> str:
        """A wrapper that calls a float kernel for one image, and what is copied around it."""
        assert isinstance(call, HostCall)
        i, graph = self.count, self.program.graph
        image = {"input": 4 * prod(graph.input_shape) // self.program.batch, "packed": 0}
        args = []
        for place in call.args:
            step = self.program.image_bytes[str(place.at)] if place.area == "values" else image[place.area]
            area = "arena" if place.area == "values" else place.area
            args.append(f"m.{area} + {self._offset(place)}ull + image * {step}ull")
        types = ", ".join(["void*"] * len(args))
        self.lines += [
            f'extern "C" int32_t {call.kernel}({types});',
            f"int32_t host{i}(const Memory& m, uint64_t image) {{ return {call.kernel}({', '.join(args)}); }}",
        ]
        spans = [self._spans(f"kIn{i}", call.reads), self._spans(f"kOut{i}", call.writes)]
        counts = f"{len(call.reads)}, {len(call.writes)}"
        return f"{{-1, {{0, 0, 0}}, 0, nullptr, 0, nullptr, 0, host{i}, {', '.join(spans)}, {counts}}}"

    def _spans(self, name: str, values: Sequence[str]) -> str:
        """Declares parts of the arena; their name."""
        if not values:
            return "nullptr"
        spans = [f"{{{self.memory.offsets[value]}ull, {self.program.values[value]}ull}}" for value in values]
        self.lines.append(f"const Span {name}[] = {{{', '.join(spans)}}};")
        return name


def _steps(name: str, rows: Sequence[str]) -> list[str]:
    """An array of steps, of one that is never used where there are none, and their number."""
    body = ",\n    ".join(rows) or "{}"
    return [f"const Step k{name}[] = {{\n    {body}}};", f"constexpr unsigned k{name}Steps = {len(rows)};"]
