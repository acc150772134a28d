"""The FrozenNet folder: round trip, and every kind of damage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qdeploy.errors import DeviceError, ModelError
from qdeploy.frozen import FrozenNet, Quantizer, load_frozen, save_frozen
from tests.nets_frozen import random_frozen


@pytest.fixture(scope="module")
def net() -> FrozenNet:
    return random_frozen(0, blocks=1, width=4, size=4, images=2)


@pytest.fixture
def folder(net: FrozenNet, tmp_path: Path) -> Path:
    save_frozen(net, tmp_path / "net")
    return tmp_path / "net"


def test_round_trip_keeps_everything(net: FrozenNet, folder: Path) -> None:
    again = load_frozen(folder)
    assert (again.name, again.spec, again.input, again.output) == (net.name, net.spec, net.input, net.output)
    assert again.nodes == net.nodes
    assert dict(again.activations) == dict(net.activations)
    assert dict(again.weights) == dict(net.weights)
    assert dict(again.report) == dict(net.report)
    for mine, theirs in ((net.tensors, again.tensors), (net.golden, again.golden)):
        assert set(mine) == set(theirs)
        for name, array in mine.items():
            assert array.dtype == theirs[name].dtype
            np.testing.assert_array_equal(array, theirs[name])


def test_same_network_same_bytes(net: FrozenNet, folder: Path, tmp_path: Path) -> None:
    save_frozen(load_frozen(folder), tmp_path / "twice")
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "twice" / file.name).read_bytes()


def test_existing_folder_is_kept_without_force(net: FrozenNet, folder: Path) -> None:
    with pytest.raises(DeviceError, match="--force"):
        save_frozen(net, folder)
    save_frozen(net, folder, force=True)


@pytest.mark.parametrize("name", ["frozen.json", "tensors.safetensors", "golden.safetensors"])
def test_every_flipped_bit_is_seen(folder: Path, name: str) -> None:
    path = folder / name
    good = path.read_bytes()
    rng = np.random.default_rng(1)
    for at in rng.integers(0, len(good), 20):
        bad = bytearray(good)
        bad[at] ^= 1
        path.write_bytes(bad)
        if name == "frozen.json":  # a digit of a measured value may change: what is left is a legal network or an error
            try:
                load_frozen(folder).check()
            except ModelError:
                continue
        else:
            with pytest.raises(ModelError, match="does not match"):
                load_frozen(folder)


@pytest.mark.parametrize("name", ["frozen.json", "tensors.safetensors", "golden.safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 0.5, -2])
def test_truncated_file(folder: Path, name: str, keep: float) -> None:
    path = folder / name
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if 0 < keep < 1 else int(keep)])
    with pytest.raises(ModelError):
        load_frozen(folder)


@pytest.mark.parametrize("name", ["frozen.json", "tensors.safetensors", "golden.safetensors"])
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelError, match=name):
        load_frozen(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="qdeploy subnet"):
        load_frozen(tmp_path / "nothing")


EDITS = {
    "format": lambda head: head.update(format="qdeploy-frozen/0"),
    "missing key": lambda head: head.pop("nodes"),
    "nodes of another type": lambda head: head.update(nodes=7),
    "unknown operator": lambda head: head["nodes"][0].update(op="lstm"),
    "unknown node key": lambda head: head["nodes"][0].update(colour="red"),
    "output of nobody": lambda head: head.update(output="nowhere"),
    "scale": lambda head: head["activations"][0]["quantizer"].update(scale=-1.0),
    "zero point": lambda head: head["activations"][0]["quantizer"].update(zero_point=300),
    "range without clip": lambda head: head["activations"][0]["quantizer"].update(lo=1),
    "spec bits": lambda head: head["spec"]["layers"][0].__setitem__(1, 9),
    "no weight bits": lambda head: head["weights"].clear(),
    "a list": lambda head: head["files"].clear(),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_edited_head_is_refused(folder: Path, edit: object) -> None:
    head = json.loads((folder / "frozen.json").read_text())
    edit(head)  # type: ignore[operator]
    (folder / "frozen.json").write_text(json.dumps(head))
    with pytest.raises(ModelError):
        load_frozen(folder)


def test_check_lists_every_problem(net: FrozenNet) -> None:
    bad = dict(net.activations)
    for name, quantizer in (("image", Quantizer(0.1, 0)), ("stem.out", Quantizer(1.0, 0, 1, 2, True))):
        bad[name] = replace(bad[name], quantizer=quantizer)
    found = replace(net, activations=bad).problems()
    assert len(found) == 2
    assert "not a positive finite float32" in found[0] and "stem.out" in found[1]


def test_saving_an_illegal_network_writes_nothing(net: FrozenNet, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="illegal"):
        save_frozen(replace(net, output="nowhere"), tmp_path / "bad")
    assert not list(tmp_path.iterdir())


def test_a_weight_zero_point_travels_and_is_checked(net: FrozenNet, tmp_path: Path) -> None:
    name = next(iter(net.weights))
    key = f"{name}.weight_zero_point"
    save_frozen(replace(net, tensors=net.tensors | {key: np.array(-3, np.int8)}), tmp_path / "net")
    again = load_frozen(tmp_path / "net")
    assert again.tensors[key].shape == () and again.tensors[key] == -3 and again.tensors[key].dtype == np.int8
    for wrong in (np.array(-3, np.int16), np.zeros(2, np.int8)):
        with pytest.raises(ModelError, match="weight_zero_point is not an int8 scalar"):
            replace(net, tensors=net.tensors | {key: wrong}).check()
