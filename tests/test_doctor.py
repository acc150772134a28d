"""`qdeploy doctor` on this machine, and on machines that lack something."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from qdeploy import doctor, installed
from qdeploy.cli import main
from qdeploy.doctor import examine, rendered
from qdeploy.target import LocalGpu


def rows(found: dict) -> dict[str, dict]:
    return {row["name"]: row for row in found["checks"]}


def test_this_machine() -> None:
    result = CliRunner().invoke(main, ["doctor", "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["ok"] is True
    assert {"python", "numpy", "click", "rich", "c++ compiler", "processor", "gpu", "threads"} <= set(rows(found))
    for row in found["checks"]:
        assert set(row) == {"name", "status", "found", "advice"} and row["status"] in ("ok", "warn")
        assert bool(row["advice"]) == (row["status"] == "warn") and row["found"]
    text = CliRunner().invoke(main, ["doctor"]).stdout
    assert len(text.splitlines()) == 1 + len(found["checks"]) + sum(bool(row["advice"]) for row in found["checks"])


def test_nothing_heavy_is_imported() -> None:
    code = "import sys; from qdeploy.doctor import examine; examine(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert not {"torch", "tvm", "onnx", "numpy", "onnxruntime", "rich", "aiohttp"} & set(done.stdout.split())


def absent(*packages: str):  # noqa: ANN201
    known = installed.version

    def version(package: str) -> str:
        if package in packages:
            raise installed.PackageNotFoundError(package)
        return known(package)

    return version


def test_a_package_of_the_core_that_is_absent_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "version", absent("rich"))
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "fail  rich" in result.stdout and "-> pip install 'rich" in result.stdout
    found = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)
    assert found["ok"] is False and rows(found)["rich"]["status"] == "fail"


def test_extras_that_are_absent_or_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["numpy>=2.1", "click", "rich", "pymoo==0.1; extra == 'search'", "nothing>=3; extra == 'scale'"]
    monkeypatch.setattr(
        installed, "requires", lambda name: [*lines, "numpy; extra == 'device'", "mypy; extra == 'dev'"]
    )
    found = rows(examine())
    assert found["[search]"]["status"] == "warn" and found["[search]"]["advice"] == "pip install 'pymoo==0.1'"
    assert found["[scale]"]["advice"].startswith("pip install 'qdeploy[scale]'") and found["[device]"]["status"] == "ok"
    assert "[dev]" not in found and "[train]" not in found


def test_pins_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    if doctor.find_spec("tvm") is None:
        pytest.skip("the compiler is not installed")
    monkeypatch.setattr(doctor, "PINNED", {"apache-tvm": "9.9"})
    found = rows(examine())["tvm"]
    assert found["status"] == "warn" and "pip install 'apache-tvm==9.9'" in found["advice"]


@pytest.mark.parametrize(
    ("arch", "missing", "best"),
    [
        ("x86_64", {"amx-int8"}, "AVX512-VNNI"),
        ("x86_64", {"amx-int8", "avx512f", "avxvnni"}, "AVX2"),
        ("x86_64", {"amx-int8", "avx512f", "avx2"}, "SSE2"),
        ("aarch64", {"i8mm"}, "dotprod"),
        ("aarch64", {"i8mm", "dotprod"}, "NEON"),
    ],
)
def test_kernels_that_a_processor_allows(
    monkeypatch: pytest.MonkeyPatch, arch: str, missing: set[str], best: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: arch)
    monkeypatch.setattr(doctor, "missing_features", lambda sets: sorted(set(sets) & missing))
    assert f"kernels with {best}" in rows(examine())["processor"]["found"]


def test_tiles_that_the_kernel_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(doctor, "missing_features", lambda sets: [])
    monkeypatch.setattr(doctor, "request_tiles", lambda: False)
    assert "kernels with AVX512-VNNI" in rows(examine())["processor"]["found"]


def test_other_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    monkeypatch.setattr(doctor, "local_gpu", lambda: LocalGpu("Tesla T4", "sm_75", 40, "12.4"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "g++-99")
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    monkeypatch.setattr(doctor.sys, "prefix", str(tmp_path))
    monkeypatch.setattr(doctor.sys, "version_info", (3, 9, 1))
    monkeypatch.setattr(doctor, "LEAST_DISK", 1 << 62)
    found = rows(examine())
    assert found["processor"]["status"] == "warn" and "--runtime ort" in found["processor"]["advice"]
    assert found["gpu"]["found"] == "Tesla T4 (sm_75), driver for CUDA 12.4"
    assert "CXX or CC names g++-99" in found["c++ compiler"]["found"]
    assert found["aarch64 linker"]["status"] == found["x86_64 emulator"]["status"] == "warn"
    assert "OMP_NUM_THREADS" in found["threads"]["advice"] and found["threads"]["status"] == "warn"
    assert found["python"]["status"] == "fail" and "3.11 to 3.13" in found["python"]["advice"]
    assert found["disk, here"]["status"] == found["disk, temporary"]["status"] == "warn"
    assert "fail  python" in rendered(examine())
