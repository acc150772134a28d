"""The demo model on three emulated ARM cores: every output at every level equals that of x86 code."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from qdeploy.package import package
from qdeploy.target import FEATURES, SHIPPED, load_target
from tests.arm.conftest import ArmDemo
from tests.arm.emulator import CORES, ROOT, run_on, shell
from tests.runner.conftest import Demo
from tests.runner.programs import VENV

MACHINE = 3
IMAGES = 60  # emulated ones take long


@pytest.mark.parametrize(("target", "mode"), [*((name, "swap") for name in CORES), ("raspberry-pi-5", "in-place")])
def test_levels_equal_those_of_x86(demo: Demo, arm: ArmDemo, tmp_path: Path, target: str, mode: str) -> None:
    np.save(tmp_path / "x.npy", demo.images[:IMAGES])
    args = ("--level", "w2", "--climb", "w4,w2", "--mode", mode, "--output", tmp_path / "y.npy", "--json")
    report = run_on(CORES[target], arm.devices[target], "--input", tmp_path / "x.npy", *args).report
    assert report["target"] == target
    found = np.load(tmp_path / "y.npy")
    for rows, level in zip(found, ("w2", "w4", "w2"), strict=True):
        assert np.array_equal(rows, demo.outputs[level][:IMAGES])


@pytest.mark.parametrize(
    "target, core, lacking",
    [
        ("raspberry-pi-5", "cortex-a53", "dotprod"),
        ("raspberry-pi-5", "cortex-a72", "dotprod"),
        ("neoverse-v1", "cortex-a76", "i8mm"),
    ],
)
def test_a_core_without_the_instructions_is_refused(arm: ArmDemo, target: str, core: str, lacking: str) -> None:
    found = run_on(core, arm.devices[target])
    assert found.code == MACHINE and found.error.count("\n") == 1
    assert "this machine's cpu lacks" in found.error and lacking in found.error and found.out == ""


def test_code_of_another_architecture_is_refused(demo: Demo, arm: ArmDemo) -> None:
    found = run_on("max", demo.constant)
    assert found.code == MACHINE and "is for x86_64, this program and machine are aarch64" in found.error


def test_features_of_cores() -> None:
    features = {core: run_on(core, "--cpu", "--json").report for core in ("cortex-a53", "cortex-a76", "max")}
    assert all(set(report["known"]) == FEATURES["aarch64"] for report in features.values())
    assert "dotprod" not in features["cortex-a53"]["features"]
    assert {"dotprod", "neon"} <= set(features["cortex-a76"]["features"])
    assert "i8mm" in features["max"]["features"]


def test_a_package_installs_on_a_bare_debian(demo: Demo, arm: ArmDemo, tmp_path: Path) -> None:
    target, root = "raspberry-pi-5", tmp_path / "root"
    shutil.copytree(ROOT, root, symlinks=True, ignore_dangling_symlinks=True)
    (root / "data").mkdir()
    out = root / "data" / "package.tar.gz"
    package(arm.artifacts[target], load_target(SHIPPED / f"{target}.toml"), out, arm.devices[target])
    done = shell(root, "cortex-a76", "tar xzf package.tar.gz && sh qdeploy/install.sh")
    assert done.returncode == 0 and "0 of 830 differ" in done.stdout, done.stderr
    assert (root / "opt" / "qdeploy" / "bin" / "qdeploy-run").is_file()
    refused = shell(root, "cortex-a53", "sh qdeploy/install.sh /opt/other")
    assert refused.returncode == 2 and "nothing was installed" in refused.stderr
    assert "cpu lacks dotprod" in refused.stderr and not (root / "opt" / "other").exists()
    cut = root / "data" / "qdeploy" / "bin" / "libtvm_ffi.so"
    cut.write_bytes(cut.read_bytes()[:-1000])
    damaged = shell(root, "cortex-a76", "sh qdeploy/install.sh /opt/other")
    assert damaged.returncode == 2 and "the package is damaged: copy and unpack it again" in damaged.stderr
    out.write_bytes(out.read_bytes()[:-1000])
    assert shell(root, "cortex-a76", "tar xzf package.tar.gz").returncode != 0


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_programs_need_no_newer_system_than_debian_12(arm: ArmDemo, arch: str) -> None:
    limits = {b"GLIBC": (2, 36), b"GLIBCXX": (3, 4, 30), b"CXXABI": (1, 3, 13)}
    found = 0
    for name in ("qdeploy-run", "libtvm_runtime.so", "libtvm_ffi.so"):
        data = (VENV / "device" / arch / name).read_bytes()
        for library, text in re.findall(rb"\0(GLIBC|GLIBCXX|CXXABI)_([0-9.]+)(?=\0)", data):
            found += 1
            assert tuple(map(int, text.split(b"."))) <= limits[library], f"{name} needs {library}_{text}"
    assert found > 10
