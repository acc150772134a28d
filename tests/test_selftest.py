"""The start-up check of the compiler: the pinned pair, other versions, a TVM that crashes."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qdeploy import selftest

ROOT = Path(__file__).parents[1]
CRASH = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"


def fake(folder: Path, tvm: str | None, **versions: str) -> Path:
    """A folder to put first on the path: other version numbers of packages, and maybe another module tvm."""
    for package, number in versions.items():
        info = folder / f"{package}-{number}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {number}\n")
    if tvm is not None:
        (folder / "tvm.py").write_text(tvm)
    return folder


def check(folder: Path, others: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`check_tvm` in a fresh process with `folder` first on its path; says whether the process imported tvm."""
    code = "import sys\nfrom qdeploy.selftest import check_tvm\ncheck_tvm()\nprint('tvm' in sys.modules)"
    environment = others | {"PYTHONPATH": f"{folder}{os.pathsep}{others['PYTHONPATH']}"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_pinned_pair_passes_without_import(tmp_path: Path, device_environment: dict[str, str]) -> None:
    done = check(fake(tmp_path, CRASH), device_environment)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_probe_passes_here(device_environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "qdeploy.selftest"]
    done = subprocess.run(command, cwd=ROOT, env=device_environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "the compiler works\n"), done.stderr


def test_other_version_that_works_passes(tmp_path: Path, device_environment: dict[str, str]) -> None:
    done = check(fake(tmp_path, None, apache_tvm_ffi="0.9.9"), device_environment)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


@pytest.mark.parametrize(
    ("tvm", "text"),
    [
        (CRASH, "apache-tvm-ffi 0.1.15.post2 is broken (signal 11 in a small kernel): "),
        (
            "raise ImportError('no such symbol')",
            "apache-tvm-ffi 0.1.15.post2 does not work (ImportError: no such symbol): ",
        ),
    ],
)
def test_broken_version_is_one_line(tmp_path: Path, tvm: str, text: str, device_environment: dict[str, str]) -> None:
    done = check(fake(tmp_path, tvm, apache_tvm_ffi="0.1.15.post2"), device_environment)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"qdeploy.errors.DeviceError: {text}pip install apache-tvm-ffi==0.1.14.post1"


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "PINNED", {"apache-tvm-that-nobody-has": "1.0"})
    with pytest.raises(selftest.DeviceError, match="is not installed: pip install apache-tvm-that-nobody-has==1.0"):
        selftest.check_tvm()


def test_the_pins_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    for package, number in selftest.PINNED.items():
        assert any(f"{package}=={number}" in extra for extra in project["optional-dependencies"].values())
        assert f"{package}=={number}" in constraints
