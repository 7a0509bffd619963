"""Files of weights as bytes: linked where that is possible, cut into shards where they are too large, never loaded.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and place of
every tensor) and the tensors, one behind the other. So a part of the tensors is a new header and a range of bytes.
"""

import json
import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ingot.errors import PackageError

SHARD_BYTES = 5_000_000_000  # what Hugging Face's hub and most object stores still take in one part
CHUNK_BYTES = 8 << 20
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MOST_HEADER_BYTES = 100_000_000  # safetensors' own limit


class Header(NamedTuple):
    """`tensors`: name -> dtype, shape and data_offsets, by place in the file. `begin`: where the first one lies."""

    tensors: dict[str, dict[str, Any]]
    begin: int
    metadata: dict[str, str]


class Piece(NamedTuple):
    """Neighbouring tensors of one file. `whole`: these are all of its tensors."""

    source: Path
    names: list[str]
    whole: bool


def read_header(path: Path) -> Header:
    """The header of a safetensors file. Raises PackageError where it is none, or is cut short."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, MOST_HEADER_BYTES):
                raise ValueError(f"its header would be {length} bytes long")
            described = json.loads(file.read(length))
        metadata = described.pop("__metadata__", {})
        tensors = dict(sorted(described.items(), key=lambda item: item[1]["data_offsets"]))
        last = max((one["data_offsets"][1] for one in tensors.values()), default=0)
        if 8 + length + last != size:
            raise ValueError(f"it is {size} bytes long, and its header says {8 + length + last}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise PackageError(f"{path} is no complete safetensors file: {error}; save the model again") from error
    return Header(tensors, 8 + length, metadata)


def shards_of(folder: Path) -> list[Path]:
    """The files that hold a model's weights, as its index names them. Raises PackageError where one is missing."""
    index, names = folder / INDEX_FILE, [SINGLE_FILE]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise PackageError(f"{folder} holds no {name}: the weights are incomplete")
    return [folder / name for name in names]


def link(source: Path, target: Path) -> int:
    """Make `target` a hard link of `source`, or a copy where links do not reach; return the bytes that were written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()  # a link to a link of the hub's cache would dangle elsewhere
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
        return source.stat().st_size
    return 0


def place(folder: Path, target: Path, limit: int = SHARD_BYTES) -> int:
    """Put a model's weights into `target`, in files of at most `limit` bytes; return the bytes that were written.

    Files that are small enough are linked. A tensor that is larger than `limit` gets a file of its own.
    """
    files = shards_of(folder)
    if all(path.stat().st_size <= limit for path in files):
        index = folder / INDEX_FILE
        return sum(link(path, target / path.name) for path in [*files, *([index] if index.is_file() else [])])
    pieces = [piece for path in files for piece in _cut(path, limit)]
    written, total, weight_map = 0, 0, dict[str, str]()
    for number, piece in enumerate(pieces, start=1):
        name = f"model-{number:05}-of-{len(pieces):05}.safetensors"
        written += link(piece.source, target / name) if piece.whole else _write_piece(piece, target / name)
        weight_map |= dict.fromkeys(piece.names, name)
    for path in files:
        total += path.stat().st_size - read_header(path).begin
    write_index(target, weight_map, total)
    return written


def write_index(folder: Path, weight_map: Mapping[str, str], total: int) -> None:
    """Write which file holds which tensor; `total`: bytes of all tensors."""
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _cut(path: Path, limit: int) -> list[Piece]:
    header = read_header(path)
    if path.stat().st_size <= limit:
        return [Piece(path, list(header.tensors), True)]
    groups: list[list[str]] = []
    room = 0
    for name, tensor in header.tensors.items():
        begin, end = tensor["data_offsets"]
        needs = end - begin + len(json.dumps({name: tensor})) + 40  # digits of its new place, padding
        if needs > room:
            groups.append([])
            room = limit - len(json.dumps(header.metadata)) - 64
        groups[-1].append(name)
        room -= needs
    return [Piece(path, names, len(groups) == 1) for names in groups]


def _write_piece(piece: Piece, target: Path) -> int:
    """Write some tensors of a file as a file of their own; return its size."""
    header = read_header(piece.source)
    chosen = {name: header.tensors[name] for name in piece.names}
    first = min(one["data_offsets"][0] for one in chosen.values())
    last = max(one["data_offsets"][1] for one in chosen.values())
    moved = {
        name: {**one, "data_offsets": [offset - first for offset in one["data_offsets"]]}
        for name, one in chosen.items()
    }
    described: dict[str, Any] = {"__metadata__": header.metadata} if header.metadata else {}
    text = json.dumps(described | moved, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, as readers that map them expect
    target.parent.mkdir(parents=True, exist_ok=True)
    with piece.source.open("rb") as source, target.open("xb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.flush()
        source.seek(header.begin + first)
        copy_bytes(source, out, last - first)
    return 8 + len(text) + last - first


def copy_bytes(source: BinaryIO, target: BinaryIO, count: int) -> None:
    """Copy `count` bytes from where `source` stands to where `target` stands, through one small buffer."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    while count:
        read = source.readinto(buffer[: min(count, CHUNK_BYTES)])  # type: ignore[attr-defined]
        if not read:
            raise PackageError(f"{getattr(source, 'name', 'a file')} ended {count} bytes too early")
        target.write(buffer[:read])
        count -= read
