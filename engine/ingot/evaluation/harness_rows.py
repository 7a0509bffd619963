"""Where a task file of lm-evaluation-harness has its rows: as the package datasets would find them, by name."""

from pathlib import Path
from typing import Any, Protocol

from ingot.data.sources import EXTENSIONS
from ingot.errors import RecipeError

FORMATS = ("json", "csv", "parquet")


class File(Protocol):
    """A harness's file as far as its rows are concerned."""

    @property
    def folder(self) -> Path: ...

    def value(self, name: str) -> Any: ...

    def note(self, text: str) -> None: ...

    def refusal(self, name: str, value: object, fix: str) -> RecipeError: ...


def part_of(file: File, split: str) -> dict[str, Any]:
    """The fields of a source for `split`. Raises RecipeError for data that is not read."""
    path, options = file.value("dataset_path"), file.value("dataset_kwargs") or {}
    if not isinstance(path, str):
        raise file.refusal("dataset_path", path, "must name where the rows are")
    if not isinstance(options, dict):
        raise file.refusal("dataset_kwargs", options, "must be a mapping")
    if "trust_remote_code" in options:
        file.note("trust_remote_code is passed over: no code of a data set is run")
        options = {name: value for name, value in options.items() if name != "trust_remote_code"}
    for name, value in options.items():
        if name not in ("data_files", "data_dir"):
            raise file.refusal(f"dataset_kwargs.{name}", value, "is not read; leave it out")
    if path in FORMATS:
        return _file(file, path, options, split)
    local = _existing(file, path)
    if local is not None and local.is_dir():
        return _in_folder(file, local, split)
    if options:
        raise file.refusal("dataset_kwargs", options, f"is read with dataset_path {', '.join(FORMATS)} only")
    name = file.value("dataset_name")
    found = {"uri": f"hf://datasets/{path}", "split": split}
    return found if name is None else found | {"config": name}


def _file(file: File, kind: str, options: dict[str, Any], split: str) -> dict[str, Any]:
    files = options.get("data_files")
    if files is None:
        folder = options.get("data_dir")
        found = None if folder is None else _existing(file, str(folder))
        if found is None:
            raise file.refusal("dataset_kwargs.data_files", None, "is missing: name the files of the splits")
        return _in_folder(file, found, split)
    by_split = files if isinstance(files, dict) else {"train": files}  # as datasets calls what has no name
    if split not in by_split:
        fix = f"holds no split {split!r}; it has {', '.join(by_split)}"
        raise file.refusal("dataset_kwargs.data_files", files, fix)
    named = by_split[split]
    if isinstance(named, list) and len(named) == 1:
        named = named[0]
    if not isinstance(named, str):
        raise file.refusal("dataset_kwargs.data_files", named, "must be one file a split; put several into one")
    path = _existing(file, named)
    if path is None:
        return {"uri": named}  # its absence is told where rows are read
    return {"uri": str(path) if path.is_absolute() else named, "format": _format(path, kind)}


def _existing(file: File, name: str) -> Path | None:
    """`name` beside the task file, or where the harness looks: in the working directory."""
    beside = file.folder / name
    if beside.exists():
        return beside
    here = Path(name).resolve()
    if here.exists():
        file.note(f"{name} is read from the working directory")
        return here
    return None


def _in_folder(file: File, folder: Path, split: str) -> dict[str, Any]:
    found = [path for path in sorted(folder.iterdir()) if path.stem == split and path.suffix.lower() in EXTENSIONS]
    if len(found) != 1:
        names = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        fix = f"must hold one file called {split!r} ({', '.join(EXTENSIONS)}); it holds {names}"
        raise file.refusal("dataset_path", str(folder), fix)
    kind = EXTENSIONS[found[0].suffix.lower()]
    return {"uri": str(found[0].resolve()), "format": _format(found[0], "json" if kind.startswith("json") else kind)}


def _format(path: Path, kind: str) -> str:
    """datasets reads lines of objects and lists of objects under one name."""
    if kind != "json":
        return kind
    with path.open("rb") as stream:
        return "json" if stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[") else "jsonl"
