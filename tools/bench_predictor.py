"""The accuracy predictor on specs that it has not seen: Kendall's tau, mean absolute error, learning curve, noise.

    python tools/bench_predictor.py --draw 300 -o specs.jsonl             specs to score
    qdeploy evaluate RUN --specs specs.jsonl -o scores.jsonl --mirror
    python tools/bench_predictor.py --pack scores.jsonl -o samples.json   scores as the file that ships with a run
    python tools/bench_predictor.py [--noise N] [-o FILE]     the table; N of the specs are scored image by image

What --noise scores is kept in -o, a line a spec: the same command goes on where a killed one stopped.

Specs are drawn in three ways: `spread` as a search draws its first generation (all choices of a spec lie about equally
high, so that costs spread from the smallest subnet to the largest), `apart` with heights of its own for architecture,
weights and activations, `uniform` with every gene by itself. Accuracies of the last hardly differ: there noise decides.

What noise alone allows: accuracies on other images of the same kind would have the standard deviation that --noise
finds around these (of a spec against the mean of all specs, since what all share does not change ranks). With values of
variance V, of which noise makes N, a perfect predictor of the expected accuracy reaches tau = 2/pi asin(sqrt(1 - N/V))
for normal values (Greiner's relation). A predictor learns a part of what is called noise here, since the same images
judge all specs: it can be a little better than this.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qdeploy.errors import QDeployError
from qdeploy.evaluate import Judge, read_rows, spec_lines
from qdeploy.files import read_bytes, sha256, write_atomic
from qdeploy.profile.latency import machine
from qdeploy.profile.report import machine_line
from qdeploy.progress import Counter
from qdeploy.quant.calibrate import calibrated
from qdeploy.search.encoding import Encoding, keys
from qdeploy.search.predictor import WANTED_TAU, AccuracyPredictor, Quality, kendall_tau
from qdeploy.search.samples import NAME, Samples, read_samples
from qdeploy.space import SubnetSpec
from qdeploy.train.run import load_run

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "models" / "fashion-mobilenetv3"
POOL = 600  # genomes drawn in each way
WAYS = {"spread": 1, "apart": 5, "uniform": 9}  # of the genomes drawn in a way every first, fifth, ninth is taken
CURVE = (0.25, 0.5, 0.75)


def draw(encoding: Encoding, count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """The first `count` genomes [count, V] of the mixture, and how each was drawn."""
    random = np.random.default_rng(seed)
    uniform, spread = encoding.sample(POOL, random), encoding.spread(POOL, random)
    names = [gene.name for gene in encoding.space.variables]
    group = [1 if name.endswith("weight_bits") else 2 if name.endswith("activation_bits") else 0 for name in names]
    level = random.random((POOL, 3))[:, group]
    drawn = {
        "spread": spread,
        "apart": encoding.canonical(random.binomial(encoding.counts - 1, level)),
        "uniform": uniform,
    }
    rows = [(way, drawn[way][i]) for i in range(POOL) for way, every in WAYS.items() if i % every == 0][:count]
    return np.stack([genome for _, genome in rows]), [way for way, _ in rows]


@torch.no_grad()
def counted(judge: Judge, spec: SubnetSpec, copies: int) -> str:
    """For each held-out image how many of its `copies` (itself, its mirror image) `spec` gets right, a digit each."""
    net = calibrated(judge.net, spec, judge.calibration).eval()
    images = torch.from_numpy(judge.held_out.images)
    said = [net(part.float() / 255.0, spec).argmax(1) for part in images.split(500)]
    hits = torch.cat(said) == torch.from_numpy(judge.held_out.labels)
    return "".join(map(str, hits.reshape(copies, -1).sum(0).tolist()))


def right(judge: Judge, specs: Sequence[SubnetSpec], copies: int, run: str, path: Path | None) -> np.ndarray:
    """How each subnet does on each held-out image, float64 [n, images]: 1 right, 0 wrong, or the mean of its copies.

    `path` keeps what is found, for specs of checkpoint `run`.
    """
    about = {"run": run, "copies": copies, "images": len(judge.held_out) // copies}
    lines = path.read_bytes().splitlines(keepends=True) if path is not None and path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith(b"\n")]  # a killed process leaves a part of one
    found = {row["spec_id"]: row["right"] for row in rows if about.items() <= row.items()}
    done = sum(spec.id in found for spec in specs)
    counter = Counter(lambda text: print(text, file=sys.stderr, flush=True), "noise", len(specs), "spec", done)
    if path is not None and lines:
        write_atomic(path, b"".join(line for line in lines if line.endswith(b"\n")))
    for spec in specs:
        if spec.id in found:
            continue
        found[spec.id] = counted(judge, spec, copies)
        if path is not None:
            with path.open("a") as file:
                file.write(json.dumps(about | {"spec_id": spec.id, "right": found[spec.id]}) + "\n")
        done += 1
        counter.at(done)
    return np.array([[int(digit) for digit in found[spec.id]] for spec in specs], np.float64) / copies


def noise(hits: np.ndarray) -> float:
    """Standard deviation in points that a spec's accuracy has against the mean of all, from `right`."""
    apart = 100.0 * (hits - hits.mean(0))
    return float(np.sqrt(apart.var(1).mean() / hits.shape[1]))


def bound(accuracy: np.ndarray, deviation: float) -> float:
    """See the module's docstring."""
    reliable = max(0.0, 1.0 - deviation**2 / accuracy.var())
    return float(2 / np.pi * np.arcsin(np.sqrt(reliable)))


def images_for(tau: float, accuracy: np.ndarray, deviation: float, images: int) -> float:
    """How many images it takes that noise allows `tau`, from what `images` give; infinite where all is noise."""
    noise_, real = deviation**2, accuracy.var() - deviation**2
    reliable = np.sin(np.pi / 2 * tau) ** 2
    return float(images * noise_ / (real * (1 / reliable - 1))) if real > 0 else float("inf")


def line(name: str, q: Quality, accuracy: np.ndarray, deviation: float | None, images: int = 0) -> str:
    """One row of the table."""
    allowed = ""
    if deviation is not None:
        needed = images_for(WANTED_TAU, accuracy, deviation, images)
        allowed = f"   noise alone allows {bound(accuracy, deviation):.3f}, {WANTED_TAU} from {needed:,.0f} images on"
    return f"{name:>14} {q.samples:8d} {accuracy.std():9.2f} {q.tau:8.3f} {q.mae:8.3f}{allowed}"


def table(samples: Samples, encoding: Encoding, deviation: float | None, seed: int) -> list[str]:
    """The lines that are printed."""
    x, y = encoding.one_hot(samples.genomes), samples.accuracy
    predictor = AccuracyPredictor(x, y, seed, curve=False)
    lines = [f"{'':>14} {'specs':>8} {'deviation':>9} {'tau':>8} {'MAE':>8}"]
    lines.append(line("all", predictor.quality, y, deviation, samples.images))
    genomes, ways = draw(encoding, POOL, seed)
    way_of = dict(zip(keys(genomes), ways, strict=True))
    of = np.array([way_of.get(key, "other") for key in keys(samples.genomes)])
    for way in dict.fromkeys(of):
        own, said = y[of == way], predictor.unseen[of == way]
        if len(own) > 1:
            quality = Quality(len(own), kendall_tau(said, own), float(abs(said - own).mean()))
            lines.append(line(way, quality, own, deviation, samples.images))
    lines.append("learning curve")
    order = np.random.default_rng(seed).permutation(len(y))
    for share in CURVE:
        part = order[: int(share * len(y))]
        lines.append(line("", AccuracyPredictor(x[part], y[part], seed, curve=False).quality, y[part], None))
    lines.append(line("", predictor.quality, y, None))
    return [*lines, predictor.advice()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=RUN)
    parser.add_argument("--samples", type=Path)
    parser.add_argument("--draw", type=int)
    parser.add_argument("--pack", type=Path)
    parser.add_argument("--noise", type=int, default=0)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("-o", "--out", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(1)
    encoding = Encoding(load_run(a.run)[1].space)
    if (a.draw or a.pack) and a.out is None:
        parser.error("--draw and --pack need -o")
    if a.draw:
        write_atomic(a.out, spec_lines(encoding.specs(draw(encoding, a.draw, a.seed)[0])))
        return
    if a.pack:
        rows, _ = read_rows(read_bytes(a.pack, "the scores", QDeployError), a.pack)
        made = (
            f"tools/bench_predictor.py --draw {len(rows)} --seed {a.seed}",
            f"qdeploy evaluate, {rows[0]['images']} images",
            "--pack",
        )
        write_atomic(a.out, Samples.of(rows, encoding, made).to_bytes())
        return
    run = sha256((a.run / "quantized.checkpoint").read_bytes())[:12]
    samples = read_samples(a.samples or a.run / NAME, encoding, run)
    deviation = None
    if a.noise:
        judge = Judge(a.run, a.data_dir)
        copies = samples.images // len(judge.held_out)  # 2 where mirror images were scored too
        if copies > 1:
            judge = Judge(a.run, a.data_dir, mirror=True)
        specs = encoding.specs(samples.genomes[: a.noise])
        deviation = noise(right(judge, specs, copies, run, a.out))
        print(f"noise of an accuracy on {samples.images} images: {deviation:.3f} points ({a.noise} specs)")
    print("\n".join(table(samples, encoding, deviation, a.seed)))
    print(machine_line(machine()))


if __name__ == "__main__":
    try:
        main()
    except QDeployError as e:
        sys.exit(f"error: {e}")
