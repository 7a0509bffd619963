"""An adapter without its base: the folder of an adapter-only package -> the runtime, over a base that is found by name
and proved by its hash. Copied into packages.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ADAPTER_FILE = "adapter_config.json"
BASE_FILE = "base.json"
BASE_VARIABLE = "INGOT_BASE_MODEL"
TENSORS_FILE = "adapter_model.safetensors"
OWN = (ADAPTER_FILE, TENSORS_FILE, BASE_FILE)
PREFIX = "base_model.model."  # of the names of a model's own tensors in an adapter
UNDER = ".base_layer"  # behind the name of a layer in an adapter: the layer as it is without its update
# What a configuration says of a head. A tuned model's stand in place of its base's, or are left out as there.
HEAD_SETTINGS = ("architectures", "id2label", "label2id", "problem_type", "pad_token_id", "tie_word_embeddings")


def is_adapter(folder: Path) -> bool:
    """Whether `folder` holds an adapter and no model."""
    return (folder / ADAPTER_FILE).is_file() and not (folder / "config.json").is_file()


def is_packaged_adapter(folder: Path) -> bool:
    """Whether `folder` holds an adapter that says which base it needs: what `over_base` can load."""
    return is_adapter(folder) and (folder / BASE_FILE).is_file()


def over_base(
    load: Callable[[Path, str, frozenset[str]], Any], folder: Path, device: str, base: Path | None = None
) -> Any:
    """What `load` makes of the base with the tokenizer and the facts of the adapter in `folder`, its weights with the
    adapter folded in. `load` is told which weights it need not find: the adapter holds them. `base`: which one, without
    a look at its hash; None: the one that is found.

    Raises FileNotFoundError without a base, ValueError for one with other weights.
    """
    try:
        from peft import PeftModel
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("an adapter is loaded by peft; pip install peft", name="peft") from error

    with view_of(folder, base or find_base(folder)) as view:
        runtime = load(view, device, whole_tensors(folder))
    adapted = PeftModel.from_pretrained(runtime.model, str(folder), is_trainable=False)
    return type(runtime)(adapted.merge_and_unload(), runtime.tokenizer, runtime.about)


@contextlib.contextmanager
def view_of(folder: Path, base: Path) -> Iterator[Path]:
    """One folder of links, so that a base with an adapter is read as every model is."""
    with tempfile.TemporaryDirectory(prefix="ingot-adapter-") as name:
        view = Path(name)
        for path in (*base.iterdir(), *folder.iterdir()):
            if path.is_file() and path.name not in OWN:
                _show(path.resolve(), view / path.name)
        named = json.loads((folder / BASE_FILE).read_text(encoding="utf-8"))
        if "head" in named:
            config = json.loads((base / "config.json").read_text(encoding="utf-8"))
            config = {key: value for key, value in config.items() if key not in HEAD_SETTINGS} | named["head"]
            (view / "config.json").unlink()
            (view / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield view


def head_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a tuned model's configuration says of its head, for `head` in base.json."""
    return {key: config[key] for key in HEAD_SETTINGS if key in config}


def whole_tensors(folder: Path) -> frozenset[str]:
    """Names that a model gives to the tensors that the adapter in `folder` holds whole: those of its head."""
    from safetensors import safe_open

    with safe_open(folder / TENSORS_FILE, framework="pt") as file:
        own = (name for name in file.keys() if ".lora_" not in name)  # noqa: SIM118
        return frozenset(name.removeprefix(PREFIX).replace(f"{UNDER}.", ".") for name in own)


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
