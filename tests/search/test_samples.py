from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qdeploy.errors import ModelError
from qdeploy.search.encoding import Encoding
from qdeploy.search.samples import Samples, read_samples
from tests.search.spaces import small_space

ENCODING = Encoding(small_space(3, (2, 3, 4)))
RUN = "0123456789ab"


def rows(count: int) -> list[dict[str, object]]:
    """As `qdeploy evaluate` has them."""
    random = np.random.default_rng(0)
    specs = ENCODING.specs(ENCODING.spread(count, random))
    scores = (random.integers(0, 5000, count) / 50).tolist()
    about = {"run": RUN, "images": 5000}
    return [
        about | {"spec_id": spec.id, "spec": spec.to_json(), "accuracy": score}
        for spec, score in zip(specs, scores, strict=True)
    ]


def test_samples_come_back_as_they_were_scored(tmp_path: Path) -> None:
    scored = rows(30)
    samples = Samples.of(scored, ENCODING, ["draw --seed 7"])
    path = tmp_path / "samples.json"
    path.write_bytes(samples.to_bytes())
    found = read_samples(path, ENCODING, RUN)
    assert found.accuracy.tolist() == [row["accuracy"] for row in scored]
    assert [spec.to_json() for spec in ENCODING.specs(found.genomes)] == [row["spec"] for row in scored]
    assert (found.images, found.made) == (5000, ("draw --seed 7",)) and found.to_bytes() == path.read_bytes()
    assert len(path.read_bytes().splitlines()) == 32


def test_scores_of_two_runs_are_no_samples() -> None:
    scored = rows(4)
    scored[2] |= {"run": "another"}
    with pytest.raises(ModelError, match="one run on the same images"):
        Samples.of(scored, ENCODING, [])


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (b"samples/1", b"samples/9", "make it again"),
        (RUN.encode(), b"another run", "another run or space"),
        (ENCODING.space.id.encode(), b"another", "another run or space"),
        (b'[\n["', b'[\n["9', "genomes|no samples"),
        (b'"samples"', b'"simples"', "holds no samples"),
        (b"]}", b"", "samples"),
    ],
)
def test_what_is_not_samples_of_this_run_is_refused(tmp_path: Path, old: bytes, new: bytes, text: str) -> None:
    path = tmp_path / "samples.json"
    path.write_bytes(Samples.of(rows(4), ENCODING, []).to_bytes().replace(old, new))
    with pytest.raises(ModelError, match=text):
        read_samples(path, ENCODING, RUN)


def test_a_digit_beyond_a_genes_choices_is_refused(tmp_path: Path) -> None:
    samples = Samples.of(rows(4), ENCODING, [])
    samples.genomes[1, 0] = 9
    path = tmp_path / "samples.json"
    path.write_bytes(samples.to_bytes())
    with pytest.raises(ModelError, match="genomes that the space has not"):
        read_samples(path, ENCODING, RUN)
