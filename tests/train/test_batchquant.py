import itertools
import json
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from qdeploy.data import Dataset
from qdeploy.errors import ModelError, RecipeError
from qdeploy.nets import build, build_supernet
from qdeploy.quant.calibrate import reestimate_float_norms
from qdeploy.quant.graph import read_graph
from qdeploy.quant.supernet import BatchQuantNet
from qdeploy.recipe import BatchQuantization, Recipe, Schedule, from_dict
from qdeploy.space import FLOAT_BITS
from qdeploy.train import loop
from qdeploy.train.batchquant import ElasticFullPrecision, Sandwich, full_precision_teacher, phases
from qdeploy.train.checkpoint import load_checkpoint
from qdeploy.train.run import check_parallel, load_run, train
from tests.train.runs import supernet_recipe

SCHEDULE = Schedule(1, 0.01, 1e-4)


def quiet(_: str) -> None:
    pass


def sandwich(floating: bool = False, name: str = "mobilenetv3-tiny", **choice: object) -> Sandwich:
    torch.manual_seed(0)
    quantization = BatchQuantization("batchquant", **choice)  # type: ignore[arg-type]
    if name == "resnet8":
        network = build(name, 1, 10, 8, 2)
        net = BatchQuantNet(network, read_graph(network), name, quantization)
        return Sandwich(net, SCHEDULE, network, 0, floating)
    supernet = build_supernet(name, 1, 10, 8, 2, quantization.kernels == "transform")
    net = BatchQuantNet(supernet, read_graph(supernet.network, scoped=True), name, quantization)
    return Sandwich(net, SCHEDULE, full_precision_teacher(supernet.network, _noise()), 0, floating)


def _noise() -> np.ndarray:
    return torch.randint(0, 256, (256, 1, 28, 28), dtype=torch.uint8).numpy()


@pytest.mark.parametrize("floating", [False, True])
def test_each_step_runs_the_largest_the_smallest_and_random_subnets(floating: bool) -> None:
    phase = sandwich(floating, random_subnets=3)
    assert phase.net.supernet is not None
    elastic, seen = phase.net.supernet.elastic, set()
    for step in range(60):
        specs = phase.subnets(step)
        assert specs == phase.subnets(step) and len(specs) == 5
        for spec, blocks in zip(specs, (elastic.largest, elastic.smallest), strict=False):
            free = {(e.weight_bits, e.activation_bits) for e in spec.layers if e.layer not in phase.net.fixed}
            assert spec.architecture is not None and spec.architecture.stages == blocks
            assert len(free) == 1 and len(set(next(iter(free)))) == 1
            seen |= free
        widths = {e.weight_bits for spec in specs[2:] for e in spec.layers if e.layer not in phase.net.fixed}
        assert len(widths) > 1
        if not floating:
            for spec in specs:
                phase.net.check_spec(spec)
    assert {pair[0] for pair in seen} == {2, 3, 4} | ({FLOAT_BITS} if floating else set())
    assert phase.subnets(0) != sandwich(not floating, random_subnets=3).subnets(0)


def test_losses_are_those_of_the_labels_and_gradients_have_a_bound() -> None:
    phase = sandwich(random_subnets=2, gradient_norm=0.5)
    images, labels = torch.rand(16, 1, 28, 28), torch.randint(0, 10, (16,))
    found = phase.backward(images, labels, 3)
    entropy = [float(F.cross_entropy(phase.net(images, spec), labels).detach()) for spec in phase.subnets(3)]
    assert found["largest"] == pytest.approx(entropy[0], rel=1e-5)
    assert found["smallest"] == pytest.approx(entropy[1], rel=1e-5)
    assert found["random"] == pytest.approx(sum(entropy[2:]) / 2, rel=1e-5)
    norms = [p.grad.norm() for p in phase.net.parameters() if p.grad is not None]
    assert found["gradient"] > 0.5 and float(torch.stack(norms).norm()) == pytest.approx(0.5, rel=1e-4)
    assert all(p.grad is None for p in phase.teacher.parameters())


def test_gradients_are_the_sum_over_the_subnets() -> None:
    phase = sandwich(random_subnets=1, gradient_norm=1e9)
    images, labels = torch.rand(16, 1, 28, 28), torch.randint(0, 10, (16,))
    phase.backward(images, labels, 0)
    found = {name: p.grad.clone() for name, p in phase.net.named_parameters() if p.grad is not None}
    phase.net.zero_grad()
    with torch.no_grad():
        taught = phase.teacher(images).log_softmax(1)
    total = torch.zeros(())
    for spec in phase.subnets(0):
        output = phase.net(images, spec)
        total = total + F.cross_entropy(output, labels)
        total = total + F.kl_div(output.log_softmax(1), taught, reduction="batchmean", log_target=True)
    total.backward()
    for name, parameter in phase.net.named_parameters():
        assert (parameter.grad is None) == (name not in found)
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kernels", ["crop", "transform"])
def test_both_kinds_of_smaller_kernels_learn(kernels: str) -> None:
    torch.manual_seed(1)
    images, labels = torch.rand(32, 1, 28, 28), torch.randint(0, 10, (32,))
    phase = sandwich(random_subnets=1, kernels=kernels)
    assert phase.net.supernet is not None
    first = ElasticFullPrecision(phase.net.supernet, Schedule(1, 0.05, 1e-4), phase.choice, 0)
    for each in (first, phase):
        optimizer, losses = loop.make_optimizer(each), []
        for _ in range(6):  # the same subnets and images again and again
            losses.append(loop.train_step(each, optimizer, images, labels, (0, 100)))
        assert losses[-1]["smallest"] < losses[0]["smallest"] and losses[-1]["largest"] < losses[0]["largest"]
        moved = [not torch.equal(matrix, torch.eye(9)) for matrix in phase.net.supernet.transforms.values()]
        # the smallest network has one block a stage, whose kernels of three go through a matrix
        assert sum(moved) >= (2 if kernels == "transform" else 0)


def test_subnets_are_drawn_at_every_resolution_and_width() -> None:
    torch.manual_seed(0)
    choice = BatchQuantization("batchquant", random_subnets=1)
    supernet = build_supernet("mobilenetv3-tiny", 1, 10, 8, 2, False, resolutions=(16, 20, 28), widths=(4, 8))
    net = BatchQuantNet(supernet, read_graph(supernet.network, scoped=True), "mobilenetv3-tiny", choice)
    teacher = full_precision_teacher(supernet, _noise())
    phase = Sandwich(net, SCHEDULE, teacher, 0, floating=False)
    float_phase = ElasticFullPrecision(supernet, SCHEDULE, choice, 0)
    seen = set()
    for step in range(40):
        own = [spec.architecture for spec in phase.subnets(step)]
        assert own[:2] == float_phase.architectures(step)[:2] == [supernet.elastic.greatest, supernet.elastic.least]
        seen |= {(a.resolution, a.width) for a in (own[2], float_phase.architectures(step)[2]) if a is not None}
    assert len(seen) == 6
    images, labels = torch.rand(8, 1, 28, 28), torch.randint(0, 10, (8,))
    for each in (float_phase, phase):
        found = each.backward(images, labels, 0)
        assert all(np.isfinite(value) for value in found.values())
    narrow = supernet.network.stages[1][1].project.conv.weight.grad  # type: ignore[union-attr, index]
    assert isinstance(narrow, torch.Tensor) and bool((narrow != 0).any())


def test_a_fixed_architecture_trains_its_widths() -> None:
    phase = sandwich(name="resnet8", random_subnets=2)
    specs = phase.subnets(0)
    assert len(specs) == 3 and all(spec.architecture is None for spec in specs)
    mixed = sandwich(floating=True, name="resnet8", random_subnets=2).subnets(0)[1]
    by_name = {e.layer: e for e in mixed.layers}
    for layer in phase.net.space.layers:  # layers that read one tensor keep one width
        if layer.shares is not None:
            assert by_name[layer.layer].activation_bits == by_name[layer.shares].activation_bits


def test_the_float_phase_teaches_with_the_largest_network() -> None:
    torch.manual_seed(0)
    supernet = build_supernet("mobilenetv3-tiny", 1, 10, 8, 2, False)
    phase = ElasticFullPrecision(supernet, SCHEDULE, BatchQuantization("batchquant", random_subnets=2), 0)
    chosen = phase.architectures(4)
    assert chosen[:2] == [supernet.elastic.greatest, supernet.elastic.least] and len(chosen) == 4
    losses = phase.backward(torch.rand(8, 1, 28, 28), torch.randint(0, 10, (8,)), 4)
    assert set(losses) == {"largest", "smallest", "random"}
    assert all(p.grad is not None for p in supernet.network.parameters())


def test_the_teacher_has_statistics_of_its_own(fashion_sample: Dataset) -> None:
    torch.manual_seed(0)
    supernet = build_supernet("mobilenetv3-tiny", 1, 10, 8, 2, False)
    teacher = full_precision_teacher(supernet, fashion_sample.images[:512])
    images = torch.from_numpy(fashion_sample.images[:256]).float() / 255
    supernet.train()
    with torch.no_grad():  # batch statistics of other images of the same kind: nearly the same outputs
        whole, own = supernet(images), teacher(images)
    assert float((whole - own).abs().mean() / whole.std()) < 0.1
    before = teacher.network.stem.bn.running_mean.clone()  # type: ignore[union-attr, operator]
    reestimate_float_norms(supernet.network, 255 - fashion_sample.images[:256])
    assert torch.equal(before, teacher.network.stem.bn.running_mean)  # type: ignore[union-attr, arg-type]


def test_a_run_trains_stops_in_every_phase_and_resumes_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("level_accuracy", "top1"):  # not what is tested here
        monkeypatch.setattr(f"qdeploy.train.run.{name}", lambda *_: 0.0)
    recipe = supernet_recipe()
    report = train(recipe, tmp_path / "whole", None, quiet)
    assert set(report["levels"]) == {"2", "3", "4"}
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in rows] == ["float", "mixed", "quantized"]
    real, count, stops = loop.train_step, itertools.count(), {1, 4, 7}  # before the second step of each phase

    def stopped(*args: object) -> dict[str, float]:
        if next(count) in stops:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "train_step", stopped)
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "parts", None, quiet)
        with pytest.raises(ModelError, match=r"stopped at step 1 of 2|cannot read"):
            load_run(tmp_path / "parts")
    assert train(recipe, tmp_path / "parts", None, quiet) == report
    one, other = (load_checkpoint(tmp_path / name / "quantized.checkpoint")[1] for name in ("whole", "parts"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    loaded, net = load_run(tmp_path / "whole")
    assert loaded == recipe and isinstance(net, BatchQuantNet) and net.supernet is not None
    net.check_spec(net.space.sample(Random(0)))


def test_phases_follow_the_recipe() -> None:
    net = sandwich().net
    assert [phase.name for phase in phases(net, SCHEDULE, net.network, 0)] == ["quantized"]
    mixed = sandwich(mixed_phase=Schedule(2, 0.02, 0.0)).net
    both = phases(mixed, SCHEDULE, mixed.network, 0)
    assert [(phase.name, phase.schedule.epochs) for phase in both] == [("mixed", 2), ("quantized", 1)]


def test_recipes_round_trip_and_wrong_ones_are_refused() -> None:
    recipe = supernet_recipe(estimator="extremes", weights="vertical")
    assert isinstance(recipe, Recipe) and from_dict(recipe.to_json()) == recipe
    wrong: list[tuple[dict[str, object], str]] = [
        ({"estimator": "median"}, "estimator is 'median': choose one of 'channel-mean'"),
        ({"weight_bits": [4, 2]}, "weight_bits .* must be rising"),
        ({"weights": "vertical", "kernels": "transform"}, 'choose kernels = "crop"'),
        ({"random_subnets": -1}, "random_subnets is 0 or more"),
        ({"mixed_phase": {"epochs": 1}}, "lacks quantization.mixed_phase.learning_rate"),
    ]
    for changes, text in wrong:
        with pytest.raises(RecipeError, match=text):
            supernet_recipe(**changes)


def test_batches_of_all_phases_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdeploy.train.run.processes", lambda: 2)
    recipe = supernet_recipe()
    check_parallel(recipe)
    odd = recipe.replace(quantization={"mixed_phase": replace(SCHEDULE, batch=129)})
    with pytest.raises(RecipeError, match="a batch of 129 cannot be divided among 2 processes"):
        check_parallel(odd)


def test_too_few_images_for_statistics(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="too few for statistics"):
        train(supernet_recipe(images=128), tmp_path / "run", None, quiet)
    assert not (tmp_path / "run").exists()
