"""The latency predictor on subnets that it has not seen, against how well a measurement repeats.

    python tools/bench_latency_predictor.py FOLDER --build [--seconds N]      compile subnets into FOLDER
    python tools/bench_latency_predictor.py FOLDER --time [--seconds N]       measure those that are compiled
    python tools/bench_latency_predictor.py FOLDER                            the table

The predictor is taught as `qdeploy search` teaches it: by the networks that show every kernel and some random ones.
Every other subnet is measured twice, all of them once before any is measured again: what the two differ by is how
well a measurement repeats, the machine's drift included. Steps can be killed and repeated: a subnet that is compiled
or measured stays so. All subnets of a space share most kernels; each is compiled once and linked into every network
that calls it. Few images calibrate a network: times do not depend on values.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qdeploy.compile.artifact import DESCRIPTION, Artifact, identity, load_artifact
from qdeploy.compile.codegen import ENTRY_PHASES, PHASES, link, linker, write_common, write_object
from qdeploy.compile.entry import arena_bytes, entry_functions
from qdeploy.compile.fuse import fuse
from qdeploy.compile.kernels.emit import on_pointers
from qdeploy.compile.kernels.join import join_kernel
from qdeploy.compile.llvm import Resolved, resolve
from qdeploy.compile.lower import Lowering
from qdeploy.compile.pipeline import Options, add_file, describe, for_any_level, kernel_rows, target_json
from qdeploy.compile.plan import plan
from qdeploy.compile.program import Program
from qdeploy.compile.read.handlers import read_graph
from qdeploy.errors import DeviceError, ModelError
from qdeploy.export import export_onnx
from qdeploy.extract import calibration_set
from qdeploy.farm.child import idlest_cpu
from qdeploy.farm.process import read_params, write_params
from qdeploy.files import canonical_json, sha256, write_atomic
from qdeploy.profile.latency import machine
from qdeploy.profile.report import machine_line
from qdeploy.profile.timing import NOISE, timed
from qdeploy.qdq import arrays, graph_digest, load_model, parse_model
from qdeploy.quant.calibrate import reestimate_norms
from qdeploy.quant.simulated import SimulatedNet
from qdeploy.search.device import COVERAGE, LEAST, LinearModel, latency_features, table_of
from qdeploy.search.encoding import Encoding
from qdeploy.search.geometry import geometry
from qdeploy.search.table import networks
from qdeploy.space import SubnetSpec
from qdeploy.subnet import to_integers
from qdeploy.target import load_target
from qdeploy.train.run import load_run

ROOT = Path(__file__).resolve().parents[1]
DRAWN = 12  # random subnets that teach, beside those that show every kernel, as in a search
ALLOWED = 0.1  # relative error that is within what is asked of a predictor
PASSES = 2
CALIBRATION = 8  # images


class SharedLowering(Lowering):
    """Names a kernel by what it is, whatever network calls it, and makes it once."""

    made: dict[Hashable, tuple[str, Any]] = {}

    def _kernel(self, key: Hashable, label: str, make: Callable[[str], Any]) -> str:
        if isinstance(key, str):  # of the one network only
            text = str(make(label).script())
            found = (name := f"{label}_{sha256(text.encode())[:12]}"), make(name)
        elif key in self.made:
            found = self.made[key]
        else:
            name = f"{label}_{sha256(f'{label} {key!r}'.encode())[:12]}"
            found = self.made[key] = name, make(name)
        self.kernels[found[0]] = found[1]
        return found[0]


class Factory:
    """Artifacts of subnets in `folder`/nets, from objects of kernels in `folder`/objects."""

    def __init__(self, folder: Path, net: SimulatedNet, images: np.ndarray, resolved: Resolved) -> None:
        self.folder, self.net, self.images, self.resolved = folder, net, images, resolved
        self.compiler = linker()
        (folder / "objects").mkdir(parents=True, exist_ok=True)

    def object_of(self, name: str, function: Any) -> Path:
        """The object file of one kernel."""
        path = self.folder / "objects" / f"{name}.o"
        if not path.exists():
            part = path.with_suffix(".part.o")
            write_object({name: on_pointers(function)}, PHASES, self.resolved.tvm, part, None)
            os.replace(part, path)
        return path

    def library(self, graph: Any, program: Program, memory: Any, digits: str) -> bytes:
        """As `qdeploy.compile.codegen.library`."""
        with tempfile.TemporaryDirectory() as where:
            entry, common = Path(where) / "entry.o", Path(where) / "common.o"
            write_object(entry_functions(graph, program, memory), ENTRY_PHASES, self.resolved.tvm, entry, None)
            write_common({"join": join_kernel("join", self.resolved.features)}, self.resolved.tvm, common, None)
            kernels = [self.object_of(name, function) for name, function in program.kernels.items()]
            return link(self.compiler, [entry, *kernels, common], digits, Path(where) / "lib.so")

    def __call__(self, spec: SubnetSpec) -> None:
        """Make the folder of `spec`, unless it is there."""
        out = self.folder / "nets" / spec.id
        if (out / DESCRIPTION).exists():
            return
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as where:
            model = Path(where) / "level.onnx"
            subnet = self.net.subnet(spec)
            reestimate_norms(subnet, spec, self.images)
            export_onnx(to_integers(subnet, spec, "subnet", self.images[:1]), model)
            data, loaded = load_model(model)
            graph = for_any_level(read_graph(parse_model(data), None))
            fused = fuse(graph, self.resolved.dot.lookup != "none")
            program = SharedLowering(fused, self.resolved.dot, 1, False, {}).program()
            memory = plan(program.values, program.lives())
            head = describe(graph, [self.resolved], graph_digest(data), Options())
            variant = {
                "library": "lib.so", "target": target_json(self.resolved), "arena_bytes": arena_bytes(memory),
                "packed_bytes": program.packed_bytes, "packed": None, "kernels": kernel_rows(program),
            }  # fmt: skip
            code = self.library(graph, program, memory, identity(head, variant))
            add_file(out, head, "lib.so", code)
            head["variants"].append(variant)
            write_params(out / "params.npz", arrays(loaded))
            write_atomic(out / DESCRIPTION, canonical_json(head))


def lines(path: Path) -> list[dict[str, Any]]:
    """What is measured; a line that a killed process left unfinished is measured again."""
    found = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in found if line.endswith(b"\n")]


def measure(folder: Path, specs: Iterable[SubnetSpec], seconds: float) -> None:
    """Add to measured.jsonl until `seconds` are over: all subnets once, then in another order again."""
    path, end = folder / "measured.jsonl", time.monotonic() + seconds
    done = {(row["spec_id"], row["pass"]) for row in lines(path)}
    built = [spec for spec in specs if (folder / "nets" / spec.id / DESCRIPTION).exists()]
    loaded: dict[str, tuple[Artifact, dict[str, np.ndarray]]] = {}
    refused = 0
    if (cpu := idlest_cpu()) is not None:
        os.sched_setaffinity(0, {cpu})
    with path.open("ab") as out:
        for number in range(PASSES):
            for i in np.random.default_rng(number).permutation(len(built)):
                spec = built[i]
                if (spec.id, number) in done:
                    continue
                if time.monotonic() > end:
                    print(f"time is over, {refused} refused as too noisy", flush=True)
                    return
                where = folder / "nets" / spec.id
                if spec.id not in loaded:
                    loaded[spec.id] = load_artifact(where), read_params(where / "params.npz")
                try:
                    found = timed(*loaded[spec.id], NOISE)
                except DeviceError as e:
                    refused += 1
                    print(e, flush=True)
                    continue
                rows = loaded[spec.id][0].description["kernels"]
                calls = [(row["name"], row["operator"], name) for row in rows for name in row["functions"]]
                if len(calls) != len(found["kernels"]):
                    raise ModelError(f"{len(found['kernels'])} kernels were timed, {len(calls)} were expected")
                row = {
                    "spec_id": spec.id, "spec": spec.to_json(), "pass": number, "ms": found["latency"]["median"],
                    "drift": found["drift"], "machine": found["machine"], "at": time.time(),
                    "kernels": [[*call, *times] for call, times in zip(calls, found["kernels"], strict=True)],
                }  # fmt: skip
                out.write(json.dumps(row).encode() + b"\n")
                out.flush()
    print(f"all {len(built)} compiled subnets are measured, {refused} refused as too noisy")


def ranks(values: np.ndarray) -> np.ndarray:
    """Rank of each value."""
    return np.argsort(np.argsort(values)).astype(float)


def report(folder: Path, encoding: Encoding, shifted: np.ndarray, taught: set[str]) -> str:
    """The table; raises ModelError where too little is measured."""
    first, second = ({r["spec_id"]: r for r in lines(folder / "measured.jsonl") if r["pass"] == n} for n in (0, 1))
    teaching = [first[name] for name in sorted(taught & first.keys())]
    seen = [name for name in sorted(first.keys() - taught) if name in second]
    if len(teaching) < LEAST or len(seen) < LEAST:
        raise ModelError(f"{len(teaching)} teaching and {len(seen)} other subnets are measured: --build, then --time")
    table = table_of(encoding, shifted, teaching)
    if table is None:
        raise ModelError("no kernels were timed: measure on a processor")
    genomes = encoding.genomes([SubnetSpec.from_json(row["spec"]) for row in teaching])
    model = LinearModel(latency_features(table, genomes), np.array([row["ms"] for row in teaching]))
    unseen = encoding.genomes([SubnetSpec.from_json(first[name]["spec"]) for name in seen])
    features = latency_features(table, unseen)
    predicted, (low, high) = model(features), model.bounds(features)
    pair = np.array([[found[name]["ms"] for found in (first, second)] for name in seen])
    measured = pair.mean(1)
    apart = np.abs(pair[:, 0] - pair[:, 1]) / measured
    error, repeat = np.abs(predicted - measured) / measured, float(np.quantile(apart, 0.9))
    within = error <= max(ALLOWED, 2 * repeat)
    spearman = float(np.corrcoef(ranks(predicted), ranks(measured))[0, 1])
    again = float(np.corrcoef(ranks(pair[:, 0]), ranks(pair[:, 1]))[0, 1])
    held, one = (low <= measured) & (measured <= high), (low <= pair[:, 0]) & (pair[:, 0] <= high)
    late, wide, bias = (
        np.quantile(error, 0.95),
        np.mean((high - low) / 2 / predicted),
        np.mean((predicted - measured) / measured),
    )
    text = [
        f"{len(seen)} unseen subnets of {measured.min():.4f} .. {measured.max():.4f} ms; {len(teaching)} taught",
        f"a second measurement differs by {np.median(apart):.1%} (median), {repeat:.1%} (9 of 10), {apart.max():.1%} "
        f"(most); Spearman of both {again:.4f}",
        f"error: {np.median(error):.1%} (median), {late:.1%} (95 of 100), {error.max():.1%} (most), "
        f"{bias:+.1%} on average",
        f"within {ALLOWED:.0%}: {np.mean(error <= ALLOWED):.1%}; within max({ALLOWED:.0%}, twice {repeat:.1%}): "
        f"{within.mean():.1%}",
        f"Spearman {spearman:.4f}",
        f"bars of {COVERAGE:.0%}: {wide:.1%} to each side; they hold for {held.mean():.1%} of the means, "
        f"{one.mean():.1%} of single measurements",
    ]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", type=Path, default=ROOT / "models" / "fashion-mobilenetv3")
    parser.add_argument("--target", type=Path, default=ROOT / "targets" / "host.toml")
    parser.add_argument("--unseen", type=int, default=200, help="subnets")
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--seconds", type=float, default=200.0)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    recipe, net = load_run(args.run)
    encoding = Encoding(net.space)
    random = np.random.default_rng(0)
    images = calibration_set(recipe, None).images[:CALIBRATION]
    shifted = geometry(net, encoding, images.shape[1:]).shifted
    showing = networks(encoding, shifted)
    teach = encoding.unlike(np.concatenate([showing, encoding.spread(DRAWN, random)]), showing[:0])
    half = args.unseen // 2
    drawn = np.concatenate([encoding.spread(2 * half, random), encoding.sample(args.unseen, random)])
    drawn = drawn[np.argsort(random.random(len(drawn)))]
    unseen = encoding.unlike(drawn, teach)[: args.unseen]
    specs = encoding.specs(np.concatenate([teach, unseen]))
    if args.build:
        factory = Factory(args.folder, net, images, resolve(load_target(args.target)))
        end = time.monotonic() + args.seconds
        for count, spec in enumerate(specs, 1):
            if time.monotonic() > end:
                print(f"time is over: {count - 1} of {len(specs)} subnets are compiled")
                return
            factory(spec)
        print(f"all {len(specs)} subnets are compiled")
    elif args.time:
        measure(args.folder, specs, args.seconds)
    else:
        print(machine_line(machine()))
        print(report(args.folder, encoding, shifted, {spec.id for spec in encoding.specs(teach)}))


if __name__ == "__main__":
    main()
