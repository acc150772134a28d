import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.nets import build
from qdeploy.quant.graph import read_graph
from qdeploy.quant.network import QuantNet
from qdeploy.recipe import Quantization, Schedule
from qdeploy.train.images import augment, generator
from qdeploy.train.vertical import Vertical, distillation, min_norm_weights


@given(st.integers(2, 5), st.integers(0, 1000))
def test_min_norm_weights_beat_every_vertex_and_the_mean(tasks: int, seed: int) -> None:
    gradients = torch.from_numpy(np.random.default_rng(seed).standard_normal((tasks, 7)))
    gram = gradients @ gradients.T
    alpha = min_norm_weights(gram)
    assert float(alpha.sum()) == pytest.approx(1) and bool((alpha >= -1e-12).all())
    best = float(alpha @ gram @ alpha)
    candidates = [torch.eye(tasks, dtype=gram.dtype)[i] for i in range(tasks)] + [torch.full((tasks,), 1 / tasks)]
    assert all(best <= float(c.double() @ gram @ c.double()) + 1e-9 for c in candidates)


def test_two_opposed_gradients_cancel() -> None:
    gradients = torch.tensor([[1.0, 0.0], [-3.0, 0.0]], dtype=torch.double)
    np.testing.assert_allclose(min_norm_weights(gradients @ gradients.T).numpy(), [0.75, 0.25], atol=1e-6)


def test_distillation_is_zero_for_equal_outputs_and_teaches_the_student_alone() -> None:
    teacher = torch.randn(4, 10, requires_grad=True)
    student = torch.randn(4, 10, requires_grad=True)
    assert float(distillation(teacher, teacher).detach()) == pytest.approx(0, abs=1e-6)
    distillation(student, teacher).backward()
    assert teacher.grad is None and student.grad is not None


def test_augmentation_depends_on_its_position_alone() -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 3, 12, 12), dtype=np.uint8)
    first = augment(images, generator(0, "augment", 1, 2))
    np.testing.assert_array_equal(first, augment(images, generator(0, "augment", 1, 2)))
    assert not np.array_equal(first, augment(images, generator(0, "augment", 1, 3)))
    assert first.shape == images.shape and first.dtype == np.uint8


def phase(**choice: object) -> Vertical:
    torch.manual_seed(0)
    network = build("tiny", 1, 10)
    quantization = Quantization(widths=(2, 3, 4), **choice)  # type: ignore[arg-type]
    net = QuantNet(network, read_graph(network), "tiny", quantization)
    return Vertical(net, Schedule(1, 0.01, 1e-4), quantization)


def test_a_widths_own_parameters_learn_as_fast_as_alone() -> None:
    vertical = phase()
    rates = {id(p): group["rate"] for group in vertical.groups() for p in group["params"]}
    assert all(rates[id(p)] == 3 for width in (2, 3, 4) for p in vertical.net.own_parameters(width))
    assert all(rates[id(p)] == 1 for p in vertical.net.shared_parameters())
    decays = {id(p): group["weight_decay"] for group in vertical.groups() for p in group["params"]}
    assert {decays[id(p)] for p in vertical.net.parameters() if id(p) in decays and p.ndim <= 1} == {0.0}


def test_each_width_learns_from_the_next_higher_one() -> None:
    images, labels = torch.rand(16, 1, 28, 28), torch.randint(0, 10, (16,))
    taught, alone = phase(), phase(distillation=False)
    losses = [p.backward(images, labels, 0) for p in (taught, alone)]
    assert losses[0]["w4"] == losses[1]["w4"]  # the highest has no teacher
    alone.net.train()
    outputs = {w: alone.net(images, spec).detach() for w, spec in alone.levels.items()}
    for low, high in ((3, 4), (2, 3)):
        expected = float(distillation(outputs[low], outputs[high]))
        assert losses[0][f"w{low}"] - losses[1][f"w{low}"] == pytest.approx(expected, abs=1e-5)
        assert expected > 2e-5
