"""Requirements read from metadata, without a package that understands them."""

from __future__ import annotations

import pytest

from qdeploy import installed
from qdeploy.installed import Requirement, distribution_of, extra_packages, extras_of, parse, requirements

LINES = [
    "numpy>=2.1",
    "rich>=14",
    'torch==2.13.0; extra == "train"',
    "qdeploy[compile]; extra == 'train'",
    'onnx<2,>=1.23 ; extra == "compile"',
    "Pillow>=11; extra == 'compile'",
    'qdeploy[train,Serve_x]; extra == "all"',
    'aiohttp>=3.14; extra == "serve-x"',
    'mypy; extra == "dev"',
]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("numpy>=2.1", Requirement("numpy", ">=2.1", "")),
        ("onnx<2,>=1.23; extra == 'compile'", Requirement("onnx", "<2,>=1.23", "compile")),
        ("Prometheus_Client (>=0.22)", Requirement("prometheus-client", ">=0.22", "")),
        ('qdeploy[a, B.c]; extra == "all"', Requirement("qdeploy", "", "all", ("a", "b-c"))),
        ('x; python_version < "3.12" and extra == "dev"', Requirement("x", "", "dev")),
    ],
)
def test_requirements_are_read(line: str, expected: Requirement) -> None:
    assert parse(line) == expected


@pytest.mark.parametrize("line", ["", ">=3", "[x]", "  "])
def test_what_is_no_requirement(line: str) -> None:
    with pytest.raises(ValueError, match="is no requirement"):
        parse(line)


@pytest.mark.parametrize(
    ("found", "asked", "met"),
    [
        ("2.13.0+cpu", "==2.13.0", True),
        ("2.13.1", "==2.13.0", False),
        ("0.27.0.post1", "==0.27.0.post1", True),
        ("0.27.0.post2", "==0.27.0.post1", False),
        ("2.0", ">=2.0.0", True),
        ("1.9.9", ">=1.10", False),
        ("1.31.1", ">=1.23,<2", True),
        ("2.0", "<2", False),
        ("2.0", "<=2", True),
        ("2.0.1", ">2", True),
        ("3", "", True),
        (None, "", False),
    ],
)
def test_versions_are_compared(monkeypatch: pytest.MonkeyPatch, found: str | None, asked: str, met: bool) -> None:
    def version(package: str) -> str:
        if found is None:
            raise installed.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(installed, "version", version)
    assert Requirement("thing", asked, "").met is met


def test_extras_name_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "requires", lambda name: LINES)
    among = requirements()
    assert set(extra_packages("train", among)) == {"torch", "onnx", "pillow"}
    assert set(extra_packages("all", among)) == {"torch", "onnx", "pillow", "aiohttp"}
    assert extra_packages("nothing", among) == {}
    assert extras_of("onnx") == ["compile", "train", "all"]  # the least first
    assert extras_of("pillow")[0] == "compile" and extras_of("numpy") == [] == extras_of("unheard-of")


def test_extras_that_name_each_other_in_a_circle() -> None:
    among = [parse("qdeploy[b]; extra == 'a'"), parse("qdeploy[a]; extra == 'b'"), parse("x; extra == 'b'")]
    assert set(extra_packages("a", among)) == {"x"}


def test_a_folder_that_was_never_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise installed.PackageNotFoundError(name)

    monkeypatch.setattr(installed, "requires", requires)
    assert requirements() == [] == extras_of("numpy")


def test_modules_and_their_packages() -> None:
    assert distribution_of("PIL") == "pillow" and distribution_of("tvm") == "apache-tvm"
    assert distribution_of("numpy") == "numpy" and distribution_of("not_here") == "not-here"
