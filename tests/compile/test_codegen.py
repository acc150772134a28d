"""Objects are made in several processes, or in one, and the library is the same."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import tvm

from qdeploy.compile import codegen
from qdeploy.compile.codegen import library, share
from qdeploy.compile.kernels.emit import const, load, loop, prim_func, store
from qdeploy.compile.llvm import resolve
from qdeploy.target import auto_targets

TARGET = resolve(auto_targets()[-1]).tvm


def kernel(name: str, step: int) -> tvm.tirx.PrimFunc:
    """x -> x + step."""
    return prim_func(
        name,
        [("x", (64,), "int32"), ("y", (64,), "int32")],
        lambda x, y: loop(64, lambda i: store(y, load(x, i) + const(step), i)),
    )


def made() -> bytes:
    kernels, entries = {f"k{i}": kernel(f"k{i}", i) for i in range(9)}, {"main": kernel("main", 1)}
    return library(kernels, entries, TARGET, "ab" * 20, common={"join": kernel("join", 2)})


def test_the_number_of_processes_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for count in (1, 2, 5):
        monkeypatch.setattr(codegen, "cores", lambda count=count: count)
        found.append(made())
    monkeypatch.delattr(os, "fork")
    found.append(made())
    assert len(set(found)) == 1
    assert bytes.fromhex("ab" * 20) in found[0]


def test_what_is_common_is_remembered_by_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(codegen, "write_object", lambda functions, _, target, path, dump: write(path, functions))

    def write(path: Path, functions: dict[str, tvm.tirx.PrimFunc]) -> None:
        made.append(functions)
        path.write_bytes(b"%d" % len(made))

    monkeypatch.setattr(codegen, "_common", {})
    for step, want in ((3, b"1"), (4, b"2"), (3, b"1")):
        codegen.write_common({"join": kernel("join", step)}, TARGET, tmp_path / "o", None)
        assert (tmp_path / "o").read_bytes() == want
    codegen.write_common({"join": kernel("join", 3)}, TARGET, tmp_path / "o", tmp_path)
    assert len(made) == 3


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_task_is_done_once(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codegen, "cores", lambda: count)
    work = tmp_path / "work"
    work.mkdir()
    share([partial((work / str(i)).touch, exist_ok=False) for i in range(7)], tmp_path)
    assert len(list(work.iterdir())) == 7 and list(tmp_path.iterdir()) == [work]


@pytest.mark.parametrize("where", [0, 1])
def test_a_task_that_fails_is_told(where: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codegen, "cores", lambda: 2)

    def fail() -> None:
        raise RuntimeError("no such instruction")

    tasks = [lambda: None, lambda: None]
    tasks[where] = fail
    with pytest.raises(RuntimeError, match="no such instruction"):
        share(tasks, tmp_path)


def test_a_process_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codegen, "cores", lambda: 2)
    with pytest.raises(RuntimeError, match="was killed"):
        share([lambda: None, lambda: os.kill(os.getpid(), 9)], tmp_path)
