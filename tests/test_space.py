import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.errors import RecipeError
from qdeploy.files import canonical_json
from qdeploy.space import LayerBits, SubnetSpec

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
