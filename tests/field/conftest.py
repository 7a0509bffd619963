"""Failures that users of fine-tuning systems met, each with a test that it cannot happen here.

Numbers are those of public issue threads. What is trained here is trained by tests/distributed/cells.py.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def cells() -> ModuleType:
    """Small models, uneven rows, and runs of them on one rank or several."""
    path = Path(__file__).parents[1] / "distributed" / "cells.py"
    spec = importlib.util.spec_from_file_location("cells", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cells"] = module
    spec.loader.exec_module(module)
    return module
