from __future__ import annotations

from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qdeploy.search.encoding import Encoding, keys
from tests.search.spaces import everything, small_space


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_arrays_say_what_the_space_says(blocks: int, seed: int) -> None:
    space = small_space(blocks)
    encoding, random = Encoding(space), np.random.default_rng(seed)
    drawn = random.integers(0, encoding.counts, (20, len(encoding)))
    specs, genomes = encoding.specs(drawn), encoding.canonical(drawn)
    assert (encoding.genomes(specs) == genomes).all()
    assert encoding.specs(genomes) == specs
    hot = encoding.one_hot(genomes)
    weights, activations = encoding.bits(genomes)
    shapes = encoding.shapes(genomes, encoding.layer_block)
    for spec, genome, row, w, a, shape in zip(specs, genomes, hot, weights, activations, shapes, strict=True):
        assert tuple(row) == space.one_hot(spec)
        assert tuple(encoding.active(genome[None])[0]) == space.active(spec)
        entries = {entry.layer: entry for entry in spec.layers}
        assert spec.architecture is not None
        for i, layer in enumerate(space.layers):
            if (entry := entries.get(layer.layer)) is None:
                assert w[i] == a[i] == 0
                continue
            assert (entry.weight_bits, entry.activation_bits) == (w[i], a[i])
            if layer.block is not None:
                block = spec.architecture.stages[layer.block[0]][layer.block[1]]
                wanted = space.kernels.index(block.kernel) * len(space.expands) + space.expands.index(block.expand)
                assert shape[i] == wanted


def test_one_genome_a_spec() -> None:
    space = small_space(2)
    genomes = everything(Encoding(space))
    assert len(genomes) == space.size == len({spec.id for spec in Encoding(space).specs(genomes)})


def test_draws_stay_inside_and_reach_the_ends() -> None:
    encoding = Encoding(small_space(3, (2, 3, 4)))
    random = np.random.default_rng(0)
    for draw in (encoding.sample, encoding.spread):
        genomes = draw(400, random)
        assert (genomes >= 0).all() and (genomes < encoding.counts).all()
        assert (encoding.canonical(genomes) == genomes).all()
        for column, count in enumerate(encoding.counts):
            assert set(genomes[:, column]) == set(range(count))
    high = (encoding.spread(400, random) / (encoding.counts - 1)).mean(1)
    even = (encoding.sample(400, random) / (encoding.counts - 1)).mean(1)
    assert high.std() > 1.5 * even.std()


def test_covering_shows_every_shape_of_every_layer() -> None:
    encoding = Encoding(small_space(3))
    genomes = encoding.covering()
    assert encoding.present(genomes).all()
    shapes = encoding.shapes(genomes, encoding.layer_block)
    inside = encoding.layer_block >= 0
    assert (shapes[:, inside] == np.arange(encoding.shape_count)[:, None]).all()


def test_unlike_keeps_the_first_of_each() -> None:
    encoding = Encoding(small_space(2))
    random = np.random.default_rng(3)
    genomes, known = encoding.sample(200, random), encoding.sample(20, random)
    fresh = encoding.unlike(genomes, known)
    assert len(set(keys(fresh))) == len(fresh)
    assert set(keys(fresh)) == set(keys(genomes)) - set(keys(known))


def test_a_sampled_spec_is_known() -> None:
    space = small_space(3)
    encoding = Encoding(space)
    specs = [space.sample(Random(i)) for i in range(30)]
    assert encoding.specs(encoding.genomes(specs)) == specs
