import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy import integer
from qdeploy.allocate import Option, allocate, cheapest, layer_options, level_bytes, side_bytes
from qdeploy.bundle.store import pieces_of
from qdeploy.bundle.write import write_bundle
from qdeploy.data import Dataset
from qdeploy.errors import ModelError, RecipeError
from qdeploy.export import export_onnx
from qdeploy.frozen import load_frozen, save_frozen
from qdeploy.ladder import read_ladder
from qdeploy.quant.calibrate import calibrated, reestimate_ranges, trained_mean_squares
from qdeploy.quant.grid import container_bits, midpoint
from qdeploy.quant.network import QuantNet
from qdeploy.space import SubnetSpec
from qdeploy.subnet import extract
from qdeploy.train.run import accuracy, load_run, train
from tests.train.runs import tiny_recipe


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> QuantNet:
    run = tmp_path_factory.mktemp("subnet") / "run"
    recipe = tiny_recipe(images=1024)
    recipe = recipe.replace(network=type(recipe.network)("resnet8", 8, 2))
    train(recipe, run, None, lambda _: None)
    return load_run(run)[1]


@pytest.fixture(scope="module")
def few(fashion_test: Dataset) -> Dataset:
    return fashion_test.take(1000)


def test_integers_are_as_accurate_as_the_simulation(net: QuantNet, fashion_sample: Dataset, few: Dataset) -> None:
    for width in net.choice.widths:
        spec = net.uniform(width)
        frozen = extract(net, spec, "t", fashion_sample.images, few)
        simulated = accuracy(calibrated(net, spec, fashion_sample.images), spec, few)
        assert abs(frozen.report["accuracy"] - simulated) <= 1.0  # ten of 1,000 images
        parity = frozen.report["parity"]
        assert parity["simulation"]["differing"] <= 1e-4 * parity["simulation"]["codes"]
        assert parity["simulation"]["largest_step"] <= 1
        assert parity["int32_bias"]["largest_step"] <= 1


def test_levels_nest_and_share_their_scales_grid(net: QuantNet, fashion_sample: Dataset) -> None:
    low, high = (extract(net, net.uniform(w), "t", fashion_sample.images, None) for w in (2, 4))
    for name, bits in low.weights.items():
        shift = container_bits(bits.top) - bits.bits
        codes = {n.spec[name].weight_bits: n.tensors[f"{name}.weight"].astype(int) for n in (low, high)}
        if bits.bits == 8:
            assert list(codes) == [8]
            np.testing.assert_array_equal(low.tensors[f"{name}.weight"], high.tensors[f"{name}.weight"])
        else:
            top = codes[4] >> (container_bits(4) - 4)
            np.testing.assert_array_equal((codes[2] - midpoint(2, 4)) >> shift, top >> 2)


def test_goldens_are_the_integer_reference(net: QuantNet, fashion_sample: Dataset, tmp_path: Path) -> None:
    frozen = extract(net, net.uniform(3), "t", fashion_sample.images, None)
    again = integer.run(frozen, frozen.golden[frozen.input])
    assert all(np.array_equal(frozen.golden[name], again[name]) for name in frozen.activations)
    save_frozen(frozen, tmp_path / "out")
    loaded = load_frozen(tmp_path / "out")
    assert loaded.spec == frozen.spec and loaded.activations == frozen.activations and loaded.nodes == frozen.nodes


def test_extraction_leaves_the_run_as_it_was(net: QuantNet, fashion_sample: Dataset) -> None:
    before = {k: v.clone() for k, v in net.state_dict().items()}
    extract(net, net.uniform(2), "t", fashion_sample.images, None)
    assert all((before[k] == v).all() for k, v in net.state_dict().items())


def test_a_budget_is_kept_and_used(net: QuantNet) -> None:
    options = {step.name: layer_options(net, step) for step in net.graph.layers}
    side = side_bytes(net)
    least = side + sum(row[0].bytes for row in options.values())
    most = side + sum(row[-1].bytes for row in options.values())
    errors = []
    for budget in (least, (least + most) // 2, most, most + 1000):
        spec = allocate(net, budget)
        chosen = [next(o for o in options[e.layer] if o.bits == e.weight_bits) for e in spec.layers]
        assert side + sum(o.bytes for o in chosen) <= budget
        errors.append(sum(o.error for o in chosen))
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0
    with pytest.raises(RecipeError, match=f"need {least}"):
        allocate(net, least - 1)


def test_a_promised_size_is_what_a_bundle_sends(fashion_sample: Dataset, tmp_path: Path) -> None:
    shipped = load_run(Path(__file__).parents[1] / "models" / "fashion-resnet8")[1]
    levels = {"w2": shipped.uniform(2), "w4": shipped.uniform(4)}
    budget = sum(level_bytes(shipped, spec) for spec in levels.values()) // 2
    levels |= {"mixed": allocate(shipped, budget, levels["w2"])}
    for name, spec in levels.items():
        export_onnx(extract(shipped, spec, "m", fashion_sample.images, None), tmp_path / f"{name}.onnx")
    manifest = write_bundle(read_ladder([tmp_path / f"{name}.onnx" for name in levels]), [], tmp_path / "tree")
    sides = {level.side for level in manifest.levels}
    for name, spec in levels.items():
        planes = set(pieces_of(manifest, name)) - sides - {manifest.skeleton}
        side = manifest.level(name).side
        assert side is not None
        real = sum(manifest.pieces[piece].size for piece in (*planes, side))
        promised = level_bytes(shipped, spec)
        assert real <= promised <= 1.03 * real
    assert level_bytes(shipped, levels["mixed"]) <= budget


def test_a_nested_budget_extends_its_level(net: QuantNet) -> None:
    low = net.uniform(3)
    spec = allocate(net, 1 << 20, low)
    assert low.nests_in(spec)
    with pytest.raises(RecipeError, match="too small"):
        allocate(net, 2000, low)


def test_a_mixed_level_freezes(net: QuantNet, fashion_sample: Dataset, few: Dataset) -> None:
    uniform = allocate(net, side_bytes(net) + 5000)
    frozen = extract(net, uniform, "mixed", fashion_sample.images, few)
    assert frozen.report["parity"]["simulation"]["largest_step"] <= 1
    assert frozen.report["accuracy"] > 20


def test_only_a_mix_moves_activation_steps(net: QuantNet, fashion_sample: Dataset) -> None:
    def steps(of: QuantNet) -> dict[str, float]:
        return {name: float(p.detach()) for name, p in of.named_parameters() if name.endswith("step")}

    images = fashion_sample.images
    assert steps(calibrated(net, net.uniform(2), images)) == steps(net)
    mixed = SubnetSpec.build(
        net.name,
        {e.layer: (e.weight_bits, e.activation_bits if e.layer in net.fixed else 4) for e in net.uniform(2).layers},
    )  # weights 2, activations 4
    before, after = steps(net), steps(calibrated(net, mixed, images))
    moved = [name for name in before if before[name] != after[name]]
    assert moved and all(0.5 < after[name] / before[name] < 2 for name in moved)


def test_ranges_follow_a_planted_spread(net: QuantNet, fashion_sample: Dataset) -> None:
    """Where training had seen tensors of half the spread, steps double."""
    spec, images = net.uniform(3), fashion_sample.images
    halved = {q: value / 4 for q, value in trained_mean_squares(net, images).items()}
    copied = copy.deepcopy((net, halved))
    before = {name: float(p.detach()) for name, p in net.named_parameters() if name.endswith("step")}
    reestimate_ranges(copied[0], spec, images, copied[1])
    after = {name: float(p.detach()) for name, p in copied[0].named_parameters() if name.endswith("step")}
    moved = [after[name] / before[name] for name in before if after[name] != before[name]]
    assert moved and moved == pytest.approx([2.0] * len(moved), rel=1e-4)


@given(st.integers(0, 10_000))
def test_the_allocation_is_the_best_one(seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = {}
    for layer in range(4):
        sizes, errors = np.sort(random.integers(1, 500, 3)), np.sort(random.random(3))[::-1]
        rows[str(layer)] = [Option(b, int(s), float(e)) for b, s, e in zip((2, 3, 4), sizes, errors, strict=True)]
    least = sum(row[0].bytes for row in rows.values())
    budget = least + int(random.integers(0, 800))
    best = min(
        sum(o.error for o in choice)
        for choice in itertools.product(*rows.values())
        if sum(o.bytes for o in choice) <= budget
    )
    chosen = cheapest(rows, budget)
    taken = [next(o for o in rows[name] if o.bits == bits) for name, bits in chosen.items()]
    assert sum(o.bytes for o in taken) <= budget
    assert sum(o.error for o in taken) == pytest.approx(best)


def test_a_spec_of_another_network_is_refused(net: QuantNet) -> None:
    other = SubnetSpec("other", net.uniform(2).layers)
    with pytest.raises(RecipeError, match="network 'other'"):
        net.check_spec(other)


def test_too_few_calibration_images(net: QuantNet, fashion_sample: Dataset) -> None:
    with pytest.raises(ModelError, match="too few"):
        extract(net, net.uniform(2), "t", fashion_sample.images[:10], None)
