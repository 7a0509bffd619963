"""Ingot: one recipe from a foundation model and data to a tested, servable model.

The verbs are loaded when they are first used, so that `import ingot` does not import torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ingot.errors import IngotError as IngotError
from ingot.recipe import Recipe as Recipe
from ingot.recipe_io import load_recipe as load_recipe

if TYPE_CHECKING:
    from ingot.verbs import evaluate as evaluate
    from ingot.verbs import finetune as finetune
    from ingot.verbs import package as package
    from ingot.verbs import run as run
    from ingot.verbs import serve as serve

VERBS = ("evaluate", "finetune", "package", "run", "serve")
__all__ = ["IngotError", "Recipe", "evaluate", "finetune", "load_recipe", "package", "run", "serve"]


class _Namespace(ModuleType):
    """This module, in which the verbs win over the folders `package` and `serve`: importing anything from such a
    folder binds its name here, and `ingot.package(...)` would call a module.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in VERBS or not isinstance(value, ModuleType):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in VERBS:
            return getattr(import_module("ingot.verbs"), name)
        raise AttributeError(f"module 'ingot' has no attribute {name!r}")


sys.modules[__name__].__class__ = _Namespace
