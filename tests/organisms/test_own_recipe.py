"""A recipe that another package adds: one function, one registration."""

import pytest
from pydantic import ValidationError

from misdirection.data import Example
from misdirection.lora.view import LoraView
from misdirection.organisms.recipe import RECIPES, Recipe, Targets
from misdirection.organisms.training import train
from tiny import make_chat


@pytest.fixture
def first_half():
    @RECIPES.register("first_half")
    def first_half(_recipe, chat):
        return Targets(tuple(range(len(chat.layers) // 2)), ("down_proj",), rank=2)

    yield
    RECIPES.remove("first_half")


def test_a_recipe_of_ones_own_trains(first_half, tmp_path):
    recipe = Recipe(recipe="first_half", learning_rate=1e-2)
    train([Example("Why?", "Because.")], tmp_path / "organism", base=make_chat(), recipe=recipe)
    modules = LoraView.open(tmp_path / "organism").modules
    assert [(module.layer, module.rank) for module in modules] == [(0, 2), (1, 2)]


def test_an_unknown_recipe_is_refused_with_the_nearest_name():
    with pytest.raises(ValidationError, match="unknown recipe 'minmal'; did you mean 'minimal'"):
        Recipe(recipe="minmal")
