"""Which engine a model gets."""

from pathlib import Path
from typing import Literal

import torch

from ingot.errors import ServeError
from ingot.evaluation.vllm_engine import has_vllm, require_vllm
from ingot.model.adapted import is_adapter
from ingot.model.folder import describe
from ingot.model.runtime import WRITING, Runtime
from ingot.serving.continuous import ContinuousEngine
from ingot.serving.engine import Engine, Limits, Meter
from ingot.serving.passes import Passes
from ingot.serving.static import StaticEngine

Wanted = Literal["auto", "own", "vllm"]


def by_vllm(wanted: Wanted, folder: Path) -> bool:
    """Whether vLLM runs the model in `folder`: as wanted, by auto where it is installed, there is a GPU and the model
    writes. Raises ServeError for one that it does not run, MissingPackage.
    """
    if wanted == "own":
        return False
    adapter = is_adapter(folder)
    task = "an adapter" if adapter else describe(folder)["task"]
    if wanted == "auto":
        return task in WRITING and has_vllm() and torch.cuda.is_available()
    if task not in WRITING:
        what = "holds an adapter alone; serve its base with --adapter" if adapter else f"is for {task}; use own"
        raise ServeError("--engine", wanted, f"vLLM runs whole models that write, and {folder.name} {what}")
    require_vllm("serve --engine vllm")
    return True


def start_engine(
    runtime: Runtime, limits: Limits | None = None, meter: Meter | None = None, passes: Passes | None = None
) -> Engine:
    """An engine of our own at work: its warm-up has begun. `passes`: of a model that does not write; None: threads."""
    if runtime.task in WRITING:
        return ContinuousEngine(runtime, limits, meter)
    return StaticEngine(runtime, limits, meter, passes)
