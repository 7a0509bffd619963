"""The form for llama.cpp: its own converter, run as a program, where it is installed; and what that loses."""

import contextlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ingot.errors import PackageError
from ingot.packaging.shards import link

CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
VARIABLE = "INGOT_GGUF_CONVERTER"
MODEL_FILE = "model.gguf"
VOCABULARY = "tokenizer.model"  # SentencePiece's own file, which transformers 5 reads and does not save
LAST_LINES = 10
# What the converter's last words mean for whoever packages a model.
KNOWN = (
    ("BPE pre-tokenizer was not recognized", "it does not know this model's tokenizer, of which it keeps a list"),
    (r"Model (\S+) is not supported", r"it does not know the architecture \1"),
    (r"No module named '([\w.]+)'", r"it needs the Python package \1: pip install \1, and package again"),
    (r"(?:File not found|Missing).*?(tokenizer\.model)", r"it reads this architecture's tokenizer from \1 alone"),
)
STRING, ARRAY = 8, 9
BYTES = {
    0: 1,
    1: 1,
    2: 2,
    3: 2,
    4: 4,
    5: 4,
    6: 4,
    7: 1,
    10: 8,
    11: 8,
    12: 8,
}  # of a value of each kind
WORDS = "tokenizer.ggml."
USE = "leave gguf out of package.forms"


def find_converter() -> Path:
    """llama.cpp's converter: INGOT_GGUF_CONVERTER, else on the PATH. Raises PackageError with how to get it."""
    given = os.environ.get(VARIABLE)
    found = Path(given) if given else next(filter(None, map(shutil.which, CONVERTERS)), None)
    if found is None or not Path(found).is_file():
        what = f"{VARIABLE}={given} is no file" if given else "llama.cpp's converter is not installed"
        raise PackageError(
            f"package.forms: gguf: {what}; get llama.cpp, pip install gguf sentencepiece, and put "
            f"convert_hf_to_gguf.py on the PATH or its path into {VARIABLE}"
        )
    return Path(found)


def convert(folder: Path, out: Path, kind: str, base: Path | None = None) -> Path:
    """Write the model in `folder` as one GGUF file of type `kind` into `out`; return it. `base`: the folder of what it
    was trained from, for the tokenizer's own file. Raises PackageError.
    """
    converter, target = find_converter(), out / MODEL_FILE
    out.mkdir(parents=True, exist_ok=True)
    with _with_vocabulary(folder, base, out.parent) as source:
        command = [str(converter), str(source), "--outfile", str(target), "--outtype", kind]
        if converter.suffix == ".py":
            command.insert(0, sys.executable)
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace", check=False
        )
    if done.returncode != 0 or not target.is_file():
        raise PackageError(f"package.forms: gguf: {converter.name} made no GGUF of this model: {_reason(done)}")
    check_gguf(target)
    order_merges(target, folder / "tokenizer.json")
    return target


@contextlib.contextmanager
def _with_vocabulary(folder: Path, base: Path | None, place: Path) -> Iterator[Path]:
    """`folder`; or one of links in `place` with `tokenizer.model` of its base, and in tokenizer_config.json with the
    tokens that were added to that, where the converter looks for them.
    """
    if base is None or not (base / VOCABULARY).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=place) as name:
        view = Path(name) / folder.name  # which the converter calls the model
        for path in folder.iterdir():
            if path.is_file() and path.name != "tokenizer_config.json":
                link(path, view / path.name)
        link(base / VOCABULARY, view / VOCABULARY)
        tokenizer, settings = (
            json.loads((folder / file).read_text(encoding="utf-8"))
            for file in ("tokenizer.json", "tokenizer_config.json")
        )
        settings["added_tokens_decoder"] = {str(token["id"]): token for token in tokenizer["added_tokens"]}
        (view / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        yield view


def _reason(done: "subprocess.CompletedProcess[str]") -> str:
    """Why the converter failed and what to do, in one sentence; its last lines where that is not known."""
    lines = done.stdout.splitlines()
    last = next((line for line in reversed(lines) if line.strip()), "")
    for pattern, meaning in KNOWN:
        if found := re.search(pattern, last):
            sentence = found.expand(meaning)
            return sentence if "pip install" in sentence else f"{sentence}; {USE}"
    return f"exit status {done.returncode}\n" + "\n".join(lines[-LAST_LINES:])


def check_gguf(path: Path) -> int:
    """How many tensors a GGUF file says it holds. Raises PackageError where it is none, or holds none."""
    with path.open("rb") as file:
        head = file.read(24)
    if len(head) < 24 or head[:4] != b"GGUF":
        raise PackageError(f"{path} is no GGUF file; convert the model again")
    _, tensors, _ = struct.unpack("<IQQ", head[4:])
    if not tensors:
        raise PackageError(f"{path} holds no tensor; convert the model again")
    return int(tensors)


def order_merges(path: Path, tokenizer: Path) -> int:
    """Write into a GGUF file which merge of a SentencePiece tokenizer comes before which, as `tokenizer`
    (tokenizer.json) has it; return how many tokens have such a rank now, 0 where the file has all it needs.

    llama.cpp's converter takes ranks from `tokenizer.model`, which transformers 5 no longer saves, and without it gives
    all tokens one score: of 338 lines of English 266 were cut into other tokens. Raises PackageError where ranks of
    tokens cannot say it.
    """
    with path.open("rb") as file:
        fields = _fields(file)
        place, count = fields.get(f"{WORDS}scores", (0, 0))
        if not count or _text(file, fields[f"{WORDS}model"][0]) != "llama":
            return 0
        file.seek(place)
        scores = list(struct.unpack(f"<{count}f", file.read(4 * count)))
    if len(set(scores)) > 1 or not tokenizer.is_file():
        return 0
    model = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]
    ranks = _ranks(model)
    for token, rank in ranks.items():
        scores[model["vocab"][token]] = -float(rank)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(struct.pack(f"<{count}f", *scores))
    return len(ranks)


def _ranks(model: dict[str, Any]) -> dict[str, int]:
    """The rank of every token that merges make. Raises PackageError where a token is made at several ranks, or not of
    all its parts: llama.cpp ranks tokens, and merges any two that make one.
    """
    vocab, ranks = model["vocab"], dict[str, int]()
    order = {(pair if isinstance(pair, str) else " ".join(pair)): rank for rank, pair in enumerate(model["merges"], 1)}
    for token in vocab:
        pairs = [f"{token[:n]} {token[n:]}" for n in range(1, len(token)) if {token[:n], token[n:]} <= vocab.keys()]
        found = [order[pair] for pair in pairs if pair in order]
        if len(found) < len(pairs) or (found and max(found) - min(found) >= len(found)):
            raise PackageError(
                f"package.forms: gguf: llama.cpp would merge {token!r} otherwise than this tokenizer; {USE}"
            )
        if found:
            ranks[token] = min(found)
    return ranks


def _fields(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Name of every field of a GGUF file -> (where its value, or the first of them, begins; how many these are)."""
    file.seek(16)
    fields: dict[str, tuple[int, int]] = {}
    for _ in range(_number(file, 8)):
        name, kind, count = _text(file), _number(file, 4), 1
        if kind == ARRAY:
            kind, count = _number(file, 4), _number(file, 8)
        fields[name] = (file.tell(), count)
        if kind == STRING:
            for _ in range(count):
                file.seek(_number(file, 8), os.SEEK_CUR)
        else:
            file.seek(BYTES[kind] * count, os.SEEK_CUR)
    return fields


def _number(file: BinaryIO, size: int) -> int:
    return int.from_bytes(file.read(size), "little")


def _text(file: BinaryIO, place: int | None = None) -> str:
    if place is not None:
        file.seek(place)
    return file.read(_number(file, 8)).decode("utf-8")
