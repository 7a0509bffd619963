"""A model in few bits: written matrix by matrix, read by transformers alone, near the model that it was made of."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors import safe_open

from ingot.errors import PackageError
from ingot.model import few_bits
from ingot.model.few_bits import write_few_bits
from ingot.model.runtime import Runtime

pytest.importorskip("bitsandbytes")
NANO = Path(few_bits.__file__).parents[1] / "catalog" / "nano"


def _logits(folder: Path) -> torch.Tensor:
    runtime = Runtime.load(folder)
    with torch.no_grad():
        return runtime.model(torch.tensor([runtime.prompt_ids("Send 20 euros to Maria")])).logits[0].float()


@pytest.mark.parametrize(("kind", "limit"), [("nf4", 0.5), ("int8", 0.1)])
def test_it_stays_near(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Literal["nf4", "int8"], limit: float
) -> None:
    monkeypatch.setattr(few_bits, "SHARD_BYTES", 1 << 20)
    out = write_few_bits(NANO, tmp_path / "out", kind)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1  # no more than a shard is held
    wanted, found = _logits(NANO), _logits(out)
    apart = ((found - wanted).abs().max() / wanted.abs().max()).item()
    assert 0 < apart < limit
    sizes = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (NANO, out)]
    assert sizes[1] < 0.5 * sizes[0]


def test_the_head_stays_whole_and_is_named(tmp_path: Path) -> None:
    out = write_few_bits(NANO, tmp_path / "out", "nf4")
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert section["bnb_4bit_quant_type"] == "nf4"
    assert "lm_head" in section["llm_int8_skip_modules"]
    with safe_open(out / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert file.get_tensor("model.layers.0.mlp.up_proj.weight").dtype == torch.uint8
        assert file.get_tensor("model.embed_tokens.weight").is_floating_point()
    assert "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4" in names


def test_rows_that_blocks_do_not_fill_stay_whole(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="no linear layer"):  # rows of 32 and 48
        write_few_bits(model_folder, tmp_path / "out", "nf4")
    write_few_bits(model_folder, tmp_path / "int8", "int8")


def test_a_model_that_is_quantized_already_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(NANO, tmp_path / "model")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(PackageError, match="use merged"):
        write_few_bits(folder, tmp_path / "out", "nf4")


def test_files_that_lack_a_layer_leave_nothing_behind(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(NANO, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(PackageError, match="up_proj"):
        write_few_bits(folder, tmp_path / "out", "nf4")
    assert not (tmp_path / "out").exists()
