"""Where a model is: a recipe's `model.source` -> a folder on this disk, checked before anything is loaded from it."""

import json
from importlib.util import find_spec
from pathlib import Path

from ingot.errors import ModelError
from ingot.recipe import Model
from ingot.registry import nearest

EMBEDDED = ("nano", "nano-t5")  # folders of ingot/catalog, shipped with the package
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)
HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*", "LICENCE*", "NOTICE*"]


def model_folder(model: Model, folder: Path, *, weights: bool = True, tokenizer: bool = True) -> Path:
    """Return the local folder of `model.source`; a relative path starts at `folder`.

    Raises ModelError when it is missing, has no configuration, no tokenizer (if `tokenizer`), no safetensors weights
    (if
    `weights`: pickle files are never opened), or asks for remote code that the recipe does not allow.
    """
    scheme, _, rest = model.source.rpartition("://")
    if scheme == "ingot":
        path = _embedded(rest)
    elif scheme == "package":
        path = _in_package(model.source, rest)
    elif scheme == "hf":
        path = _from_hub(model, rest)
    elif scheme:
        raise ModelError("model.source", model.source, "use ingot://, hf://, package:// or a folder")
    else:
        path = _local(model.source, folder)
    _check(model, path, weights, tokenizer)
    return path


def _embedded(name: str) -> Path:
    if name not in EMBEDDED:
        raise ModelError("model.source", f"ingot://{name}", nearest(name, EMBEDDED))
    return Path(__file__).parents[1] / "catalog" / name


def _in_package(source: str, rest: str) -> Path:
    package, _, inside = rest.partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            "model.source",
            source,
            f"the Python package {package} is not installed: pip install {package.replace('_', '-')}",
        )
    path = (Path(spec.submodule_search_locations[0]) / inside).resolve()
    if not path.is_dir():
        raise ModelError("model.source", source, f"the package {package} has no folder {inside!r}")
    return path


def _local(source: str, folder: Path) -> Path:
    path = (folder / Path(source).expanduser()).resolve()
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelError("model.source", source, "this is a file; name the folder that holds config.json")
    siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    hint = nearest(path.name, siblings) if siblings else f"the folder {path.parent} does not exist either"
    raise ModelError("model.source", source, f"no such folder ({path}); {hint}; a hub model is written hf://org/name")


def _from_hub(model: Model, repo: str) -> Path:
    """Download (or find in the local cache) the safe files of a hub repository."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    patterns = [*HUB_PATTERNS, "*.py"] if model.trust_remote_code else HUB_PATTERNS
    if repo.count("/") != 1:
        raise ModelError("model.source", model.source, "write hf://organisation/name")
    try:
        return Path(snapshot_download(repo, revision=model.revision, allow_patterns=patterns, local_files_only=True))
    except (OSError, ValueError):
        pass  # not in the cache: ask the hub
    try:
        HfApi().model_info(
            repo, revision=model.revision, timeout=10
        )  # one short question, so that being offline shows at once
        return Path(snapshot_download(repo, revision=model.revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise ModelError(
            "model.source",
            model.source,
            f"gated: accept its terms on the hub page of {repo}, then log in (hf auth login)",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError("model.revision", model.revision, f"{repo} has no such revision") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            "model.source", model.source, "the hub has no such model, or it is private and you are not logged in"
        ) from error
    except Exception as error:  # what an unreachable host raises depends on the hub library's transport: httpx2 today
        reason = type(error).__name__
        raise ModelError(
            "model.source",
            model.source,
            f"not in the local cache, and the hub cannot be reached ({reason}); go online once, or name a local folder",
        ) from error


def _check(model: Model, path: Path, weights: bool, tokenizer: bool) -> None:
    names = [p.name for p in path.iterdir()]
    if "config.json" not in names:
        raise ModelError("model.source", model.source, "the folder has no config.json, so it is no transformers model")
    if weights and not any(name.endswith(".safetensors") for name in names):
        pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
        if pickles:
            raise ModelError(
                "model.source",
                model.source,
                f"only pickle weights ({pickles[0]}): loading them can run any code, so Ingot refuses; "
                "convert them to safetensors",
            )
        raise ModelError(
            "model.source",
            model.source,
            "the folder has no *.safetensors weights; to draw new ones: model.initialization: random",
        )
    if tokenizer and not any(name in names for name in TOKENIZER_FILES):
        raise ModelError(
            "model.source",
            model.source,
            "the folder has no tokenizer (tokenizer.json); copy the base model's tokenizer files into it",
        )
    try:
        needs_code = "auto_map" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (TypeError, ValueError) as error:
        raise ModelError("model.source", model.source, f"its config.json is not JSON: {error}") from error
    if needs_code and not model.trust_remote_code:
        raise ModelError(
            "model.trust_remote_code",
            False,
            f"{model.source} brings its own Python code; read it, then set model.trust_remote_code: true to run it",
        )
