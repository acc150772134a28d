from pathlib import Path

import pytest

from qdeploy.bundle.manifest import manifest_bytes
from qdeploy.bundle.store import object_name
from qdeploy.errors import BundleError, ModelError, QDeployError
from qdeploy.files import canonical_json
from qdeploy.frozen import save_frozen
from qdeploy.inspect import describe, render
from qdeploy.recipe import from_dict
from qdeploy.space import Architecture, Block, LayerBits, SubnetSpec
from tests.bundle.small import small_tree
from tests.nets_frozen import random_frozen


def test_bundle(tmp_path: Path) -> None:
    manifest = small_tree(tmp_path)
    found = describe(tmp_path / "tree")
    assert (found["kind"], found["model"], found["release"]) == ("bundle", "w4", 1)
    assert found["manifest bytes"] == len(manifest_bytes(manifest))
    assert [level["bits a weight"] for level in found["levels"]] == [2, 3, 4]
    steps = [level["step bytes"] for level in found["levels"]]
    assert [level["total bytes"] for level in found["levels"]] == [sum(steps[: i + 1]) for i in range(3)]
    summary = {row["planes"]: row for row in found["planes against their entropy"]}
    assert list(summary) == ["base", "2", "3", "all"]
    assert summary["all"]["coded"] == sum(manifest.pieces[part.piece].size for part in manifest.tensors[0].parts)
    assert summary["all"]["weights"] == 48 and 0 < summary["all"]["bound"] <= 24
    assert found["artifacts"][0]["target"] == "host"
    text = render(found)
    assert "bits a weight" in text and "w.weight" in text
    canonical_json(found)  # a plain JSON value


def test_damaged_bundle(tmp_path: Path) -> None:
    manifest = small_tree(tmp_path)
    path = tmp_path / "tree" / object_name(manifest.objects[0].sha256)
    path.write_bytes(bytes(len(path.read_bytes())))
    with pytest.raises(BundleError, match="SHA-256"):
        describe(tmp_path / "tree")


def test_model(tmp_path: Path) -> None:
    small_tree(tmp_path)
    found = describe(tmp_path / "w4.onnx")
    assert found["kind"] == "QDQ ONNX model" and found["canonical"] == "yes" and found["opset"] == 13
    assert found["weights"][0]["tensor"] == "w.weight" and found["weights"][0]["codes"] <= 16
    assert "w.weight" in render(found)


def test_artifact(tmp_path: Path) -> None:
    small_tree(tmp_path)
    found = describe(tmp_path / "artifact")
    assert found["kind"] == "compiled artifact" and found["arena bytes"] == 64
    assert found["files"][0]["file"] == "lib.so"
    assert "avx2" in render(found)
    (tmp_path / "artifact" / "lib.so").write_bytes(b"x")
    with pytest.raises(BundleError, match="not the file that artifact.json names"):
        describe(tmp_path / "artifact")
    (tmp_path / "artifact" / "artifact.json").write_bytes(b"{}")
    with pytest.raises(BundleError, match="damaged"):
        describe(tmp_path / "artifact")


def test_frozen_network_and_spec(tmp_path: Path) -> None:
    net = random_frozen(0)
    save_frozen(net, tmp_path / "net")
    found = describe(tmp_path / "net")
    assert found["kind"] == "frozen network" and found["spec id"] == net.spec.id
    assert {row["layer"]: row["bits"] for row in found["layers"]}["stem"] == 8
    (tmp_path / "spec.json").write_bytes(canonical_json(net.spec.to_json()))
    spec = describe(tmp_path / "spec.json")
    assert spec["kind"] == "subnet spec" and spec["id"] == net.spec.id and len(spec["layers"]) == len(net.spec.layers)
    assert "weight bits" in render(spec) and "stem" in render(found)
    elastic = SubnetSpec("n", (LayerBits("a", 2, 3, "channel", "asymmetric"),), Architecture(((Block(3, 4),),), 28))
    (tmp_path / "elastic.json").write_bytes(canonical_json(elastic.to_json()))
    spec = describe(tmp_path / "elastic.json")
    assert spec["layers"][0]["granularity"] == "channel" and spec["architecture"]["resolution"] == 28
    assert "asymmetric" in render(spec)


def test_a_run_lists_every_phase(tmp_path: Path) -> None:
    recipe = from_dict({"name": "r", "network": {"name": "n"}, "data": {"name": "d"}})
    (tmp_path / "recipe.json").write_bytes(canonical_json(recipe.to_json()))
    for i, phase in enumerate(("float", "mixed", "quantized")):
        (tmp_path / f"{phase}.checkpoint").write_bytes(bytes(i + 1))
    found = describe(tmp_path)
    assert [(row["phase"], row["bytes"]) for row in found["checkpoints"]] == [
        ("float", 1), ("mixed", 2), ("quantized", 3),
    ]  # fmt: skip
    assert "mixed" in render(found)


def test_anything_else(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.json").write_bytes(b'{"a":1}')
    (tmp_path / "x.onnx").write_bytes(b"not a model")
    for name in ("empty", "x.json", "x.onnx", "gone"):
        with pytest.raises(QDeployError) as e:
            describe(tmp_path / name)
        assert isinstance(e.value, ModelError)
        assert name in str(e.value) and "\n" not in str(e.value)
