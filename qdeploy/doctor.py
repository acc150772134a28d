"""`qdeploy doctor`: what this machine has of what qdeploy uses. Reads metadata, looks for programs, imports nothing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qdeploy import __version__
from qdeploy.installed import Requirement, extra_packages, requirements
from qdeploy.selftest import PINNED
from qdeploy.target import FEATURES, local_gpu, missing_features, request_tiles

PYTHONS = ((3, 11), (3, 13))  # the first and the last that are tested
CORE = ("numpy", "click", "rich")
EXTRAS = {  # those that users choose from, and what for
    "device": "pull signed releases",
    "compile": "quantize, export, compile, profile",
    "train": "train, subnet, evaluate",
    "search": "search",
    "serve": "publish, serve, fleet",
    "scale": "--workers",
    "farm": "RPC trackers and servers",
    "cuda": "compile for GPUs where no CUDA toolkit is",
}
LEAST_DISK = 2 << 30  # a compiled network takes some MB, an environment with torch 2 GB
FAMILIES = {  # by arch: kernels, and the instruction sets that they need, the fastest first (compile/llvm.py)
    "x86_64": (
        ("AMX tiles", ("amx-int8", "amx-tile", "avx512f", "avx512bw", "avx512vl", "avx512vnni")),
        ("AVX512-VNNI", ("avx512f", "avx512bw", "avx512vl", "avx512vnni")),
        ("AVX512 without VNNI", ("avx512f", "avx512bw")),
        ("AVX-VNNI", ("avx2", "avxvnni")),
        ("AVX2", ("avx2",)),
        ("SSE2", ("sse2",)),
    ),
    "aarch64": (("i8mm", ("i8mm",)), ("dotprod", ("dotprod",)), ("NEON", ("neon",))),
}
COMPILERS = ("g++", "gcc", "clang++", "clang", "c++", "cc")  # in the order in which TVM looks for them


@dataclass(frozen=True)
class Check:
    """One line: `status` is "ok", "warn" (some commands lack something) or "fail"; `advice` says what to do."""

    name: str
    status: str
    found: str
    advice: str = ""


def examine() -> dict[str, Any]:
    """{"version", "ok": nothing failed, "checks": rows of name, status, found, advice}."""
    checks = [_python(), *_core(), *_extras(requirements()), *_tvm(), _linker(), *_cross(), _processor(), _gpu()]
    checks += [_threads(), *_disks()]
    rows = [asdict(check) for check in checks]
    return {"version": __version__, "ok": all(row["status"] != "fail" for row in rows), "checks": rows}


def failed(found: dict[str, Any]) -> bool:
    """Whether `examine` met something that every install needs."""
    return not found["ok"]


def rendered(found: dict[str, Any]) -> str:
    """`examine`'s value as text: a line a check, and what to do below it."""
    rows = found["checks"]
    width = max(len(row["name"]) for row in rows)
    lines = [f"qdeploy {found['version']}"]
    for row in rows:
        lines.append(f"{row['status']:4}  {row['name']:<{width}}  {row['found']}")
        if row["advice"]:
            lines.append(f"{'':4}  {'':<{width}}  -> {row['advice']}")
    return "\n".join(lines)


# ---- packages --------------------------------------------------------------------------------------------------------


def _python() -> Check:
    here = f"{platform.python_version()} at {sys.prefix}"
    if PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        return Check("python", "ok", here)
    names = " to ".join(".".join(map(str, one)) for one in PYTHONS)
    return Check("python", "fail", here, f"make an environment with Python {names}")


def _core() -> list[Check]:
    asked = {one.package: one for one in requirements() if not one.extra}
    found = []
    for package in CORE:
        one = asked.get(package, Requirement(package, "", ""))
        text = f"{one.installed or 'not installed'}{f' (asked for: {one.asked})' if one.asked else ''}"
        advice = "" if one.met else f"pip install '{package}{one.asked}'"
        found.append(Check(package, "ok" if one.met else "fail", text, advice))
    return found


def _extras(among: Sequence[Requirement]) -> list[Check]:
    """A line for each extra that this version has; and one for packages that every install asks for."""
    found, listed = [], set[str]()
    if wrong := [one for one in among if not one.extra and one.package not in CORE and not one.met]:
        found.append(Check("packages", "warn", _versions(wrong), _pip(wrong)))
    for extra, purpose in EXTRAS.items():
        packages = list(extra_packages(extra, among).values())
        if not packages:
            continue
        wrong = [one for one in packages if not one.met]
        if not wrong:
            fresh = [f"{one.package} {one.installed}" for one in packages if one.package not in listed]
            more = ["packages above"] if len(fresh) < len(packages) else []
            listed |= {one.package for one in packages}
            found.append(Check(f"[{extra}]", "ok", ", ".join(fresh + more)))
        elif all(one.installed is None for one in wrong):
            absent = ", ".join(one.package for one in wrong)
            text, how = f"{absent} not installed (what for: {purpose})", f"pip install 'qdeploy[{extra}]'"
            found.append(Check(f"[{extra}]", "warn", text, f"{how}, if you want that"))
        else:
            found.append(Check(f"[{extra}]", "warn", _versions(wrong), _pip(wrong)))
    return found


def _versions(wrong: Iterable[Requirement]) -> str:
    return ", ".join(f"{one.package} {one.installed or 'is absent'}, asked for {one.asked or 'any'}" for one in wrong)


def _pip(wrong: Iterable[Requirement]) -> str:
    return "pip install " + " ".join(f"'{one.package}{one.asked}'" for one in wrong)


# ---- compilers -------------------------------------------------------------------------------------------------------


def _tvm() -> list[Check]:
    """The compiler's versions against the pins, and its library with LLVM; nothing where it is not installed."""
    spec = find_spec("tvm")  # finds it without importing it
    if spec is None or spec.origin is None:
        return []
    pins = [Requirement(package, f"=={pinned}", "") for package, pinned in PINNED.items()]
    wrong = [one for one in pins if not one.met]
    library = next(Path(spec.origin).parent.glob("lib*/libtvm_compiler.so"), None)
    if library is None:
        return [Check("tvm", "warn", "its compiler (with LLVM) is not there", _pip(pins))]
    if wrong:
        return [Check("tvm", "warn", _versions(wrong), f"{_pip(wrong)}; other versions are probed at each use")]
    versions = ", ".join(f"{one.package} {one.installed}" for one in pins)
    return [Check("tvm", "ok", f"{versions}, with LLVM")]


def _linker() -> Check:
    """The C++ compiler that links libraries for this machine."""
    given = os.environ.get("CXX") or os.environ.get("CC")
    path = next((found for name in ([given] if given else COMPILERS) if (found := shutil.which(name))), None)
    if path is None:
        what = f"CXX or CC names {given}, which is no program" if given else "none"
        return Check("c++ compiler", "warn", f"{what}: compile cannot link", "apt install g++, or set CXX")
    return Check("c++ compiler", "ok", path)


def _cross() -> list[Check]:
    """Compiler and emulator for the other arch."""
    found = []
    for arch in FEATURES:
        if arch == platform.machine():
            continue
        name, cross = f"{arch}-linux-gnu-g++", Path(sys.prefix, "cross")
        given = os.environ.get(f"QDEPLOY_CROSS_{arch.upper()}")
        path = shutil.which(given or name) or shutil.which(str(cross / "usr" / "bin" / name))
        advice = f"apt install g++-{arch.replace('_', '-')}-linux-gnu, or make cross, if you compile for {arch}"
        found.append(Check(f"{arch} linker", "ok" if path else "warn", path or "none", "" if path else advice))
        names = (f"qemu-{arch}-static", f"qemu-{arch}", str(cross / "bin" / f"qemu-{arch}-static"))
        emulator = next((one for program in names if (one := shutil.which(program))), None)
        advice = "" if emulator else "apt install qemu-user-static, if you test packages for it here"
        found.append(Check(f"{arch} emulator", "ok" if emulator else "warn", emulator or "none", advice))
    return found


# ---- the machine -----------------------------------------------------------------------------------------------------


def _processor() -> Check:
    """The best kernels that the instruction sets allow."""
    arch = platform.machine()
    if arch not in FAMILIES:
        known = " and ".join(FAMILIES)
        return Check("processor", "warn", arch, f"kernels are for {known}: use ONNX Runtime (--runtime ort)")
    fit = [name for name, sets in FAMILIES[arch] if not missing_features(sets)]
    if fit[:1] == ["AMX tiles"] and not request_tiles():
        fit = fit[1:]
    if not fit:
        return Check("processor", "warn", f"{arch}, instruction sets unknown", "/proc/cpuinfo cannot be read here")
    more = f", also {', '.join(fit[1:])}" if fit[1:] else ""
    return Check("processor", "ok", f"{arch}, {_cores()} cores, kernels with {fit[0]}{more}")


def _gpu() -> Check:
    found = local_gpu()
    if isinstance(found, str):
        return Check("gpu", "ok", f"none: {found}")
    return Check("gpu", "ok", f"{found.name} ({found.arch}), driver for CUDA {found.driver}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads() -> Check:
    names = ("OMP_NUM_THREADS", "TVM_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    given = {name: os.environ[name] for name in names if name in os.environ}
    text = ", ".join(f"{name}={value}" for name, value in given.items()) or "no variable is set"
    over = [name for name, value in given.items() if not value.isdecimal() or int(value) > _cores()]
    if over:
        return Check("threads", "warn", text, f"set {over[0]} to at most {_cores()}, the cores at hand")
    return Check("threads", "ok", text)


def _disks() -> list[Check]:
    """Room in the working directory and where temporary files go."""
    found = []
    for name, folder in (("disk, here", Path.cwd()), ("disk, temporary", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        text = f"{free / 2**30:.1f} GiB free in {folder}"
        if not os.access(folder, os.W_OK):
            found.append(Check(name, "warn", f"{folder} cannot be written", "work in a folder that you may write"))
        elif free < LEAST_DISK:
            found.append(Check(name, "warn", text, "free some space, or set TMPDIR to another disk"))
        else:
            found.append(Check(name, "ok", text))
    return found
