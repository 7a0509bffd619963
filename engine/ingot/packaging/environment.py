"""What a package must be given to run: conda.yaml, python_env.yaml and requirements.txt, locked to what trained it."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

REQUIREMENTS = ("mlflow", "torch", "transformers", "safetensors", "pandas", "numpy", "pydantic")
# Azure ML builds its image from conda.yaml alone, and its server answers 502 at boot where these are not in it. They
# stay out of requirements.txt, which every other host installs. That server wants one minor version of pydantic
# (1.5.1: 2.12), which a pin of another would make unsolvable; the runtime takes any of 2.
AZURE_HOSTING = ("azureml-inference-server-http>=1.4.1", "azureml-ai-monitoring>=1.0.0")


def pins(locked: Mapping[str, str], more: Sequence[str] = ()) -> list[str]:
    """`name==version` of what the runtime imports and of `more`: versions of `locked`, else those installed here.

    A local suffix such as +cpu or +cu128 is cut: package indexes do not carry it.
    """
    names = [*REQUIREMENTS, *(name for name in more if name not in REQUIREMENTS)]
    return [f"{name}=={(locked.get(name) or version(name)).partition('+')[0]}" for name in names]


def write_environment(folder: Path, locked: Mapping[str, str], more: Sequence[str] = ()) -> None:
    """Write the three files. `locked`: package -> version, of Python too, as the run's record has them."""
    wanted, python = pins(locked, more), locked.get("python") or platform.python_version()
    (folder / "requirements.txt").write_text("\n".join(wanted) + "\n", encoding="utf-8")
    conda = {
        "name": "mlflow-env",
        "channels": ["conda-forge"],
        "dependencies": [f"python={python}", "pip", {"pip": [*map(_loosened, wanted), *AZURE_HOSTING]}],
    }
    env = {"python": python, "build_dependencies": ["pip"], "dependencies": ["-r requirements.txt"]}
    (folder / "conda.yaml").write_text(yaml.safe_dump(conda, sort_keys=False), encoding="utf-8")
    (folder / "python_env.yaml").write_text(yaml.safe_dump(env, sort_keys=False), encoding="utf-8")


def verified_with(folder: Path) -> dict[str, Any]:
    """For verification.json: `versions` here (of Python too) of what the package in `folder` pins, empty where one is
    absent, under `pinned_otherwise` what it pins instead, and the `device` that packaged models choose here.
    """
    import torch  # here alone: writing a package needs none

    lines = (folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==", 1) for line in lines if "==" in line)
    pinned["python"] = str(yaml.safe_load((folder / "python_env.yaml").read_text(encoding="utf-8"))["python"])
    here = {name: platform.python_version() if name == "python" else _installed(name) for name in pinned}
    otherwise = {name: it for name, it in pinned.items() if it != here[name]}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"versions": here, "pinned_otherwise": otherwise, "device": device}


def _installed(name: str) -> str:
    """Its version here as `pins` would write it; empty where it is absent."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return ""


def _loosened(pin: str) -> str:
    return "pydantic>=2.8,<3" if pin.startswith("pydantic==") else pin
