"""The layout rule: who may import what, read from the source, and what the device side really loads.

A unit is a module or a folder of qdeploy. Amend the table when the rule changes, in the order of the data flow: a unit
may import only units that stand above it, so nothing is circular and no stage reaches up into the command line.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qdeploy"

VOCABULARY = "files progress space cost target recipe frozen integer data pictures image_folder selftest"
STAGES = (
    f"{VOCABULARY} bundle qdq ladder train subnet allocate freeze extract workers evaluate export bundle.write"
    " compile.artifact compile profile client serve inspect search farm report report.front package"
)

# unit -> (units of qdeploy, other packages, and what may come in addition inside a function)
TABLE: dict[str, tuple[str, str, str]] = {
    "errors": ("", "", ""),
    "files": ("errors", "", ""),
    "progress": ("", "", "rich"),
    # vocabulary
    "space": ("errors files", "", ""),
    "cost": ("errors files", "", ""),
    "target": ("errors files", "", ""),
    "recipe": ("errors files space", "", ""),
    "frozen": ("errors files space", "numpy safetensors", ""),
    "integer": ("errors frozen", "numpy", ""),
    "data": ("errors files", "numpy", ""),
    "pictures": ("errors", "numpy PIL", ""),
    "image_folder": ("errors files recipe data pictures", "numpy", ""),
    "selftest": ("errors", "", "numpy tvm"),
    # what the stages share
    "nets": ("errors space", "torch", ""),
    "ptq.mixquant": ("errors", "numpy", ""),  # the rule alone, which training can follow too
    "quant": ("errors space recipe frozen nets ptq.mixquant", "numpy torch", ""),
    "qdq": ("errors files", "numpy onnx google", ""),  # google.protobuf, which onnx brings
    "bundle": ("errors files", "numpy", ""),  # the format itself: the device side stands on it
    "nesting": ("errors bundle", "numpy", ""),
    "ladder": ("errors files qdq bundle nesting", "numpy onnx", ""),
    # stages
    "train": ("errors files progress space recipe data image_folder nets quant", "numpy torch safetensors", ""),
    "subnet": ("errors files space recipe frozen integer data quant train", "numpy torch", ""),
    "allocate": ("errors files space bundle quant subnet", "numpy torch", ""),
    "freeze": ("errors files space recipe frozen integer data quant subnet", "numpy torch", ""),
    "extract": (
        "errors files space recipe frozen data image_folder quant train subnet allocate freeze",
        "numpy torch",
        "",
    ),
    "workers": ("errors files", "", "dask distributed"),
    "evaluate": ("errors files progress space recipe data quant train workers", "numpy torch", ""),
    "export": ("errors files space frozen integer qdq", "numpy onnx", "onnxsim onnxruntime"),
    "bundle.write": ("errors files qdq bundle nesting ladder", "numpy", ""),
    "compile.artifact": ("errors files target", "numpy", "tvm"),  # loading one: the device side does so too
    "compile": (
        "errors files progress target cost selftest qdq integer frozen compile.artifact",
        "numpy onnx tvm tvm_ffi",
        "onnxruntime",
    ),
    "profile": (
        "errors files space target cost data frozen qdq bundle compile.artifact compile",
        "numpy tvm",
        "onnx onnxruntime",
    ),
    "client": ("errors files bundle", "numpy", "target compile.artifact tvm onnxruntime PIL tuf"),
    "trust": ("errors files bundle", "tuf securesystemslib cryptography", "fsspec"),
    "serve.controls": ("errors files bundle trust", "tuf", ""),  # for who changes the rollout from the fleet page
    "serve": ("errors files bundle client", "aiohttp prometheus_client", "serve.controls"),
    "installed": ("", "", ""),
    "cli_options": ("errors progress", "click", "target installed"),
    "cli_serve": ("errors cli_options", "click", "serve"),
    "inspect": ("errors files space recipe frozen bundle", "numpy", "qdq"),
    "search": (
        "errors files progress space cost target qdq bundle bundle.write ladder nesting quant train subnet allocate"
        " extract workers evaluate export compile.artifact compile profile",
        "numpy torch pymoo",
        "moocore",
    ),
    "farm": ("errors files target compile.artifact compile profile", "numpy tvm", ""),
    "report": ("errors files", "numpy matplotlib", ""),
    "report.front": ("errors files space search report", "numpy", ""),
    "report.folders": ("errors files bundle inspect report report.front", "", ""),
    "ptq": ("errors files progress data pictures qdq report ptq.mixquant", "numpy onnx", "onnxruntime onnxsim"),
    "ptq.learn": ("errors qdq ptq", "numpy torch onnx", ""),  # torch for who asks for learned rounding alone
    "ptq.reconstruct": ("errors files progress qdq ptq ptq.learn", "numpy", ""),
    "ptq.torch_source": ("errors nets qdq ptq", "numpy torch", "safetensors"),
    "cli_quantize": ("errors cli_options", "click", "files nets ptq ptq.reconstruct ptq.torch_source"),
    "package": (
        "errors files target qdq bundle ladder bundle.write compile.artifact compile client",
        "numpy",
        "",
    ),
    # across stages
    "demo_search": (f"errors quant {STAGES}", "numpy", ""),
    "demo": (f"errors demo_search trust {STAGES}", "numpy", ""),
    "doctor": ("selftest target installed", "", ""),
    "scaffold": ("errors files recipe data pictures image_folder", "numpy", "nets"),
    "cli_publish": ("errors cli_options", "click", "files trust"),
    "cli_search": ("errors cli_options", "click", f"{STAGES} torch"),
    "cli_device": ("errors progress cli_options", "click", "files client numpy"),
    "cli_devices": ("errors cli_options cli_search", "click", f"{STAGES} torch"),
    "cli_model": ("errors cli_options", "click", STAGES),
    "cli_train": ("errors cli_options cli_search", "click", f"{STAGES} torch"),
    "cli_report": ("errors cli_options", "click", "report.folders"),
    "cli_setup": ("errors cli_options", "click", "selftest data demo doctor scaffold"),
    "cli": (
        "errors cli_options cli_device cli_devices cli_model cli_publish cli_quantize cli_report cli_search cli_serve"
        " cli_setup cli_train",
        "click",
        "",
    ),
}

HEAVY = (
    *("torch", "tvm", "tvm_ffi", "onnx", "onnxruntime", "onnxsim", "safetensors", "aiohttp", "matplotlib", "pymoo"),
    *("scipy", "click", "tuf", "securesystemslib", "cryptography", "fsspec", "rich"),
)


@dataclass
class Imports:
    """Dotted names that one file imports, when it is loaded and later."""

    loading: set[str] = field(default_factory=set)
    later: set[str] = field(default_factory=set)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def read_imports(path: Path, module: str) -> Imports:
    """`module` is the dotted name of `path` below qdeploy; the names found are absolute."""
    found = Imports()
    package = ["qdeploy", *module.split(".")] if path.name == "__init__.py" else ["qdeploy", *module.split(".")[:-1]]

    def visit(node: ast.AST, into: set[str]) -> None:
        if isinstance(node, ast.Import):
            into.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module or "") if part)
            # `from qdeploy import x`: x is a module if there is a file of that name
            names = [f"{source}.{a.name}" for a in node.names] if source.split(".")[0] == "qdeploy" else []
            modules = [name for name in names if locate(name) is not None]
            into.update(modules)
            if len(modules) < len(node.names):
                into.add(source)
        for child in ast.iter_child_nodes(node):
            lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(node)
            visit(child, found.later if lazy else into)

    visit(ast.parse(path.read_text()), found.loading)
    return found


def locate(name: str) -> Path | None:
    """File of a dotted module name of qdeploy."""
    base = PACKAGE.parent.joinpath(*name.split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def unit_of(module: str) -> str:
    """The longest key of the table that `module` (dotted, below qdeploy) belongs to; KeyError when there is none."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (key := ".".join(parts[:length])) in TABLE:
            return key
    raise KeyError(
        f"qdeploy/{module.replace('.', '/')}.py stands for no unit of TABLE: add it where the data flow has it"
    )


def modules() -> dict[str, Path]:
    """Dotted name below qdeploy -> file, without qdeploy/__init__.py."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts:
            names[".".join(parts)] = path
    return names


def breaches(module: str, names: set[str], own: set[str], others: set[str]) -> list[str]:
    """Which of the imported `names` the table does not allow."""
    unit = unit_of(module)
    found = []
    for name in sorted(names):
        top, _, rest = name.partition(".")
        if top != "qdeploy":
            if top not in sys.stdlib_module_names and top not in others:
                found.append(top)
        elif rest and (target := unit_of(rest)) != unit and target not in own:
            found.append(name)
    return found


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_follow_the_table(module: str) -> None:
    own, others, later = (set(text.split()) for text in TABLE[unit_of(module)])
    imports = read_imports(modules()[module], module)
    assert not breaches(module, imports.loading, own, others), "imported when the module is loaded"
    assert not breaches(module, imports.later, own | later, others | later), "imported inside a function"


def test_table_goes_one_way() -> None:
    units = list(TABLE)
    for index, (unit, (own, others, later)) in enumerate(TABLE.items()):
        above = units[:index]
        for name in own.split():
            assert name in above, f"{unit} may import {name}, which does not stand above it"
        for name in later.split():
            assert name in above or name not in units, f"{unit} may import {name}, which does not stand above it"
        assert not set(others.split()) & set(units)


def test_no_import_by_string() -> None:
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called.split(".")[-1] not in ("import_module", "__import__"), f"{module} imports by string"


def test_tools_and_tests_are_not_imported() -> None:
    for module, path in modules().items():
        imports = read_imports(path, module)
        tops = {name.split(".")[0] for name in imports.loading | imports.later}
        assert not tops & {"tools", "tests"}, module


@pytest.mark.parametrize("path", [p for p in sorted(PACKAGE.rglob("*.py"))], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or node.lineno) - node.lineno < 70, f"{node.name} is longer than 70 lines"


def loaded_by(code: str) -> set[str]:
    """Top-level names of the modules that a fresh process has loaded after `code`."""
    command = [sys.executable, "-c", f"import sys\n{code}\nprint(*{{name.split('.')[0] for name in sys.modules}})"]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_device_side_loads_numpy_and_the_standard_library() -> None:
    client = [f"qdeploy.{module}" for module in modules() if module.split(".")[0] == "client"]
    loaded = loaded_by("import " + ", ".join(["qdeploy.client", *client]))
    assert "numpy" in loaded
    assert not loaded & set(HEAVY)


def test_the_command_line_starts_without_the_heavy_packages() -> None:
    loaded = loaded_by("import qdeploy.cli")
    assert not loaded & (set(HEAVY) - {"click"})
    assert "numpy" not in loaded


def test_reader_sees_every_kind_of_import(tmp_path: Path) -> None:
    path = tmp_path / "store.py"
    path.write_text(
        "import os, torch.nn as nn\nfrom . import planes\nfrom ..errors import BundleError\n"
        "from qdeploy import files, x\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import tvm\n"
        "try:\n    import onnx\nexcept ImportError:\n    pass\nclass A:\n    import click\n"
        "    def f(self):\n        import numpy\n"
    )
    found = read_imports(path, "bundle.store")
    loading = {"os", "torch.nn", "typing", "onnx", "click", "qdeploy", "qdeploy.files", "qdeploy.errors"}
    assert found.loading - {"qdeploy.bundle.planes"} == loading and "qdeploy.bundle.planes" in found.loading
    assert found.later == {"tvm", "numpy"}
    assert breaches("bundle.store", found.loading, {"errors", "files"}, {"numpy"}) == ["click", "onnx", "torch"]
