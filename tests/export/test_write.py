"""export_onnx: both files or none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qdeploy.errors import DeviceError, ModelError
from qdeploy.export import export_onnx
from qdeploy.files import canonical_json, sha256
from qdeploy.frozen import FrozenNet, load_frozen, save_frozen
from qdeploy.qdq import graph_digest
from tests.nets_frozen import ladder_of, random_frozen


@pytest.fixture(scope="module")
def net() -> FrozenNet:
    return random_frozen(0, blocks=1, width=4, images=2)


def test_model_and_sidecar(net: FrozenNet, tmp_path: Path) -> None:
    lines: list[str] = []
    sidecar = export_onnx(net, tmp_path / "deep" / "m.onnx", echo=lines.append)
    data = (tmp_path / "deep" / "m.onnx").read_bytes()
    text = (tmp_path / "deep" / "m.onnx.json").read_bytes()
    assert json.loads(text) == sidecar and canonical_json(sidecar) == text
    assert sidecar["format"] == "qdeploy-model/1"
    assert sidecar["model"] == sha256(data) and sidecar["graph"] == graph_digest(data)
    assert sidecar["spec"] == net.spec.to_json() and sidecar["spec_id"] == net.spec.id
    assert sidecar["weights"]["stem"] == {"bits": 8, "top": 8, "container": 8}
    assert sidecar["accuracy"] == net.report["accuracy"]
    assert sidecar["golden"]["input_sha256"] == sha256(net.golden[net.input].tobytes())
    assert sidecar["parity"]["largest_step"] <= 1
    assert lines and lines[-1].startswith("parity: ")


def test_same_network_same_bytes_also_through_a_folder(net: FrozenNet, tmp_path: Path) -> None:
    save_frozen(net, tmp_path / "net")
    export_onnx(net, tmp_path / "a.onnx")
    export_onnx(load_frozen(tmp_path / "net"), tmp_path / "b.onnx")
    for suffix in ("", ".json"):
        assert (tmp_path / f"a.onnx{suffix}").read_bytes() == (tmp_path / f"b.onnx{suffix}").read_bytes()


def test_levels_have_equal_length(tmp_path: Path) -> None:
    sizes = set()
    for i, level in enumerate(ladder_of(1, (2, 4, 6), blocks=1, width=4, images=1)):
        export_onnx(level, tmp_path / f"{i}.onnx")
        sizes.add((tmp_path / f"{i}.onnx").stat().st_size)
    assert len(sizes) == 1


def test_existing_files_are_kept_without_force(net: FrozenNet, tmp_path: Path) -> None:
    for name in ("m.onnx", "m.onnx.json"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(DeviceError, match="--force"):
            export_onnx(net, tmp_path / "m.onnx")
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    (tmp_path / "m.onnx").write_text("old")
    export_onnx(net, tmp_path / "m.onnx", force=True)
    with pytest.raises(DeviceError, match="--force"):
        export_onnx(net, tmp_path, force=True)  # a folder


def test_nothing_is_written_when_the_gate_refuses(net: FrozenNet, tmp_path: Path) -> None:
    golden = dict(net.golden)
    golden["stem.out"] = np.zeros_like(golden["stem.out"])
    with pytest.raises(ModelError, match="ONNX Runtime disagrees"):
        export_onnx(replace(net, golden=golden), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="illegal"):
        export_onnx(replace(net, output="nowhere"), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_unwritable_place_is_a_device_error(net: FrozenNet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DeviceError, match="cannot write"):
        export_onnx(net, tmp_path / "file" / "m.onnx")
