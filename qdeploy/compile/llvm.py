"""Target file -> LLVM target: processor and features checked against LLVM's own lists, and its 8-bit dot product."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from typing import Any

from tvm.target import Target as TvmTarget
from tvm.target import codegen

from qdeploy.errors import CompileError, RecipeError
from qdeploy.target import (
    FEATURES,
    HOST,
    TILE_FEATURES,
    Target,
    machine_flags,
    missing_features,
    request_tiles,
)  # fmt: skip

TRIPLES = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}
LEAST_CPU = {"x86_64": "x86-64", "aarch64": "generic"}  # what every processor of the arch is compared with
LEAST_FEATURES = {"x86_64": ("64bit", "sse2"), "aarch64": ("neon",)}  # what kernels cannot do without
NEON = ("smull", "smlal", "sdot", "usdot", "usmmla")  # 8-bit products of aarch64
SHORTER = {
    "pmaddwd": ("pmaddubsw", 64),
    "smull": ("smlal", 127),
}  # what multiplies faster, and the most |weight| for it
OPT_LEVEL = 2  # LLVM's level 3 takes a third longer and makes longer code, which measured no faster


@dataclass(frozen=True)
class Dot:
    """How a target multiplies 4 codes by 4 signed bytes into each 32-bit lane.

    `instruction`, of x86: vpdpbusd, or pmaddwd (bytes widened to 16 bits), which every x86-64 processor has; of
    aarch64: sdot, usdot, usmmla (8 bytes of 2 windows by 8 bytes of 2 channels, where usdot does not serve better), or
    smull (products of 16 bits, added up in pairs), which every processor has.
    `lanes` output channels share a vector; `registers` vectors hold accumulators, weights and inputs. With `tiles` the
    processor multiplies whole tiles too (AMX). `lookup` is how a vector of 4 * lanes bytes is looked up in a table of
    256: vpermi2b (64 bytes among 128 entries at once), pshufb (among 16), tbl (among 64) or none (one by one).
    """

    instruction: str
    lanes: int
    registers: int
    tiles: bool = False
    lookup: str = "none"

    @property
    def neon(self) -> bool:
        """Vectors are those of aarch64, of 128 bits."""
        return self.instruction in NEON

    @property
    def offset(self) -> int:
        """What is subtracted from codes before they are multiplied: 128 where that needs signed ones."""
        return 128 if self.instruction in ("smull", "smlal", "sdot") else 0

    @property
    def reach(self) -> int:
        """The most |weight| that a shorter product takes exactly; 0 where there is none."""
        return SHORTER[self.instruction][1] if self.instruction in SHORTER and (self.neon or self.lanes > 4) else 0

    @property
    def shorter(self) -> Dot:
        """The shorter product."""
        return replace(self, instruction=SHORTER[self.instruction][0])


@dataclass(frozen=True)
class Resolved:
    """A checked target: what TVM gets, what the artifact records, how its kernels multiply."""

    target: Target
    cpu: str
    tvm: Any  # tvm.target.Target
    features: tuple[str, ...]  # instruction sets that the code may use, LLVM's names, sorted
    dot: Dot


def resolve(target: Target) -> Resolved:
    """Check `target` with LLVM; raises RecipeError for a cpu or feature that it does not know.

    Cpu "host" becomes LLVM's name of this machine less the features that this machine hides (as virtual ones do).
    """
    triple, least = TRIPLES[target.arch], LEAST_CPU[target.arch]
    cpu, features = target.cpu, list(target.features)
    if cpu == HOST:
        if platform.machine() != target.arch:
            machine = f"this machine is {platform.machine()}"
            raise RecipeError(f'target {target.name}: cpu = "host" with arch {target.arch}, but {machine}: name a cpu')
        cpu = str(codegen.llvm_get_system_cpu())
        if not machine_flags():
            raise CompileError('cpu = "host" needs /proc/cpuinfo to know this machine: name a cpu in the target file')
        hidden = missing_features(_required(target.arch, _features(triple, cpu, [])))
        if target.arch == "x86_64" and TILE_FEATURES[0] not in hidden and not request_tiles():
            hidden += TILE_FEATURES  # the kernel keeps them from us
        features = [f"-{name}" for name in hidden] + features
    if not codegen.llvm_is_valid_cpu(cpu, triple):
        known = sorted(str(name) for name in codegen.llvm_get_cpu_archlist(_tvm_target(triple, least, [])))
        raise RecipeError(f"target {target.name}: LLVM knows no {target.arch} cpu {cpu!r}: choose {_near(cpu, known)}")
    for feature in target.features:
        name = feature.lstrip("+-")
        if name not in FEATURES[target.arch]:
            near = _near(name, FEATURES[target.arch])
            raise RecipeError(f"target {target.name}: feature {feature!r} is unknown: choose {near}")
    found = _features(triple, cpu, features)
    for feature in target.features:
        if (feature.lstrip("+-") in found) == feature.startswith("-"):
            raise RecipeError(f"target {target.name}: LLVM does not take feature {feature!r} for cpu {cpu}")
    if not found.issuperset(LEAST_FEATURES[target.arch]):
        what = "a 64-bit processor" if target.arch == "x86_64" else "a processor with NEON"
        raise RecipeError(f"target {target.name}: cpu {cpu} is not {what}")
    required = tuple(_required(target.arch, found))
    return Resolved(target, cpu, _tvm_target(triple, cpu, features), required, choose_dot(found))


def _tvm_target(triple: str, cpu: str, features: list[str]) -> Any:
    value: dict[str, Any] = {"kind": "llvm", "mtriple": triple, "mcpu": cpu, "opt-level": OPT_LEVEL}
    if features:
        value["mattr"] = [f if f[0] in "+-" else f"+{f}" for f in features]
    return TvmTarget(value)


def _features(triple: str, cpu: str, features: list[str]) -> set[str]:
    return {str(name) for name in codegen.llvm_get_cpu_features(_tvm_target(triple, cpu, features))}


def _required(arch: str, features: set[str]) -> list[str]:
    """Those of LLVM's features that are instruction sets a compiler uses unasked (the rest are tuning hints)."""
    return sorted(features & FEATURES[arch])


def _near(name: str, known: Any) -> str:
    import difflib

    close = difflib.get_close_matches(name, list(known), 5, 0.4) or sorted(known)[:8]
    return "one of " + ", ".join(close) + ", ..."


def choose_dot(features: set[str]) -> Dot:
    """The best exact byte dot product that `features` have, and their best way to look up bytes."""
    if "neon" in features:
        found = [name for name, feature in (("usmmla", "i8mm"), ("sdot", "dotprod")) if feature in features]
        return Dot([*found, "smull"][0], 4, 32, lookup="tbl")
    dot = _multiply(features)
    if dot.lanes == 16 and "avx512vbmi" in features:
        return replace(dot, lookup="vpermi2b")
    return replace(dot, lookup="pshufb" if "ssse3" in features else "none")


def _multiply(features: set[str]) -> Dot:
    if {"avx512f", "avx512bw", "avx512vl", "avx512vnni"} <= features:
        return Dot("vpdpbusd", 16, 32, set(TILE_FEATURES) <= features)
    if {"avx512f", "avx512bw"} <= features:
        return Dot("pmaddwd", 16, 32)
    if {"avx2", "avxvnni"} <= features:
        return Dot("vpdpbusd", 8, 16)
    if "avx2" in features:
        return Dot("pmaddwd", 8, 16)
    return Dot("pmaddwd", 4, 16)
