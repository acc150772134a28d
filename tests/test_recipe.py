from pathlib import Path

import pytest

from qdeploy.errors import RecipeError
from qdeploy.recipe import (
    BatchQuantization,
    EQNetQuantization,
    Quantization,
    from_dict,
    load_recipe,
    same_recipe,
    with_only,
)
from qdeploy.space import Architecture, Block, LayerBits, SubnetSpec

GOOD = {"name": "x", "network": {"name": "tiny"}, "data": {"name": "fashion-mnist"}}
ONLY = SubnetSpec("tiny", (LayerBits("a", 2, 3), LayerBits("b", 8, 8)), Architecture(((Block(3, 2),),), 20))
MOBILE = {"name": "mobilenetv3-tiny", "width": 8}
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
        ({"quantization": {"method": "lsq"}}, "quantization.method is 'lsq': choose one of 'vertical', 'eqnet'"),
        ({"quantization": {"method": ["eqnet"]}}, "quantization.method is"),
        ({"quantization": {"method": "eqnet", "widths": [2]}}, "unknown key quantization.widths"),
        ({"quantization": {"method": "eqnet", "weight_bits": [4, 2]}}, "weight_bits .4, 2. must be rising"),
        ({"quantization": {"method": "eqnet", "activation_bits": [1]}}, "must be rising and lie in 2..8"),
        ({"quantization": {"method": "eqnet", "granularity": []}}, "granularity .. must name at least one"),
        ({"quantization": {"method": "eqnet", "symmetry": ["both"]}}, "choose one of 'symmetric', 'asymmetric'"),
        ({"quantization": {"method": "eqnet", "guidance": 1.5}}, "guidance lies in 0..1"),
        ({"quantization": {"method": "eqnet", "kurtosis_weight": -1}}, "not negative"),
        ({"data": {"name": "fashion-mnist", "held_out": 0}}, "data.held_out is 0"),
        ({"data": {"name": "fashion-mnist", "train_images": 0}}, "data.train_images is 0"),
        ({"float_phase": {"epochs": 0, "learning_rate": 0.1, "weight_decay": 0}}, "epochs >= 1"),
        ({"float_phase": {"epochs": 1}}, "lacks float_phase.learning_rate"),
        ({"network": "tiny"}, "network must be a table"),
        ({"seed": True}, "int is needed"),
        ({"quantization": {"method": "batchquant", "affine": 1}}, "quantization.affine is 1: bool is needed"),
        ({"quantization": {"method": "batchquant", "estimator": "mean"}}, "'running', 'learned'"),
        (
            {"quantization": {"method": "batchquant", "estimator": "learned", "affine": False}},
            'affine is false: estimator "learned" has no gamma and beta',
        ),
        ({"quantization": {"only": ONLY.to_json()}}, "unknown key quantization.only"),
        ({"quantization": {"method": "eqnet", "only": 3}}, "quantization.only: a subnet spec is a JSON object"),
        (
            {"quantization": {"method": "batchquant", "only": ONLY.to_json() | {"layers": [["a", 1, 2]]}}},
            "quantization.only: weight_bits of layer a is 1",
        ),
        ({"network": MOBILE, "quantization": {"method": "eqnet", "only": ONLY.to_json()}}, "only is a subnet of tiny"),
        ({"network": MOBILE | {"resolutions": [20, 16]}}, r"network.resolutions .20, 16. must be rising"),
        ({"network": MOBILE | {"resolutions": [0, 16]}}, "must be rising whole numbers from 1 up"),
        ({"network": MOBILE | {"resolutions": [20.5]}}, "int is needed"),
        ({"network": MOBILE | {"widths": [4, 6]}}, "must end with network.width, which is 8"),
        ({"network": MOBILE | {"widths": [4, 8]}}, "network.widths vary in elastic networks: choose method batchquant"),
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


def test_each_method_has_its_own_table() -> None:
    elastic = from_dict(GOOD | {"quantization": {"method": "eqnet", "weight_bits": [3, 8]}})
    assert isinstance(elastic.quantization, EQNetQuantization) and elastic.quantization.widths == (3, 8)
    assert from_dict(elastic.to_json()) == elastic
    assert isinstance(from_dict(GOOD).quantization, Quantization)
    assert "held_out" not in from_dict(GOOD).to_json()["data"]  # unset fields leave older runs' recipes as they are


def test_one_subnet_is_a_table_of_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(
        '[network]\nname = "tiny"\n[data]\nname = "fashion-mnist"\n[quantization]\nmethod = "eqnet"\n'
        '[quantization.only]\nversion = 1\nnetwork = "tiny"\nlayers = [["a", 2, 3], ["b", 8, 8]]\n'
        "architecture = {stages = [[{kernel = 3, expand = 2}]], resolution = 20}\n"
    )
    recipe = load_recipe(path)
    assert isinstance(recipe.quantization, EQNetQuantization) and recipe.quantization.only == ONLY
    assert from_dict(recipe.to_json()) == recipe
    plain = from_dict(GOOD | {"name": "r", "quantization": {"method": "eqnet"}})
    assert "only" not in plain.to_json()["quantization"]
    assert with_only(plain, ONLY) == recipe != plain
    with pytest.raises(RecipeError, match="method eqnet or batchquant"):
        with_only(from_dict(GOOD), ONLY)


def test_a_key_with_its_default_is_an_absent_key() -> None:
    recipe = from_dict(GOOD | {"quantization": {"method": "batchquant"}})
    assert isinstance(recipe.quantization, BatchQuantization) and recipe.quantization.affine
    older = recipe.to_json()
    del older["quantization"]["affine"]
    assert same_recipe(older, recipe) and same_recipe(recipe.to_json(), recipe)
    assert not same_recipe(older, from_dict(GOOD | {"quantization": {"method": "batchquant", "affine": False}}))
    assert not same_recipe(older | {"colour": 1}, recipe) and not same_recipe(None, recipe)
