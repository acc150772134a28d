"""Bad input gets one line on standard error and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from qdeploy.cli import main
from qdeploy.export import export_onnx
from qdeploy.ladder import read_ladder
from tests.nets_frozen import ladder_of

REPOSITORY = Path(__file__).parents[1]
SHIPPED = REPOSITORY / "models" / "fashion-resnet8"
HOST = REPOSITORY / "targets" / "host.toml"


def refused(result: Result, *texts: str) -> None:
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("qdeploy: "), result.stderr
    for text in texts:
        assert text in lines[0]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    paths = []
    for bits, net in zip((2, 4), ladder_of(0, levels=(2, 4)), strict=True):
        export_onnx(net, folder / f"w{bits}.onnx")
        paths.append(folder / f"w{bits}.onnx")
    return paths


@pytest.mark.parametrize("command", [c for c in main.commands])  # noqa: C416
def test_every_command_has_help(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0 and "Usage" in result.output


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("colour = 1", "unknown key colour"),
        ('[network]\nname = "vgg"\n[data]\nname = "fashion-mnist"\nsplit = "sample"', "resnet8"),
        ('[network]\nname = "tiny"\n[data]\nname = "svhn"', "unknown dataset"),
        ('[network]\nname = "tiny"\n[data]\nname = "fashion-mnist"\n[quantization]\nwidths = [1, 2]', "2..8"),
        ('[network]\nname = 3\n[data]\nname = "fashion-mnist"', "network.name is 3"),
    ],
)
def test_train_names_what_is_wrong_with_a_recipe(tmp_path: Path, text: str, expected: str) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(text)
    refused(call("train", recipe, "-o", tmp_path / "run"), expected)


def test_absent_cifar_says_the_three_ways(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[network]\nname = "tiny"\n[data]\nname = "cifar-10"')
    refused(
        call("train", recipe, "-o", tmp_path / "run"), "cifar-10-batches-py", "cifar-10-batches-bin", "make_cifar10"
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "choose one of --bits"),
        (["--bits", 5], "choose from [2, 3, 4]"),
        (["--bits", 2, "--budget-kib", 3], "choose one of"),
        (["--budget-kib", 1], "too small"),
        (["--bits", 2, "--nested-with", "x"], "goes with --budget-kib"),
        (["--spec", "absent.json"], "cannot read"),
        (["--bits", 2, "--granularity", "channel"], "--granularity goes with --bits and a run of method eqnet"),
    ],
)
def test_subnet_choices(tmp_path: Path, options: list[object], expected: str) -> None:
    refused(call("subnet", SHIPPED, *options, "-o", tmp_path / "s"), expected)
    assert not (tmp_path / "s").exists()


def test_subnet_of_a_damaged_checkpoint(tmp_path: Path) -> None:
    for name in ("recipe.json", "quantized.checkpoint"):
        data = bytearray((SHIPPED / name).read_bytes())
        data[-7] ^= 16
        (tmp_path / name).write_bytes(bytes(data) if name.endswith("checkpoint") else (SHIPPED / name).read_bytes())
    refused(call("subnet", tmp_path, "--bits", 2, "-o", tmp_path / "s"), "not a sound qdeploy checkpoint")


def test_an_output_that_exists_is_kept(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine.txt").write_text("keep me")
    refused(call("subnet", SHIPPED, "--bits", 2, "-o", tmp_path / "s"), "not empty")
    assert (tmp_path / "s" / "mine.txt").read_text() == "keep me"


def test_export_of_something_else(tmp_path: Path) -> None:
    refused(call("export", tmp_path, "-o", tmp_path / "m.onnx"), "frozen")
    assert not (tmp_path / "m.onnx").exists()


def test_bundle_refuses_models_that_do_not_nest(tmp_path: Path) -> None:
    paths = []
    for seed in (0, 1):
        export_onnx(ladder_of(seed, levels=(2, 4))[seed], tmp_path / f"n{seed}.onnx")
        paths.append(tmp_path / f"n{seed}.onnx")
    refused(call("bundle", *paths, "-o", tmp_path / "tree"), "nest")
    assert not (tmp_path / "tree").exists()


def test_compile_refuses_a_float_model_and_lists_the_breaches(tmp_path: Path, models: list[Path]) -> None:
    import onnx
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]), tmp_path / "f.onnx")
    refused(call("compile", tmp_path / "f.onnx", "--target", HOST, "-o", tmp_path / "a"), "put QuantizeLinear")
    (tmp_path / "cut.onnx").write_bytes(models[0].read_bytes()[:1000])
    refused(call("compile", tmp_path / "cut.onnx", "--target", HOST, "-o", tmp_path / "a"), "cut.onnx")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("line", "expected"), [("cpu = 'pentium9'", "pentium9"), ("speed = 3", "unknown key")])
def test_compile_refuses_an_unknown_target(tmp_path: Path, models: list[Path], line: str, expected: str) -> None:
    target = tmp_path / "t.toml"
    text = 'name = "t"\narch = "x86_64"\nkind = "llvm"\n' + ("cpu = 'generic'\n" if "cpu" not in line else "")
    target.write_text(text + line)
    refused(call("compile", models[0], "--target", target, "-o", tmp_path / "a"), expected)


def test_compile_wants_one_target_or_all(tmp_path: Path, models: list[Path]) -> None:
    for given in ((), ("--target", HOST, "--isa", "auto")):
        refused(call("compile", models[0], *given, "-o", tmp_path / "a"), "give --target FILE, or --isa auto")


def test_compile_with_threads_and_constants(tmp_path: Path, models: list[Path]) -> None:
    done = call("compile", models[0], "--target", HOST, "--threads", 2, "--constant", "-o", tmp_path / "a")
    assert done.exit_code == 0 and "kernels, arena" in done.stdout
    head = json.loads((tmp_path / "a" / "artifact.json").read_bytes())
    assert head["threads"] == 2 and head["constant"] and set(head["files"]) == {"lib.so", "packed.bin"}
    assert json.loads(call("inspect", tmp_path / "a", "--json").stdout)["variants"] == ["host"]


def test_serve_says_when_the_port_is_in_use(tmp_path: Path, models: list[Path]) -> None:
    from qdeploy.bundle.write import write_bundle

    write_bundle(read_ladder(models), [], tmp_path / "tree")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(call("serve", tmp_path / "tree", "--port", port), str(port))
    refused(call("serve", tmp_path, "--port", 0), "release.json")


def test_pull_from_nobody(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    refused(call("pull", f"http://127.0.0.1:{port}", "-o", tmp_path / "d", "--unsigned"), str(port))


def test_levels_and_images_that_do_not_fit(tmp_path: Path, models: list[Path]) -> None:
    from qdeploy.bundle.write import write_bundle
    from qdeploy.serve.app import serving

    write_bundle(read_ladder(models), [], tmp_path / "tree")
    device = tmp_path / "d"
    with serving(tmp_path / "tree") as url:
        refused(call("pull", url, "-o", device, "--level", "w9", "--unsigned"), "w2", "w4")
        assert call("pull", url, "-o", device, "--level", "w2", "--unsigned").exit_code == 0
        refused(call("climb", device, "--to", "w9"), "w2", "w4")
    refused(call("drop", device, "--to", "w4"), "w4")
    np.save(tmp_path / "wrong.npy", np.zeros((2, 1, 3, 3), np.uint8))
    refused(call("run", device, "--images", tmp_path / "wrong.npy", "--runtime", "ort"), "3")
    refused(call("run", device, "--images", tmp_path / "absent.npy", "--runtime", "ort"), "absent.npy")
    refused(call("run", tmp_path / "nothing", "--images", tmp_path / "wrong.npy"), "nothing")


def test_inspect_of_everything_and_of_nothing(tmp_path: Path, models: list[Path]) -> None:
    assert json.loads(call("inspect", models[0], "--json").stdout)["kind"]
    assert "fashion-resnet8" in call("inspect", SHIPPED).stdout
    (tmp_path / "x.bin").write_bytes(os.urandom(64))
    refused(call("inspect", tmp_path / "x.bin"), "x.bin")


def test_help_starts_without_the_heavy_packages() -> None:
    code = "import sys, qdeploy.cli; print([m for m in ('torch', 'tvm', 'onnx', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
