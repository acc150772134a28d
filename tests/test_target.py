from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.errors import RecipeError
from qdeploy.target import (
    ARM_FLAGS,
    CPUINFO_FLAGS,
    HWCAP2,
    load_target,
    machine_flags,
    missing_features,
    parse_target,
)

TARGETS = Path(__file__).parents[1] / "targets"
GOOD = 'name = "a"\narch = "x86_64"\nkind = "llvm"\ncpu = "haswell"\n'


def test_shipped_targets_are_named_after_their_files() -> None:
    paths = sorted(TARGETS.glob("*.toml"))
    assert {p.stem for p in paths} >= {"host", "x86-64", "x86-64-amx", "x86-64-avx512"}
    assert {p.stem for p in paths} >= {"raspberry-pi-4", "raspberry-pi-5", "aarch64", "neoverse-v1"}
    for path in paths:
        assert load_target(path).name == path.stem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "opt = 3\n", "unknown key 'opt': the keys are name, arch, kind, cpu, features, description"),
        (GOOD + "cpu = 3\n", "not valid TOML"),
        (GOOD.replace('"haswell"', "3"), "cpu is a string, not 3"),
        (GOOD + "features = 'avx2'\n", "features is a list of strings"),
        (GOOD + "features = ['']\n", "features is a list of strings"),
        (GOOD.replace("llvm", "vulkan"), "kind 'vulkan' is unknown: choose one of llvm"),
        (GOOD.replace("x86_64", "z80"), "arch 'z80' is unknown"),
        ('name = "a"\n', "key 'arch' is missing"),
        (GOOD.replace("haswell", ""), "a name and a cpu"),
        (GOOD + "device = 'farm:9190'\n", "device 'farm:9190' is unknown: write local or HOST:PORT/KEY"),
        (GOOD + "device = 3\n", "device is a string, not 3"),
    ],
)
def test_wrong_files_are_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_target(text.encode())


@pytest.mark.parametrize("device", ["", "local", "farm:9190/rpi5", "127.0.0.1/board"])
def test_a_target_says_where_it_is_measured(device: str) -> None:
    assert parse_target((GOOD + f'device = "{device}"\n').encode()).device == device


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read the target file"):
        load_target(tmp_path / "none.toml")


@given(st.binary(max_size=60))
def test_any_bytes_parse_or_raise(data: bytes) -> None:
    with pytest.raises(RecipeError):
        parse_target(data)


def test_arm_features_have_flags_and_bits_of_their_own() -> None:
    """Those of Linux's hwcap.h: a Cortex-A76 as its kernel describes it, and one that hides dot products."""
    assert ARM_FLAGS["dotprod"] == ("asimddp", 20) and ARM_FLAGS["i8mm"] == ("i8mm", HWCAP2 + 13)
    for place in (0, 1):
        assert len({row[place] for row in ARM_FLAGS.values()}) == len(ARM_FLAGS)
    flags = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
    needed = "aes crc dotprod fp-armv8 fullfp16 lse neon rcpc rdm sha2"
    assert missing_features(needed.split(), flags.split()) == []
    assert missing_features(needed.split(), flags.split()[:-1]) == ["dotprod"]


def test_missing_features() -> None:
    assert missing_features(["avx2", "sse4.2", "lzcnt"], ["avx2", "sse4_2", "abm"]) == []
    assert missing_features(["avx512vnni", "avx2"], ["avx2"]) == ["avx512vnni"]
    assert missing_features(["quantum"], CPUINFO_FLAGS.values()) == ["quantum"]
    assert missing_features([]) == []
    assert "fpu" in machine_flags() or not Path("/proc/cpuinfo").exists() or not machine_flags()


def test_a_bare_name_is_a_shipped_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_target(Path("raspberry-pi-5")) == load_target(TARGETS / "raspberry-pi-5.toml")
    (tmp_path / "host").write_text("not this one")
    assert load_target(Path("host")).cpu == "host"
    for wrong in ("hots", ".."):
        with pytest.raises(RecipeError, match="no shipped target is named .*: name a .toml file, or one of .*host"):
            load_target(Path(wrong))
    with pytest.raises(RecipeError, match="cannot read the target file"):
        load_target(Path("host.toml"))
