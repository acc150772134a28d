"""TIR functions -> a shared library: PHASES lower them, LLVM makes objects in several processes, a C++ compiler links.

TVM's default pipeline is for scheduled tensor programs and takes as long again; kernels here arrive flat, vectors and
register buffers in place. Kernels are external functions of objects of their own, so nothing is inlined into `main`.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.support import cc
from tvm.tirx import transform

from qdeploy.compile.kernels.emit import on_pointers
from qdeploy.errors import CompileError
from qdeploy.files import write_atomic
from qdeploy.progress import Counter, Echo, silent

Pass = Any
Phase = tuple[str, list[Callable[[], Pass]]]

PHASES: list[Phase] = [
    ("6-flat", [transform.FlattenBuffer, partial(transform.NarrowDataType, 32)]),
    ("7-simple", [transform.StmtSimplify, transform.RemoveNoOp]),
    ("8-lowered", [transform.LowerTVMBuiltin, transform.LowerIntrin]),
]
# Exported functions get TVM's calling convention, which checks arguments, before the last phase.
ENTRY_PHASES: list[Phase] = [*PHASES[:-1], ("7-packed", [transform.MakePackedAPI]), PHASES[-1]]
PARTS = 4  # objects that kernels are divided among, always: the library does not depend on how many cores there are
LINK_OPTIONS = ["-s", "-Wl,-Bsymbolic", "-Wl,-z,relro,-z,now"]  # no names of temporary files; its own kernels only
MODULE = "target.build.llvm"


def library(
    kernels: Mapping[str, tirx.PrimFunc], entries: Mapping[str, tirx.PrimFunc], target: Any, identity: str,
    dump: Path | None = None, common: Mapping[str, tirx.PrimFunc] | None = None, more: Sequence[bytes] = (),
    echo: Echo = silent,
) -> bytes:  # fmt: skip
    """The shared library that exports `entries`, which call `kernels` by name.

    `target`: tvm.target.Target. `identity`: hex digits that the library carries as its build id. `dump`: a folder for
    the functions after each phase. `common` is exported too: what is the same in many libraries, and remembered; so is
    what the object files `more` export.
    Equal input gives equal bytes. Raises CompileError when there is no linker.
    """
    compiler = linker(arch_of(target))
    names = list(kernels)
    jobs: list[tuple[str, dict[str, tirx.PrimFunc], list[Phase]]] = [("entry", dict(entries), ENTRY_PHASES)]
    for i in range(PARTS):
        part = {name: on_pointers(kernels[name]) for name in names[i::PARTS]}
        if part:
            jobs.append((f"kernels{i}", part, PHASES))
    with tempfile.TemporaryDirectory() as folder:
        objects = [Path(folder) / f"{name}.o" for name, _, _ in jobs]
        tasks = [
            partial(write_object, functions, phases, target, path, dump and Path(dump) / name)
            for (name, functions, phases), path in zip(jobs, objects, strict=True)
        ]
        if common:
            objects.append(Path(folder) / "common.o")
            tasks.insert(0, partial(write_common, common, target, objects[-1], dump and Path(dump) / "common"))
        for i, data in enumerate(more):
            objects.append(Path(folder) / f"more{i}.o")
            objects[-1].write_bytes(data)
        share(tasks, Path(folder), echo)
        return link(compiler, objects, identity, Path(folder) / "lib.so")


_common: dict[tuple[str, int], bytes] = {}  # target and functions -> the object that this process made of them


def write_common(functions: Mapping[str, tirx.PrimFunc], target: Any, path: Path, dump: Path | None) -> None:
    """`write_object`, but for a `dump` once in a process."""
    key = str(target), tvm_ffi.structural_hash(tvm.IRModule(dict(functions)))
    if dump is not None or key not in _common:
        write_object(functions, ENTRY_PHASES, target, path, dump)
        _common[key] = path.read_bytes()
    path.write_bytes(_common[key])


def write_object(
    functions: Mapping[str, tirx.PrimFunc], phases: Sequence[Phase], target: Any, path: Path, dump: Path | None
) -> None:
    """Lower `functions` and write LLVM's object file."""
    module = tvm.IRModule(dict(functions))
    with target, tvm.transform.PassContext(opt_level=3):
        module = transform.BindTarget(target.with_host(target))(module)
        write_dump(dump, "5-written", module)
        for name, passes in phases:
            module = tvm.transform.Sequential([make() for make in passes])(module)
            write_dump(dump, name, module)
        tvm.get_global_func(MODULE)(module, target).write_to_file(str(path))


def write_dump(folder: Path | None, phase: str, module: tvm.IRModule) -> None:
    """The module as text, for people."""
    if folder is not None:
        write_atomic(folder.with_name(f"{phase}-{folder.name}.txt"), module.script().encode())


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share(tasks: Sequence[Callable[[], None]], folder: Path, echo: Echo = silent) -> None:
    """Do `tasks` in as many processes as there are cores, this one included; one process where there is no fork.

    `echo` hears how far this process is: the others have as much to do. Raises RuntimeError with the message of the
    first task that failed elsewhere; `folder` is where messages pass.
    """
    count = min(cores(), len(tasks)) if hasattr(os, "fork") else 1
    children: dict[int, Path] = {}
    try:
        for i in range(1, count):
            note = folder / f"{i}.error"
            children[start(tasks[i::count], note)] = note
        counter = Counter(echo, "code", len(tasks), "object", last=False)
        for done, task in enumerate(tasks[::count], 1):
            task()
            counter.at(min(done * count, len(tasks)))
    finally:
        failed = [note for child, note in children.items() if os.waitpid(child, 0)[1] != 0]
    for note in failed:
        raise RuntimeError(note.read_text() if note.exists() else "a process that generates code was killed")


def start(tasks: Sequence[Callable[[], None]], note: Path) -> int:
    """Fork a process that does `tasks` and ends; its number. What goes wrong there is written to `note`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads may run here; the child uses none of theirs
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        for task in tasks:
            task()
        code = 0
    except BaseException as e:
        note.write_text(f"{type(e).__name__}: {e}")
    finally:
        os._exit(code)  # neither handlers nor buffers of the process that was copied


def arch_of(target: Any) -> str:
    """The arch that a tvm.target.Target is for."""
    return str(target.attrs["mtriple"]).partition("-")[0]


def linker(arch: str = "") -> str:
    """The C++ compiler that links for machines of `arch` (default: this one); raises CompileError when there is none.

    For others: what the environment variable names, the compiler of Debian's packages, or the one under .venv/cross.
    """
    if arch in ("", platform.machine()):
        compiler = cc.get_cc()
        if compiler is None or shutil.which(compiler) is None:
            raise CompileError("linking needs a C++ compiler: install one (Debian: apt install g++) or set CXX")
        return str(compiler)
    name, variable = f"{arch}-linux-gnu-g++", f"QDEPLOY_CROSS_{arch.upper()}"
    given = os.environ.get(variable)
    if given and shutil.which(given) is None:
        raise CompileError(f"{variable} names {given}, which is no program here: name a C++ compiler for {arch}")
    found = given or shutil.which(name) or shutil.which(str(Path(sys.prefix, "cross", "usr", "bin", name)))
    if found is None:
        package = f"g++-{arch.replace('_', '-')}-linux-gnu"
        raise CompileError(
            f"linking for {arch} needs the cross-compiler {name}: install it (Debian: apt install {package}), "
            f"unpack one under {sys.prefix}/cross (make cross), or name one in {variable}"
        )
    return found


def link(compiler: str, objects: Sequence[Path], identity: str, out: Path) -> bytes:
    """The shared library of `objects`, with build id `identity`; raises CompileError."""
    options = [*LINK_OPTIONS, f"-Wl,--build-id=0x{identity}"]
    try:
        cc.create_shared(str(out), [str(path) for path in objects], options=options, cc=compiler)
        return out.read_bytes()
    except (RuntimeError, subprocess.SubprocessError, OSError) as e:
        lines = [line for line in str(e).removeprefix("Compilation error:").splitlines() if line.strip()]
        reason = lines[0].strip()[:200] if lines else type(e).__name__
        text = "name a C++ compiler that links for the target's arch (docs/targets.md)"
        raise CompileError(f"{compiler} cannot link the library ({reason}): {text}") from e
