"""What is built from this checkout, and a device that has installed no more than the wheel and `qdeploy[device]`."""

from __future__ import annotations

import functools
import http.server
import re
import subprocess
import sys
import tarfile
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from qdeploy import __version__
from tests.trust.world import World

ROOT = Path(__file__).parents[1]
# what a device must not be made to install, whatever it can do without
FORBIDDEN = {
    *("torch", "onnx", "onnxsim", "onnxruntime", "apache-tvm", "apache-tvm-ffi", "safetensors", "matplotlib"),
    *("pymoo", "scipy", "aiohttp", "prometheus-client", "fsspec", "distributed", "pillow"),
}
ABSENT = ("torch", "onnx", "onnxruntime", "tvm", "aiohttp", "matplotlib", "safetensors", "PIL", "fsspec", "pymoo")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel): the wheel is built from the sdist, as an index would have it, without network or isolation."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    assert wheel.name == f"qdeploy-{__version__}-py3-none-any.whl"
    return sdist, wheel


@pytest.fixture(scope="module")
def metadata(built: tuple[Path, Path]) -> Message:
    with zipfile.ZipFile(built[1]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def tracked(folder: str) -> set[str]:
    """Files of a folder of the checkout that are part of the project: no caches, nothing compiled."""
    found = (path for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts}


def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licence = archive.read(f"qdeploy-{__version__}.dist-info/licenses/LICENSE")
        assert archive.read("qdeploy/targets/host.toml") == (ROOT / "targets" / "host.toml").read_bytes()
    assert names == tracked("qdeploy") | {f"qdeploy/{name}" for name in tracked("targets")}
    assert licence == (ROOT / "LICENSE").read_bytes()
    # what a command reads at run time, beside modules
    assert {"qdeploy/py.typed", "qdeploy/bundle/FORMAT.md", "qdeploy/compile/cuda/host.cc"} <= names
    assert any(name.endswith(".cuh") for name in names)


def test_the_sdist_holds_what_the_wheel_is_built_from(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    assert tracked("qdeploy") | tracked("targets") <= names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "PKG-INFO"} <= names
    unwanted = {"tests", "runs", "claims", "models", "data", "build", ".venv", "tools", "runner"}
    assert not {name.split("/")[0] for name in names} & unwanted


def test_metadata_says_what_the_package_is(metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("qdeploy", __version__)
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == "<3.14,>=3.11"
    assert metadata.get_payload() == (ROOT / "README.md").read_text()
    extras = {"device", "compile", "train", "search", "serve", "scale", "farm", "cuda", "all", "docs", "bench", "dev"}
    assert set(metadata.get_all("Provides-Extra", [])) == extras


def installed(name: str) -> Distribution:
    try:
        return distribution(name)
    except PackageNotFoundError:
        pytest.fail(f"{name} is a requirement and is not installed: run make test, which sets up .venv")


def resolved(metadata: Message, extra: str) -> dict[str, Distribution]:
    """Name -> distribution of everything that `pip install qdeploy[extra]` brings here, walked through requirements."""
    found: dict[str, Distribution] = {}

    def walk(texts: list[str], extras: set[str]) -> None:
        for requirement in map(Requirement, texts):
            wanted = {"", *extras}
            if requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in wanted):
                continue
            name = canonicalize_name(requirement.name)
            package = installed(requirement.name)
            assert requirement.specifier.contains(package.version, prereleases=True), (
                f"{requirement}: {package.version}"
            )
            if name not in found or requirement.extras:
                found[name] = package
                walk(package.requires or [], set(requirement.extras))

    walk(metadata.get_all("Requires-Dist", []), {extra} if extra else set())
    return found


def test_a_device_installs_little(metadata: Message) -> None:
    assert set(resolved(metadata, "")) == {"numpy", "click", "rich", "markdown-it-py", "mdurl", "pygments"}
    device = set(resolved(metadata, "device"))
    assert {"numpy", "tuf", "cryptography"} <= device
    assert not device & FORBIDDEN
    assert not set(resolved(metadata, "serve")) & {"torch", "onnx", "apache-tvm", "pymoo"}
    assert not set(resolved(metadata, "compile")) & {"torch", "pymoo", "aiohttp", "tuf"}


def test_all_and_dev_have_every_extra_and_constraints_pin_them(metadata: Message) -> None:
    everything = set(resolved(metadata, "all"))
    for extra in ("device", "compile", "train", "search", "serve", "scale", "farm"):
        assert set(resolved(metadata, extra)) <= everything
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pinned = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}
    assert not [line for line in lines if "+" in line], "a local version suffix fits one index only"
    assert sorted(lines) == sorted(set(lines))
    every = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    apart = [one for one in every if one.marker and any(one.marker.evaluate({"extra": e}) for e in ("bench", "docs"))]
    named = {canonicalize_name(one.name) for one in apart}  # what these bring in turn is not installed by make test
    missing = (named | set(resolved(metadata, "dev"))) - {"qdeploy", *pinned}
    # what only a CUDA build of torch brings
    assert not {name for name in missing if not re.match("nvidia-|cuda-|triton", name)}, "add to constraints.txt"
    exact = (requirement for requirement in metadata.get_all("Requires-Dist", []) if "==" in requirement.split(";")[0])
    for requirement in map(Requirement, exact):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])


def test_extras_name_what_each_is_for() -> None:
    """Every requirement stands on a line with its reason, or below one."""
    text = (ROOT / "pyproject.toml").read_text()
    table = tomllib.loads(text)["project"]
    block = text[text.index("\ndependencies = [") : text.index("[project.scripts]")]
    for requirement in table["dependencies"]:
        (line,) = (line for line in block.splitlines() if line.strip().startswith(f'"{requirement}"'))
        assert "#" in line
    for name in table["optional-dependencies"]:
        (at,) = (i for i, line in enumerate(block.splitlines()) if line.startswith(f"{name} = "))
        line, before = block.splitlines()[at], block.splitlines()[at - 1]
        assert "#" in line or before.startswith("#") or name == "dev", name


def link(packages: dict[str, Distribution], site: Path) -> None:
    """Let the environment whose site-packages are `site` see these installed packages, and no others."""
    for package in packages.values():
        tops = {Path(file).parts[0] for file in package.files or []} - {"..", "__pycache__"}
        for top in tops:
            target = Path(str(package.locate_file(top)))
            if target.exists() and not (site / top).exists():
                (site / top).symlink_to(target)


@pytest.fixture(scope="module")
def device(built: tuple[Path, Path], metadata: Message, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a new environment with the wheel and what `qdeploy[device]` resolves to."""
    home = tmp_path_factory.mktemp("device") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = str(home / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(built[1])], check=True)
    (site,) = (home / "lib").glob("python*/site-packages")
    link(resolved(metadata, "device"), site)
    return home / "bin"


def call(bin_: Path, *arguments: object, code: int = 0) -> str:
    done = subprocess.run([str(bin_ / "qdeploy"), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def script(bin_: Path, code: str, *arguments: object) -> str:
    command = [str(bin_ / "python"), "-c", code, *map(str, arguments)]
    # `-c` looks for modules in the working directory first, which must not be the checkout
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=bin_)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def world(tmp_path: Path) -> Iterator[tuple[World, str]]:
    """A publisher with a signed release, and the address where any web server gives it out."""
    world = World(tmp_path / "world", root="1/1", targets="1/1")
    world.publish()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(world.folder / "root"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield world, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_device_has_only_what_it_asked_for(device: Path) -> None:
    found = script(
        device, "import importlib.util, sys\nfor n in sys.argv[1:]: print(importlib.util.find_spec(n))", *ABSENT
    )
    assert set(found.split()) == {"None"}
    where = script(device, "import qdeploy; print(qdeploy.__file__)").strip()
    assert where.startswith(str(device.parent)), "the wheel and not the checkout"


def test_the_client_imports_little(device: Path) -> None:
    code = (
        "import sys, pkgutil, importlib, qdeploy.client as client\n"
        "for m in pkgutil.iter_modules(client.__path__):\n"
        "    if m.name != '__main__': importlib.import_module(f'qdeploy.client.{m.name}')\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    loaded = set(script(device, code).split())
    assert "numpy" in loaded
    assert not loaded & {*ABSENT, "rich", "click", "tuf", "cryptography", "securesystemslib", "asyncio"}


def test_a_device_pulls_verifies_and_assembles(device: Path, world: tuple[World, str], tmp_path: Path) -> None:
    publisher, url = world
    files = publisher.bundle().files
    low, *_, high = files
    folder = tmp_path / "device"
    call(device, "pull", url, folder, "--root", publisher.home / "1.root.json", "--level", low)
    assembled = (
        "import sys, hashlib, pathlib\nfrom qdeploy.bundle.store import assemble\n"
        "from qdeploy.client.state import DeviceFolder\n"
        "d = DeviceFolder(pathlib.Path(sys.argv[1])); m = d.manifest(d.chosen().manifest)\n"
        "data = assemble(m, sys.argv[2], d.reader(m)); pathlib.Path(sys.argv[3]).write_bytes(data)"
    )
    for level, command in ((low, None), (high, "climb"), (low, "drop")):
        if command is not None:
            call(device, command, folder, "--to", level)
        script(device, assembled, folder, level, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == files[level]


def test_a_device_refuses_what_nobody_signed(device: Path, world: tuple[World, str], tmp_path: Path) -> None:
    publisher, url = world
    assert "--root" in call(device, "pull", url, tmp_path / "a", code=2)
    (tmp_path / "other").mkdir()
    stranger = World(tmp_path / "other", root="1/1", targets="1/1")
    refused = call(device, "pull", url, tmp_path / "b", "--root", stranger.home / "1.root.json", code=2)
    assert refused.startswith("qdeploy: ") and len(refused.splitlines()) == 1


def test_an_installed_wheel_knows_the_shipped_targets(device: Path) -> None:
    code = "import pathlib, qdeploy.target as t; print(t.SHIPPED, t.load_target(pathlib.Path('host')).cpu)"
    where, cpu = script(device, code).split()
    assert Path(where).parent.name == "qdeploy" and cpu == "host"


@pytest.mark.parametrize(
    ("line", "extra"),
    [("serve site", "serve"), ("targets", "compile"), ("quantize model.onnx --data images -o int8.onnx", "compile")],
)
def test_a_command_that_lacks_its_packages_names_the_extra(device: Path, line: str, extra: str) -> None:
    refused = call(device, *line.split(), code=2)
    assert len(refused.splitlines()) == 1 and f"qdeploy[{extra}]" in refused
