"""`qdeploy targets`: which targets ship, and which of them this machine can build for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qdeploy.compile.codegen import linker
from qdeploy.compile.cuda.spec import gpu_of
from qdeploy.compile.llvm import resolve
from qdeploy.errors import QDeployError
from qdeploy.target import SHIPPED, Target, load_target


def listed(folder: Path = SHIPPED) -> list[dict[str, Any]]:
    """The targets of `folder` by name: their keys, and `lacks`: why this machine cannot build for one, or None.

    Raises RecipeError for a target file that is wrong.
    """
    targets = sorted((load_target(path) for path in folder.glob("*.toml")), key=lambda target: target.name)
    return [asdict(target) | {"features": list(target.features), "lacks": lacks(target)} for target in targets]


def lacks(target: Target) -> str | None:
    """What this machine lacks to build for `target`; None where it can."""
    try:
        CHECKS[target.kind](target)
    except QDeployError as e:
        return str(e)
    return None


def check_llvm(target: Target) -> None:
    """Raise for a cpu or a feature that LLVM does not know, or where there is no linker."""
    resolve(target)
    linker(target.arch)


def check_cuda(target: Target) -> None:
    """As `check_llvm` for the host; and where there is no CUDA compiler, or none that knows the GPU."""
    check_llvm(target)
    gpu_of(target)


CHECKS: dict[str, Callable[[Target], None]] = {"llvm": check_llvm, "cuda": check_cuda}  # by Target.kind


def rendered(rows: list[dict[str, Any]]) -> str:
    """`listed` as text: a line a target, and one more where it cannot be built here."""
    width = max(len(row["name"]) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row['name']:<{width}}  {'yes' if row['lacks'] is None else 'no '}  {row['description']}")
        if row["lacks"] is not None:
            lines.append(f"{'':<{width}}       {row['lacks']}")
    return "\n".join([f"{'target':<{width}}  builds here", *lines])
