"""Weights as bytes: what is cut is the same to the bit, and nothing is loaded on the way."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from every_task import packaged

from ingot.errors import PackageError
from ingot.packaging import shards
from ingot.packaging.bundle import check_manifest

LIMIT = 20_000


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Tensors of several types and sizes, one of them larger than LIMIT, in one file."""
    torch.manual_seed(0)
    found = {
        "embed": torch.randn(100, 64),
        **{f"layers.{i}.w": torch.randn(32, 48).bfloat16() for i in range(8)},
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "odd": torch.arange(7, dtype=torch.uint8),
    }
    folder = tmp_path / "model"
    folder.mkdir()
    safetensors.torch.save_file(found, folder / shards.SINGLE_FILE, metadata={"format": "pt"})
    return found


def _read(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor by safetensors' own reader, through the index."""
    index = json.loads((folder / shards.INDEX_FILE).read_text())
    files = {name: safetensors.torch.load_file(folder / name) for name in set(index["weight_map"].values())}
    return {name: files[file][name] for name, file in index["weight_map"].items()}


def _same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].view(torch.uint8).tolist() == tensor.view(torch.uint8).tolist() if tensor.dim() else True
        assert torch.equal(found[name], tensor)


def test_a_large_file_is_cut_to_the_bit(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    written = shards.place(tmp_path / "model", tmp_path / "out", LIMIT)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert written == sum(path.stat().st_size for path in files)
    for path in files:
        held = shards.read_header(path)
        assert path.stat().st_size <= LIMIT or list(held.tensors) == ["embed"]
        assert held.begin % 8 == 0
        assert held.metadata == {"format": "pt"}
    _same(_read(tmp_path / "out"), weights)
    total = json.loads((tmp_path / "out" / shards.INDEX_FILE).read_text())["metadata"]["total_size"]
    assert total == sum(t.numel() * t.element_size() for t in weights.values())


def test_small_shards_are_linked_beside_a_cut_one(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / shards.SINGLE_FILE).unlink()
    parts = {"a.safetensors": ("odd", "scalar"), "b.safetensors": tuple(set(weights) - {"odd", "scalar"})}
    for file, names in parts.items():
        safetensors.torch.save_file({name: weights[name] for name in names}, folder / file)
    shards.write_index(folder, {name: file for file, names in parts.items() for name in names}, 1)
    shards.place(folder, tmp_path / "out", LIMIT)
    assert (tmp_path / "out" / "model-00001-of-00004.safetensors").samefile(folder / "a.safetensors")
    _same(_read(tmp_path / "out"), weights)


def test_what_is_small_enough_is_linked_as_it_is(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    assert shards.place(tmp_path / "model", tmp_path / "out") == 0
    assert (tmp_path / "out" / shards.SINGLE_FILE).samefile(tmp_path / "model" / shards.SINGLE_FILE)
    assert not (tmp_path / "out" / shards.INDEX_FILE).exists()


def test_packaging_loads_no_tensor(text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = safetensors.torch.load_file(text_folder / shards.SINGLE_FILE)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a tensor was loaded")

    with monkeypatch.context() as patch:
        for place, name in ((safetensors, "safe_open"), (safetensors.torch, "load_file"), (torch, "load")):
            patch.setattr(place, name, refuse)
        out = packaged(text_folder, tmp_path / "package", shard_bytes=LIMIT)
    check_manifest(out)
    _same(_read(out / "model"), wanted)
    from ingot.model.runtime import Runtime

    whole, cut = Runtime.load(text_folder), Runtime.load(out / "model")
    assert whole.complete("Hello!").text == cut.complete("Hello!").text


def _break(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "cut short":
        path.write_bytes(data[:-3])
    elif how == "no header":
        path.write_bytes(b"PK\x03\x04 something else entirely")
    elif how == "too long":
        path.write_bytes(struct.pack("<Q", 1 << 60) + data[8:])


@pytest.mark.parametrize("how", ["cut short", "no header", "too long"])
def test_a_damaged_file_is_refused(weights: dict[str, torch.Tensor], tmp_path: Path, how: str) -> None:
    _break(tmp_path / "model" / shards.SINGLE_FILE, how)
    with pytest.raises(PackageError, match="no complete safetensors file"):
        shards.read_header(tmp_path / "model" / shards.SINGLE_FILE)


def test_an_index_does_not_lead_elsewhere(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    shards.write_index(tmp_path / "model", {"w": "../secret.safetensors"}, 1)
    with pytest.raises(PackageError, match="incomplete"):
        shards.place(tmp_path / "model", tmp_path / "out")
