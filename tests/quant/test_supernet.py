from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from torch.nn import ModuleDict
from torch.nn.parameter import Parameter

from qdeploy.data import Dataset
from qdeploy.errors import ModelError, RecipeError
from qdeploy.nets import build, build_supernet
from qdeploy.nets.elastic import sliced
from qdeploy.quant.batchquant import BatchQuantizer, RunningQuantizer
from qdeploy.quant.calibrate import calibrated
from qdeploy.quant.eqnet import ElasticActivationQuantizer
from qdeploy.quant.graph import read_graph
from qdeploy.quant.grid import midpoint
from qdeploy.quant.supernet import BatchQuantNet
from qdeploy.recipe import BatchQuantization
from qdeploy.space import FLOAT_BITS, LayerBits, SubnetSpec


def supernet(name: str = "mobilenetv3-tiny", shape: dict[str, object] | None = None, **choice: object) -> BatchQuantNet:
    torch.manual_seed(0)
    quantization = BatchQuantization("batchquant", **choice)  # type: ignore[arg-type]
    network = build_supernet(name, 1, 10, 8, 2, quantization.kernels == "transform", **(shape or {}))  # type: ignore[arg-type]
    return BatchQuantNet(network, read_graph(network.network, scoped=True), name, quantization)


def spec_of(net: BatchQuantNet, seed: int) -> SubnetSpec:
    return net.space.sample(Random(seed))


def test_the_full_space_counts_to_the_papers_size() -> None:
    assert f"{supernet('mobilenetv3').space.size:.3e}" == "2.186e+76"


def test_blocks_are_searched_and_what_surrounds_them_has_eight_bits() -> None:
    net = supernet()
    free = {layer.layer for layer in net.space.layers if len(layer.weight_bits) > 1}
    names = ("expand.conv", "depthwise.conv", "project.conv")
    assert free == {f"stages.{s}.{b}.{name}" for s in (0, 1) for b in (0, 1) for name in names}
    around = {layer.layer for layer in net.space.layers} - free
    assert {"stem.conv", "first.depthwise.conv", "last.conv", "mix", "head.linear"} < around
    assert {"stages.1.0.squeeze.reduce", "stages.1.1.squeeze.expand"} < around
    assert all(layer.activation_bits == (8,) for layer in net.space.layers if layer.layer in around)


@pytest.mark.parametrize("weights", ["lsq", "vertical"])
@pytest.mark.parametrize("kernels", ["crop", "transform"])
def test_a_subnet_computes_what_the_supernet_computes(weights: str, kernels: str, fashion_sample: Dataset) -> None:
    if (weights, kernels) == ("vertical", "transform"):
        with pytest.raises(RecipeError, match="would not nest"):
            BatchQuantization("batchquant", weights="vertical", kernels="transform")
        return
    net = supernet(weights=weights, kernels=kernels)
    x = torch.from_numpy(fashion_sample.images[:32]).float() / 255
    for seed in range(3):
        spec = spec_of(net, seed)
        own = net.subnet(spec).train()
        torch.testing.assert_close(net.train()(x, spec), own(x, spec))
        tuned = calibrated(net, spec, fashion_sample.images[:256])
        assert isinstance(tuned, BatchQuantNet) and torch.isfinite(tuned(x, spec)).all()
        assert len(tuned.graph.layers) == len(spec.layers)


def test_codes_of_a_subnet_are_a_slice_of_the_largest_networks() -> None:
    net = supernet()
    spec = spec_of(net, 3)
    small = net.subnet(spec)
    for step in small.graph.layers:
        whole = net.steps[step.name]
        entry = spec[step.name]
        own = small.layer_codes(step, spec)
        full = net.weights[whole.name.replace(".", "/")].codes(whole.module.weight, entry)  # type: ignore[union-attr, operator]
        np.testing.assert_array_equal(own.codes, sliced(torch.from_numpy(full.codes), own.codes.shape).numpy())
        np.testing.assert_array_equal(own.step, full.step)


def test_vertical_codes_of_lower_widths_are_prefixes() -> None:
    net = supernet(weights="vertical")
    blocks = spec_of(net, 1).architecture
    assert blocks is not None
    low, high = (net.uniform_blocks(blocks.stages, b, b) for b in (2, 4))
    small = net.subnet(high)
    for step in small.graph.layers:
        codes = {b: small.layer_codes(step, spec) for b, spec in ((2, low), (4, high))}
        if step.name in small.fixed:
            np.testing.assert_array_equal(codes[2].codes, codes[4].codes)
        else:
            truncated = ((codes[4].codes.astype(int) >> 5) << 5) + midpoint(2, 4)
            np.testing.assert_array_equal(codes[2].codes, truncated)
        assert codes[2].step == codes[4].step


def test_transformed_kernels_start_as_the_centre() -> None:
    cropped, transformed = supernet().train(), supernet(kernels="transform").train()
    assert transformed.supernet is not None and transformed.supernet.transforms
    x = torch.rand(8, 1, 28, 28)
    for seed in range(3):
        spec = spec_of(cropped, seed)
        torch.testing.assert_close(transformed(x, spec), cropped(x, spec))


def test_extraction_leaves_the_supernet_as_it_was(fashion_sample: Dataset) -> None:
    net = supernet()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    calibrated(net, spec_of(net, 0), fashion_sample.images[:256])
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_gradients_of_a_subnet_stay_in_its_slices_and_widths() -> None:
    net = supernet().train()
    assert net.supernet is not None
    spec = net.uniform_blocks(net.supernet.elastic.smallest, 3, 2)
    net(torch.rand(8, 1, 28, 28), spec).square().sum().backward()
    gamma = {name: p for name, p in net.lows.named_parameters() if name.endswith("gamma")}
    touched = {name for name, p in gamma.items() if p.grad is not None}
    assert touched and all(name.split(".")[1] == "2" and "stages/0/1" not in name for name in touched)
    weight = net.steps["stages.1.0.depthwise.conv"].module.weight  # type: ignore[union-attr]
    assert isinstance(weight, Parameter) and weight.grad is not None
    inside = sliced(weight.grad, (16, 1, 3, 3))
    assert bool((inside != 0).any()) and int((weight.grad != 0).sum()) == int((inside != 0).sum())


def test_floating_point_layers_are_not_quantized() -> None:
    net = supernet()
    spec = net.uniform(2)
    free = [e.layer for e in spec.layers if e.layer not in net.fixed]
    mixed = replace(spec, layers=tuple(replace(e, weight_bits=32) if e.layer in free else e for e in spec.layers))
    step = net.steps[free[0]]
    assert net.weight(step, mixed) is step.module.weight  # type: ignore[union-attr]
    whole = tuple(LayerBits(e.layer, FLOAT_BITS, FLOAT_BITS) if e.layer in free else e for e in spec.layers)
    trace: dict[str, torch.Tensor] = {}
    net.train()(torch.rand(4, 1, 28, 28), replace(spec, layers=whole), trace)
    assert len(trace["stages.0.0.expand.conv"].unique()) > 256
    with pytest.raises(RecipeError, match=r"weight_bits of .* is 32: choose from \[2, 3, 4\]"):
        net.check_spec(mixed)


def test_templates_are_kept_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdeploy.quant.supernet.KEPT_TEMPLATES", 2)
    net, x = supernet().train(), torch.rand(2, 1, 28, 28)
    assert net.supernet is not None
    specs = [net.uniform_blocks(net.supernet.elastic.uniform((1, d), k, 2), 2, 2) for d, k in ((1, 3), (2, 3), (1, 5))]
    net(x, specs[0])
    kept = next(iter(net._templates.values()))
    for spec in (specs[1], specs[0], specs[2]):
        net(x, spec)
    assert len(net._templates) == 2 and any(template is kept for template in net._templates.values())
    assert not any("_templates" in key for key in net.state_dict())


def test_a_fixed_architecture_has_widths_alone() -> None:
    torch.manual_seed(0)
    network = build("resnet8", 1, 10, 8, 2)
    net = BatchQuantNet(network, read_graph(network), "resnet8", BatchQuantization("batchquant"))
    assert net.supernet is None and net.uniform(3).architecture is None
    out = net.train()(torch.rand(4, 1, 28, 28), net.space.sample(Random(0)))
    assert torch.isfinite(out).all()


def test_a_spec_without_architecture_is_refused() -> None:
    net = supernet()
    spec = replace(net.uniform(2), architecture=None)
    with pytest.raises(RecipeError, match="0 elastic stages, the network 2"):
        net.check_spec(spec)
    with pytest.raises(ModelError, match="needs an architecture"):
        net(torch.rand(2, 1, 28, 28), spec)


def test_projection_keeps_what_runtimes_need_positive() -> None:
    for weights in ("lsq", "vertical"):
        net = supernet(weights=weights)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.fill_(-100.0)
        net.project()
        for name, parameter in net.named_parameters():
            if name.startswith("weights") or name.endswith(("gamma", "bn.weight")):
                assert (parameter > 0).all(), name


@pytest.mark.parametrize("weights", ["lsq", "vertical"])
def test_steps_of_eight_bit_layers_follow_the_greatest_weight(weights: str) -> None:
    net = supernet(weights=weights)
    learned = net.quantizer_parameters()
    with torch.no_grad():
        net.steps["stem.conv"].module.weight.mul_(3.0)  # type: ignore[union-attr, operator]
    net.project()
    for step in net.graph.layers:
        own = list(net.weights[step.name.replace(".", "/")].parameters())
        if step.name in net.fixed:
            greatest = step.module.weight.detach().abs().max()  # type: ignore[union-attr, operator]
            torch.testing.assert_close(own[0].reshape(()), greatest / 127)
        assert any(own[0] is parameter for parameter in learned) == (step.name not in net.fixed)


SHAPES: dict[str, object] = {"resolutions": (16, 20, 28), "widths": (4, 8)}


@pytest.mark.parametrize("weights", ["lsq", "vertical"])
def test_resolution_and_width_belong_to_a_subnet(weights: str, fashion_sample: Dataset) -> None:
    net = supernet(shape=SHAPES, weights=weights)
    assert net.space.size == 6 * supernet().space.size
    assert {"resolution", "width"} <= {gene.name for gene in net.space.variables}
    x = torch.from_numpy(fashion_sample.images[:32]).float() / 255
    for seed in range(4):
        spec = spec_of(net, seed)
        assert spec.architecture is not None and spec.architecture.resolution is not None
        own = net.subnet(spec).train()
        torch.testing.assert_close(net.train()(x, spec), own(x, spec))
        trace: dict[str, torch.Tensor] = {}
        tuned = calibrated(net, spec, fashion_sample.images[:256])
        tuned(x, spec, trace)
        assert trace["image"].shape[2:] == (spec.architecture.resolution,) * 2
        stem = tuned.graph.layers[0].module.weight  # type: ignore[union-attr]
        assert stem.shape[0] == 8 and net.steps["stages.1.0.project.conv"].module.weight.shape[0] == 16  # type: ignore
        for step in tuned.graph.layers:
            whole, entry = net.steps[step.name], spec[step.name]
            full = net.layer_codes(whole, spec)
            codes = tuned.layer_codes(step, spec).codes
            np.testing.assert_array_equal(codes, sliced(torch.from_numpy(full.codes), codes.shape).numpy())
            assert entry.weight_bits == full.bits.bits


def test_a_spec_of_another_shape_is_refused() -> None:
    net = supernet(shape=SHAPES)
    spec = net.uniform(3)
    assert spec.architecture is not None
    for change, text in (
        ({"resolution": 24}, r"resolution is 24: choose from \[16, 20, 28\]"),
        ({"width": None}, r"width is None: choose from \[4, 8\]"),
    ):
        with pytest.raises(RecipeError, match=text):
            net.check_spec(replace(spec, architecture=replace(spec.architecture, **change)))
    with pytest.raises(RecipeError, match="resolution is 28: this network has no such choice"):
        supernet().check_spec(spec)
    wide, narrow = (
        replace(net.uniform(bits), architecture=replace(spec.architecture, resolution=r))
        for bits, r in ((4, 28), (2, 16))
    )
    assert not narrow.nests_in(wide) and net.uniform(2).nests_in(net.uniform(4))  # one resolution, one graph


@pytest.mark.parametrize(
    ("choice", "kind"),
    [
        ({"estimator": "learned"}, ElasticActivationQuantizer),
        ({"estimator": "running"}, RunningQuantizer),
        ({"affine": False}, BatchQuantizer),
    ],
)
def test_activation_quantizers_follow_the_recipe(choice: dict[str, object], kind: type) -> None:
    net = supernet(**choice)
    quantizers = [m for group in (net.streams, net.lows) for m in group.modules() if not isinstance(m, ModuleDict)]
    assert quantizers and all(type(m) is kind for m in quantizers)
    assert bool(net.residual_parameters()) == ("affine" not in choice)
    if kind is ElasticActivationQuantizer:
        names = {name.split(".")[-1] for name, _ in (*net.streams.named_parameters(), *net.lows.named_parameters())}
        assert names == {"step", "offset"}
        spec = net.uniform(2)
        net.train()(torch.rand(8, 1, 28, 28), spec).square().sum().backward()
        used = [p for name, p in net.lows.named_parameters() if ".2." in name and name.endswith("step")]
        assert used and all(p.grad is not None and bool(torch.isfinite(p.grad)) for p in used)
        with torch.no_grad():
            for p in net.residual_parameters():
                p.fill_(-100.0)
        net.project()
        assert all(float(p.detach()) >= 0 for p in net.residual_parameters())


def test_the_space_of_one_subnet_alone() -> None:
    spec = spec_of(supernet(shape=SHAPES), 5)
    assert spec.architecture is not None
    net = supernet(shape=SHAPES | {"only": spec.architecture}, only=spec)
    assert net.space.size == 1 and net.space.sample(Random(0)) == spec and net.levels == {"only": spec}
    assert type(net.space).from_json(net.space.to_json()) == net.space
    net.check_spec(spec)
    other = replace(spec, layers=(*spec.layers[:-1], replace(spec.layers[-1], weight_bits=4)))
    with pytest.raises(RecipeError, match=r"weight_bits of head.linear is 4: choose from \[8\]"):
        net.check_spec(other)
    moved = replace(spec, architecture=replace(spec.architecture, resolution=None))
    with pytest.raises(RecipeError, match="another architecture than the one subnet that was trained alone"):
        net.check_spec(moved)
