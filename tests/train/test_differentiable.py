from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from qdeploy.errors import ModelError, RecipeError
from qdeploy.quant.differentiable import KIB, DifferentiableNet
from qdeploy.recipe import Recipe, from_dict
from qdeploy.train import loop
from qdeploy.train.batchquant import full_precision_teacher
from qdeploy.train.checkpoint import load_checkpoint
from qdeploy.train.differentiable import FixedWidths, LearnedWidths, phases
from qdeploy.train.run import load_run, new_network, new_quantized, train

PHASE = {"epochs": 1, "weight_decay": 1e-4, "batch": 64, "learning_rate": 0.02}


def recipe(**quantization: Any) -> Recipe:
    """`tiny` on the shipped sample: 4 steps a phase."""
    learning = (
        {} if quantization.get("allocation", "learned") != "learned" else {"precision_phase": PHASE | {"epochs": 2}}
    )
    fields = {"method": "differentiable", "weight_kib": 0.7, "activation_kib": 2.9, "uniform_phase": PHASE}
    return from_dict(
        {
            "name": "learned",
            "network": {"name": "tiny", "width": 8},
            "data": {"name": "fashion-mnist", "split": "sample", "train_images": 256},
            "quantization": fields | {"update_steps": 3} | learning | quantization,
            "float_phase": PHASE | {"learning_rate": 0.1},
            "quantized_phase": PHASE,
        }
    )


def quiet(_: str) -> None:
    pass


def steps_of(**quantization: Any) -> tuple[DifferentiableNet, list[Any], tuple[Tensor, Tensor]]:
    """A new network, its phases, and one batch."""
    chosen = recipe(**quantization)
    network = new_network(chosen, 1, 10)
    net = new_quantized(chosen, network, (1, 28, 28))
    assert isinstance(net, DifferentiableNet)
    teacher = full_precision_teacher(network, torch.zeros(2, 1, 28, 28).numpy())
    torch.manual_seed(0)
    batch = torch.rand(64, 1, 28, 28), torch.randint(0, 10, (64,))
    return net, list(phases(net, chosen.quantized_phase, teacher, 256)), batch


def states(net: DifferentiableNet) -> list[Tensor]:
    return [p.detach().clone() for entry in net.ranges() for p in (entry.log_step, entry.log_range)]


def test_phases_in_their_order() -> None:
    _, found, _ = steps_of()
    assert [phase.name for phase in found] == ["uniform", "precision", "quantized"]
    assert [type(phase) for phase in found] == [FixedWidths, LearnedWidths, FixedWidths]
    assert [phase.total for phase in found] == [4, 8, 4]
    assert [phase.name for phase in steps_of(allocation="mixquant")[1]] == ["uniform", "quantized"]


def test_the_penalty_is_of_both_excesses_and_grows_in_the_first_half() -> None:
    net, found, batch = steps_of(penalty=8.0)
    sizes = {"w": float(net.weight_bits().detach()), "a": float(net.activation_bits().detach())}
    excess = (sizes["w"] / (0.7 * KIB) - 1) ** 2 + (sizes["a"] / (2.9 * KIB) - 1) ** 2
    grown = [float(found[1].penalty(step).detach()) for step in range(8)]
    assert grown == pytest.approx([8 * excess * min(1, step / 4) for step in range(8)], rel=1e-4)
    ample = steps_of(weight_kib=9.0, activation_kib=9.0)[1][1]
    assert float(ample.penalty(7).detach()) == 0
    losses = found[0].backward(*batch, 0)
    assert losses["penalty"] == 0 and losses["uniform"] > 0


def test_ranges_are_updated_every_few_steps_and_weights_each_time() -> None:
    net, (first, *_), batch = steps_of()
    optimizer = loop.make_optimizer(first)
    learned = {id(p) for entry in net.ranges() for p in entry.parameters()}
    assert not learned & {id(p) for group in optimizer.param_groups for p in group["params"]}
    first.backward(*batch, 0)  # starts the ranges of activations
    before, gradients = states(net), [entry.pending.clone() for entry in net.ranges()]
    first.after_step()
    assert all(g.any() for g in gradients) and all(map(torch.equal, before, states(net)))
    loop.train_step(first, optimizer, *batch, (1, 4))
    assert all(map(torch.equal, before, states(net)))
    loop.train_step(first, optimizer, *batch, (2, 4))
    assert not any(map(torch.equal, before, states(net)))
    assert not any(entry.pending.any() for entry in net.ranges())


def test_widths_change_in_the_precision_phase_alone() -> None:
    net, (first, second, last), batch = steps_of(range_rate=1.0, update_steps=1)
    widths = lambda: [entry.width.tolist() for entry in net.ranges()]  # noqa: E731
    seen = []
    for phase in (first, second, last):
        optimizer = loop.make_optimizer(phase)
        loop.train_step(phase, optimizer, *batch, (0, phase.total))
        began = widths()
        for step in range(1, 3):
            loop.train_step(phase, optimizer, *batch, (step, phase.total))
        seen.append(began != widths())
    assert seen == [False, True, False]
    size = net.size_kib()
    assert size["weights"] <= 0.7 and size["activations"] <= 2.9


@pytest.mark.parametrize("kind", ["none", "soft", "penalty"])
def test_what_is_learned_from(kind: str) -> None:
    net, (first, *_), (images, labels) = steps_of(distillation=kind)
    found = first.backward(images, labels, 0)["uniform"]
    with torch.no_grad():
        for norm in (m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.momentum = 0.0
        output, soft = net(images, net.only), first.teacher(images)
    hard = F.cross_entropy(output, labels)
    from_teacher = -(soft.softmax(1) * output.log_softmax(1)).sum(1).mean()
    entropy = -(soft.softmax(1) * soft.log_softmax(1)).sum(1).mean()
    expected = {"none": hard, "soft": from_teacher, "penalty": hard + from_teacher - entropy}
    assert found == pytest.approx(float(expected[kind]), rel=1e-5)


def test_a_run_meets_its_budgets_and_loads_again(tmp_path: Path, fashion_test: object) -> None:
    report = train(recipe(), tmp_path / "run", None, quiet)
    assert set(report["levels"]) == {"only"} and report["size_kib"]["weights"] <= 0.7
    loaded, net = load_run(tmp_path / "run")
    assert isinstance(net, DifferentiableNet) and loaded == recipe() and net.size_kib() == report["size_kib"]
    assert net.levels == {"only": net.only} and net.space.size == 1


@pytest.mark.usefixtures("fashion_test")
def test_an_interrupted_run_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(recipe(), tmp_path / "whole", None, quiet)
    step = loop.train_step

    def stopping(phase: Any, *rest: Any) -> dict[str, float]:
        if phase.name == "precision" and rest[-1][0] == 5:  # in the middle of an update's steps
            raise KeyboardInterrupt
        return step(phase, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(), tmp_path / "cut", None, quiet)
    assert load_checkpoint(tmp_path / "cut" / "precision.checkpoint")[0]["done"] == 5
    train(recipe(), tmp_path / "cut", None, quiet)
    files = [(tmp_path / name / "quantized.checkpoint").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"weight_kb": 3}, "unknown key quantization.weight_kb"),
        ({"weight_kib": 0.1}, r"quantization.weight_kib is 0.1: the least is 0\.51"),
        ({"weight_kib": -1.0}, "quantization.weight_kib is -1.0: a positive number"),
        ({"activation_kib": float("nan")}, "quantization.activation_kib is nan"),
        ({"start_bits": 9}, r"quantization.start_bits \[9\]"),
        ({"allocation": "uniform", "precision_phase": PHASE}, "precision_phase goes with allocation"),
        ({"weight_gradient": "sine"}, "choose one of 'ste', 'ewgs'"),
        ({"gradient_alpha": 2.0}, "gradient_alpha between -2 and 2"),
        ({"update_steps": 0}, "quantization.update_steps is 0"),
        ({"percentile": 40.0}, "quantization.percentile is 40"),
        ({"precision_phase": PHASE | {"batch": 1}}, "batch >= 2"),
    ],
)
def test_bad_recipes_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        chosen = recipe(**changes)
        new_quantized(chosen, new_network(chosen, 1, 10), (1, 28, 28))


def test_too_few_images_for_a_batch_of_any_phase(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="256 images make no batch of 300"):
        train(recipe(precision_phase=PHASE | {"batch": 300}), tmp_path, None, quiet)
