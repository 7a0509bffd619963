"""What a server serves: models by name, adapters over one of them, versions behind a name. Loads it all."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from ingot.errors import ServeError
from ingot.model.adapted import is_packaged_adapter
from ingot.model.runtime import WRITING, Runtime
from ingot.model.side_by_side import side_by_side
from ingot.model.unweighted import without_weights
from ingot.serving.continuous import free_tokens
from ingot.serving.deployments import Deployed, Deployments
from ingot.serving.endpoint_file import NAME, EndpointSection
from ingot.serving.engine import Engine, Limits, Meter
from ingot.serving.engines import Wanted, by_vllm, start_engine
from ingot.serving.passes import Passes, Processes, beside, obstacle
from ingot.serving.replay import Stored
from ingot.serving.versions import Versioned
from ingot.serving.vllm_engine import VllmEngine
from ingot.serving.vllm_model import MEMORY, Vllm
from ingot.serving.weights import Weights

log = logging.getLogger("ingot.serve")

Where = Literal["auto", "threads", "processes"]
Found = TypeVar("Found")
LEAST_TOKENS = 1024  # of keys and values for each of several models


@dataclass(frozen=True)
class Target:
    """A model's folder, and what it is to be called. `stored`: rows that it must answer as stored."""

    folder: Path
    name: str | None = None
    stored: Sequence[Stored] = ()


@dataclass(frozen=True)
class Fleet:
    """`models`: the first answers requests that name none. `adapters`: name -> peft folder, over the only model.
    `versions`: version -> target, of `endpoint`; `weights`: where its decisions are kept.
    """

    models: tuple[Target, ...] = ()
    adapters: Mapping[str, Path] = field(default_factory=dict)
    endpoint: EndpointSection | None = None
    versions: Mapping[str, Target] = field(default_factory=dict)
    weights: Path | None = None


def find_model_folder(target: Path) -> Path:
    """A package, a run folder (its package, else its merged model) or a Hugging Face folder -> the latter."""
    candidates = [target, target / "model", target / "package" / "model", *sorted(target.glob("package/*/model"))]
    # A run folder has both: the package is what was verified.
    for folder in [*candidates[2:], *candidates[:2]]:
        if (folder / "config.json").is_file() or is_packaged_adapter(folder):
            return folder
    what = "no such folder" if not target.exists() else "holds no packaged model, no model/ and no config.json"
    raise ServeError("MODEL", str(target), f"{what}; give a package, a run folder or a Hugging Face folder")


def name_of(target: Path) -> str:
    """The model's public name: as its package says, else the folder's."""
    found = find_model_folder(target)
    place = found.parent if found.name == "model" else found
    for package in (place, place.parent):
        if (package / "MLmodel").is_file():
            import yaml

            metadata = yaml.safe_load((package / "MLmodel").read_text(encoding="utf-8")).get("metadata") or {}
            return str(metadata.get("name") or package.name)
    return place.resolve().name


def named_models(fleet: Fleet) -> dict[str, Target]:
    """Public name -> model, adapters and the endpoint left out. Raises ServeError for a name that is given twice."""
    taken = [*fleet.adapters, *([fleet.endpoint.name] if fleet.endpoint is not None else [])]
    found: dict[str, Target] = {}
    for target in fleet.models:
        name = target.name or name_of(target.folder)
        if name in found or name in taken:
            raise ServeError("MODEL", str(target.folder), f"something else here is called {name!r}; write NAME=MODEL")
        find_model_folder(target.folder)
        found[name] = target
    if len(set(taken)) < len(taken):
        raise ServeError("--adapter", taken[-1], "something else here is called that; give it another name")
    if fleet.adapters and len(found) != 1:
        fix = f"adapters go over one model, and {len(found)} are given; start a server for each base"
        raise ServeError("--adapter", next(iter(fleet.adapters)), fix)
    for name in fleet.adapters:
        if not re.fullmatch(NAME, name):
            raise ServeError("--adapter", name, "a name is of letters, digits, '.', '_' and '-'")
    return found


def load(target: Path, read: Callable[[Path], Found]) -> Found:
    """The model of a target. Raises ServeError."""
    folder = find_model_folder(target)
    try:
        return read(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ServeError("MODEL", str(target), f"the model in {folder} does not load: {error}") from error


@dataclass(frozen=True)
class Loaded:
    """A model, or what reads requests for it where `vllm` runs it; of that, `adapter` by name."""

    runtime: Runtime
    vllm: Vllm | None = None
    adapter: str | None = None
    passes: Passes | None = None

    def start(self, limits: Limits, own: Limits, meter: Meter) -> Engine:
        """Its engine. `own`: the limits of our own."""
        if self.vllm is None:
            return start_engine(self.runtime, own, meter, self.passes)
        return VllmEngine(self.runtime, self.vllm, limits, meter, self.adapter)


def _open(
    target: Path, engine: Wanted, limits: Limits, adapters: Mapping[str, Path], share: float, where: Where
) -> Loaded:
    folder = find_model_folder(target)
    if not by_vllm(engine, folder):
        runtime = load(target, Runtime.load)
        return Loaded(runtime, passes=None if adapters else _processes(runtime, target, where))
    runtime = load(target, without_weights)
    log.info("vLLM runs a model", extra={"fields": {"model": folder.name, "gpu_memory": share, "engine": engine}})
    return Loaded(runtime, Vllm(folder, runtime, limits, adapters, share))


def _processes(runtime: Runtime, target: Path, where: Where) -> Passes | None:
    """Processes for the passes of a model, which this one then holds no more; None: threads. Raises ServeError."""
    why = obstacle(runtime) if where != "threads" else "unwanted"
    if why is not None:
        if where == "processes" and runtime.task not in WRITING:
            raise ServeError("--passes", where, f"{target.name}: {why}; use threads")
        return None
    count = beside(runtime)
    passes = load(target, lambda folder: Processes(folder, count))
    runtime.model.to("meta")
    return passes


def deploy(
    fleet: Fleet,
    limits: Limits,
    meter: Callable[[str], Meter],
    engine: Wanted = "own",
    where: Where = "threads",
) -> tuple[Deployments, dict[Deployed, Sequence[Stored]]]:
    """Load everything and start its engines: (what is served, rows to prove it by). `meter`: of a model's name.
    `where`: passes of models that do not write; auto: in processes, where they can be.

    Raises ServeError, and ModelError for an adapter that cannot stand beside others, or a model that vLLM cannot run.
    """
    models = named_models(fleet)
    share = round(MEMORY / (len(models) + len(fleet.versions)), 3)

    def opened(targets: Mapping[str, Target]) -> dict[str, Loaded]:
        return {name: _open(it.folder, engine, limits, fleet.adapters, share, where) for name, it in targets.items()}

    loaded, versions = opened(models), opened(fleet.versions)
    adapted: dict[str, Loaded] = {}
    if fleet.adapters:
        [(base, it)] = loaded.items()
        runtime, views = side_by_side(it.runtime, dict(fleet.adapters), weights=it.vllm is None)
        loaded[base] = replace(it, runtime=runtime)
        adapted = {name: Loaded(view, it.vllm, name) for name, view in views.items()}
    own = _shared(limits, [*loaded.values(), *adapted.values(), *versions.values()])

    def deployed(name: str, it: Loaded, told: str, parent: str | None = None) -> Deployed:
        return Deployed(name, it.start(limits, own, meter(told)), parent)

    served: list[Any] = []
    stored: dict[Deployed, Sequence[Stored]] = {}
    if fleet.endpoint is not None:
        name = fleet.endpoint.name
        of = {version: deployed(name, it, f"{name}@{version}") for version, it in versions.items()}
        served.append(Versioned(fleet.endpoint, of, None if fleet.weights is None else Weights(fleet.weights)))
        stored |= {of[version]: target.stored for version, target in fleet.versions.items()}
    for name, it in loaded.items():
        served.append(deployed(name, it, name))
        stored[served[-1]] = models[name].stored
    served += [deployed(name, it, name, next(iter(loaded))) for name, it in adapted.items()]
    return Deployments(*served), stored


def _shared(limits: Limits, loaded: Sequence[Loaded]) -> Limits:
    """Each of our own engines takes a quarter of the free memory for keys and values: of several, each takes its share
    of that.
    """
    writing = [it.runtime for it in loaded if it.vllm is None and it.runtime.task in WRITING]
    if limits.cache_tokens is not None or len(writing) < 2:
        return limits
    least = min(free_tokens(runtime.model) for runtime in writing)
    return replace(limits, cache_tokens=max(LEAST_TOKENS, least // len(writing)))
