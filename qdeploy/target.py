"""Target: what a model is compiled for, parsed from targets/*.toml, and whether this machine has what it needs."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qdeploy.errors import RecipeError
from qdeploy.files import read_bytes

KINDS = ("llvm", "cuda")
ARCHS = ("x86_64", "aarch64")
HOST = "host"  # a `cpu` that stands for the machine that compiles; the artifact records which one it was

# LLVM's name of an instruction set -> its flag in /proc/cpuinfo. Only sets that a compiler may use unasked.
X86_FLAGS = {
    "adx": "adx", "aes": "aes", "amx-int8": "amx_int8", "amx-tile": "amx_tile", "avx": "avx",
    "avx2": "avx2", "avx512bf16": "avx512_bf16",
    "avx512bitalg": "avx512_bitalg", "avx512bw": "avx512bw", "avx512cd": "avx512cd", "avx512dq": "avx512dq",
    "avx512f": "avx512f", "avx512fp16": "avx512_fp16", "avx512ifma": "avx512ifma", "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2", "avx512vl": "avx512vl", "avx512vnni": "avx512_vnni",
    "avx512vpopcntdq": "avx512_vpopcntdq", "avxifma": "avx_ifma", "avxvnni": "avx_vnni", "avxvnniint8": "avx_vnni_int8",
    "bmi": "bmi1", "bmi2": "bmi2", "cx16": "cx16", "f16c": "f16c", "fma": "fma", "fma4": "fma4", "gfni": "gfni",
    "lzcnt": "abm", "movbe": "movbe", "pclmul": "pclmulqdq", "popcnt": "popcnt", "sha": "sha_ni", "sse": "sse",
    "sse2": "sse2", "sse3": "pni", "sse4.1": "sse4_1", "sse4.2": "sse4_2", "sse4a": "sse4a", "ssse3": "ssse3",
    "tbm": "tbm", "vaes": "vaes", "vpclmulqdq": "vpclmulqdq", "xop": "xop",
}  # fmt: skip

# The same for aarch64: the flag and its bit, of getauxval(AT_HWCAP), or from 32 on of getauxval(AT_HWCAP2) less 32
# (Linux, arch/arm64/include/uapi/asm/hwcap.h).
HWCAP2 = 32
ARM_FLAGS = {
    "aes": ("aes", 3), "bf16": ("bf16", HWCAP2 + 14), "complxnum": ("fcma", 14), "crc": ("crc32", 7),
    "dotprod": ("asimddp", 20), "flagm": ("flagm", 27), "fp-armv8": ("fp", 0), "fp16fml": ("asimdfhm", 23),
    "fullfp16": ("asimdhp", 10), "i8mm": ("i8mm", HWCAP2 + 13), "jsconv": ("jscvt", 13), "lse": ("atomics", 8),
    "neon": ("asimd", 1), "rcpc": ("lrcpc", 15), "rcpc-immo": ("ilrcpc", 26), "rdm": ("asimdrdm", 12),
    "sha2": ("sha2", 6), "sha3": ("sha3", 17), "sm4": ("sm4", 19), "sve": ("sve", 22), "sve2": ("sve2", HWCAP2 + 1),
}  # fmt: skip
CPUINFO_FLAGS = X86_FLAGS | {name: flag for name, (flag, _) in ARM_FLAGS.items()}
FEATURES = {"x86_64": frozenset(X86_FLAGS), "aarch64": frozenset(ARM_FLAGS)}  # of each arch, that loading can check

_INSTALLED = (
    Path(__file__).parent / "targets"
)  # a wheel has the shipped targets inside the package, a checkout beside it
SHIPPED = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "targets"
AUTO = ("x86-64-amx", "x86-64-avx512", "x86-64-avxvnni", "x86-64")  # shipped targets, best first

DEVICE = re.compile(r"|local|[^/\s]+/\S+")

TILE_FEATURES = ("amx-int8", "amx-tile")  # a process must ask Linux before it uses tiles: `request_tiles`


@dataclass(frozen=True)
class Target:
    """One device class.

    `cpu` is LLVM's name of the processor or "host"; `features` adds (`avx512vnni`) or removes (`-avx512f`) instruction
    sets. The names of both are checked against LLVM's own lists by qdeploy.compile: LLVM only warns and falls back.
    With kind "cuda" these are the host's processor, and `gpu` is the architecture of the GPU beside it ("sm_87").
    `device` is where to measure, as `qdeploy.farm.device.parse_device` reads it; "" says no more than this machine.
    """

    name: str
    arch: str
    kind: str
    cpu: str
    features: tuple[str, ...] = ()
    description: str = ""
    gpu: str = ""
    device: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RecipeError(f"target {self.name}: kind {self.kind!r} is unknown: choose one of {', '.join(KINDS)}")
        if self.arch not in ARCHS:
            raise RecipeError(f"target {self.name}: arch {self.arch!r} is unknown: choose one of {', '.join(ARCHS)}")
        if not self.name or not self.cpu:
            raise RecipeError("a target needs a name and a cpu")
        if (self.kind == "cuda") != bool(self.gpu):
            raise RecipeError(f'target {self.name}: kind "cuda" goes with gpu, as in gpu = "sm_75", and no other does')
        if not DEVICE.fullmatch(self.device):
            raise RecipeError(f"target {self.name}: device {self.device!r} is unknown: write local or HOST:PORT/KEY")


def parse_target(data: bytes, what: str = "the target file") -> Target:
    """TOML bytes -> Target; RecipeError names an unknown key, a missing key or a wrong type."""
    try:
        table = tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise RecipeError(f"{what} is not valid TOML: {e}") from e
    allowed = [f.name for f in fields(Target)]
    if unknown := sorted(set(table) - set(allowed)):
        raise RecipeError(f"{what}: unknown key {unknown[0]!r}: the keys are {', '.join(allowed)}")
    if missing := [name for name in ("name", "arch", "kind", "cpu") if name not in table]:
        raise RecipeError(f"{what}: key {missing[0]!r} is missing: the keys are {', '.join(allowed)}")
    values: dict[str, Any] = dict(table)
    for key, value in table.items():
        if key == "features":
            if not (isinstance(value, list) and all(isinstance(item, str) and item for item in value)):
                raise RecipeError(f"{what}: features is a list of strings, not {value!r}")
            values[key] = tuple(value)
        elif not isinstance(value, str):
            raise RecipeError(f"{what}: {key} is a string, not {value!r}")
    return Target(**values)


def load_target(path: Path) -> Target:
    """Read a target file, or the shipped target that a bare name says ("host"); RecipeError when missing or wrong."""
    if path.name == str(path) and not path.suffix:
        shipped = {file.stem: file for file in SHIPPED.glob("*.toml")}
        if path.name not in shipped:
            names = ", ".join(sorted(shipped))
            raise RecipeError(f"no shipped target is named {path.name}: name a .toml file, or one of {names}")
        path = shipped[path.name]
    return parse_target(read_bytes(path, "the target file", RecipeError), str(path))


def auto_targets(folder: Path = SHIPPED) -> list[Target]:
    """Targets of one artifact for all x86 machines, best first; RecipeError when they are not in `folder`."""
    return [load_target(folder / f"{name}.toml") for name in AUTO]


def machine_flags() -> frozenset[str]:
    """Flags of this machine's first processor in /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def missing_features(required: Iterable[str], flags: Iterable[str] | None = None) -> list[str]:
    """Those of `required` (LLVM's names) that this machine, or one with the cpuinfo `flags`, does not have, sorted.

    A name that is not in CPUINFO_FLAGS counts as missing: it cannot be checked.
    """
    have = frozenset(flags) if flags is not None else machine_flags()
    return sorted({name for name in required if CPUINFO_FLAGS.get(name) not in have})


def request_tiles() -> bool:
    """Ask Linux to let this process use AMX tiles; True when it does. Asking again changes nothing.

    arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), Documentation/arch/x86/xstate.rst: the state of tiles is large,
    so threads carry it only after this.
    """
    import ctypes
    import platform

    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return int(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data)) == 0


# The GPU of this machine --------------------------------------------------------------------------------------------

MAJOR, MINOR, PROCESSORS = 75, 76, 16  # CU_DEVICE_ATTRIBUTE_*
ORIN = 87
GPU_ARCH = re.compile("sm_[1-9][0-9]+")


@dataclass(frozen=True)
class LocalGpu:
    """Its name, architecture ("sm_90"), number of processors and the CUDA release of the driver ("13.0")."""

    name: str
    arch: str
    processors: int
    driver: str


def local_gpu() -> LocalGpu | str:
    """The first GPU of this machine, or why there is none."""
    import ctypes

    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1)"
    count, device, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "the NVIDIA driver finds no GPU"
    name, values = ctypes.create_string_buffer(256), {key: ctypes.c_int() for key in (MAJOR, MINOR, PROCESSORS)}
    failed = cuda.cuDeviceGet(ctypes.byref(device), 0) or cuda.cuDriverGetVersion(ctypes.byref(version))
    failed = failed or cuda.cuDeviceGetName(name, len(name), device)
    for key, value in values.items():
        failed = failed or cuda.cuDeviceGetAttribute(ctypes.byref(value), key, device)
    if failed:
        return f"the NVIDIA driver does not describe the GPU (CUDA error {failed})"
    arch = f"sm_{values[MAJOR].value}{values[MINOR].value}"
    release = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return LocalGpu(name.value.decode(errors="replace"), arch, values[PROCESSORS].value, release)


def gpu_problem(arch: str) -> str | None:
    """Why this machine's GPU cannot run machine code for `arch`; None when it can.

    That is code for another kind of GPU: `gpu_takes`.
    """
    found = local_gpu()
    if isinstance(found, str):
        return found
    if not GPU_ARCH.fullmatch(arch):
        return f"it is for {arch}, this machine has {found.name} ({found.arch})"
    return None if gpu_takes(found.arch, arch) else f"{found.name} is {found.arch}, not {arch}"


def gpu_takes(gpu: str, code: str) -> bool:
    """Whether a GPU of one architecture ("sm_89") runs machine code for another ("sm_80").

    Code runs on the same major and the same or a later minor version; that of Jetson Orin (sm_87) is a kind of its own
    (CUDA C++ programming guide, binary compatibility).
    """
    if not (GPU_ARCH.fullmatch(gpu) and GPU_ARCH.fullmatch(code)):
        return False
    ours, theirs = (int(name.removeprefix("sm_")) for name in (gpu, code))
    return ours // 10 == theirs // 10 and ours >= theirs and (ours == ORIN) == (theirs == ORIN)
