"""Is the compiler at hand one that works? A version that is known to crash becomes one clear line, not a dead process.

`python -m qdeploy.selftest` runs the probe itself: it imports TVM, tensorizes and compiles a small kernel and runs it.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from qdeploy.errors import DeviceError

# the pair that is tested (docs/adr/0003-what-is-pinned.md); pyproject.toml asks for the same
PINNED = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}
PROBE_SECONDS = 300


def check_tvm() -> None:
    """Return when the installed TVM is the pinned one, or another that passes the probe; DeviceError otherwise.

    With the pinned versions this reads two metadata files and imports nothing. Other versions cost a child process of
    some seconds at each call.
    """
    found = {}
    for package, pinned in PINNED.items():
        try:
            found[package] = version(package)
        except PackageNotFoundError as e:
            raise DeviceError(f"{package} is not installed: pip install {package}=={pinned}") from e
    if found != PINNED:
        _probe_in_child(found)


def _probe_in_child(found: dict[str, str]) -> None:
    """Run the probe where a segmentation fault does no harm."""
    odd = [f"{package} {found[package]}" for package in PINNED if found[package] != PINNED[package]]
    remedy = "pip install " + " ".join(f"{p}=={v}" for p, v in PINNED.items() if found[p] != v)
    command = [sys.executable, "-m", "qdeploy.selftest"]
    try:
        root = Path(__file__).parents[1]  # `-m` looks there first: the same qdeploy in the child
        done = subprocess.run(
            command, cwd=root, capture_output=True, text=True, errors="replace", timeout=PROBE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise DeviceError(f"{' and '.join(odd)} could not be tried ({e}): {remedy}") from e
    if done.returncode < 0:
        raise DeviceError(f"{' and '.join(odd)} is broken (signal {-done.returncode} in a small kernel): {remedy}")
    if done.returncode > 0:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise DeviceError(f"{' and '.join(odd)} does not work ({last}): {remedy}")


def probe() -> None:
    """Tensorize, compile and run a [4, 16] kernel with the TVM that is installed; may kill the process."""
    import numpy as np
    import tvm
    from tvm import te
    from tvm.s_tir import Schedule, TensorIntrin
    from tvm.script import tirx as T

    # an intrinsic of our own: importing those of TVM takes half a minute
    @T.prim_func(s_tir=True)
    def row(a: T.handle, c: T.handle) -> None:
        source = T.match_buffer(a, (16,), "int32", offset_factor=1)
        target = T.match_buffer(c, (16,), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(source[0:16])
            T.writes(target[0:16])
            for i in range(16):
                with T.sblock("row"):
                    vi = T.axis.spatial(16, i)
                    target[vi] = source[vi] + 1

    x = te.placeholder((4, 16), "int32", "x")
    y = te.compute(x.shape, lambda *i: x(*i) + 1, "y")
    TensorIntrin.register("qdeploy.selftest.row", row, row)
    schedule = Schedule(te.create_prim_func([x, y]))
    schedule.tensorize(schedule.get_loops(schedule.get_sblock("y"))[1], "qdeploy.selftest.row")
    module = tvm.compile(schedule.mod, target="llvm")
    given = np.arange(64, dtype=np.int32).reshape(4, 16)
    answer = tvm.runtime.tensor(np.zeros_like(given))
    module["main"](tvm.runtime.tensor(given), answer)
    if not np.array_equal(answer.numpy(), given + 1):
        raise DeviceError("the kernel computed a wrong answer")


if __name__ == "__main__":
    probe()
    print("the compiler works")
