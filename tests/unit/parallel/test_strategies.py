"""What is known of a model before anything of it is read."""

import json
from pathlib import Path

import pytest

from ingot.errors import MissingPackage, RecipeError
from ingot.parallel import strategies
from ingot.parallel.strategies import check_model
from ingot.recipe import Quantization, Recipe
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


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ({"quant_method": "gptq", "bits": 4}, "holds its weights as gptq; use the weights in full size"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "as 8 bits of bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "as fp4"),
    ],
)
def test_weights_in_few_bits_that_are_not_read(model_folder: Path, form: dict[str, object], text: str) -> None:
    quantized_to(model_folder, form)
    with pytest.raises(RecipeError, match=text):
        check_model(recipe(model_folder), model_folder)


def test_nf4_is_read_where_its_package_is(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized_to(model_folder, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    with pytest.raises(RecipeError, match=r"quantization\.kind = 'none': .* use nf4"):
        check_model(recipe(model_folder), model_folder)
    over = recipe(model_folder).model_copy(update={"quantization": Quantization(kind="nf4")})
    check_model(over, model_folder)
    monkeypatch.setattr(strategies, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="pip install bitsandbytes"):
        check_model(over, model_folder)


def quantized_to(folder: Path, form: dict[str, object]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": form}))
