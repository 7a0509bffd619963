"""`ingot.recipe` on an image without pydantic: sections hold their defaults and what is given, and nothing is checked.

For benchmarks only, which write their settings themselves.
"""

import inspect
import sys
from types import ModuleType
from typing import Any


class _Default:
    def __init__(self, default: Any = None, *, default_factory: Any = None, **rules: Any) -> None:
        self.make = default_factory or (lambda: default)


class _Section:
    def __init_subclass__(cls, **options: Any) -> None:
        """Takes what pydantic takes."""

    def __init__(self, **given: Any) -> None:
        for kind in reversed(type(self).__mro__):
            for name in inspect.get_annotations(kind):
                found = vars(kind).get(name)
                value = given.get(name, found.make() if isinstance(found, _Default) else found)
                object.__setattr__(self, name, value)


def _same(*arguments: Any, **options: Any) -> Any:
    """A decorator or a note that changes nothing."""
    return lambda function: function


def install() -> None:
    """Put this in pydantic's place, where that is missing."""
    try:
        import pydantic  # noqa: F401
    except ModuleNotFoundError:
        stand_in = ModuleType("pydantic")
        names = {"BaseModel": _Section, "Field": _Default, "ConfigDict": dict, "ValidationError": ValueError}
        names |= dict.fromkeys(("BeforeValidator", "Discriminator", "Tag", "model_validator"), _same)
        vars(stand_in).update(names)
        sys.modules["pydantic"] = stand_in
