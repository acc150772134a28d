from __future__ import annotations

from dataclasses import replace

import pytest

from qdeploy.compile.llvm import choose_dot, resolve
from qdeploy.errors import RecipeError
from qdeploy.target import Target, missing_features

BASE = Target("test", "x86_64", "llvm", "x86-64-v3")


def test_features_decide_the_instruction() -> None:
    assert resolve(BASE).dot.instruction == "pmaddwd"
    assert resolve(replace(BASE, cpu="cascadelake")).dot.instruction == "vpdpbusd"
    assert resolve(replace(BASE, cpu="x86-64")).dot.lanes == 4
    assert resolve(replace(BASE, cpu="cascadelake", features=("-avx512f",))).dot.instruction == "pmaddwd"
    assert choose_dot({"avx2", "avxvnni"}).lanes == 8
    amx = resolve(replace(BASE, cpu="x86-64-v4", features=("avx512vnni", "amx-tile", "amx-int8")))
    assert amx.dot.tiles and {"amx-tile", "amx-int8"} <= set(amx.features)
    assert not resolve(replace(BASE, cpu="sapphirerapids", features=("-amx-int8",))).dot.tiles


def test_required_features_are_recorded() -> None:
    features = resolve(replace(BASE, features=("avx512f",))).features
    assert {"avx2", "avx512f", "fma"} <= set(features)
    assert "false-deps-popcnt" not in features  # a tuning hint
    assert list(features) == sorted(features)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cpu": "haswel"}, "LLVM knows no x86_64 cpu 'haswel': choose one of haswell"),
        ({"features": ("avx513",)}, "feature 'avx513' is unknown: choose one of avx512"),
        ({"cpu": "i386"}, "not a 64-bit processor"),
    ],
)
def test_unknown_names_are_refused(change: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve(replace(BASE, **change))


def test_host_is_a_real_cpu_that_this_machine_can_run() -> None:
    resolved = resolve(replace(BASE, cpu="host"))
    assert resolved.cpu != "host"
    assert missing_features(resolved.features) == []
