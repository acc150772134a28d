"""`qdeploy package`: a compiled artifact and all that a device needs to run it, as one archive.

    qdeploy/bin/        qdeploy-run and TVM's two runtime libraries for the target's architecture
    qdeploy/artifact/   the artifact folder
    qdeploy/device/     a pulled folder with the levels that it holds, unless the artifact holds its own level
    qdeploy/selftest/   images, and the codes that the integer reference computes from them (none of a float output)
    qdeploy/licenses/   of everything that is in bin/
    qdeploy/install.sh  qdeploy/selftest.sh  qdeploy/SHA256SUMS

The device needs Linux with glibc 2.34, libstdc++ and a POSIX shell with coreutils; Debian 12 and later have them. Equal
input gives equal bytes.
"""

from __future__ import annotations

import gzip
import io
import shlex
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path

import numpy as np

from qdeploy.bundle.store import RELEASE_NAME, assemble, load_tree, manifest_name, object_name, pieces_of
from qdeploy.bundle.write import write_bundle
from qdeploy.client.pull import open_choice
from qdeploy.client.state import Current, DeviceFolder, current_bytes
from qdeploy.compile.artifact import DESCRIPTION, Description, load_artifact, read_description, read_file
from qdeploy.compile.llvm import resolve
from qdeploy.compile.read.handlers import read_graph
from qdeploy.compile.reference import Evaluator
from qdeploy.errors import CompileError, DeviceError
from qdeploy.files import parse_json, read_bytes, sha256, write_atomic
from qdeploy.ladder import read_ladder
from qdeploy.qdq import arrays, canonical_bytes, graph_digest, load_model, parse_model
from qdeploy.target import Target, gpu_takes

ROOT = "qdeploy"  # folder that the archive unpacks to
PROGRAM, LIBRARIES = "qdeploy-run", ("libtvm_runtime.so", "libtvm_ffi.so")
ELF_MACHINES = {"x86_64": 62, "aarch64": 183}
SELFTEST_ELEMENTS = 1 << 16  # of the images together, but one batch at least
EXECUTABLE = 0o755
Echo = Callable[[str], None]

SELFTEST = """#!/bin/sh
# Run the images in selftest/{what}.
cd "$(dirname "$0")" || exit 2
exec bin/qdeploy-run {folder} --input selftest/images.npy{codes} "$@"
"""

INSTALL = """#!/bin/sh
# Check this package, run its self-test and copy it to $1 (default: /opt/qdeploy).
set -eu
target=${{1:-/opt/qdeploy}}
cd "$(dirname "$0")"
stop() {{
    echo "error: $1" >&2
    exit 2
}}
[ "$(uname -m)" = {arch} ] || stop "this package is for {arch}, this machine is $(uname -m): make one for it"
sha256sum --quiet --strict -c SHA256SUMS || stop "the package is damaged: copy and unpack it again"
bin/qdeploy-run --help >/dev/null || stop "the program does not start: it needs glibc 2.34 and libstdc++ (Debian 12)"
sh selftest.sh || stop "the self-test failed on this machine: nothing was installed"
[ ! -e "$target" ] || [ -f "$target/SHA256SUMS" ] || stop "$target exists and is no package: name another folder"
mkdir -p "$(dirname "$target")" || stop "cannot write $target: name another folder"
rm -rf "$target.new"
cp -R . "$target.new" || stop "cannot write $target.new: make room, or name another folder"
rm -rf "$target"
mv "$target.new" "$target"
echo "installed in $target"
"""


@dataclass(frozen=True)
class Level:
    """What a package runs beside the artifact's code: files of a device folder (none if the artifact has a level of its
    own), and the ONNX file from which expected outputs are computed (None: the artifact itself, on this machine)."""

    files: Mapping[str, bytes]
    model: bytes | None


def package(
    artifact: Path, target: Target, out: Path, device: Path | None = None, model: Path | None = None,
    echo: Echo | None = None, kits: Path | None = None,
) -> int:  # fmt: skip
    """Write `out` (.tar.gz) for machines of `target`; returns its size in bytes.

    The level comes from `device`, a pulled folder, or `model`, the QDQ ONNX file that was compiled; an artifact that
    holds its own needs `model` only where this machine cannot run it. `kits`: folder of the runners by architecture
    (default: device/ of the virtual environment, where `make cross` puts them). Raises CompileError (an artifact for
    another target), DeviceError (no runner, `out` cannot be written), BundleError, ModelError.
    """
    say = echo or (lambda text: None)
    artifact = Path(artifact)
    head = read_description(artifact)
    check_target(head, target, artifact)
    level = _level(artifact, head, device, model)
    files = runner_files(target.arch, kits)
    files |= {f"artifact/{name}": read_file(artifact, head, name) for name in head["files"]}
    files["artifact/artifact.json"] = read_bytes(artifact / DESCRIPTION, "the artifact's description", CompileError)
    files |= {f"device/{name}": data for name, data in level.files.items()}
    say("computing what the self-test expects")
    files |= {f"selftest/{name}": data for name, data in _selftest(artifact, head, level).items()}
    folder = "device --artifact artifact" if level.files else "artifact"
    files["selftest.sh"] = selftest_script(folder, bool(head["outputs"][0]["codes"])).encode()
    files["install.sh"] = INSTALL.format(arch=shlex.quote(target.arch)).encode()
    files["SHA256SUMS"] = "".join(f"{sha256(files[name])}  {name}\n" for name in sorted(files)).encode()
    data = archive(files)
    write_atomic(out, data)
    return len(data)


def check_target(head: Description, target: Target, artifact: Path) -> None:
    """Raise CompileError unless a machine of `target` can run a variant, in the runner that is at hand."""
    reasons = []
    has = set(resolve(target).features)
    for variant in head["variants"]:
        name, arch, gpu = (variant["target"].get(key) for key in ("name", "arch", "gpu"))
        lacking = sorted(set(variant["target"]["features"]) - has)
        if arch != target.arch:
            reasons.append(f"its code for {name} is for {arch}, {target.name} is {target.arch}")
        elif lacking:
            reasons.append(f"its code for {name} needs {', '.join(lacking)}, which {target.name} lacks")
        elif variant["target"].get("kind") != ("llvm" if gpu is None else "cuda"):
            reasons.append(f"its code for {name} is of a kind that the runner does not run")
        elif gpu is not None and not target.gpu:
            reasons.append(f"its code for {name} needs a GPU of {gpu}, which {target.name} lacks")
        elif gpu is not None and not gpu_takes(target.gpu, str(gpu)):
            reasons.append(f"its code for {name} is for a GPU of {gpu}, {target.name} has {target.gpu}")
        else:
            break
    else:
        raise CompileError(
            f"{artifact} does not run on {target.name} ({'; '.join(reasons)}): compile it for that target"
        )
    made, have = str(head["versions"].get("apache-tvm", "")), version("apache-tvm")
    if made.split(".")[:2] != have.split(".")[:2]:
        raise CompileError(f"{artifact} was compiled by apache-tvm {made}, the runner has {have}: compile it again")


def runner_files(arch: str, kits: Path | None = None) -> dict[str, bytes]:
    """bin/ and licenses/ of a package for `arch`, as `make cross` built them; raises DeviceError."""
    kit = (kits or Path(sys.prefix, "device")) / arch
    hint = "run `make cross`, which builds it"
    if not kit.is_dir():
        raise DeviceError(f"there is no runner for {arch} in {kit.parent}: {hint}")
    files = {}
    for path in sorted(kit.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(kit))
            where = name if name.startswith("licenses/") else f"bin/{name}"
            files[where] = read_bytes(path, "a file of the runner", DeviceError)
    for name in (PROGRAM, *LIBRARIES):
        data = files.get(f"bin/{name}", b"")
        if data[:4] != b"\x7fELF" or int.from_bytes(data[18:20], "little") != ELF_MACHINES[arch]:
            raise DeviceError(f"{kit / name} is missing or no program for {arch}: {hint}")
    if not any(name.startswith("licenses/") for name in files):
        raise DeviceError(f"{kit / 'licenses'} is missing: {hint}")
    return files


# --- levels ----------------------------------------------------------------------------------------------------------


def _level(artifact: Path, head: Description, device: Path | None, model: Path | None) -> Level:
    """The level that the package runs; raises CompileError when there is none, or more than one."""
    if device is not None and (model is not None or head["constant"]):
        other = "--model" if model is not None else f"{artifact}, compiled with --constant,"
        raise CompileError(f"--device and {other} both bring a level: leave one out")
    if device is not None:
        return _pulled(Path(device), head)
    if model is None:
        if not head["constant"]:
            text = "add --device FOLDER (pulled) or --model FILE.onnx, or compile it with --constant"
            raise CompileError(f"{artifact} holds no level: {text}")
        return Level({}, None)
    data, _ = load_model(Path(model))
    if graph_digest(data) != head["graph"]:
        raise CompileError(f"{model} is not the model that {artifact} was compiled from: name that one")
    return Level({}, data) if head["constant"] else Level(_one_level(Path(model)), data)


def _pulled(folder: Path, head: Description) -> Level:
    """The levels that a device folder holds; all of the one in force is verified."""
    held = DeviceFolder(folder)
    current, manifest = open_choice(held)
    if manifest.graph != head["graph"]:
        raise CompileError(f"{folder} is a release of another graph than the artifact's: pull the one it was made for")
    data = assemble(manifest, current.level, held.reader(manifest))
    wanted = {manifest.pieces[piece].object for level in manifest.levels for piece in pieces_of(manifest, level.name)}
    names = [object_name(manifest.objects[index].sha256) for index in sorted(wanted)]
    names = [name for name in names if (folder / name).is_file()] + [manifest_name(current.manifest), "current.json"]
    return Level(
        {name: read_bytes(folder / name, "the device's file", DeviceError) for name in [*names, "journal"]}, data
    )


def _one_level(model: Path) -> dict[str, bytes]:
    """Files of a device folder that holds the ONNX file `model` as its only level."""
    with tempfile.TemporaryDirectory(prefix="qdeploy-") as temporary:
        tree = Path(temporary) / "tree"
        write_bundle(read_ladder([model]), [], tree)
        manifest = load_tree(tree)
        names = [object_name(entry.sha256) for entry in manifest.objects]
        digest = parse_json((tree / RELEASE_NAME).read_bytes(), RELEASE_NAME, DeviceError)["manifest"]["sha256"]
        files = {name: (tree / name).read_bytes() for name in (*names, manifest_name(digest))}
    files["current.json"] = current_bytes(Current("", digest, manifest.levels[0].name))
    return files


# --- the self-test ---------------------------------------------------------------------------------------------------


def selftest_script(folder: str, coded: bool) -> str:
    """selftest.sh. Float arithmetic may round elsewhere: what comes of it is not compared."""
    if not coded:
        return SELFTEST.format(folder=folder, codes="", what=" (the output is computed in float: not compared)")
    what = " and compare the codes, bit for bit, with those computed when the package was made"
    return SELFTEST.format(folder=folder, codes=" --codes --expect selftest/expected.npy", what=what)


def _selftest(artifact: Path, head: Description, level: Level) -> dict[str, bytes]:
    """images.npy, and expected.npy: their codes, where the network's output has codes."""
    shape = head["inputs"][0]["shape"]
    batches = max(1, SELFTEST_ELEMENTS // prod(shape))
    images = np.random.default_rng(0).random((batches * shape[0], *shape[1:]), np.float32)
    if not head["outputs"][0]["codes"]:
        return {"images.npy": npy(images)}
    compute = _on_this_machine(artifact) if level.model is None else _reference(level.model, head)
    outputs = [compute(images[i : i + shape[0]]) for i in range(0, len(images), shape[0])]
    return {"images.npy": npy(images), "expected.npy": npy(np.concatenate(outputs))}


def _reference(model: bytes, head: Description) -> Callable[[np.ndarray], np.ndarray]:
    """Codes of a batch by the integer reference."""
    parsed = parse_model(canonical_bytes(parse_model(model)))
    inputs = head["inputs"][0]
    evaluator = Evaluator(read_graph(parsed, (inputs["name"], tuple(inputs["shape"]))), arrays(parsed))
    return lambda x: evaluator.output(x)[1]


def _on_this_machine(artifact: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Codes of a batch by the artifact itself."""
    try:
        return load_artifact(artifact).codes
    except DeviceError as e:
        raise DeviceError(f"the self-test's outputs cannot be computed here ({e}); add --model FILE.onnx") from e


def npy(array: np.ndarray) -> bytes:
    """The bytes of a .npy file."""
    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(array), allow_pickle=False)
    return out.getvalue()


# --- the archive -----------------------------------------------------------------------------------------------------


def archive(files: Mapping[str, bytes]) -> bytes:
    """A .tar.gz of `files` below ROOT, without clocks, users or an order of its own."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted(files):
            entry = tarfile.TarInfo(f"{ROOT}/{name}")
            entry.size = len(files[name])
            entry.mode = EXECUTABLE if name.endswith(".sh") or name.startswith("bin/") else 0o644
            tar.addfile(entry, io.BytesIO(files[name]))
    return gzip.compress(packed.getvalue(), mtime=0)
