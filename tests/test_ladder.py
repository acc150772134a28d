from pathlib import Path

import numpy as np
import onnx
import pytest

from qdeploy.bundle.store import assemble, tree_reader
from qdeploy.bundle.tables import TensorLevel
from qdeploy.bundle.write import write_bundle
from qdeploy.errors import BundleError, ModelError
from qdeploy.export.write import export_onnx, qdq_bytes
from qdeploy.files import canonical_json, sha256
from qdeploy.ladder import read_ladder
from qdeploy.qdq import graph_digest
from tests.bundle.small import TOP, container, model_bytes, write_levels
from tests.nets_frozen import ladder_of, random_frozen


def save(folder: Path, **models: bytes) -> list[Path]:
    paths = []
    for name, data in models.items():
        paths.append(folder / f"{name}.onnx")
        paths[-1].write_bytes(data)
    return paths


def test_a_small_ladder(tmp_path: Path) -> None:
    paths = write_levels(tmp_path)
    ladder = read_ladder([paths[2], paths[0], paths[1]])
    assert [level.name for level in ladder.levels] == ["w2", "w3", "w4"]
    assert ladder.model == "w4" and ladder.graph == graph_digest(paths[0].read_bytes())
    assert {area.name: area.kind for area in ladder.initializers} == {
        "w.weight": "planes",
        "w.weight_scale": "fixed",
        "x.scale": "side",
        "x.zero_point": "fixed",
    }
    (tensor,) = ladder.tensors
    assert np.array_equal(tensor.u, TOP + 8)
    assert tensor.levels == {
        "w2": TensorLevel(2, 5, 12),
        "w3": TensorLevel(3, 4, 4),
        "w4": TensorLevel(4, 3, 0),
    }


@pytest.mark.parametrize("top", [4, 8])
def test_exported_ladders_come_back(tmp_path: Path, top: int) -> None:
    levels = (2, 3, 4) if top == 4 else (2, 5, 8)
    paths = save(tmp_path, **{f"w{net.spec['fc'].weight_bits}_{i}": qdq_bytes(net) for i, net in
                              enumerate(ladder_of(7, levels, depthwise=True))})  # fmt: skip
    manifest = write_bundle(read_ladder(paths), [], tmp_path / "tree")
    read = tree_reader(tmp_path / "tree", manifest)
    for path, level in zip(paths, manifest.levels, strict=True):
        assert level.name == path.stem
        assert assemble(manifest, level.name, read) == path.read_bytes()
    stem = next(i for i, tensor in enumerate(manifest.tensors) if tensor.name == "stem.weight")
    assert len({level.tensors[stem] for level in manifest.levels}) == 1  # a fixed tensor is held in full at every level


def test_mixed_levels(tmp_path: Path) -> None:
    names = [name for name in random_frozen(3).weights if name not in ("stem", "fc")]
    mixed = {name: 2 + i % 3 for i, name in enumerate(names)}
    nets = [random_frozen(3, bits=bits, activation_bits=8) for bits in (2, mixed, 4)]
    paths = save(tmp_path, **{name: qdq_bytes(net) for name, net in zip(("low", "mixed", "high"), nets, strict=True)})
    manifest = write_bundle(read_ladder(paths), [], tmp_path / "tree")
    assert [level.name for level in manifest.levels] == ["low", "mixed", "high"]
    for i, tensor in enumerate(manifest.tensors):
        if (name := tensor.name.removesuffix(".weight")) in mixed:
            assert [level.tensors[i].bits for level in manifest.levels] == [2, mixed[name], 4]


def test_sidecars(tmp_path: Path) -> None:
    for i, net in enumerate(ladder_of(1, (2, 4))):
        export_onnx(net, tmp_path / f"level{i}.onnx")
    ladder = read_ladder([tmp_path / "level0.onnx", tmp_path / "level1.onnx"])
    assert ladder.model == "random"
    low = ladder.levels[0]
    assert low.info == {"spec_id": ladder_of(1, (2, 4))[0].spec.id, "accuracy.top1": 0.5}
    assert low.golden is not None and set(low.golden) == {"input_sha256", "output_sha256"}
    (tmp_path / "level1.onnx.json").write_bytes((tmp_path / "level0.onnx.json").read_bytes())
    with pytest.raises(BundleError, match=r"level1.onnx.json belongs to another file"):
        read_ladder([tmp_path / "level0.onnx", tmp_path / "level1.onnx"])


@pytest.mark.parametrize(
    "edit", [{"format": "x"}, {"golden": {"a": 1}}, {"golden": [1]}, {"name": 3}, {"spec_id": None}]
)
def test_bad_sidecars(tmp_path: Path, edit: dict[str, object]) -> None:
    (path,) = write_levels(tmp_path, (4,))
    sidecar = {"format": "qdeploy-model/1", "model": sha256(path.read_bytes()), "name": "net"}
    (tmp_path / "w4.onnx.json").write_bytes(canonical_json(sidecar))
    assert read_ladder([path]).model == "net"
    (tmp_path / "w4.onnx.json").write_bytes(canonical_json(sidecar | edit))
    with pytest.raises(BundleError, match=r"w4.onnx.json"):
        read_ladder([path])


def test_one_level_is_a_ladder(tmp_path: Path) -> None:
    ladder = read_ladder(write_levels(tmp_path, (4,)))
    manifest = write_bundle(ladder, [], tmp_path / "tree")
    assert manifest.levels[0].side is None
    read = tree_reader(tmp_path / "tree", manifest)
    assert assemble(manifest, "w4", read) == (tmp_path / "w4.onnx").read_bytes()


def test_foreign_files_are_made_canonical(tmp_path: Path) -> None:
    """Plain truncation codes, another scale per level, unsigned weights; other producer, doc strings, typed fields."""
    paths = []
    for bits in (2, 4):
        codes = ((TOP + 8) >> (4 - bits)).astype(np.uint8)
        model = onnx.load_model_from_string(model_bytes(codes, extra={}))
        model.producer_name = f"tool {bits}"
        model.graph.node[0].doc_string = "from line 7"
        scale = next(t for t in model.graph.initializer if t.name == "w.weight_scale")
        scale.ClearField("raw_data")
        scale.float_data.append(0.04 / bits)
        paths.append(tmp_path / f"b{bits}.onnx")
        paths[-1].write_bytes(model.SerializeToString())
    said: list[str] = []
    ladder = read_ladder(paths, said.append)
    assert len(said) == 2 and "level b2: b2.onnx was written by another tool" in said[0]
    assert ladder.tensors[0].levels == {"b2": TensorLevel(2, 0, 2), "b4": TensorLevel(4, 0, 8)}
    manifest = write_bundle(ladder, [], tmp_path / "tree")
    assembled = assemble(manifest, "b2", tree_reader(tmp_path / "tree", manifest))
    assert assembled == ladder.levels[0].data != paths[0].read_bytes()


def test_levels_that_differ_in_side_tensors_alone(tmp_path: Path) -> None:
    paths = save(tmp_path, a4=model_bytes(container(4), 0.5), a8=model_bytes(container(4), 0.25))
    manifest = write_bundle(read_ladder(paths), [], tmp_path / "tree")
    read = tree_reader(tmp_path / "tree", manifest)
    for path in paths:
        assert assemble(manifest, path.stem, read) == path.read_bytes()


def test_bad_ladders(tmp_path: Path) -> None:
    good = container(4)
    a = model_bytes(good)
    (path,) = save(tmp_path, a=a)
    (tmp_path / "other").mkdir()
    cases = [
        ([], "at least one level"),
        ([path, *save(tmp_path / "other", a=model_bytes(container(2)))], "two levels are called a"),
        ([path, *save(tmp_path, copy=a)], "levels a and copy are identical"),
        ([path, *save(tmp_path, relu=model_bytes(good, relu=True))], r"not of one graph: node matmul.*other inputs"),
        ([path, *save(tmp_path, wide=model_bytes(np.hstack([good, good])))], r"initializer w.weight is INT8 \[6, 8\]"),
        ([path, *save(tmp_path, extra=model_bytes(good, extra={"a.b": np.float32(1)}))], "initializer a.b is only in"),
        ([path, *save(tmp_path, odd=model_bytes(good[::-1].copy()))], "tensor w.weight does not nest"),
        ([path, *save(tmp_path, **{"a b": a})], "rename it"),
    ]
    for paths, message in cases:
        with pytest.raises(BundleError, match=message):
            read_ladder(paths)
    with pytest.raises(ModelError):
        read_ladder([tmp_path / "gone.onnx"])


def test_structure_may_not_differ(tmp_path: Path) -> None:
    """An initializer without a numeric role (read by no quantizer) is part of the graph."""
    files = save(tmp_path, a=model_bytes(container(4), extra={"s": np.int64(1)}),
                 b=model_bytes(container(2), extra={"s": np.int64(2)}))  # fmt: skip
    with pytest.raises(BundleError, match="initializer s is part of the structure"):
        read_ladder(files)
