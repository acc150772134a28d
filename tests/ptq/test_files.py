"""Files and folders: float models as they come, images, settings, and the commands from end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import helper, numpy_helper

from qdeploy.cli import main
from qdeploy.errors import DataError, ModelError, RecipeError
from qdeploy.ladder import read_ladder
from qdeploy.ptq.command import parse_ladder, parse_widths
from qdeploy.ptq.images import Reading, load_calibration, parse_numbers
from qdeploy.ptq.prepare import parse_shape, prepare
from qdeploy.ptq.settings import Settings, load_settings
from tests.ptq.nets import FloatNet, inputs, residual, saved

SHAPE = (1, 3, 16, 16)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(result: Result, text: str) -> None:
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 2 and lines[-1].startswith("qdeploy: ") and text in lines[-1], result.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model, and images with labels below it."""
    data = tmp_path / "data"
    data.mkdir()
    np.save(data / "images.npy", inputs(SHAPE))
    np.save(data / "labels.npy", np.arange(24) % 10)
    saved(residual(), tmp_path)
    return tmp_path


# Models --------------------------------------------------------------------------------------------------------------


def test_open_sizes_are_fixed_or_refused(tmp_path: Path) -> None:
    net = FloatNet(("batch", 3, "height", "width"))
    path = saved(net.model(net.head(net.conv("x", 3, 4), 4)), tmp_path)
    with pytest.raises(ModelError, match="--shape x=1,3,SIZE,SIZE"):
        prepare(path)
    assert prepare(path, ("x", (4, 3, 12, 12))).shape == (1, 3, 12, 12)
    with pytest.raises(ModelError, match="does not fit"):
        prepare(path, ("x", (1, 1, 12, 12)))
    with pytest.raises(ModelError, match="does not fit"):
        prepare(path, ("y", (1, 3, 12, 12)))
    for text in ("x", "x=", "x=1,a", "x=0,3"):
        with pytest.raises(ModelError, match="write for instance"):
            parse_shape(text)


def test_an_old_opset_is_converted(tmp_path: Path) -> None:
    net = FloatNet()
    x = net.node("Clip", net.conv("x", 3, 4), min=0.0, max=6.0)
    said: list[str] = []
    graph = prepare(saved(net.model(net.head(x, 4), opset=9), tmp_path), None, said.append)
    assert graph.opset == 13 and "converted from opset 9 to 13" in said


def test_models_that_cannot_be_taken_say_why(tmp_path: Path) -> None:
    model = residual()
    for tensor in model.graph.initializer:
        if list(tensor.dims) == [8, 3, 3, 3]:
            values = numpy_helper.to_array(tensor).copy()
            values[1, 1, 1, 1] = np.nan
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    name = next(tensor.name for tensor in model.graph.initializer if list(tensor.dims) == [8, 3, 3, 3])
    with pytest.raises(ModelError, match=f"tensor {name} holds NaN or infinity"):
        prepare(saved(model, tmp_path))
    net = FloatNet()
    codes = net.node("QuantizeLinear", "x", net.store(0.1), net.store(0, np.uint8))
    x = net.node("DequantizeLinear", codes, net.store(0.1), net.store(0, np.uint8))
    with pytest.raises(ModelError, match="quantized already"):
        prepare(saved(net.model(net.head(net.conv(x, 3, 4), 4)), tmp_path))
    model = residual()
    model.graph.input.append(helper.make_tensor_value_info("mask", onnx.TensorProto.FLOAT, (1,)))
    with pytest.raises(ModelError, match="2 inputs"):
        prepare(saved(model, tmp_path))
    model = residual()
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    with pytest.raises(ModelError, match=r"DOUBLE|not a valid"):
        prepare(saved(model, tmp_path))
    (tmp_path / "net.onnx").write_bytes(b"\x08\x01damaged")
    with pytest.raises(ModelError):
        prepare(tmp_path / "net.onnx")


# Images --------------------------------------------------------------------------------------------------------------


def test_arrays_pictures_and_datasets_are_read(folder: Path) -> None:
    from PIL import Image

    images, labels = load_calibration(str(folder / "data"), SHAPE, Reading(count=8))
    assert images.shape == (8, 3, 16, 16) and labels is not None and labels.tolist() == [0, 3, 6, 9, 2, 5, 8, 1]
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3)).astype(np.uint8)
    pictures, arrays = folder / "pictures", folder / "arrays"
    pictures.mkdir(), arrays.mkdir()
    for i, pixel in enumerate(pixels):
        Image.fromarray(pixel).save(pictures / f"{i}.png")
    np.savez(arrays / "all.npz", a=pixels[:2], b=pixels[2:])
    how = Reading("nhwc", (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    from_arrays, none = load_calibration(str(arrays), SHAPE, how)
    from_pictures, _ = load_calibration(str(pictures), SHAPE, how)
    expected = (pixels / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.2, 0.1])
    np.testing.assert_allclose(from_arrays, expected.transpose(0, 3, 1, 2), atol=1e-5)
    assert none is None and np.array_equal(from_arrays, from_pictures)
    channels_last, _ = load_calibration(str(pictures), (1, 16, 16, 3), Reading(mean=how.mean, std=how.std))
    assert np.array_equal(channels_last, from_pictures.transpose(0, 2, 3, 1))
    grey, classes = load_calibration("fashion-mnist", (1, 1, 28, 28), Reading(count=10))
    assert grey.shape == (10, 1, 28, 28) and grey.max() <= 1 and classes is not None and len(classes) == 10


def test_pictures_of_other_sizes_need_a_word(tmp_path: Path) -> None:
    from PIL import Image

    for i, size in enumerate(((40, 20), (20, 30))):
        Image.fromarray(np.full((size[1], size[0], 3), 100, np.uint8)).save(tmp_path / f"{i}.jpg")
    with pytest.raises(DataError, match="add --resize"):
        load_calibration(str(tmp_path), SHAPE)
    images, _ = load_calibration(str(tmp_path), SHAPE, Reading(resize=True))
    np.testing.assert_allclose(images, 100 / 255, atol=0.02)
    (tmp_path / "0.jpg").write_bytes(b"\xff\xd8 no picture")
    with pytest.raises(DataError, match="damaged picture"):
        load_calibration(str(tmp_path), SHAPE, Reading(resize=True))


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.zeros((4, 16, 16, 3), np.float32), "add --layout nhwc"),
        (np.zeros((4, 3, 8, 8), np.float32), r"the model reads \[n, 3, 16, 16\]"),
        (np.zeros((4, 3, 16, 16), np.int64), "give uint8 pixels or float32"),
        (np.full((4, 3, 16, 16), np.inf, np.float32), "NaN or infinity"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(array: np.ndarray, text: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=text):
        load_calibration(str(tmp_path), SHAPE)


def test_folders_that_hold_nothing_usable_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images"):
        load_calibration(str(tmp_path), SHAPE)
    with pytest.raises(DataError, match="no folder and none of"):
        load_calibration(str(tmp_path / "absent"), SHAPE)
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY damaged")
    with pytest.raises(DataError, match="not a usable file"):
        load_calibration(str(tmp_path), SHAPE)
    np.save(tmp_path / "a.npy", inputs(SHAPE, 3))
    np.save(tmp_path / "labels.npy", np.arange(2))
    with pytest.raises(DataError, match="2 labels for 3 images"):
        load_calibration(str(tmp_path), SHAPE)
    with pytest.raises(DataError, match="go together"):
        load_calibration(str(tmp_path), SHAPE, Reading(mean=(0.5,)))
    with pytest.raises(DataError, match="list of numbers"):
        parse_numbers("0.5;0.5")


# Settings ------------------------------------------------------------------------------------------------------------


def test_settings_come_from_toml(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text('weight_bits = 4\n[[layer]]\nmatch = "*head*"\nquantize = false\n')
    settings = Settings(**load_settings(path))
    assert settings.weight_bits == 4 and not settings.choices(["a", "the_head_1", "z"])["the_head_1"].quantize


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("colour = 1", "sets 'colour'"),
        ("weight_bits = 9", "give 2 to 8"),
        ('calibration = "kl"', "choose from minmax"),
        ("percentile = 10", "more than 50"),
        ('[[layer]]\nmatch = "a"', "at least one of"),
        ('[[layer]]\nmatch = "a"\nbits = 4', "sets 'bits'"),
        ('[[layer]]\nmatch = "a"\nweight_bits = 1', "give 2 to 8"),
        ("equalize = 1", "true or false"),
        ("= 3", "no TOML"),
    ],
)
def test_settings_that_are_wrong_say_so(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=expected):
        Settings(**load_settings(path))


# Commands ------------------------------------------------------------------------------------------------------------


def test_a_ladder_from_the_command_line_bundles(folder: Path) -> None:
    out = folder / "levels"
    result = call("quantize", folder / "net.onnx", "--data", folder / "data", "--ladder", "2,4,8", "-o", out)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == sorted(
        f"w{bits}.onnx{tail}" for bits in (2, 4, 8) for tail in ("", ".json")
    )
    ladder = read_ladder([out / "w2.onnx", out / "w4.onnx", out / "w8.onnx"])
    assert ladder.model == "net" and "accuracy" in ladder.levels[0].info
    result = call("bundle", *(out / f"w{bits}.onnx" for bits in (2, 4, 8)), "-o", folder / "tree")
    assert result.exit_code == 0, result.output
    refused(call("quantize", folder / "net.onnx", "--data", folder / "data", "--ladder", "2,4", "-o", out), "--force")


def test_mixquant_meets_bounds_from_the_command_line(folder: Path) -> None:
    base = ("quantize", folder / "net.onnx", "--data", folder / "data", "--json", "-o")
    rows = {}
    for name, options in {
        "qem": ("--mixquant", 20),
        "size": ("--max-kib", 0.65),
        "accuracy": ("--min-accuracy", 1),
    }.items():
        result = call(*base, folder / f"{name}.onnx", *options)
        assert result.exit_code == 0, result.output
        rows[name] = json.loads(result.stdout)[0]
        assert (folder / f"{name}.onnx.json").is_file()
    assert rows["size"]["weight_bytes"] <= 0.65 * 1024 and rows["qem"]["average_bits"] < 8
    assert rows["accuracy"]["average_bits"] <= rows["qem"]["average_bits"]
    assert {row["bits"] for row in rows["qem"]["weights"].values()} <= set(range(2, 9))
    refused(call(*base, folder / "x.onnx", "--max-kib", 0.01), "the least is")
    refused(call(*base, folder / "x.onnx", "--mixquant", 2, "--max-kib", 1), "give one of")
    refused(call(*base, folder / "x.onnx", "--min-accuracy", 101), "even 8 bits reach")
    assert not (folder / "x.onnx").exists()


def test_bad_input_is_one_line_and_leaves_nothing(folder: Path) -> None:
    model, data, out = folder / "net.onnx", folder / "data", folder / "out.onnx"
    refused(call("quantize", model, "--data", folder / "none", "-o", out), "no folder")
    refused(call("quantize", model, "--data", data, "--images", 1, "-o", out), "too few")
    refused(call("quantize", model, "--data", data, "--ladder", "2,x", "-o", out), "'x' of --ladder 2,x is no level")
    refused(call("quantize", model, "--data", data, "--ladder", "2,4", "--bits", 4, "-o", out), "--ladder")
    refused(call("quantize", folder / "absent.onnx", "--data", data, "-o", out), "cannot read")
    assert not out.exists() and not Path(f"{out}.json").exists()
    with pytest.raises(RecipeError, match="list of widths"):
        parse_widths("1,4")


def test_the_sensitivity_report_has_every_layer_and_type(folder: Path) -> None:
    out = folder / "report"
    result = call("sensitivity", folder / "net.onnx", "--data", folder / "data", "--widths", "2,8", "-o", out)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "sensitivity.json").read_text())
    assert [row["type"] for row in report["layers"]] == ["first", "1x1", "depthwise", "1x1", "last"]
    assert [row["type"] for row in report["types"]] == ["first", "1x1", "depthwise", "last"]
    for row in (*report["layers"], *report["types"]):
        assert row["2"]["output"] > row["8"]["output"] > 0 and row["2"]["weight"] > row["8"]["weight"]
        assert row["8"]["weight"] < 1e-3 < row["2"]["weight"]
    page = (out / "sensitivity.html").read_text()
    assert 'src="' not in page and page.count("<script") == 1 and all(row["name"] in page for row in report["layers"])
    refused(call("sensitivity", folder / "net.onnx", "--data", folder / "data", "-o", out), "--force")


def test_reconstruction_resumes_and_leaves_no_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qdeploy.ptq import reconstruct as module

    model, out = folder / "net.onnx", folder / "out.onnx"
    arguments = ("quantize", model, "--data", folder / "data", "--bits", 3, "--reconstruct", 3, "-o", out)
    learn, count = module.learn_block, 0

    def interrupted(*given: object) -> object:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return learn(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "learn_block", interrupted)
    assert call(*arguments).exit_code == 130
    assert not out.exists() and (folder / "out.onnx.blocks" / "block-000.npz").is_file()
    result = call(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "done before" in result.stderr and "block 2 of 3" in result.stderr
    assert not (folder / "out.onnx.blocks").exists() and count == 4
    assert json.loads((folder / "out.onnx.json").read_text())["reconstruction"] == {"iterations": 3}


def test_a_reconstructed_ladder_with_mixquant_levels_nests_and_resumes(folder: Path) -> None:
    out = folder / "levels"
    arguments = (
        "quantize",
        folder / "net.onnx",
        "--data",
        folder / "data",
        "--ladder",
        "8,q280,2",
        "-o",
        out,
        "--json",
    )
    result = call(*arguments, "--reconstruct", 2)
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [row["average_bits"] for row in rows] == sorted(row["average_bits"] for row in rows)
    assert all(row["reconstruction"] == {"iterations": 2} for row in rows) and not (folder / "levels.blocks").exists()
    widths = {row["bits"] for row in json.loads((out / "q280.onnx.json").read_text())["weights"].values()}
    assert len(widths) > 1
    ladder = read_ladder([out / f"{name}.onnx" for name in ("w2", "q280", "w8")])
    assert [level.name for level in ladder.levels] == ["w2", "q280", "w8"]
    refused(call(*arguments, "--force", "--nesting", "truncate", "--reconstruct", 2), "leave --nesting out")


def test_ladders_are_parsed_and_levels_differ(folder: Path) -> None:
    rungs = parse_ladder("2, q68,q1.5,8")
    assert [(rung.name, rung.bits, rung.qem) for rung in rungs] == [
        ("w2", 2, None), ("q68", 8, 68.0), ("q1.5", 8, 1.5), ("w8", 8, None),
    ]  # fmt: skip
    for text, expected in {"4": "one level", "4,4": "one level", "1,4": "'1'", "4,9": "'9'", "q0.5,4": "'q0.5'",
                           "4,": "''", "q,4": "'q'"}.items():  # fmt: skip
        with pytest.raises(RecipeError, match=expected):
            parse_ladder(text)
    out = folder / "levels"
    arguments = ("quantize", folder / "net.onnx", "--data", folder / "data", "--ladder", "8,q1", "-o", out)
    refused(call(*arguments), "w8 and q1 are the same")
    assert not out.exists()


# Torch networks ------------------------------------------------------------------------------------------------------

NETWORKS = """
import torch
from torch import nn

class Doubling(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x

def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 10))

def doubling():
    return nn.Sequential(Doubling(), small())

def number():
    return 3

def failing(argument):
    return argument
"""


@pytest.fixture
def networks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder is the working one and holds a module of networks."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "torch_networks", raising=False)
    (folder / "torch_networks.py").write_text(NETWORKS)
    return folder


def test_a_torch_network_is_quantized_with_weights_of_a_file(networks: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from qdeploy.nets.own import make_own

    torch.manual_seed(3)
    state = {name: torch.rand_like(value) if value.is_floating_point() else value
             for name, value in make_own("torch_networks:small").state_dict().items()}  # fmt: skip
    save_file(state, networks / "w.safetensors")
    torch.save({"epoch": 3, "state_dict": state}, networks / "w.pt")
    base = ("quantize", "torch_networks:small", "--data", networks / "data", "--shape", "image=1,3,16,16", "-o")
    for name, more in {
        "own": (),
        "tensors": ("--weights", "w.safetensors"),
        "checkpoint": ("--weights", "w.pt"),
    }.items():
        result = call(*base, networks / f"{name}.onnx", *more)
        assert result.exit_code == 0, result.stderr
    built = {name: (networks / f"{name}.onnx").read_bytes() for name in ("own", "tensors", "checkpoint")}
    assert built["tensors"] == built["checkpoint"] != built["own"]
    assert onnx.load_from_string(built["own"]).graph.input[0].name == "image"
    assert json.loads((networks / "own.onnx.json").read_text())["name"] == "small"


def test_torch_networks_that_cannot_be_taken_say_why(networks: Path) -> None:
    import pickle

    import torch

    rest = ("--data", networks / "data", "-o", networks / "x.onnx")
    shape = ("--shape", "image=1,3,16,16")
    refused(call("quantize", "torch_networks:small", *rest), "give --shape")
    refused(call("quantize", "torch_networks:small", *rest, "--shape", "image=1,4,16,16"), "cannot be exported")
    refused(call("quantize", "torch_networks:absent", *rest, *shape), "cannot be imported")
    refused(call("quantize", "no_such_module:small", *rest, *shape), "cannot be imported")
    refused(call("quantize", "torch_networks:number", *rest, *shape), "returned a int")
    refused(call("quantize", "torch_networks:failing", *rest, *shape), "takes no arguments")
    refused(call("quantize", "torch_networks:doubling", *rest, *shape), "other things for other inputs")
    marker = networks / "ran"
    with (networks / "evil.pt").open("wb") as file:
        pickle.dump(Evil(str(marker)), file)
    torch.save({"0.weight": torch.zeros(8, 3, 3, 3)}, networks / "less.pt")
    (networks / "cut.safetensors").write_bytes(b"\x08")
    for name, text in {"evil.pt": "more than tensors", "less.pt": "lack 0.bias", "cut.safetensors": "damaged",
                       "absent.pt": "no such file"}.items():  # fmt: skip
        refused(call("quantize", "torch_networks:small", *rest, *shape, "--weights", name), text)
    assert not marker.exists() and not (networks / "x.onnx").exists()
    result = call("quantize", networks / "net.onnx", *rest, "--weights", "less.pt")
    assert result.exit_code == 2 and "belongs to a torch network" in result.stderr


class Evil:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)
