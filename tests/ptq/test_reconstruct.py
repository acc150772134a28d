"""Channels balanced by exact rescaling, blocks found in graphs, and their rounding learned, kept and resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from qdeploy.errors import DataError
from qdeploy.ladder import read_ladder
from qdeploy.ptq.blocks import between, find_blocks, outputs_of_block
from qdeploy.ptq.graph import outputs_of
from qdeploy.ptq.learn import other_codes
from qdeploy.ptq.place import place
from qdeploy.ptq.prepare import prepare
from qdeploy.ptq.quantize import (
    Calibrated,
    activation_grids,
    build,
    build_ladder,
    calibrate,
    compare,
    effect,
    ladder_widths,
    layer_weights,
)
from qdeploy.ptq.reconstruct import reconstruct, reconstruct_ladder
from qdeploy.ptq.settings import Rule, Settings
from qdeploy.ptq.streams import balance, find_streams
from qdeploy.ptq.weights import ladder_levels
from qdeploy.qdq import arrays, parse_model
from tests.compile.models import read_difference
from tests.ptq.nets import NETWORKS, FloatNet, inputs, residual, saved


def two_outputs() -> onnx.ModelProto:
    """A stem whose activation is an output beside the classes: nothing behind it is passed through by all."""
    net = FloatNet()
    x = net.node("Relu", net.conv("x", 3, 8, stride=2))
    y = net.node("Relu", net.conv(x, 8, 8))
    model = net.model(net.head(y, 8))
    model.graph.output.append(onnx.helper.make_tensor_value_info(y, onnx.TensorProto.FLOAT, [None] * 4))
    return model


def calibrated(name: str, folder: Path, settings: Settings | None = None) -> Calibrated:
    graph = prepare(saved(NETWORKS[name](), folder))
    return calibrate(graph, inputs(graph.shape), settings or Settings())


# Streams -------------------------------------------------------------------------------------------------------------


def uneven() -> onnx.ModelProto:
    """The residual network with channels of its stream from 1/30 to 30 times as large, undone in the readers."""
    model = residual()
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    stored = {tensor.name: tensor for tensor in graph.initializer}
    add = next(node for node in graph.node if node.op_type == "Add")
    factors = np.logspace(-1.5, 1.5, 8).astype(np.float32)

    def scale(name: str, by: np.ndarray) -> None:
        array = onnx.numpy_helper.to_array(stored[name]) * by
        stored[name].CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), name))

    norms = [makers[makers[add.input[0]].input[0]], makers[add.input[1]]]
    for norm in norms:
        scale(norm.input[1], factors)
        scale(norm.input[2], factors)
    for reader in (n for n in graph.node if n.op_type in ("Conv", "Gemm")):
        form = {"Conv": (1, -1, 1, 1), "Gemm": (1, -1)}[reader.op_type]
        if onnx.numpy_helper.to_array(stored[reader.input[1]]).shape[1] == len(factors):
            scale(reader.input[1], 1 / factors.reshape(form))
    return model


def test_a_stream_of_uneven_channels_is_balanced(tmp_path: Path) -> None:
    graph = prepare(saved(uneven(), tmp_path))
    images = inputs(graph.shape)
    before = outputs_of(graph.model(), images, graph.output_names[0])
    kinds = [{node.op_type for node in stream.readers} for stream in find_streams(graph)]
    assert {"Conv", "Gemm"} in kinds  # the residual stream, from the stem to the classifier
    owners = sorted(set(place(graph).owners.values()))
    assert balance(graph, images, owners, 8, 8) >= 1
    after = outputs_of(graph.model(), images, graph.output_names[0])
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-3 * np.abs(before).max())
    errors = {}
    for equalize in (True, False):
        found = calibrate(prepare(saved(uneven(), tmp_path)), images, Settings(equalize=equalize, rounding="nearest"))
        errors[equalize] = effect(found, build(found)).error
    assert errors[True] < 0.6 * errors[False]


@pytest.mark.parametrize("name", NETWORKS)
def test_balancing_keeps_the_function(name: str, tmp_path: Path) -> None:
    graph = prepare(saved(NETWORKS[name](), tmp_path))
    images = inputs(graph.shape, 6)
    before = outputs_of(graph.model(), images, graph.output_names[0])
    balance(graph, images, sorted(set(place(graph).owners.values())), 4, 8)
    after = outputs_of(graph.model(), images, graph.output_names[0])
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-4 * np.abs(before).max())


def test_streams_end_at_what_takes_no_factors(tmp_path: Path) -> None:
    graph = prepare(saved(NETWORKS["swish"](), tmp_path))
    free = {value for stream in find_streams(graph) for value in stream.values}
    for node in graph.nodes:
        if node.op_type in ("HardSwish", "Sigmoid", "Mul", "HardSigmoid"):
            assert not free & {*node.input, *node.output}
    assert graph.input not in free and not free & set(graph.output_names)


# Blocks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_follow_each_other_and_hold_every_layer(name: str, tmp_path: Path) -> None:
    found = calibrated(name, tmp_path)
    blocks = find_blocks(found.graph, found.placement)
    assert blocks[0].input == found.graph.input
    assert all(a.output == b.input for a, b in zip(blocks, blocks[1:], strict=False))
    assert [layer for block in blocks for layer in block.layers] == found.layers
    exact = found.images
    for block in blocks:
        shape = found.graph.floats.get(block.input, found.graph.shape)
        exact = outputs_of_block(found.graph.model([block.output]), block.input, shape, block.output, exact)
    whole = outputs_of(found.graph.model([blocks[-1].output]), found.images, blocks[-1].output)
    np.testing.assert_allclose(exact, whole, rtol=1e-4, atol=1e-5)


def test_a_residual_sum_is_one_block(tmp_path: Path) -> None:
    found = calibrated("residual", tmp_path)
    blocks = find_blocks(found.graph, found.placement)
    assert [len(block.layers) for block in blocks] == [1, 3, 1]
    part = between(found.graph.model(), blocks[1].input, (1, 8, 8, 8), blocks[1].output)
    assert [node.op_type for node in part.graph.node].count("Conv") == 3


@pytest.mark.parametrize("name", ["residual", "swish"])
@pytest.mark.parametrize("narrow", [8, 4])
def test_the_learner_computes_what_the_file_does(name: str, narrow: int, tmp_path: Path) -> None:
    from qdeploy.ptq.learn import _Network, unlearnable
    from qdeploy.ptq.reconstruct import _problem, _State

    found = calibrated(name, tmp_path, Settings(weight_bits=4, activation_bits=narrow))
    choices = found.settings.choices(found.layers)
    layers = {layer.name: layer for layer in found.placement.layers}
    weights = {key: layer_weights(found, layer, choices[key]) for key, layer in layers.items()}
    forms = {key: ladder_levels((choice.weight_bits,)) for key, choice in choices.items()}
    state = _State(found, choices, [weights], forms, activation_grids(found, choices), 1, tmp_path)
    model = parse_model(state.model(0))
    compared = 0
    for block in find_blocks(found.graph, found.placement)[1:]:
        assert unlearnable(block, layers) is None
        end = block.output if block.output in found.graph.output_names else f"{block.output}.values"
        both = onnx.ModelProto()
        both.CopyFrom(model)
        for value in {f"{block.input}.values", end} - {o.name for o in model.graph.output}:
            both.graph.output.append(onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None))
        x, y = (outputs_of(both, found.images, value) for value in (f"{block.input}.values", end))
        network = _Network(_problem(state, block))
        with torch.no_grad():
            got = network.forward(0, torch.from_numpy(x), hard=True).numpy()
        assert compare(y, got).error < 0.03  # ONNX Runtime's integer pools round a code apart now and then
        compared += 1
    assert compared >= 2


# Learning ------------------------------------------------------------------------------------------------------------


def test_learning_lowers_the_error_and_is_never_worse(tmp_path: Path) -> None:
    found = calibrated("residual", tmp_path, Settings(weight_bits=2, first_last="same"))
    said: list[str] = []
    built = reconstruct(found, None, 60, tmp_path / "kept", said.append)
    assert effect(found, built).error < 0.9 * effect(found, build(found)).error
    for line in (line for line in said if "->" in line):
        before, after = (float(part.strip("%,")) for part in line.split() if part.endswith(("%", "%,")))
        assert after <= before
    graph, difference = read_difference(parse_model(built), 0.1)
    assert not any(op.kind == "float" for op in graph.ops) and difference.worst <= 1.01
    weight = arrays(parse_model(built))[f"{found.layers[1]}.weight"]
    assert len(np.unique(weight)) <= 4


def test_a_learned_ladder_nests_and_is_better(tmp_path: Path) -> None:
    found = calibrated("residual", tmp_path, Settings(first_last="same"))
    levels = {f"w{bits}": ladder_widths(found, bits) for bits in (2, 3, 4)}
    said: list[str] = []
    learned = reconstruct_ladder(found, levels, 60, tmp_path / "kept", said.append)
    plain = build_ladder(found, levels)
    errors = [(effect(found, learned[name]).error, effect(found, plain[name]).error) for name in levels]
    assert all(a < 1.03 * b for a, b in errors) and sum(a / b for a, b in errors) < 2.9
    assert sum("->" in line for line in said) == 3
    paths = [tmp_path / f"{name}.onnx" for name in levels]
    for path, data in zip(paths, learned.values(), strict=True):
        path.write_bytes(data)
    warned: list[str] = []
    read = read_ladder(paths, warned.append)
    assert not warned and {tensor.bits for tensor in read.tensors} == {4}
    assert (
        reconstruct_ladder(found, dict(reversed(levels.items())), 60, tmp_path / "kept") == learned
    )  # from the folder


@pytest.mark.parametrize("turn", [0, 1])
def test_second_candidates_share_the_prefix_that_is_decided(turn: int) -> None:
    random = np.random.default_rng(turn)
    forms = ladder_levels((2, 4, 8))
    tops = random.integers(-128, 128, 5000)
    exact = forms[turn].codes(tops) + random.normal(0, 20, 5000)
    others = other_codes(tops, exact, forms, turn, (-128, 127))
    prefix, other = (codes >> (8 - forms[turn].bits) for codes in (tops, others))
    assert others.min() >= -128 and others.max() <= 127 and np.all(np.abs(prefix - other) == 1)
    if turn:
        assert np.array_equal(others >> 6, tops >> 6)
    nearest = np.abs(forms[2].codes(others) - exact) <= np.abs(forms[2].codes(others ^ 1) - exact) + 2
    assert np.mean(nearest) > 0.5


def test_a_single_code_below_its_prefix_has_no_second_candidate() -> None:
    forms = [*ladder_levels((2, 4))[:1] * 2, ladder_levels((2, 4))[1]]
    tops = np.arange(-8, 8)
    assert np.array_equal(other_codes(tops, tops * 8.0, forms, 1, (-8, 7)), tops)


def test_widths_of_a_search_are_kept(tmp_path: Path) -> None:
    found = calibrated("residual", tmp_path)
    widths = dict(zip(found.layers, (8, 2, 4, 3, 8), strict=True))
    stored = arrays(parse_model(reconstruct(found, widths, 3, tmp_path / "kept")))
    for name, bits in widths.items():
        codes = stored[f"{name}.weight"].astype(int)
        assert -(1 << (bits - 1)) <= codes.min() and codes.max() < 1 << (bits - 1)


def test_finished_blocks_are_kept_and_give_the_same_bytes(tmp_path: Path) -> None:
    found = calibrated("residual", tmp_path, Settings(weight_bits=3))
    folder = tmp_path / "kept"

    class StopError(Exception):
        pass

    def stop(text: str) -> None:
        if text.startswith("block 2"):
            raise StopError

    with pytest.raises(StopError):
        reconstruct(found, None, 8, folder, stop)
    said: list[str] = []
    resumed = reconstruct(found, None, 8, folder, said.append)
    assert [line.endswith("done before") for line in said] == [True, True, False]
    assert resumed == reconstruct(found, None, 8, tmp_path / "fresh")
    (folder / "block-001.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(DataError, match="damaged"):
        reconstruct(found, None, 8, folder)
    said.clear()
    reconstruct(found, None, 2, folder, said.append)  # another quantization: nothing of the old one is taken
    assert not any("done before" in line for line in said)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    found = calibrated("residual", tmp_path)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("keep")
    with pytest.raises(DataError, match="no kept blocks"):
        reconstruct(found, None, 2, folder)
    assert (folder / "notes.txt").read_text() == "keep"


@pytest.mark.parametrize("name", ["branches", "sequence"])
def test_what_cannot_be_learned_keeps_its_rounding_and_is_said(name: str, tmp_path: Path) -> None:
    found = calibrated(name, tmp_path, Settings(weight_bits=4))
    said: list[str] = []
    built = reconstruct(found, None, 5, tmp_path / "kept", said.append)
    assert any("rounded layer by layer" in line for line in said)
    assert effect(found, built).error < 1.2 * effect(found, build(found)).error + 0.02


def test_layers_behind_the_last_block_are_said(tmp_path: Path) -> None:
    graph = prepare(saved(two_outputs(), tmp_path))
    found = calibrate(graph, inputs(graph.shape), Settings(weight_bits=4))
    said: list[str] = []
    built = reconstruct(found, None, 5, tmp_path / "kept", said.append)
    assert found.layers[-1] in said[-1] and "in no block" in said[-1]
    assert effect(found, built).error < 0.5


def test_dead_channels_keep_their_bias(tmp_path: Path) -> None:
    net = FloatNet()
    x = net.conv("x", 3, 8)
    net.arrays["p0"][3] = 0
    net.arrays["p0"][5] *= 1e-12
    net.arrays["p1"][3:6] = 4.0
    graph = prepare(saved(net.model(net.head(net.node("Relu", net.conv(x, 8, 8)), 8)), tmp_path))
    found = calibrate(graph, inputs(graph.shape), Settings())
    left = replace(found, settings=replace(found.settings, rules=(Rule("*", {"granularity": "tensor"}),)), done={})
    for one in (found, left):
        assert effect(one, reconstruct(one, None, 20, tmp_path / str(id(one)))).error < 0.1
