"""An adapter without its base: the folder of an adapter-only package -> the runtime, over a base that is found by name
and proved by its hash. Copied into packages.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ADAPTER_FILE = "adapter_config.json"
BASE_FILE = "base.json"
BASE_VARIABLE = "INGOT_BASE_MODEL"
OWN = (ADAPTER_FILE, "adapter_model.safetensors", BASE_FILE)


def is_adapter(folder: Path) -> bool:
    """Whether `folder` holds an adapter and no model."""
    return (folder / ADAPTER_FILE).is_file() and not (folder / "config.json").is_file()


def is_packaged_adapter(folder: Path) -> bool:
    """Whether `folder` holds an adapter that says which base it needs: what `over_base` can load."""
    return is_adapter(folder) and (folder / BASE_FILE).is_file()


def over_base(load: Callable[[Path, str], Any], folder: Path, device: str) -> Any:
    """What `load` makes of the base with the tokenizer and the facts of the adapter in `folder`, its weights with the
    adapter folded in.

    Raises FileNotFoundError without a base, ValueError for one with other weights.
    """
    try:
        from peft import PeftModel
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("an adapter is loaded by peft; pip install peft", name="peft") from error

    base = find_base(folder)
    with tempfile.TemporaryDirectory(prefix="ingot-adapter-") as name:
        # One folder of links, so that a base with an adapter is read as every model is.
        view = Path(name)
        for path in (*base.iterdir(), *folder.iterdir()):
            if path.is_file() and path.name not in OWN:
                _show(path.resolve(), view / path.name)
        runtime = load(view, device)
    adapted = PeftModel.from_pretrained(runtime.model, str(folder), is_trainable=False)
    return type(runtime)(adapted.merge_and_unload(), runtime.tokenizer, runtime.about)


def find_base(folder: Path) -> Path:
    """The base that the adapter in `folder` was trained over: INGOT_BASE_MODEL, else a folder `base` in or beside the
    package, else the local cache of Hugging Face's hub.
    """
    wanted = json.loads((folder / BASE_FILE).read_text(encoding="utf-8"))
    given = os.environ.get(BASE_VARIABLE)
    if given and not (Path(given) / "config.json").is_file():
        raise FileNotFoundError(f"{BASE_VARIABLE}={given} is no model folder: it holds no config.json")
    for base in [Path(given)] if given else _candidates(folder, wanted):
        if (base / "config.json").is_file():
            found = weights_digest(base)
            if found != wanted["weights"]:
                raise ValueError(
                    f"{base} is not the base of this adapter: the SHA-256 of its weights is {found[:12]}..., and "
                    f"{wanted['source']} had {wanted['weights'][:12]}...; set {BASE_VARIABLE} to the right one"
                )
            return base
    revision = f" at revision {wanted['revision']}" if wanted.get("revision") else ""
    raise FileNotFoundError(
        f"this package is an adapter, and its base {wanted['source']}{revision} is not here; set {BASE_VARIABLE} to "
        "its folder, or put it beside the package as `base`"
    )


def weights_digest(folder: Path) -> str:
    """One SHA-256 of all safetensors files in `folder`, whatever they are called."""
    return digest_of(map(sha256, folder.glob("*.safetensors")))


def digest_of(digests: Iterable[str]) -> str:
    """One SHA-256 of several files' hashes, whatever their order."""
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a file, read once from end to end in small portions."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _candidates(folder: Path, wanted: dict[str, Any]) -> Iterator[Path]:
    folder = folder.resolve()
    yield from (place / "base" for place in (folder, folder.parent, folder.parent.parent))
    source = str(wanted["source"])
    if source.startswith("hf://"):
        from transformers.utils.hub import cached_file

        options: dict[str, Any] = {"local_files_only": True, "_raise_exceptions_for_missing_entries": False}
        revision = wanted.get("revision")
        found = cached_file(source.removeprefix("hf://"), "config.json", revision=revision, **options)
        if found is not None:
            yield Path(found).parent


def _show(path: Path, place: Path) -> None:
    place.unlink(missing_ok=True)  # the adapter's own tokenizer takes the place of the base's
    try:
        place.symlink_to(path)
    except OSError:  # where links are forbidden
        shutil.copyfile(path, place)
