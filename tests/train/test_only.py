"""One subnet trained alone: as a network of its own, with the losses of a plain one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from click.testing import CliRunner

from qdeploy.cli import main
from qdeploy.data import Dataset
from qdeploy.errors import ModelError, RecipeError
from qdeploy.export import export_onnx
from qdeploy.files import canonical_json
from qdeploy.quant.eqnet import EQNet
from qdeploy.quant.supernet import BatchQuantNet
from qdeploy.recipe import EQNetQuantization, Recipe, with_only
from qdeploy.space import SubnetSpec
from qdeploy.subnet import extract
from qdeploy.train.batchquant import ElasticFullPrecision, full_precision_teacher, phases
from qdeploy.train.checkpoint import load_checkpoint
from qdeploy.train.eqnet import GroupProgressive
from qdeploy.train.run import float_phase, load_run, new_network, new_quantized, train
from tests.train.runs import elastic_recipe, supernet_recipe

SHAPE = {"resolutions": [20, 28], "widths": [4, 8]}


def quiet(_: str) -> None:
    pass


def spec_of(recipe: Recipe, seed: int) -> SubnetSpec:
    return new_quantized(recipe, new_network(recipe, 1, 10), (1, 28, 28)).space.sample(Random(seed))


def alone(recipe: Recipe, seed: int = 0) -> Recipe:
    return with_only(recipe, spec_of(recipe, seed))


def test_every_step_of_a_supernet_recipe_runs_the_one_subnet() -> None:
    recipe = alone(supernet_recipe(shape=SHAPE), 2)
    network = new_network(recipe, 1, 10)
    net = new_quantized(recipe, network, (1, 28, 28))
    assert isinstance(net, BatchQuantNet) and net.only is not None and net.only.architecture is not None
    first = float_phase(recipe, network)
    assert isinstance(first, ElasticFullPrecision) and first.architectures(7) == [net.only.architecture]
    images, labels = torch.rand(16, 1, 28, 28), torch.randint(0, 10, (16,))
    entropy = F.cross_entropy(network(images), labels)
    assert first.backward(images, labels, 0) == {"largest": pytest.approx(float(entropy.detach()), rel=1e-5)}
    teacher = full_precision_teacher(network, torch.randint(0, 256, (256, 1, 28, 28), dtype=torch.uint8).numpy())
    both = phases(net, recipe.quantized_phase, teacher, 0)
    assert [phase.subnets(3) for phase in both] == [[net.only], [net.only]]  # the mixed phase is one of its own
    net.zero_grad()
    found = both[0].backward(images, labels, 0)
    output = net(images, net.only)
    assert found["largest"] == pytest.approx(float(F.cross_entropy(output, labels).detach()), rel=1e-5)
    got = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    taught = teacher(images).detach().log_softmax(1)
    loss = F.cross_entropy(output, labels)
    (loss + F.kl_div(output.log_softmax(1), taught, reduction="batchmean", log_target=True)).backward()
    assert all(torch.allclose(got[n], p.grad, 1e-3, 1e-4) for n, p in net.named_parameters() if p.grad is not None)


def test_a_subnet_alone_is_no_larger_than_it_is() -> None:
    recipe = supernet_recipe(shape=SHAPE)
    spec = spec_of(recipe, 3)
    supernet = new_quantized(recipe, new_network(recipe, 1, 10), (1, 28, 28))
    net = new_quantized(with_only(recipe, spec), new_network(with_only(recipe, spec), 1, 10), (1, 28, 28))
    inherited = dict(supernet.subnet(spec).network.named_parameters())
    own = {name.removeprefix("network."): p.shape for name, p in net.network.named_parameters()}
    assert own == {name: p.shape for name, p in inherited.items()}


def test_eqnet_learns_one_subnet_from_the_labels_alone() -> None:
    recipe = alone(elastic_recipe(kurtosis_weight=5.0))
    net = new_quantized(recipe, new_network(recipe, 1, 10), (1, 28, 28))
    assert isinstance(net, EQNet) and isinstance(recipe.quantization, EQNetQuantization) and net.only is not None
    phase = GroupProgressive(net, recipe.quantized_phase, recipe.quantization, 0)
    images, labels = torch.rand(16, 1, 28, 28), torch.randint(0, 10, (16,))
    assert phase.subnets(0) == phase.subnets(9) == {"only": net.only}
    found = phase.backward(images, labels, 0)
    got = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    loss = F.cross_entropy(net(images, net.only), labels)
    loss.backward()
    assert found == {"only": pytest.approx(float(loss.detach()), rel=1e-5)}
    norm = torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None]).norm()
    scale = min(1.0, 10.0 / float(norm))
    for name, p in net.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad * scale, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["batchquant", "eqnet"])
def test_a_run_of_one_subnet_goes_all_the_way(
    method: str, tmp_path: Path, fashion_sample: Dataset, fashion_test: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qdeploy.train.run.top1", lambda *_: 0.0)  # not what is tested here
    recipe = alone(supernet_recipe(shape=SHAPE) if method == "batchquant" else elastic_recipe(images=256), 1)
    report = train(recipe, tmp_path / "run", None, quiet)
    assert set(report["levels"]) == {"only"}
    loaded, net = load_run(tmp_path / "run")
    assert loaded == recipe and net.only is not None
    frozen = extract(net, net.only, "only", fashion_sample.images[:512], fashion_test.take(100))
    parity = frozen.report["parity"]["simulation"]
    assert parity["differing"] <= 1e-3 * parity["codes"] and parity["largest_step"] <= 1
    sidecar = export_onnx(frozen, tmp_path / "only.onnx")
    assert sidecar["spec_id"] == net.only.id and sidecar["parity"]["largest_step"] <= 1
    tensors = load_checkpoint(tmp_path / "run" / "quantized.checkpoint")[1]
    assert train(recipe, tmp_path / "run", None, quiet) == report  # finished: nothing is trained again
    again = load_checkpoint(tmp_path / "run" / "quantized.checkpoint")[1]
    assert all(torch.equal(tensor, again[key]) for key, tensor in tensors.items())
    with pytest.raises(ModelError, match="a run of another recipe"):
        train(recipe.replace(quantization={"only": None}), tmp_path / "run", None, quiet)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"resolution": 24}, r"resolution is 24: choose from \[20, 28\]"),
        ({"stages": ()}, "has 0 elastic stages, the network 2"),
    ],
)
def test_a_subnet_outside_the_space_is_refused_before_training(
    change: dict[str, object], text: str, tmp_path: Path
) -> None:
    recipe = supernet_recipe(shape=SHAPE)
    spec = spec_of(recipe, 0)
    assert spec.architecture is not None
    wrong = replace(spec, architecture=replace(spec.architecture, **change))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=text):
        train(with_only(recipe, wrong), tmp_path / "run", None, quiet)
    five = replace(spec, layers=tuple(replace(e, weight_bits=5) if e.weight_bits < 8 else e for e in spec.layers))
    with pytest.raises(RecipeError, match=r"weight_bits of .* is 5: choose from \[2, 3, 4\]"):
        train(with_only(recipe, five), tmp_path / "run", None, quiet)
    assert not (tmp_path / "run").exists()


def test_resolutions_need_an_elastic_network(tmp_path: Path) -> None:
    recipe = supernet_recipe(shape={"name": "resnet8", "resolutions": [20, 28]})
    with pytest.raises(RecipeError, match="network resnet8 is not elastic: leave resolutions and widths out"):
        train(recipe, tmp_path / "run", None, quiet)


def test_the_command_line_takes_the_subnet_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, asked = SubnetSpec.build("tiny", {"a": (2, 2), "b": (8, 8)}), []
    monkeypatch.setattr(
        "qdeploy.train.run.train", lambda recipe, *_: asked.append(recipe) or {"float": 10.0, "levels": {}}
    )
    (tmp_path / "spec.json").write_bytes(canonical_json(spec.to_json()))
    for method in ("eqnet", "vertical"):
        recipe = f'[network]\nname = "tiny"\n[data]\nname = "fashion-mnist"\n[quantization]\nmethod = "{method}"\n'
        (tmp_path / f"{method}.toml").write_text(recipe)
    command = [
        "train",
        str(tmp_path / "eqnet.toml"),
        "-o",
        str(tmp_path / "run"),
        "--only",
        str(tmp_path / "spec.json"),
    ]
    assert CliRunner().invoke(main, command).exit_code == 0
    assert [recipe.quantization.only for recipe in asked] == [spec]
    command[1] = str(tmp_path / "vertical.toml")
    found = CliRunner().invoke(main, command)
    assert found.exit_code == 2 and "one subnet alone can be trained with method eqnet or batchquant" in found.output
