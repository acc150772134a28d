"""QDQ files as bytes: canonical form, the wire walker, roles and the graph digest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from qdeploy.errors import ModelError
from qdeploy.export.write import qdq_bytes
from qdeploy.qdq import (
    arrays,
    canonical_bytes,
    graph_digest,
    has_only_raw_data,
    load_model,
    numeric_roles,
    parse_model,
    raw_data_ranges,
)
from tests.nets_frozen import ladder_of


@pytest.fixture(scope="module")
def ladder() -> list[bytes]:
    return [qdq_bytes(net) for net in ladder_of(0, blocks=2, width=4, size=8, images=1, max_pool=True, depthwise=True)]


def small(shape: tuple[int, ...] = (2, 4), raw: bool = True, as_node: bool = False) -> ModelProto:
    """x [1, 4] -> Reshape(shape) -> Mul(scale) -> Identity: the same model written in several ways."""
    scale = np.array([1, 2, 3, 4], np.float32)
    tensors = [("shape", np.array(shape, np.int64)), ("scale", scale[: shape[-1]])]
    protos = []
    for name, array in tensors:
        if raw:
            protos.append(numpy_helper.from_array(array, name))
        else:
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            protos.append(helper.make_tensor(name, kind, array.shape, array.tolist()))
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["r"], "r"),
        helper.make_node("Mul", ["r", "scale"], ["y"], "m"),
    ]
    if as_node:
        nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in protos] + nodes
    graph = helper.make_graph(
        nodes,
        "some name",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, int(np.prod(shape))])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(shape))],
        [] if as_node else protos,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


# Canonical bytes -----------------------------------------------------------------------------------------------------


def test_canonical_twice_is_canonical_once() -> None:
    once = canonical_bytes(small())
    assert canonical_bytes(parse_model(once)) == once


def test_ways_to_write_one_model_become_one_file() -> None:
    wanted = canonical_bytes(small())
    assert canonical_bytes(small(raw=False)) == wanted
    assert canonical_bytes(small(as_node=True)) == wanted
    assert canonical_bytes(small(as_node=True, raw=False)) == wanted
    noisy = small()
    noisy.producer_name, noisy.producer_version, noisy.doc_string = "tool", "1.0", "made today"
    noisy.graph.name, noisy.graph.doc_string, noisy.graph.node[0].doc_string = "other", "text", "text"
    noisy.metadata_props.add(key="date", value="today")
    noisy.graph.node[0].metadata_props.add(key="line", value="3")
    noisy.graph.input[0].doc_string = "text"
    noisy.graph.value_info.add().CopyFrom(helper.make_tensor_value_info("r", TensorProto.FLOAT, [2, 4]))
    noisy.opset_import.add(domain="com.microsoft", version=1)
    noisy.graph.initializer.reverse()
    noisy.ir_version = 4
    assert canonical_bytes(noisy) == wanted


def test_initializers_that_are_inputs_stop_being_inputs() -> None:
    model = small()
    model.graph.input.add().CopyFrom(helper.make_tensor_value_info("scale", TensorProto.FLOAT, [4]))
    assert canonical_bytes(model) == canonical_bytes(small())


def test_attributes_are_sorted() -> None:
    a = helper.make_node("Conv", ["x", "w"], ["y"], group=1, pads=[0, 0, 0, 0], strides=[1, 1])
    b = onnx.NodeProto()
    b.CopyFrom(a)
    b.attribute.reverse()
    models = []
    for node in (a, b):
        value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1, 2, 2]) for n in "xy"]
        weight = numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "w")
        graph = helper.make_graph([node], "g", value[:1], value[1:], [weight])
        models.append(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]))
    assert canonical_bytes(models[0]) == canonical_bytes(models[1])


def test_what_cannot_be_canonical_raises() -> None:
    external = small()
    external.graph.initializer[0].data_location = TensorProto.EXTERNAL
    text = small()
    text.graph.initializer.append(helper.make_tensor("s", TensorProto.STRING, [1], [b"a"]))
    twice = small()
    twice.graph.initializer.append(twice.graph.initializer[0])
    short = small()
    short.graph.initializer[1].raw_data = short.graph.initializer[1].raw_data[:-1]
    unknown = ModelProto()
    unknown.ParseFromString(small().SerializeToString() + b"\xf8\x3f\x01")  # field 1023
    no_opset = small()
    del no_opset.opset_import[:]
    cases = {"another file": external, "STRING": text, "two initializers": twice, "malformed": short}
    cases |= {"does not know": unknown, "opset": no_opset}
    for reason, model in cases.items():
        with pytest.raises(ModelError, match=reason):
            canonical_bytes(model)


def test_own_exports_are_canonical(ladder: list[bytes]) -> None:
    for data in ladder:
        model = parse_model(data)
        assert canonical_bytes(model) == data
        assert all(has_only_raw_data(tensor) for tensor in model.graph.initializer)


# The wire walker -----------------------------------------------------------------------------------------------------


def test_ranges_are_where_protobuf_reads(ladder: list[bytes]) -> None:
    for data in ladder:
        ranges = raw_data_ranges(data)
        tensors = {tensor.name: tensor.raw_data for tensor in parse_model(data).graph.initializer}
        assert {name: data[at : at + length] for name, (at, length) in ranges.items()} == tensors


def test_levels_differ_inside_the_ranges_only(ladder: list[bytes]) -> None:
    ranges = raw_data_ranges(ladder[0])
    skeletons = set()
    for data in ladder:
        assert raw_data_ranges(data) == ranges
        holes = bytearray(data)
        for at, length in ranges.values():
            holes[at : at + length] = bytes(length)
        skeletons.add(bytes(holes))
    assert len(skeletons) == 1 and len(set(ladder)) == len(ladder)


def test_literal_bytes() -> None:
    tensor = b"\x08\x02" + b"\x10\x03" + b"\x42\x01w" + b"\x4a\x02\xab\xcd"  # dims 2, int8, name w, raw_data
    graph = b"\x2a" + bytes([len(tensor)]) + tensor
    data = b"\x08\x08" + b"\x3a" + bytes([len(graph)]) + graph
    assert raw_data_ranges(data) == {"w": (len(data) - 2, 2)}


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.text(min_size=1, max_size=8), st.binary(max_size=300), min_size=1, max_size=6),
    st.binary(max_size=40),
)
def test_any_initializers_round_trip(values: dict[str, bytes], prose: bytes) -> None:
    model = ModelProto(ir_version=8, producer_name=prose.hex())
    for name, raw in values.items():
        model.graph.initializer.add(name=name, dims=[len(raw)], data_type=TensorProto.INT8, raw_data=raw)
    data = model.SerializeToString()
    assert {n: data[at : at + length] for n, (at, length) in raw_data_ranges(data).items()} == values


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damage_raises_or_stays_inside(ladder: list[bytes], case: st.DataObject) -> None:
    good = ladder[0]
    bad = bytearray(good)
    for _ in range(case.draw(st.integers(1, 4))):
        bad[case.draw(st.integers(0, 400))] = case.draw(st.integers(0, 255))
    damaged = bytes(bad[: case.draw(st.integers(0, len(good)))])
    try:
        ranges = raw_data_ranges(damaged)
    except ModelError:
        return
    assert all(at >= 0 and at + length <= len(damaged) for at, length in ranges.values())


def test_every_truncation_raises(ladder: list[bytes]) -> None:
    data = ladder[0]
    last = max(at + length for at, length in raw_data_ranges(data).values())
    for end in range(0, last, 97):
        with pytest.raises(ModelError):
            raw_data_ranges(data[:end])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x3a\x00\x3a\x00",  # two graphs, which protobuf would merge
        b"\x38\x00",  # the graph as a number
        b"\x3a\x02\x2a\x00",  # an initializer without a name
        b"\x3a\x05\x2a\x03\x42\x01w",  # without raw_data
        b"\x3a\x07\x2a\x05\x42\x01\xff\x4a\x00",  # a name that is not UTF-8
        b"\x3a\x09\x2a\x07\x42\x01w\x4a\x00\x4a\x00",  # raw_data twice, the last of which protobuf would take
        b"\x3a\x0e" + b"\x2a\x05\x42\x01w\x4a\x00" * 2,  # one name twice
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # an endless number
        b"\x3b\x00",  # a group
        b"\x3a\x7f\x00",  # a length past the end
    ],
)
def test_malformed_files_raise(data: bytes) -> None:
    with pytest.raises(ModelError):
        raw_data_ranges(data)


# Roles and digest ----------------------------------------------------------------------------------------------------


def test_roles_are_the_names_of_the_table(ladder: list[bytes]) -> None:
    roles = numeric_roles(parse_model(ladder[0]))
    assert set(roles) == set(arrays(parse_model(ladder[0])))
    assert all(name.rsplit(".", 1)[1] == role for name, role in roles.items())
    weights = {"weight", "weight_scale", "weight_zero_point", "bias", "bias_scale"}
    assert set(roles.values()) == weights | {"scale", "zero_point", "clip_min", "clip_max"}


def test_structure_has_no_role() -> None:
    assert numeric_roles(small()) == {}


def test_one_digest_for_all_levels(ladder: list[bytes]) -> None:
    assert len({graph_digest(data) for data in ladder}) == 1


def test_digest_sees_structure_not_values() -> None:
    assert graph_digest(canonical_bytes(small())) == graph_digest(small(raw=False).SerializeToString())
    assert graph_digest(canonical_bytes(small((2, 4)))) != graph_digest(canonical_bytes(small((4, 2))))


# Loading -------------------------------------------------------------------------------------------------------------


def test_load_gives_bytes_and_model(ladder: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(ladder[0])
    data, model = load_model(tmp_path / "m.onnx")
    assert data == ladder[0] and model.graph.name == "main"


@pytest.mark.parametrize("content", [b"", b"not onnx", b"\x00" * 100, b"\x08\x08", b"PK\x03\x04" * 50])
def test_not_onnx(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=r"m\.onnx"):
        load_model(tmp_path / "m.onnx")


def test_truncated_models_do_not_load(ladder: list[bytes], tmp_path: Path) -> None:
    for end in range(1, len(ladder[0]) - 1, 1499):
        (tmp_path / "m.onnx").write_bytes(ladder[0][:end])
        with pytest.raises(ModelError):
            load_model(tmp_path / "m.onnx")


def test_missing_folder_and_external(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read"):
        load_model(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="cannot read"):
        load_model(tmp_path)
    onnx.save(small(), tmp_path / "e.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    with pytest.raises(ModelError, match="other files"):
        load_model(tmp_path / "e.onnx")
