"""Targets for ARM: what LLVM and the kernels make of them, and what `qdeploy targets` says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from qdeploy.cli import main
from qdeploy.compile.llvm import choose_dot, resolve
from qdeploy.compile.targets import lacks, listed, rendered
from qdeploy.errors import RecipeError
from qdeploy.target import SHIPPED, Target, load_target

BASE = Target("board", "aarch64", "llvm", "cortex-a72")
CROSS = "QDEPLOY_CROSS_AARCH64"


def test_features_decide_how_to_multiply() -> None:
    ways = {name: resolve(load_target(SHIPPED / f"{name}.toml")).dot.instruction for name in (
        "raspberry-pi-4", "aarch64", "raspberry-pi-5", "aarch64-dotprod", "jetson-orin-cpu", "neoverse-v1",
    )}  # fmt: skip
    assert list(ways.values()) == ["smull", "smull", "sdot", "sdot", "sdot", "usmmla"]
    assert resolve(replace(BASE, features=("dotprod", "i8mm"))).dot.instruction == "usmmla"
    assert resolve(replace(BASE, cpu="cortex-a76", features=("-dotprod",))).dot.instruction == "smull"
    assert choose_dot({"neon"}).lookup == "tbl"


def test_what_a_board_lacks_is_not_required() -> None:
    """Broadcom's Cortex-A72 has no cryptography; no kernel is written for SVE."""
    assert "aes" in resolve(BASE).features
    assert resolve(load_target(SHIPPED / "raspberry-pi-4.toml")).features == ("crc", "fp-armv8", "neon")
    assert {"i8mm", "dotprod"} <= set(resolve(load_target(SHIPPED / "neoverse-v1.toml")).features) - {"sve", "sve2"}
    assert "sve" not in resolve(load_target(SHIPPED / "neoverse-v1.toml")).features


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cpu": "cortex-a7x"}, "LLVM knows no aarch64 cpu 'cortex-a7x': choose one of cortex-a7"),
        ({"cpu": "x86-64-v3"}, "LLVM knows no aarch64 cpu 'x86-64-v3'"),
        ({"features": ("dotprd",)}, "feature 'dotprd' is unknown: choose one of dotprod"),
        ({"features": ("avx2",)}, "feature 'avx2' is unknown"),
        ({"features": ("-neon",)}, "is not a processor with NEON"),
        ({"cpu": "host"}, 'cpu = "host" with arch aarch64, but this machine is x86_64: name a cpu'),
    ],
)
def test_unknown_names_are_refused(change: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve(replace(BASE, **change))


def test_the_list_says_what_cannot_be_built_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.toml").write_text('name = "a"\narch = "aarch64"\nkind = "llvm"\ncpu = "cortex-a76"\n')
    (tmp_path / "b.toml").write_text('name = "b"\narch = "x86_64"\nkind = "llvm"\ncpu = "haswel"\n')
    (tmp_path / "c.toml").write_text('name = "c"\narch = "x86_64"\nkind = "llvm"\ncpu = "haswell"\n')
    monkeypatch.setenv(CROSS, str(tmp_path / "none"))
    rows = listed(tmp_path)
    assert [row["lacks"] is None for row in rows] == [False, False, True]
    assert CROSS in rows[0]["lacks"] and "knows no x86_64 cpu" in rows[1]["lacks"]
    text = rendered(rows).splitlines()
    assert len(text) == 1 + 3 + 2 and text[1].startswith("a  no") and text[-1].startswith("c  yes")
    monkeypatch.setenv(CROSS, "/bin/sh")  # any program
    assert lacks(load_target(tmp_path / "a.toml")) is None


def test_the_command_lists_every_shipped_target() -> None:
    done = CliRunner().invoke(main, ["targets", "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.output)
    assert [row["name"] for row in rows] == sorted(row["name"] for row in rows)
    assert {row["name"] for row in rows} == {path.stem for path in SHIPPED.glob("*.toml")}
    assert next(row for row in rows if row["name"] == "host")["lacks"] is None
