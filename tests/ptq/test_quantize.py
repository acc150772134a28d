"""Whole networks: close to the float one, read by the compiler without float operators, ladders that bundle takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from qdeploy.errors import DataError, ModelError, RecipeError
from qdeploy.ladder import read_ladder
from qdeploy.ptq.graph import outputs_of
from qdeploy.ptq.prepare import prepare
from qdeploy.ptq.quantize import Calibrated, build, build_ladder, calibrate, compare, effect, ladder_widths
from qdeploy.ptq.settings import Rule, Settings
from qdeploy.qdq import arrays, canonical_bytes, parse_model
from tests.compile.models import read_difference
from tests.ptq.nets import NETWORKS, FloatNet, inputs, residual, saved

FLOAT_REGIONS = {"sequence": 1}  # of the compiled graph; every other network has none


def calibrated(name: str, folder: Path, settings: Settings | None = None) -> Calibrated:
    graph = prepare(saved(NETWORKS[name](), folder))
    return calibrate(graph, inputs(graph.shape), settings or Settings())


@pytest.mark.parametrize("name", NETWORKS)
def test_eight_bits_are_close_and_have_integer_kernels(name: str, tmp_path: Path) -> None:
    found = calibrated(name, tmp_path)
    built = build(found)
    assert effect(found, built).error < 0.06
    model = parse_model(built)
    assert canonical_bytes(model) == built
    graph, difference = read_difference(model, 1e-3 if name == "sequence" else _step(model))
    assert sum(op.kind == "float" for op in graph.ops) == FLOAT_REGIONS.get(name, 0)
    assert difference.worst <= 1.01 or name == "sequence"


def _step(model: onnx.ModelProto) -> float:
    last = next(node for node in model.graph.node if node.output[0] == model.graph.output[0].name)
    return float(arrays(model)[last.input[1]])


def test_what_stays_in_float_is_named(tmp_path: Path) -> None:
    floats = calibrated("sequence", tmp_path).placement.floats
    assert [op for op, _, _ in floats] == ["LayerNormalization", "Softmax"]
    assert all(reason for _, _, reason in floats)


@pytest.mark.parametrize(
    "settings",
    [
        Settings(calibration="minmax"), Settings(calibration="margin"), Settings(calibration="percentile"),
        Settings(calibration="entropy"),
        Settings(granularity="tensor"), Settings(granularity="tensor", symmetry="asymmetric"),
        Settings(symmetry="asymmetric"), Settings(activation_symmetry="symmetric"), Settings(rounding="nearest"),
        Settings(equalize=False), Settings(bias_correction=False),
    ],
    ids=str,
)  # fmt: skip
def test_every_setting_works_at_eight_bits(settings: Settings, tmp_path: Path) -> None:
    found = calibrated("residual", tmp_path, settings)
    model = parse_model(build(found))
    assert effect(found, build(found)).error < 0.12
    graph, difference = read_difference(model, _step(model))
    assert not any(op.kind == "float" for op in graph.ops) and difference.worst <= 1.01


def test_narrow_activations_are_cut_and_read_by_layers_alone(tmp_path: Path) -> None:
    found = calibrated("residual", tmp_path, Settings(weight_bits=4, activation_bits=4))
    model = parse_model(build(found))
    clips = [node for node in model.graph.node if node.op_type == "Clip"]
    assert clips and all(int(arrays(model)[node.input[2]]) == 15 for node in clips)
    codes = {node.output[0]: node for node in model.graph.node}
    add = next(node for node in model.graph.node if node.op_type == "Add")
    assert all(codes[codes[name].input[0]].op_type == "QuantizeLinear" for name in add.input)  # the residual has 8 bits
    graph, difference = read_difference(model, _step(model))
    assert not any(op.kind == "float" for op in graph.ops) and difference.worst <= 1.01
    assert effect(found, build(found)).error < 0.6


def test_few_bits_are_better_rounded_by_least_squares(tmp_path: Path) -> None:
    errors = {}
    for rounding in ("nearest", "least-squares"):
        found = calibrated("residual", tmp_path, Settings(weight_bits=3, rounding=rounding))
        errors[rounding] = effect(found, build(found)).error
    assert errors["least-squares"] < 0.9 * errors["nearest"]


def test_calibration_is_judged_on_images_that_it_did_not_see(tmp_path: Path) -> None:
    graph = prepare(saved(NETWORKS["swish"](), tmp_path))
    images = inputs(graph.shape)
    images[1::2] = images[::2]
    assert calibrate(graph, images, Settings(equalize=False)).settings.calibration != "margin"
    images[1::2] *= 1.2
    assert calibrate(graph, images, Settings(equalize=False)).settings.calibration == "margin"


def test_rules_and_the_policy_for_first_and_last(tmp_path: Path) -> None:
    base = calibrated("residual", tmp_path)
    first, second, third, *_, last = base.layers
    rules = (Rule(second, {"weight_bits": 2}), Rule(f"*{third[2:]}", {"weight_bits": 5}))
    settings = Settings(weight_bits=4, rules=rules)
    choices = settings.choices(base.layers)
    assert [choices[n].weight_bits for n in (first, second, last)] == [8, 2, 8]
    assert choices[third].weight_bits == 5
    assert replace(settings, first_last="same").choices(base.layers)[first].weight_bits == 4
    with pytest.raises(RecipeError, match="fits no layer"):
        replace(settings, rules=(Rule("nothing*", {"weight_bits": 2}),)).choices(base.layers)
    model = parse_model(build(replace(base, settings=settings)))
    assert len(np.unique(arrays(model)[f"{second}.weight"])) <= 4
    left = calibrated("residual", tmp_path, Settings(weight_bits=4, first_last="float"))
    assert first not in left.layers and [name for _, name, _ in left.placement.floats] == [first, last]
    assert {choice.weight_bits for choice in left.settings.choices(left.layers).values()} == {4}


def test_a_rule_that_leaves_its_layers_in_float_stands_beside_others(tmp_path: Path) -> None:
    first, second, third, *_ = calibrated("residual", tmp_path).layers
    rules = (Rule(second, {"quantize": False}), Rule(third, {"weight_bits": 3}))
    found = calibrated("residual", tmp_path, Settings(rules=rules))
    assert second not in found.layers and [name for _, name, _ in found.placement.floats] == [second]
    model = parse_model(build(found))
    assert len(np.unique(arrays(model)[f"{third}.weight"])) <= 8 and f"{second}.weight" not in arrays(model)


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    one, two = (build(calibrated("swish", tmp_path, Settings(weight_bits=4))) for _ in range(2))
    assert one == two


# Ladders -------------------------------------------------------------------------------------------------------------


def levels_of(found: Calibrated, ladder: tuple[int, ...], nesting: str = "joint") -> dict[int, bytes]:
    return build_ladder(found, {bits: ladder_widths(found, bits) for bits in ladder}, nesting)


@pytest.mark.parametrize("ladder", [(2, 4, 8), (2, 3, 4), (4, 5, 6, 7, 8)], ids=str)
def test_levels_nest_and_bundle(ladder: tuple[int, ...], tmp_path: Path) -> None:
    found = calibrated("residual", tmp_path)
    levels = levels_of(found, ladder)
    paths = [tmp_path / f"w{bits}.onnx" for bits in ladder]
    for path, data in zip(paths, levels.values(), strict=True):
        path.write_bytes(data)
    said: list[str] = []
    read = read_ladder(paths, said.append)
    assert not said  # the files are canonical already
    assert [level.name for level in read.levels] == [f"w{bits}" for bits in ladder]
    inner = [t for t in read.tensors if t.name.removesuffix(".weight") in found.layers[1:-1]]
    assert len(inner) == len(found.layers) - 2
    for tensor in inner:
        assert all(tensor.levels[f"w{bits}"].bits <= bits for bits in ladder)
        assert tensor.bits <= max(ladder)
    errors = [effect(found, levels[bits]).error for bits in ladder]
    assert errors[0] > errors[-1] and errors[-1] < (0.06 if ladder[-1] == 8 else 0.3)


def test_a_joint_ladder_beats_a_truncated_one_where_bits_are_few(tmp_path: Path) -> None:
    found = calibrated("residual", tmp_path)
    joint, truncated = (levels_of(found, (2, 4, 8), nesting) for nesting in ("joint", "truncate"))
    assert effect(found, joint[2]).error < effect(found, truncated[2]).error
    alone = build(replace(found, settings=Settings(weight_bits=2)))
    assert effect(found, joint[2]).error < 1.3 * effect(found, alone).error


def test_a_rule_bounds_its_layer_at_every_level(tmp_path: Path) -> None:
    found = calibrated("residual", tmp_path)
    name = found.layers[1]
    found = replace(found, settings=Settings(rules=(Rule(name, {"weight_bits": 4}),)))
    levels = levels_of(found, (2, 4, 8))
    codes = {bits: arrays(parse_model(data))[f"{name}.weight"] for bits, data in levels.items()}
    assert np.array_equal(codes[4], codes[8]) and not np.array_equal(codes[2], codes[4])


def test_asymmetric_weights_make_no_ladder(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="symmetric"):
        levels_of(calibrated("residual", tmp_path, Settings(symmetry="asymmetric")), (2, 4))


# Bad input -----------------------------------------------------------------------------------------------------------


def test_images_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    graph = prepare(saved(residual(), tmp_path))
    good = inputs(graph.shape)
    with pytest.raises(DataError, match="too few"):
        calibrate(graph, good[:1], Settings())
    with pytest.raises(DataError, match="--layout nhwc"):
        calibrate(graph, good.transpose(0, 2, 3, 1).copy(), Settings())
    with pytest.raises(DataError, match="the model reads"):
        calibrate(graph, good[:, :, :8], Settings())
    good[3, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="NaN"):
        calibrate(graph, good, Settings())


def test_a_network_of_which_nothing_can_be_quantized_is_an_error(tmp_path: Path) -> None:
    net = FloatNet((1, 4))
    model = net.model(net.node("Relu", net.node("Add", "x", "x")))
    graph = prepare(saved(model, tmp_path))
    with pytest.raises(ModelError, match="nothing of the model can be quantized"):
        calibrate(graph, inputs(graph.shape), Settings())
    left = Settings(rules=(Rule("*", {"quantize": False}),))
    graph = prepare(saved(residual(), tmp_path))
    with pytest.raises(ModelError, match="the settings leave it in float"):
        calibrate(graph, inputs(graph.shape), left)


def test_activations_that_overflow_are_refused(tmp_path: Path) -> None:
    graph = prepare(saved(residual(), tmp_path))
    images = inputs(graph.shape) * np.float32(1e37)
    with pytest.raises(DataError, match="not finite"):
        calibrate(graph, images, Settings())


@pytest.mark.parametrize("nesting", ["joint", "truncate"])
@pytest.mark.parametrize("size", [1e-4, 1e-7, 1e-10, 0.0])
def test_a_bias_beside_tiny_weights_keeps_its_value(size: float, nesting: str, tmp_path: Path) -> None:
    """Such a channel's scale is as large as its int32 bias needs, at every level."""
    net = FloatNet()
    stem = net.node("Relu", net.conv("x", 3, 8))
    middle = net.conv(stem, 8, 32)
    weight, bias = list(net.arrays)[-2:]
    net.arrays[weight][:16] *= np.float32(size)
    net.arrays[bias][:16] = np.linspace(-700, 700, 16)
    graph = prepare(saved(net.model(net.head(net.node("Relu", middle), 32)), tmp_path))
    found = calibrate(graph, inputs(graph.shape), Settings(equalize=False))
    for data in levels_of(found, (2, 4, 8), nesting).values():
        assert effect(found, data).error < 0.02


def test_a_taken_name_is_refused(tmp_path: Path) -> None:
    net = FloatNet()
    x = net.conv("x", 3, 4)
    net.nodes.append(helper.make_node("Relu", [x], ["x.scale"], "relu"))
    graph = prepare(saved(net.model(net.head("x.scale", 4)), tmp_path))
    with pytest.raises(ModelError, match=r"x\.scale"):
        build(calibrate(graph, inputs((1, 3, 16, 16)), Settings()))


def test_compare_counts_classes_and_labels() -> None:
    expected = np.eye(4, dtype=np.float32)
    found = compare(expected, expected[[0, 1, 2, 2]], np.array([0, 1, 2, 2]))
    assert (found.agreement, found.accuracy) == (75.0, 100.0)
    assert found.error == pytest.approx((2 / 4) ** 0.5)


def test_runs_of_one_session_are_in_order(tmp_path: Path) -> None:
    graph = prepare(saved(residual(), tmp_path))
    images = inputs(graph.shape, 3)
    whole = outputs_of(graph.model(), images, graph.output_names[0])
    assert np.array_equal(whole[1], outputs_of(graph.model(), images[1:2], graph.output_names[0])[0])
