"""Hugging Face data sets: from the hub, or from a folder that `save_to_disk` wrote. The one owner of `datasets`."""

import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from ingot.errors import DataError, MissingPackage
from ingot.recipe import Source
from ingot.registry import nearest

HUB = "hf://datasets/"
CONNECT_TIMEOUT_SECONDS = 5.0


def is_dataset(source: Source, folder: Path) -> bool:
    """True for a data set of the hub, and for a folder that `save_to_disk` wrote."""
    target = folder / source.uri
    saved = (target / "dataset_dict.json").is_file() or (target / "state.json").is_file()
    return source.uri.startswith(HUB) or saved


def open_split(source: Source, folder: Path, field: str, *, streaming: bool = False) -> tuple[Any, str]:
    """The rows of `source` (mappings, read as they are asked for) and their name for messages.

    `streaming`: rows come over the network one by one; a saved folder is memory-mapped either way. Raises `DataError`.
    """
    if source.uri.startswith(HUB):
        name = source.uri.removeprefix(HUB)
        return _split(_from_hub(name, source, field, streaming), source, field, name)
    loaded = _datasets().load_from_disk(str(folder / source.uri))
    return _split(loaded, source, field, (folder / source.uri).name)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingPackage("datasets", "reading Hugging Face data sets") from error
    return datasets


def _from_hub(name: str, source: Source, field: str, streaming: bool) -> Any:
    datasets = _datasets()
    fallback = "run datasets.save_to_disk where there is a network and give that folder"
    # Asked first, because the library retries for half a minute before it gives up.
    if not datasets.config.HF_HUB_OFFLINE and not _reachable(datasets.config.HF_ENDPOINT):
        fix = (
            f"data set {name!r} cannot be loaded: the hub cannot be reached; set HF_HUB_OFFLINE=1 to use a cached copy"
        )
        raise DataError(f"{field}.uri", source.uri, f"{fix}, or {fallback}")
    try:
        return datasets.load_dataset(name, source.config, **({"streaming": True} if streaming else {}))
    except Exception as error:  # the library lets errors of half a dozen packages through
        fix = f"data set {name!r} cannot be loaded: {_first_line(error)}; check the id and config, or {fallback}"
        raise DataError(f"{field}.uri", source.uri, fix) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _reachable(endpoint: str) -> bool:
    """Whether a connection to `endpoint` (or to the proxy that the environment names for it) opens within seconds."""
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    url = urlparse(proxy or endpoint)
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((url.hostname or "", port), timeout=CONNECT_TIMEOUT_SECONDS).close()
    except OSError:
        return False
    return True


def _split(loaded: Any, source: Source, field: str, name: str) -> tuple[Any, str]:
    if not isinstance(loaded, dict):
        return loaded, name
    splits = list(loaded)
    chosen = source.split or (splits[0] if len(splits) == 1 else None)
    if chosen is None:
        raise DataError(f"{field}.split", None, f"{name} has several splits; use one of: {', '.join(splits)}")
    if chosen not in loaded:
        raise DataError(f"{field}.split", chosen, nearest(chosen, splits))
    return loaded[chosen], f"{name}/{chosen}"
