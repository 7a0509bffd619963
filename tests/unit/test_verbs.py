"""The SDK: the verbs as functions of the package, loaded when they are first used."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import ingot
from ingot.errors import RecipeError

ROOT = Path(__file__).resolve().parents[2]
VERBS = ("run", "finetune", "evaluate", "package", "serve")


def test_verbs_are_functions_after_every_folder_was_imported():
    folders = [path.parent.name for path in (ROOT / "engine" / "ingot").glob("*/__init__.py")]
    code = "\n".join(
        [
            f"import sys; sys.path[:0] = [{str(ROOT / 'engine')!r}, {str(ROOT / 'kernels')!r}]",
            "import ingot, types",
            "assert 'torch' not in sys.modules",
            *(f"import ingot.{name}" for name in folders),
            f"for verb in {VERBS!r}:",
            "    for _ in range(2):  # the first use imports the folders, the second finds what that left behind",
            "        assert isinstance(getattr(ingot, verb), types.FunctionType), verb",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_are_documented_and_typed(verb):
    function = getattr(ingot, verb)
    assert inspect.getdoc(function)
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(known.annotation is not inspect.Parameter.empty for known in signature.parameters.values())


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="finetuna"):
        ingot.finetuna  # noqa: B018


def test_a_path_is_as_good_as_a_recipe(tmp_path):
    """Relative paths start at the recipe's folder; for a Recipe, at `home`."""
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\nmodel: {source: model}\ndata: {train: rows.jsonl}\n")
    for recipe, home in ((path, None), (str(path), None), (ingot.load_recipe(path), tmp_path)):
        with pytest.raises(ingot.IngotError, match=str(tmp_path / "model")):
            ingot.finetune(recipe, home=home)
    with pytest.raises(RecipeError, match=r"gone\.yaml"):
        ingot.run("gone.yaml")
