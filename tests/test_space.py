from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.errors import RecipeError
from qdeploy.files import canonical_json
from qdeploy.space import Architecture, Block, LayerBits, LayerSpace, SearchSpace, SubnetSpec

WIDTHS = st.integers(2, 8)
NAMES = st.lists(st.text("abc.0", min_size=1, max_size=6), min_size=1, max_size=5, unique=True)


@st.composite
def specs(draw: st.DrawFn) -> SubnetSpec:
    return SubnetSpec("net", tuple(LayerBits(name, draw(WIDTHS), draw(WIDTHS)) for name in draw(NAMES)))


@given(specs())
def test_json_round_trip_keeps_value_and_id(spec: SubnetSpec) -> None:
    again = SubnetSpec.parse(canonical_json(spec.to_json()))
    assert again == spec and hash(again) == hash(spec) and again.id == spec.id


def test_the_id_is_pinned() -> None:
    """Ids are keys in files: a change of this value breaks them."""
    assert SubnetSpec.build("net", {"a": (2, 3), "b": (8, 8)}).id == "263e7824c27f"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"[]", "JSON object"),
        (b"{", "not valid JSON"),
        (b'{"version":1,"network":"n","layers":[],"x":1}', "unknown key 'x'"),
        (b'{"version":2,"network":"n","layers":[]}', "version 2"),
        (b'{"version":1,"network":"n","layers":[]}', "at least one layer"),
        (b'{"version":1,"network":"n","layers":[["a",1,8]]}', "weight_bits of layer a is 1"),
        (b'{"version":1,"network":"n","layers":[["a",true,8]]}', "weight_bits of layer a is True"),
        (b'{"version":1,"network":"n","layers":[["a",2]]}', "is not .name"),
        (b'{"version":1,"network":"n","layers":[["a",2,2],["a",2,2]]}', "twice"),
        (b'{"version":1,"network":"n","layers":[["a",2,2,{"granularity":"row"}]]}', "choose one of tensor, channel"),
        (b'{"version":1,"network":"n","layers":[["a",2,2,{"colour":1}]]}', "options of layer a"),
        (b'{"version":1,"network":"n","layers":[["a",2,2,{"symmetry":null}]]}', "options of layer a"),
        (b'{"version":1,"network":"n","layers":[["a",2,2]],"architecture":{"depth":1}}', "unknown key 'depth'"),
        (b'{"version":1,"network":"n","layers":[["a",2,2]],"architecture":{"width":0}}', "width is 0"),
        (b'{"version":1,"network":"n","layers":[["a",2,2]],"architecture":{"stages":[3]}}', "list of lists"),
        (b'{"version":1,"network":"n","layers":[["a",2,2]],"architecture":{"stages":[[{"k":3}]]}}', "unknown key 'k'"),
        (b'{"version":1,"version":1,"network":"n","layers":[]}', "appears twice"),
    ],
)
def test_wrong_specs_are_refused_with_the_reason(data: bytes, text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        SubnetSpec.parse(data)


def test_nesting() -> None:
    low = SubnetSpec.build("n", {"a": (2, 2), "b": (8, 8)})
    high = SubnetSpec.build("n", {"a": (4, 2), "b": (8, 8)})
    assert low.nests_in(high) and not high.nests_in(low)


# ---- the search space ----------------------------------------------------------------------------------------------


def qfa_space(resolutions: tuple[int, ...] = ()) -> SearchSpace:
    """The paper's space: 5 stages of 2 to 4 blocks, three convolutions a block, each with widths of its own."""
    low = (2, 3, 4)
    layers = [LayerSpace("stem", (8,), (8,))]
    for stage in range(5):
        for block in range(4):
            for name in ("expand", "depthwise", "project"):
                layers.append(LayerSpace(f"s{stage}.b{block}.{name}", low, low, block=(stage, block)))
    layers.append(LayerSpace("head", (8,), (8,)))
    return SearchSpace("qfa", tuple(layers), ((2, 3, 4),) * 5, (3, 5, 7), (3, 4, 6), resolutions)


def test_the_papers_space_counts_to_its_size() -> None:
    block = 3 * 3 * (3 * 3) ** 3
    assert qfa_space().size == (block**2 + block**3 + block**4) ** 5
    assert f"{qfa_space().size:.3e}" == "2.186e+76"
    assert qfa_space((24, 28, 32)).size == 3 * qfa_space().size


OPTIONS = st.sampled_from([(), ("channel",), ("tensor", "channel")])
SETS = st.lists(st.integers(2, 8), min_size=1, max_size=3, unique=True).map(lambda bits: tuple(sorted(bits)))


@st.composite
def spaces(draw: st.DrawFn) -> SearchSpace:
    """Small ones, with and without elastic stages, with layers that share their input."""
    depths = tuple(
        tuple(sorted(d)) for d in draw(st.lists(st.sets(st.integers(0, 3), min_size=1, max_size=2), max_size=2))
    )
    layers = []
    for i, block in enumerate([None, *((s, b) for s, d in enumerate(depths) for b in range(max(d))), None]):
        symmetry = draw(st.sampled_from([(), ("symmetric", "asymmetric")]))
        first = LayerSpace(f"l{i}", draw(SETS), draw(SETS), draw(OPTIONS), symmetry, None, block)
        layers.append(first)
        if draw(st.booleans()):
            layers.append(LayerSpace(f"l{i}x", draw(SETS), first.activation_bits, (), (), first.layer, block))
    kernels = draw(st.sampled_from([(), (3,), (3, 5, 7)]))
    resolutions, widths = draw(st.sampled_from([(), (28, 32)])), draw(st.sampled_from([(), (16, 24)]))
    return SearchSpace("net", tuple(layers), depths, kernels, (3, 4), resolutions, widths)


@given(spaces(), st.integers(0, 1 << 30))
def test_samples_lie_in_the_space_and_genes_are_their_inverse(space: SearchSpace, seed: int) -> None:
    random = Random(seed)
    spec, other = space.sample(random), space.sample(random)
    for child in (spec, space.mutate(spec, random, 0.5), space.crossover(spec, other, random)):
        space.check(child)
        assert space.from_genes(space.genes(child)) == child
        assert SubnetSpec.parse(canonical_json(child.to_json())) == child
        assert all(active or gene == 0 for gene, active in zip(space.genes(child), space.active(child), strict=True))
    again = Random(seed)
    assert (space.sample(again), space.sample(again)) == (spec, other)
    assert space.crossover(spec, spec, random) == spec and space.mutate(spec, random, 0.0) == spec


@given(spaces(), st.integers(0, 1 << 30))
def test_a_child_has_its_parents_genes(space: SearchSpace, seed: int) -> None:
    random = Random(seed)
    parents = [space.sample(random), space.sample(random)]
    child = space.crossover(*parents, random)
    rows = [(space.genes(p), space.active(p)) for p in parents]
    for i, active in enumerate(space.active(child)):
        if active:
            assert space.genes(child)[i] in [genes[i] for genes, on in rows if on[i]]


@given(spaces(), st.integers(0, 1 << 30))
def test_one_hot_has_one_column_for_each_active_gene(space: SearchSpace, seed: int) -> None:
    spec = space.sample(Random(seed))
    row = space.one_hot(spec)
    assert len(row) == len(space.columns) == len(set(space.columns)) and set(row) <= {0, 1}
    assert sum(row) == sum(space.active(spec))
    at = 0
    for gene, active in zip(space.variables, space.active(spec), strict=True):
        assert sum(row[at : at + len(gene.choices)]) == active
        at += len(gene.choices)


@given(spaces())
def test_a_space_keeps_its_value_and_id_through_json(space: SearchSpace) -> None:
    again = SearchSpace.from_json(space.to_json())
    assert again == space and again.id == space.id


@given(spaces(), st.integers(0, 1 << 30))
def test_mutation_changes_each_gene_that_it_may(space: SearchSpace, seed: int) -> None:
    random = Random(seed)
    spec = space.sample(random)
    changed = space.mutate(spec, random, 1.0)
    both = [a and b for a, b in zip(space.active(spec), space.active(changed), strict=True)]
    pairs = zip(space.genes(spec), space.genes(changed), both, strict=True)
    assert all(before != after for before, after, active in pairs if active)


def test_the_size_of_a_small_space_is_the_number_of_its_specs() -> None:
    layers = (
        LayerSpace("a", (2, 3), (4, 8), ("tensor", "channel")),
        LayerSpace("b", (2, 3), (4, 8), shares="a"),
        LayerSpace("c", (2, 3, 4), (8,), block=(0, 0)),
        LayerSpace("d", (2, 3, 4), (8,), block=(0, 1)),
    )
    space = SearchSpace("n", layers, ((0, 2),), (3, 5))
    found = {space.sample(Random(seed)) for seed in range(8000)}
    assert space.size == len(found) == 2 * 2 * 2 * 2 * (1 + (3 * 2) ** 2)


def test_a_spec_with_options_and_architecture_has_a_pinned_id() -> None:
    layers = (LayerBits("a", 2, 3, "channel", "asymmetric"), LayerBits("b", 8, 8))
    plain = SubnetSpec("net", layers)
    assert plain.to_json()["layers"] == [["a", 2, 3, {"granularity": "channel", "symmetry": "asymmetric"}], ["b", 8, 8]]
    elastic = SubnetSpec("net", layers, Architecture(((Block(3, 4), Block(5)), ()), 28))
    assert elastic.to_json()["architecture"] == {
        "stages": [[{"kernel": 3, "expand": 4}, {"kernel": 5}], []],
        "resolution": 28,
    }
    assert (plain.id, elastic.id) == ("6fe250e036a6", "31b39c9f1845")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"network": "x"}, "network 'x'"),
        ({"architecture": None}, "0 elastic stages, the network 1"),
        ({"architecture": Architecture(((Block(3),),))}, r"stage 0 depth is 1: choose from \[2\]"),
        ({"architecture": Architecture(((Block(3), Block(4)),))}, r"block 1 kernel is 4: choose from \[3, 5\]"),
        ({"architecture": Architecture(((Block(3), Block(5, 6)),))}, "block 1 expand is 6: this network has no such"),
        ({"architecture": Architecture(((Block(3), Block(5)),), width=16)}, "width is 16: this network has no such"),
        ({"layers": (LayerBits("b", 2, 2),)}, "layers are not the network's: those are a"),
        ({"layers": (LayerBits("a", 5, 4, "tensor"),)}, r"weight_bits of a is 5: choose from \[2, 3\]"),
        ({"layers": (LayerBits("a", 2, 8, "tensor"),)}, r"activation_bits of a is 8: choose from \[4\]"),
        ({"layers": (LayerBits("a", 2, 4),)}, r"granularity of a is None: choose from \['tensor'\]"),
        ({"layers": (LayerBits("a", 2, 4, "tensor", "symmetric"),)}, "symmetry of a is symmetric: this network has no"),
    ],
)
def test_a_spec_outside_the_space_is_refused_by_field(change: dict[str, object], text: str) -> None:
    space = SearchSpace("n", (LayerSpace("a", (2, 3), (4,), ("tensor",), block=(0, 0)),), ((2,),), (3, 5))
    spec = space.sample(Random(0))
    fields = {"network": spec.network, "layers": spec.layers, "architecture": spec.architecture} | change
    with pytest.raises(RecipeError, match=text):
        space.check(SubnetSpec(**fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ([], "at least one layer"),
        ([LayerSpace("a", (2,), (2,)), LayerSpace("a", (2,), (2,))], "a twice"),
        ([LayerSpace("a", (), (2,))], "no widths"),
        ([LayerSpace("a", (2,), (2,), shares="b")], "shares with b"),
        ([LayerSpace("a", (2,), (2,)), LayerSpace("b", (2,), (3,), shares="a")], "same widths"),
        ([LayerSpace("a", (2,), (2,), block=(0, 0))], "no depth reaches"),
    ],
)
def test_an_inconsistent_space_is_refused(layers: list[LayerSpace], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        SearchSpace("n", tuple(layers))


def test_genes_out_of_range_are_refused() -> None:
    space = SearchSpace("n", (LayerSpace("a", (2, 3), (4,)),))
    with pytest.raises(RecipeError, match="gene a weight_bits is 2: choose from 0 to 1"):
        space.from_genes([2])
    with pytest.raises(RecipeError, match="2 genes: this space has 1"):
        space.from_genes([0, 0])
