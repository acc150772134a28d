import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from qdeploy.errors import ModelError, RecipeError
from qdeploy.nets import build
from qdeploy.quant.eqnet import EQNet
from qdeploy.quant.graph import read_graph
from qdeploy.recipe import EQNetQuantization, Schedule
from qdeploy.train import loop
from qdeploy.train.checkpoint import load_checkpoint
from qdeploy.train.eqnet import MAX_GRADIENT_NORM, GroupProgressive, distance, moments
from qdeploy.train.run import held_out_set, load_run, train, training_set
from tests.train.runs import elastic_recipe


def quiet(_: str) -> None:
    pass


def phase(seed: int = 0, **choice: object) -> GroupProgressive:
    torch.manual_seed(0)
    network = build("resnet8", 1, 10, 8, 2)
    quantization = EQNetQuantization("eqnet", **choice)  # type: ignore[arg-type]
    net = EQNet(network, read_graph(network), "resnet8", quantization)
    return GroupProgressive(net, Schedule(1, 0.01, 1e-4), quantization, seed)


def test_moments_of_known_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    for values, skewness, kurtosis in [
        (torch.rand(200_000, generator=generator), 0, 1.8),
        (torch.randn(200_000, generator=generator), 0, 3),
        (torch.empty(200_000).exponential_(generator=generator), 2, 9),
    ]:
        found = [float(v) for v in moments(values.reshape(100, -1))]
        assert found[0] == pytest.approx(skewness, abs=0.1) and found[1] == pytest.approx(kurtosis, rel=0.1)


def test_the_distance_is_kullback_leibler_and_teaches_the_student_alone() -> None:
    student, teacher = torch.randn(4, 10, requires_grad=True), torch.randn(4, 10, requires_grad=True)
    p, q = teacher.softmax(1), student.softmax(1)
    found = distance(student, teacher)
    assert float(found.detach()) == pytest.approx(float((p * (p / q).log()).sum(1).mean().detach()), rel=1e-5)
    found.backward()
    assert teacher.grad is None and student.grad is not None


def test_each_step_runs_the_highest_a_random_and_the_lowest_subnet() -> None:
    p = phase(weight_bits=(2, 3, 8), activation_bits=(4, 8))
    options = set()
    for step in range(40):
        specs = p.subnets(step)
        assert specs == p.subnets(step)
        for name, pair in (("H", (8, 8)), ("L", (2, 4))):
            free = [entry for entry in specs[name].layers if entry.layer not in p.net.fixed]
            assert {(entry.weight_bits, entry.activation_bits) for entry in free} == {pair}
            assert len({(entry.granularity, entry.symmetry) for entry in free}) == 1
            options.add((name, free[0].granularity, free[0].symmetry))
    assert len(options) == 8
    assert len({p.subnets(step)["R"] for step in range(40)}) == 40
    assert phase(seed=1).subnets(0) != phase(seed=0).subnets(0)


@pytest.mark.parametrize("guidance", [0.0, 0.5, 0.9])
def test_losses_are_the_papers(guidance: float) -> None:
    p = phase(guidance=guidance)
    images, labels = torch.rand(16, 1, 28, 28), torch.randint(0, 10, (16,))
    losses = p.backward(images, labels, 3)
    outputs = {name: p.net(images, spec).detach() for name, spec in p.subnets(3).items()}
    entropy = {name: float(F.cross_entropy(out, labels)) for name, out in outputs.items()}
    assert losses["H"] == pytest.approx(entropy["H"], rel=1e-5)
    for student, teacher in (("R", "H"), ("L", "R")):
        expected = guidance * float(distance(outputs[student], outputs[teacher])) + (1 - guidance) * entropy[student]
        assert losses[student] == pytest.approx(expected, rel=1e-4)
    weights = [step.module.weight.detach() for step in p.net.graph.layers[1:] if step.module is not None]
    pairs = np.array([[float(m) for m in moments(weight)] for weight in weights])  # type: ignore[arg-type]
    expected = 0.015 * np.mean((pairs[:, 1] - 1.8) ** 2) + np.mean(pairs[:, 0] ** 2)
    assert losses["weights"] == pytest.approx(expected, rel=1e-4)


def test_gradients_of_a_wild_batch_are_bounded() -> None:
    p = phase()
    with torch.no_grad():
        p.net.network.head.linear.weight.mul_(1e4)  # type: ignore[union-attr, operator]
    p.backward(torch.rand(8, 1, 28, 28), torch.randint(0, 10, (8,)), 0)
    norms = [q.grad.norm() for q in p.net.parameters() if q.grad is not None]
    assert float(torch.stack(norms).norm()) <= MAX_GRADIENT_NORM * 1.001


def test_regularization_draws_weights_towards_uniform() -> None:
    weight = torch.randn(4000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=20.0)
    before = float(moments(weight)[1].detach())
    for _ in range(200):
        optimizer.zero_grad()
        skewness, kurtosis = moments(weight)
        ((kurtosis - 1.8).square() + skewness.square()).backward()
        optimizer.step()
    after = float(moments(weight)[1].detach())
    assert before > 2.9 and abs(after - 1.8) < 0.1


def test_a_run_trains_stops_and_resumes_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = elastic_recipe(images=320, weight_bits=[2, 8])
    report = train(recipe, tmp_path / "whole", None, quiet)
    assert set(report["levels"]) == {"2", "8"}
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert set(rows[-1]["loss"]) == {"H", "R", "L", "weights"}
    real, count = loop.train_step, itertools.count()

    def stopped(*args: object) -> dict[str, float]:
        if next(count) == 8:  # in the third step of the quantized phase
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "train_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "parts", None, quiet)
    with pytest.raises(ModelError, match="stopped at step 3 of 5"):
        load_run(tmp_path / "parts")
    monkeypatch.undo()
    assert train(recipe, tmp_path / "parts", None, quiet) == report
    one, other = (load_checkpoint(tmp_path / name / "quantized.checkpoint")[1] for name in ("whole", "parts"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    loaded, net = load_run(tmp_path / "whole")
    assert loaded == recipe and isinstance(net, EQNet)


def test_held_out_images_are_never_trained_on() -> None:
    recipe = elastic_recipe()
    trained, held = (
        training_set(recipe.replace(data=type(recipe.data)("fashion-mnist", "sample", held_out=500)), None),
        held_out_set(recipe, None),
    )
    assert (len(trained), len(held)) == (4500, 500)
    assert not {image.tobytes() for image in trained.images} & {image.tobytes() for image in held.images}
    few = training_set(recipe, None)
    assert len(few) == 512 and {i.tobytes() for i in few.images} <= {i.tobytes() for i in trained.images}
    with pytest.raises(RecipeError, match="set held_out"):
        held_out_set(recipe.replace(data=type(recipe.data)("fashion-mnist", "sample")), None)
    with pytest.raises(ModelError, match="some must be left"):
        training_set(recipe.replace(data=type(recipe.data)("fashion-mnist", "sample", held_out=5000)), None)


def test_too_few_images_for_statistics(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="too few for statistics"):
        train(elastic_recipe(images=128), tmp_path / "run", None, quiet)
    assert not (tmp_path / "run").exists()
