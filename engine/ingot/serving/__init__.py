"""The endpoint: OpenAI's and MLflow's routes over one packaged model."""

from ingot.errors import MissingPackage

try:
    import fastapi  # noqa: F401
    import uvicorn  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingPackage(str(error.name), "serving") from error

from ingot.serving.app import create_app
from ingot.serving.server import Endpoint, find_model_folder, serve

__all__ = ["Endpoint", "create_app", "find_model_folder", "serve"]
