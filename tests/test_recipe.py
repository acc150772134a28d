from pathlib import Path

import pytest

from qdeploy.errors import RecipeError
from qdeploy.recipe import from_dict, load_recipe

GOOD = {"name": "x", "network": {"name": "tiny"}, "data": {"name": "fashion-mnist"}}
MODELS = Path(__file__).parents[1] / "models"


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_recipes_parse_and_round_trip(path: Path) -> None:
    recipe = load_recipe(path)
    assert from_dict(recipe.to_json()) == recipe
    assert recipe.name == path.stem


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"colour": 1}, "unknown key colour"),
        ({"quantization": {"width": [2]}}, "unknown key quantization.width"),
        ({"quantization": {"widths": [2, 9]}}, "must lie in 2..8"),
        ({"quantization": {"widths": [4, 2]}}, "must be rising"),
        ({"quantization": {"widths": []}}, "must be rising"),
        ({"quantization": {"widths": [2.0]}}, "int is needed"),
        ({"quantization": {"compensation": 1}}, "bool is needed"),
        ({"quantization": {"activation_bits": 4}}, "choose one of 'same', 8"),
        ({"float_phase": {"epochs": 0, "learning_rate": 0.1, "weight_decay": 0}}, "epochs >= 1"),
        ({"float_phase": {"epochs": 1}}, "lacks float_phase.learning_rate"),
        ({"network": "tiny"}, "network must be a table"),
        ({"seed": True}, "int is needed"),
        ({"network": {}}, "lacks network.name"),
    ],
)
def test_a_wrong_recipe_names_the_key(change: dict[str, object], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        from_dict(GOOD | change)


def test_a_file_that_is_not_toml(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("= 3")
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(path)
    with pytest.raises(RecipeError, match="cannot read"):
        load_recipe(tmp_path / "absent.toml")
