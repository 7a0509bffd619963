"""The endpoint: OpenAI's, MLflow's and other routes over served models. Nothing heavy is imported before it is used:
the supervisor lives here too.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ingot.errors import MissingPackage

if TYPE_CHECKING:
    from ingot.serving.app import create_app as create_app
    from ingot.serving.fleet import find_model_folder as find_model_folder
    from ingot.serving.server import Endpoint as Endpoint
    from ingot.serving.server import serve as serve

for _package in ("fastapi", "uvicorn"):
    if find_spec(_package) is None:
        raise MissingPackage(_package, "serving")

PLACES = {"Endpoint": "server", "create_app": "app", "find_model_folder": "fleet", "serve": "server"}
__all__ = ["Endpoint", "create_app", "find_model_folder", "serve"]


def __getattr__(name: str) -> Any:
    if name in PLACES:
        return getattr(import_module(f"{__name__}.{PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
