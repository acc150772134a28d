"""The JavaScript device in a Node process that answers requests of tests."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qdeploy.files import canonical_json
from qdeploy.trust.keys import KeyFolder, Quorum, init_keys
from qdeploy.trust.publish import Wish, publish
from qdeploy.trust.storage import Folder

SCRIPT = Path(__file__).with_suffix(".mjs")


class Refused(Exception):
    """The device refused what it was given; `name` is the class of its error."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name


def text(data: bytes) -> str:
    """How bytes travel in requests."""
    return base64.b64encode(data).decode()


class Agent:
    """Sends requests and waits for each answer."""

    def __init__(self, program: str) -> None:
        self.process = subprocess.Popen(
            [program, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )

    def ask(self, op: str, **request: Any) -> Any:
        """The answer's result; Refused when the device says an error of its own, AssertionError for any other."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"op": op} | request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "error" not in answer:
            return answer["result"]
        assert answer["name"] in ("BundleError", "NetworkError"), answer
        assert answer["error"] and "\n" not in answer["error"]
        raise Refused(answer["name"], answer["error"])

    def accepts(self, op: str, data: bytes) -> bool:
        """Whether a parser takes these bytes."""
        try:
            self.ask(op, data=text(data))
        except Refused:
            return False
        return True


@pytest.fixture(scope="session")
def node() -> str:
    """Path of Node 20 or later; tests that ask for it are skipped without."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("node is not on PATH")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    if int(version.lstrip("v").split(".")[0]) < 20:
        pytest.skip(f"node is {version.strip()}, not 20 or later")
    return program


@pytest.fixture(scope="module")
def agent(node: str) -> Iterator[Agent]:
    """One Node process for a module of tests."""
    found = Agent(node)
    yield found
    assert found.process.stdin is not None and found.process.stdout is not None
    found.process.stdin.close()
    found.process.stdout.close()
    assert found.process.wait(10) == 0


class Publisher:
    """Keys and a signed tree below one folder."""

    def __init__(self, folder: Path, targets: str = "1/1") -> None:
        self.home, self.tree = folder / "keys", folder / "site"
        init_keys(self.home, Quorum.parse("1/1"), Quorum.parse(targets), None)

    def publish(self, bundle: Path, **wish: Any) -> None:
        """The next release of its model."""
        publish(bundle, Folder(self.tree), KeyFolder([self.home]), Wish(**wish))

    @property
    def root(self) -> bytes:
        """The root metadata that devices are given."""
        return (self.home / "1.root.json").read_bytes()

    @property
    def release(self) -> dict[str, Any]:
        """What release.json says."""
        value: dict[str, Any] = json.loads((self.tree / "release.json").read_bytes())
        return value

    def write_release(self, **change: Any) -> None:
        """Change release.json in the tree."""
        (self.tree / "release.json").write_bytes(canonical_json(self.release | change))
