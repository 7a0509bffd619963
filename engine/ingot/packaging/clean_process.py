"""Run as `python -I clean_process.py REQUEST RESPONSE`: loads a package as a stranger would, and answers examples.

Imports nothing of Ingot's. Every installed distribution outside the closure of the package's requirements is hidden,
and Ingot itself too: what loads here loads in an environment built from requirements.txt.
"""

import importlib
import importlib.metadata
import json
import re
import sys
from pathlib import Path
from typing import Any

HIDDEN_ALWAYS = {"ingot", "ingot_kernels"}


def canonical(name: str) -> str:
    """A distribution's name in the one spelling that compares equal."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(requirements: list[str]) -> set[str]:
    """Canonical names of the distributions that installing `requirements` brings, by the installed metadata."""
    from packaging.requirements import Requirement

    seen: set[tuple[str, str]] = set()
    waiting = [(requirement, "") for requirement in map(Requirement, requirements)]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            key = (canonical(requirement.name), wanted)
            if key in seen:
                continue
            seen.add(key)
            try:
                needs = importlib.metadata.requires(requirement.name) or []
            except importlib.metadata.PackageNotFoundError:
                continue  # for another platform, or missing: then the import itself fails
            waiting.extend((Requirement(text), wanted) for text in needs)
    return {name for name, _ in seen}


class Hiding:
    """A finder that sees what `inner` sees, but for the top-level modules in `hidden`."""

    def __init__(self, inner: Any, hidden: set[str]) -> None:
        self.inner, self.hidden = inner, hidden

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """None for a hidden module: it looks as if it were not installed."""
        return None if name.partition(".")[0] in self.hidden else self.inner.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:  # find_distributions, invalidate_caches
        return getattr(self.inner, name)


def hide_others(requirements: list[str]) -> set[str]:
    """Hide the modules that no distribution of the closure brings; returns them."""
    allowed = closure(requirements)
    hidden = set(HIDDEN_ALWAYS)
    for module, owners in importlib.metadata.packages_distributions().items():
        if not any(canonical(owner) in allowed for owner in owners):
            hidden.add(module)
    # Python's own modules stay, whatever a distribution claims.
    hidden -= set(sys.stdlib_module_names)
    sys.meta_path[:] = [Hiding(finder, hidden) if hasattr(finder, "find_spec") else finder for finder in sys.meta_path]
    for module in [name for name in sys.modules if name.partition(".")[0] in hidden]:
        del sys.modules[module]
    return hidden


def main(request_file: str, response_file: str) -> None:
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    package = Path(request["package"])
    lines = (package / "requirements.txt").read_text(encoding="utf-8").split("\n")
    hidden = hide_others([line for line in lines if line.strip()])
    import mlflow.pyfunc

    model = mlflow.pyfunc.load_model(str(package))
    # One call, as when the expected answers were made: another batch would differ by float noise.
    rows = model.predict(request["examples"]).to_dict("records")
    response = {"rows": rows, "hidden": sorted(hidden), "answer": None}
    if request["example"] is not None:
        response["answer"] = model.predict([request["example"]]).to_dict("records")[0]
    if request["logits"]:
        # MLflow hands out what a loader module made by no public name.
        packaged = model._model_impl
        runtime_package = type(packaged).__module__.rpartition(".")[0]
        probing = importlib.import_module(f"{runtime_package}.probing")
        response["logits"] = probing.probe(packaged.runtime, request["examples"])
    Path(response_file).write_text(json.dumps(response), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
