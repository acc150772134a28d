from __future__ import annotations

import json
import time
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner

from qdeploy.bundle.rollout import Channels, Entry, rollout_bytes
from qdeploy.cli import main
from qdeploy.client.status import DeviceState
from qdeploy.errors import BundleError, DataError, FetchError
from qdeploy.files import canonical_json, sha256
from qdeploy.serve.app import Options, serving, serving_both
from qdeploy.serve.catalogue import read_signed
from qdeploy.serve.database import PAGE, StateDatabase
from qdeploy.serve.fleet import read_fleet, read_history, render, summarize
from tests.serve.trees import make_root

NOW = 1_000_000.0


def state(device: str, release: int = 2, wanted: str = "w4", reached: str = "w4", **more: object) -> DeviceState:
    return DeviceState(device, "net", "rpi5", release, wanted, reached, **more)  # type: ignore[arg-type]


ROWS = [
    (NOW, state("a", fetched=10)),
    (NOW - 90_000, state("b", 1, reached="w2", stale=True, fetched=5)),
    (NOW, state("c", channel="canary", error="no space")),
]


def test_a_summary_counts_and_names_trouble() -> None:
    found = summarize(ROWS, NOW, 86_400)
    assert found == {
        "devices": 3,
        "fetched_bytes": 15,
        "runs": [
            {"model": "net", "channel": None, "release": 1, "level": "w2", "devices": 1},
            {"model": "net", "channel": None, "release": 2, "level": "w4", "devices": 1},
            {"model": "net", "channel": "canary", "release": 2, "level": "w4", "devices": 1},
        ],
        "behind": [{"device": "b", "wanted": "w4", "reached": "w2"}],
        "stale": ["b"],
        "errors": [{"device": "c", "error": "no space"}],
        "silent": [{"device": "b", "seconds": 90_000}],
    }
    text = render(found)
    assert text.splitlines()[0] == "3 devices, 15 bytes fetched"
    for line in (
        "net    canary   2        w4     1",
        "behind (1): b (w2, wants w4)",
        "stale (1): b",
        "silent (1): b (25 h)",
    ):
        assert line in text.splitlines()
    assert render(summarize([], NOW, 1)) == "0 devices, 0 bytes fetched"


def test_long_lists_are_cut_for_people() -> None:
    found = summarize([(NOW, state(f"d{i:03}", stale=True)) for i in range(100)], NOW, 1)
    line = next(line for line in render(found).splitlines() if line.startswith("stale"))
    assert line.startswith("stale (100): d000, ") and line.endswith(", and 80 more") and "d019" in line


ENTRY = Entry(2, "a" * 64, 10, levels={"rpi5": "w4"})


@pytest.mark.parametrize(
    ("device", "entry", "wish"),
    [
        (state("x"), ENTRY, None),
        (state("x", reached="w2"), ENTRY, (2, "w4")),
        (state("x", 1), ENTRY, (2, "w4")),
        (state("x", 3), ENTRY, (2, "w4")),
        (state("x", 1), Entry(2, "a" * 64, 10, hold=True), None),
        (state("x", 3), Entry(2, "a" * 64, 10, hold=True), (2, None)),
        (state("x", reached="w2"), Entry(2, "a" * 64, 10), None),
    ],
)
def test_what_the_rollout_wants(device: DeviceState, entry: Entry, wish: tuple[int, str | None] | None) -> None:
    found = summarize([(NOW, device)], NOW, 1, {"net": Channels(stable=entry)})["otherwise"]
    assert [(row["wanted_release"], row["wanted_level"]) for row in found] == ([wish] if wish else [])


def test_channels() -> None:
    canary = Entry(5, "b" * 64, 10, percent=100)
    rollout = {"net": Channels(stable=ENTRY, canary=canary)}
    rows = [(NOW, state("x", channel="stable")), (NOW, state("y")), (NOW, state("z", channel="nightly"))]
    found = summarize(rows, NOW, 1, rollout)
    assert [row["device"] for row in found["otherwise"]] == ["y", "z"]
    assert found["otherwise"][0]["channel"] == "canary" and "no channel" in found["otherwise"][1]["problem"]
    assert "y on canary: release 2 w4, not release 5" in render(found)


def make_signed(tree: Path, rollout: bytes, version: int = 9) -> None:
    """Metadata from the timestamp down to the rollout; signatures are not looked at here."""

    def put(name: str, value: object) -> dict[str, object]:
        data = canonical_json({"signed": value})
        (tree / "metadata" / name).write_bytes(data)
        return {"version": version, "length": len(data), "hashes": {"sha256": sha256(data)}}

    digest = sha256(rollout)
    (tree / "rollout" / f"{digest}.json").write_bytes(rollout)
    head = {"version": version, "expires": "2999-01-01T00:00:00Z"}
    target = {"rollout.json": {"hashes": {"sha256": digest}, "length": len(rollout)}}
    entry = put(f"{version}.targets.json", head | {"targets": target})
    entry = put(f"{version}.snapshot.json", head | {"meta": {"targets.json": entry}})
    put("timestamp.json", head | {"meta": {"snapshot.json": entry}})


def test_the_rollout_in_force_is_the_timestamps(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="qdeploy publish"):
        read_signed(tmp_path)
    tree = make_root(tmp_path)
    with pytest.raises(BundleError, match="valid JSON"):
        read_signed(tree)
    rollout = {"net": Channels(stable=ENTRY)}
    make_signed(tree, rollout_bytes(rollout))
    (tree / "metadata" / "11.targets.json").write_bytes(b"{}")  # a crash left it: nothing names it
    found = read_signed(tree)
    assert (found.rollout, found.versions["targets"], found.expires["timestamp"]) == (
        rollout,
        9,
        "2999-01-01T00:00:00Z",
    )


@pytest.mark.parametrize("name", ["9.snapshot.json", "9.targets.json", "rollout"])
def test_a_damaged_link_of_the_chain(tmp_path: Path, name: str) -> None:
    tree = make_root(tmp_path)
    rollout = rollout_bytes({"net": Channels(stable=ENTRY)})
    make_signed(tree, rollout)
    path = tree / "rollout" / f"{sha256(rollout)}.json" if name == "rollout" else tree / "metadata" / name
    data = path.read_bytes()
    for changed in (data + b" ", data[:-2] + b" \n"):
        path.write_bytes(changed)
        with pytest.raises(BundleError, match="damaged: publish again"):
            read_signed(tree)
    path.unlink()
    with pytest.raises(BundleError, match="cannot read"):
        read_signed(tree)


@pytest.mark.parametrize("value", [b"[]", b'{"signed":3}', b'{"signed":{"version":"x","expires":"","meta":{}}}'])
def test_metadata_of_another_make(tmp_path: Path, value: bytes) -> None:
    tree = make_root(tmp_path)
    (tree / "metadata" / "timestamp.json").write_bytes(value)
    with pytest.raises(BundleError, match="not what qdeploy writes"):
        read_signed(tree)


@pytest.fixture
def states(tmp_path: Path) -> Path:
    path = tmp_path / "states.sqlite"
    with closing(StateDatabase(path)) as database:
        database.write([state("a", 1), state("b")], time.time() - 10)
        database.write([state("a", 2)], time.time())
    return path


def call(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    return done.exit_code, done.stdout, done.stderr


def test_the_command(states: Path, tmp_path: Path) -> None:
    tree = make_root(tmp_path)
    make_signed(tree, rollout_bytes({"net": Channels(stable=Entry(3, "a" * 64, 10))}))
    with serving_both(tree, Options(port=0, devices=states, admin_port=0)) as (_, admin):
        for source in (states, admin):
            code, text, _ = call("fleet", source, "--json", "--tree", tree)
            found = json.loads(text)
            assert (code, found["devices"], len(found["otherwise"])) == (0, 2, 2)
            code, text, _ = call("fleet", source, "--device", "a")
            assert code == 0 and [line.split("net ")[1] for line in text.splitlines()] == [
                "release 1 w4",
                "release 2 w4",
            ]
            assert [row["release"] for row in json.loads(call("fleet", source, "--device", "a", "--json")[1])] == [1, 2]
    code, text, _ = call("fleet", states)
    assert code == 0 and "net    -        2        w4     2" in text.splitlines()


def test_what_the_command_refuses(states: Path, tmp_path: Path) -> None:
    tree = make_root(tmp_path)
    with serving(tree) as url:
        cases = [(tmp_path / "no",), (tree / "release.json",), (states, "--device", "zz"), (states, "--device", "../x"),
                 (states, "--tree", tmp_path), (url,), (url, "--device", "a"), ("http://127.0.0.1:1",)]  # fmt: skip
        for arguments in cases:
            code, text, error = call("fleet", *arguments)
            assert (code, text, len(error.splitlines())) == (2, "", 1), arguments


def test_many_devices_come_page_by_page(tmp_path: Path) -> None:
    path = tmp_path / "states.sqlite"
    count = 2 * PAGE + 7
    with closing(StateDatabase(path)) as database:
        database.write([state(f"d{i:05}") for i in range(count)], NOW)
    with serving_both(make_root(tmp_path), Options(port=0, devices=path, admin_port=0)) as (_, admin):
        assert admin is not None
        assert [s.device for _, s in read_fleet(admin)] == [f"d{i:05}" for i in range(count)]
        with pytest.raises(DataError, match="heard nothing"):
            read_history(admin, "nobody")
        with pytest.raises(FetchError):
            read_fleet(admin + "/x")
