"""Costs of genomes against networks that are really built, and the papers' BitOPs by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from qdeploy.export import export_onnx
from qdeploy.profile.bitops import bitops, read_values
from qdeploy.profile.memory import activation_bytes, memory
from qdeploy.quant.simulated import SimulatedNet
from qdeploy.recipe import from_dict
from qdeploy.search import geometry as geometry_module
from qdeploy.search.costs import Costs
from qdeploy.search.encoding import Encoding
from qdeploy.search.geometry import coded_bytes, geometry
from qdeploy.subnet import extract
from qdeploy.train.run import new_network, new_quantized
from tests.train.runs import supernet_recipe, tiny_recipe


def untrained(recipe: dict[str, Any], image: tuple[int, ...], classes: int = 10) -> SimulatedNet:
    found = from_dict(recipe)
    return new_quantized(found, new_network(found, image[0], classes), image)


def test_costs_are_those_of_the_exported_network(images: np.ndarray, tmp_path: Path) -> None:
    recipe = supernet_recipe(weights="vertical", activation_bits=[4, 8]).to_json()
    net = untrained(recipe, (1, 28, 28))
    encoding = Encoding(net.space)
    costs = Costs(encoding, geometry(net, encoding, (1, 28, 28)))
    genomes = encoding.spread(2, np.random.default_rng(1))
    found, parts = costs(genomes), costs.parts(genomes)
    for i, spec in enumerate(encoding.specs(genomes)):
        path = tmp_path / f"{i}.onnx"
        export_onnx(extract(net, spec, "net", np.tile(images, (4, 1, 1, 1)), None), path)
        counted = bitops(path)
        macs = {row["layer"]: row["macs"] for row in counted["layers"]}
        rows = {row["layer"]: row for row in counted["layers"]}
        present = [name for name, value in zip(encoding.layers, parts["macs"][i], strict=True) if value]
        assert set(macs) == set(present) == {entry.layer for entry in spec.layers}
        for name, value in zip(encoding.layers, parts["macs"][i], strict=True):
            assert macs.get(name, 0) == value
        spent = sum(macs[e.layer] * e.weight_bits * e.activation_bits for e in spec.layers)
        assert found["bitops"][i] == spent and found["complexity"][i] == spent / 64
        assert {rows[e.layer]["activation_bits"] for e in spec.layers} <= {4, 8}
        graph, values = read_values(path)
        assert found["activations_kib"][i] * 1024 == activation_bytes(graph, values)
        assert memory(graph, values, 0, 0)["weight_containers"].value == parts["weights"][i].sum()


def test_coded_bytes_are_those_of_the_weights(fashion_sample: Any) -> None:
    net = untrained(tiny_recipe().to_json(), (1, 28, 28))
    encoding = Encoding(net.space)
    found = geometry(net, encoding, (1, 28, 28))
    spec = net.uniform(2)
    for row, name in enumerate(encoding.layers):
        bits = spec[name].weight_bits
        assert found.coded[row, 0, bits] == coded_bytes(net.layer_codes(net.steps[name], spec).codes)
    assert (found.coded[1, 0, [2, 3, 4]] > 0).all() and (np.diff(found.coded[1, 0, [2, 3, 4]]) > 0).all()
    assert coded_bytes(np.zeros((4, 4), np.int8)) == 0


RESNET18 = {"stem": 118_013_952, "stage 1": 4 * 115_605_504, "stages 2 to 4": 3 * 411_041_792, "classifier": 512_000}


@pytest.mark.parametrize("ends", [8, "float"])
def test_bitops_of_resnet18_by_hand(ends: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry_module, "coded_bytes", lambda codes: 0)  # of no interest here, and slow
    recipe = tiny_recipe(first_last=ends).to_json()
    recipe["network"] = {"name": "resnet18-imagenet"}
    net = untrained(recipe, (3, 224, 224), 1000)
    encoding = Encoding(net.space)
    costs = Costs(encoding, geometry(net, encoding, (3, 224, 224)))
    genomes = encoding.genomes([net.uniform(4)])
    found = costs(genomes)
    outer = RESNET18["stem"] + RESNET18["classifier"]
    inner = sum(RESNET18.values()) - outer
    assert costs.parts(genomes)["macs"].sum() == sum(RESNET18.values()) == 1_814_073_344
    if ends == "float":
        assert found["bitops"][0] == inner * 4 * 4
        assert found["complexity"][0] == outer + inner * 16 / 64
    else:
        assert found["bitops"][0] == inner * 4 * 4 + outer * 8 * 8
        assert found["complexity"][0] == outer + inner * 16 / 64  # 8 x 8 bits count as one float multiply-add
    weights = sum(cast(Any, step.module).weight.numel() for step in net.graph.layers)
    fixed = 64 * 3 * 49 + 512 * 1000
    bits = (32 if ends == "float" else 8) * fixed + 4 * (weights - fixed)
    assert found["weights_kib"][0] == pytest.approx(bits / 8 / 1024)
