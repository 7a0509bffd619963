"""Ingot: one recipe from a foundation model and data to a tested, servable model.

The verbs are loaded when they are first used, so that `import ingot` does not import torch. No folder of this package
is named like a verb: importing a submodule binds its name here, and `ingot.evaluate(...)` would call a module.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ingot.errors import IngotError as IngotError
from ingot.recipe import Recipe as Recipe
from ingot.recipe_io import load_recipe as load_recipe

if TYPE_CHECKING:
    from ingot.batches import batch as batch
    from ingot.comparing import compare as compare
    from ingot.verbs import evaluate as evaluate
    from ingot.verbs import finetune as finetune
    from ingot.verbs import package as package
    from ingot.verbs import run as run
    from ingot.verbs import serve as serve

VERBS = {
    "batch": "ingot.batches",
    "compare": "ingot.comparing",
    **dict.fromkeys(("evaluate", "finetune", "package", "run", "serve"), "ingot.verbs"),
}
__all__ = ["IngotError", "Recipe", "batch", "compare", "evaluate", "finetune", "load_recipe", "package", "run", "serve"]


def __getattr__(name: str) -> Any:
    if name in VERBS:
        return getattr(import_module(VERBS[name]), name)
    raise AttributeError(f"module 'ingot' has no attribute {name!r}")
