"""The schema's own rules."""

import pydantic
import pytest

from ingot.errors import RecipeError
from ingot.recipe import Recipe
from ingot.recipe_io import json_schema, parse_recipe

MINIMAL = {"name": "a", "model": {"source": "ingot://nano"}, "data": {"train": "rows.jsonl"}}


def test_minimal_recipe_has_defaults() -> None:
    recipe = Recipe.model_validate(MINIMAL)
    assert recipe.objective.task == "chat-completion"
    assert recipe.data.train.uri == "rows.jsonl"
    assert recipe.data.train.format == "auto"


def test_recipes_are_frozen() -> None:
    recipe = Recipe.model_validate(MINIMAL)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        recipe.optim.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("train", {"tokens_per_microbatch": 10}, "cannot hold one row"),
        ("data", {"train": "x", "validation_share": 0.5, "test_share": 0.5}, "must be under 1"),
        ("data", {"train": "x", "columns": {"promt": "mr"}}, "names 'promt'"),
        ("evaluate", {"confidence": 1.0}, "less than 1"),
    ],
    ids=["microbatch", "shares", "columns", "confidence"],
)
def test_contradictions_are_refused(section: str, values: dict[str, object], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        Recipe.model_validate(MINIMAL | {section: values})


def test_every_field_is_documented() -> None:
    schema = json_schema()
    bare = [
        f"{name}.{field}"
        for name, section in schema["$defs"].items()
        for field, part in section["properties"].items()
        if not part.get("description")
    ]
    assert bare == []


def test_merged_references_are_for_generated_text() -> None:
    base = {"name": "x", "model": {"source": "m"}, "data": {"train": "t"}, "evaluate": {"merge_references": True}}
    with pytest.raises(RecipeError, match="merge_references is for text-generation"):
        parse_recipe(base | {"objective": {"task": "text-classification"}})
    assert parse_recipe(base | {"objective": {"task": "text-generation"}}).evaluate.merge_references
