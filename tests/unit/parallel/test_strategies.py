"""What is known of a model before anything of it is read."""

from pathlib import Path

import pytest

from ingot.errors import RecipeError
from ingot.parallel.strategies import check_model
from ingot.recipe import Recipe
from ingot.recipe_io import parse_recipe


def recipe(folder: Path, task: str = "language-modeling", **parallel: int) -> Recipe:
    return parse_recipe(
        {
            "name": "shape",
            "model": {"source": str(folder)},
            "data": {"train": "unused"},
            "objective": {"task": task},
            "parallel": parallel,
        }
    )


@pytest.mark.parametrize("shared", [{}, {"context": 2}, {"context": 4}, {"tensor": 2}])
def test_shapes_that_can_be_shared(model_folder: Path, shared: dict[str, int]) -> None:
    (model_folder / "model.safetensors").unlink()  # not read
    check_model(recipe(model_folder, **shared), model_folder)
    if "context" not in shared:
        check_model(recipe(model_folder, "text-classification", **shared), model_folder)


@pytest.mark.parametrize(
    ("shared", "text"),
    [({"context": 3}, r"context = 3.*has 4; use one of 1, 2, 4"), ({"tensor": 4}, "tensor = 4.*1, 2$")],
)
def test_shapes_that_cannot(model_folder: Path, shared: dict[str, int], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        check_model(recipe(model_folder, **shared), model_folder)
