"""`qdeploy package` for this machine: what is inside, the same bytes again, installed and refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qdeploy.compile.pipeline import Options, compile_model
from qdeploy.errors import CompileError, DeviceError, QDeployError
from qdeploy.export.write import qdq_bytes
from qdeploy.files import canonical_json
from qdeploy.package import archive, npy, package, runner_files
from qdeploy.target import SHIPPED, Target, load_target
from tests.nets_frozen import random_frozen
from tests.runner.programs import program

HOST = load_target(SHIPPED / "host.toml")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if platform.machine() != "x86_64":
        pytest.skip(f"targets/host.toml is for x86_64, this machine is {platform.machine()}")
    path = tmp_path_factory.mktemp("model") / "net.onnx"
    path.write_bytes(qdq_bytes(random_frozen(4)))
    return path


@pytest.fixture(scope="module")
def artifact(model: Path) -> Path:
    compile_model(model, HOST, model.parent / "artifact")
    return model.parent / "artifact"


@pytest.fixture(scope="module")
def constant(model: Path) -> Path:
    compile_model(model, HOST, model.parent / "constant", options=Options(constant=True))
    return model.parent / "constant"


def unpacked(path: Path, to: Path) -> Path:
    with tarfile.open(path) as tar:
        tar.extractall(to, filter="data")
    return to / "qdeploy"


def sh(folder: Path, script: str, *args: Path) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(folder / script), *map(str, args)]
    environment = {"PATH": os.environ["PATH"]}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd="/")


def test_a_package_installs_and_tests_itself(artifact: Path, model: Path, tmp_path: Path) -> None:
    program("x86_64")
    size = package(artifact, HOST, tmp_path / "p.tar.gz", model=model)
    assert size == (tmp_path / "p.tar.gz").stat().st_size
    folder, place = unpacked(tmp_path / "p.tar.gz", tmp_path), tmp_path / "opt" / "net"
    done = sh(folder, "install.sh", place)
    assert done.returncode == 0 and "0 of" in done.stdout, done.stderr
    again = sh(folder, "install.sh", place)  # over the one before
    assert again.returncode == 0 and sh(place, "selftest.sh").returncode == 0
    names = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    wanted = {
        "bin/qdeploy-run",
        "bin/libtvm_runtime.so",
        "bin/libtvm_ffi.so",
        "artifact/artifact.json",
        "artifact/lib.so",
    }
    wanted |= {"licenses/zlib/LICENSE", "licenses/qdeploy/LICENSE", "licenses/apache-tvm/NOTICE", "device/current.json"}
    assert names >= wanted | {"licenses/apache-tvm/LICENSE", "licenses/apache-tvm-ffi/LICENSE", "SHA256SUMS"}
    sums = dict(reversed(line.split("  ")) for line in (place / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == names - {"SHA256SUMS"}
    assert all(hashlib.sha256((place / name).read_bytes()).hexdigest() == digest for name, digest in sums.items())


def test_an_artifact_with_its_level_needs_no_model(constant: Path, model: Path, tmp_path: Path) -> None:
    program("x86_64")
    package(constant, HOST, tmp_path / "a.tar.gz")
    package(constant, HOST, tmp_path / "b.tar.gz", model=model)
    assert (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "b.tar.gz").read_bytes(), "the reference differs"
    folder = unpacked(tmp_path / "a.tar.gz", tmp_path)
    assert not (folder / "device").exists() and sh(folder, "selftest.sh").returncode == 0


def test_the_self_test_fails_for_other_outputs(constant: Path, tmp_path: Path) -> None:
    program("x86_64")
    package(constant, HOST, tmp_path / "a.tar.gz")
    folder = unpacked(tmp_path / "a.tar.gz", tmp_path)
    expected = np.load(folder / "selftest" / "expected.npy")
    expected[0, 0] ^= 1
    np.save(folder / "selftest" / "expected.npy", expected)
    assert sh(folder, "selftest.sh").returncode == 1
    assert "the package is damaged" in sh(folder, "install.sh", tmp_path / "opt").stderr


def test_damaged_and_foreign_packages_install_nothing(constant: Path, tmp_path: Path) -> None:
    program("x86_64")
    package(constant, HOST, tmp_path / "a.tar.gz")
    folder, place = unpacked(tmp_path / "a.tar.gz", tmp_path), tmp_path / "opt"
    runner = folder / "bin" / "qdeploy-run"
    runner.write_bytes(runner.read_bytes()[:5000])
    done = sh(folder, "install.sh", place)
    assert done.returncode == 2 and "the package is damaged: copy and unpack it again" in done.stderr
    script = (folder / "install.sh").read_text().replace("= x86_64 ]", "= aarch64 ]")
    (folder / "install.sh").write_text(script)
    done = sh(folder, "install.sh", place)
    assert done.returncode == 2 and "this machine is x86_64" in done.stderr and not place.exists()
    cut = (tmp_path / "a.tar.gz").read_bytes()[:-500]
    with pytest.raises((EOFError, tarfile.TarError)), tarfile.open(fileobj=io.BytesIO(cut)) as tar:
        tar.getmembers()


def test_somebody_elses_folder_is_not_replaced(constant: Path, tmp_path: Path) -> None:
    program("x86_64")
    package(constant, HOST, tmp_path / "a.tar.gz")
    (tmp_path / "home").mkdir()
    done = sh(unpacked(tmp_path / "a.tar.gz", tmp_path), "install.sh", tmp_path / "home")
    assert done.returncode == 2 and "is no package: name another folder" in done.stderr
    assert list((tmp_path / "home").iterdir()) == []


def older(folder: Path, to: Path) -> Path:
    """A copy of an artifact that says it was compiled by an older TVM."""
    shutil.copytree(folder, to)
    head = json.loads((to / "artifact.json").read_bytes())
    head["versions"]["apache-tvm"] = "0.9"
    (to / "artifact.json").write_bytes(canonical_json(head))
    return to


ARM = load_target(SHIPPED / "raspberry-pi-5.toml")
OLD = Target("old", "x86_64", "llvm", "nehalem")
REFUSED: dict[str, tuple[Callable[[Path, Path, Path, Path], object], type[QDeployError], str]] = {
    "architecture": (lambda a, c, m, t: package(c, ARM, t / "p"), CompileError, "raspberry-pi-5 is aarch64"),
    "features": (lambda a, c, m, t: package(c, OLD, t / "p"), CompileError, "which old lacks"),
    "no level": (lambda a, c, m, t: package(a, HOST, t / "p"), CompileError, "holds no level: add --device"),
    "two levels": (lambda a, c, m, t: package(a, HOST, t / "p", t, m), CompileError, "both bring a level"),
    "no artifact": (lambda a, c, m, t: package(t, HOST, t / "p"), CompileError, "cannot read the artifact's file"),
    "no device": (lambda a, c, m, t: package(a, HOST, t / "p", t / "none"), QDeployError, "holds no level yet"),
    "no kit": (lambda a, c, m, t: package(c, HOST, t / "p", kits=t), DeviceError, "no runner for x86_64"),
    "version": (
        lambda a, c, m, t: package(older(c, t / "x"), HOST, t / "p"), CompileError, "compiled by apache-tvm 0.9",
    ),
    "a folder": (lambda a, c, m, t: package(c, HOST, t), DeviceError, "not a regular file"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_packaged_leaves_nothing(
    artifact: Path, constant: Path, model: Path, tmp_path: Path, case: str
) -> None:
    program("x86_64")
    act, error, text = REFUSED[case]
    with pytest.raises(error, match=text):
        act(artifact, constant, model, tmp_path)
    assert not list(tmp_path.glob("p*"))


def test_another_model_is_refused(artifact: Path, tmp_path: Path) -> None:
    program("x86_64")
    (tmp_path / "other.onnx").write_bytes(qdq_bytes(random_frozen(4, blocks=1)))
    with pytest.raises(CompileError, match="is not the model that"):
        package(artifact, HOST, tmp_path / "p", model=tmp_path / "other.onnx")


def test_a_damaged_kit_is_refused(tmp_path: Path) -> None:
    shutil.copytree(program("x86_64").parent, tmp_path / "x86_64")
    assert "bin/qdeploy-run" in runner_files("x86_64", tmp_path)
    (tmp_path / "x86_64").rename(tmp_path / "aarch64")
    with pytest.raises(DeviceError, match="missing or no program for aarch64: run `make cross`"):
        runner_files("aarch64", tmp_path)
    shutil.rmtree(tmp_path / "aarch64" / "licenses")
    (tmp_path / "aarch64").rename(tmp_path / "x86_64")
    with pytest.raises(DeviceError, match="licenses is missing"):
        runner_files("x86_64", tmp_path)


def test_archives_depend_on_their_files_alone() -> None:
    files = {"b.sh": b"#!/bin/sh\n", "bin/a": b"\0" * 1000, "c": npy(np.zeros(3, np.float32))}
    data = archive(files)
    assert data == archive(dict(reversed(files.items())))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = tar.getmembers()
        assert [(m.name, m.mode, m.mtime, m.uid, m.uname) for m in members] == [
            ("qdeploy/b.sh", 0o755, 0, 0, ""), ("qdeploy/bin/a", 0o755, 0, 0, ""), ("qdeploy/c", 0o644, 0, 0, ""),
        ]  # fmt: skip
        assert {m.name.removeprefix("qdeploy/"): tar.extractfile(m).read() for m in members} == files  # type: ignore[union-attr]
