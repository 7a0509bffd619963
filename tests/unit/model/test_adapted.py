"""An adapter without its base finds the right one, refuses another, and answers as the merged model does."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ingot.model import adapted
from ingot.model.adapters import attach_adapter, save_adapter
from ingot.model.runtime import Runtime
from ingot.recipe import Adapter


@pytest.fixture
def forms(model_folder: Path, tmp_path: Path, tiny_tokenizer: Any) -> tuple[Path, Path]:
    """(a folder with an adapter alone, the merged model's folder) over the model in `model_folder`."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_folder)
    model = attach_adapter(model, Adapter(rank=8), "text-generation", 0)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3)
    folder, merged = tmp_path / "package" / "model", tmp_path / "merged"
    save_adapter(model, folder, "org/base")
    model.merge_and_unload().save_pretrained(merged)
    about = {"task": "text-generation", "max_new_tokens": 8}
    for place in (folder, merged):
        tiny_tokenizer.save_pretrained(place)
        (place / "ingot.json").write_text(json.dumps(about))
    named = {"source": "hf://org/base", "revision": None, "weights": adapted.weights_digest(model_folder)}
    (folder / adapted.BASE_FILE).write_text(json.dumps(named))
    return folder, merged


def _answers(runtime: Runtime) -> list[str]:
    prompts = [runtime.prompt_ids(text) for text in ("Hello!", "What is the capital")]
    return [it.text for it in runtime.generate(prompts)]


def test_it_answers_as_the_merged_model(
    forms: tuple[Path, Path], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, merged = forms
    monkeypatch.setenv(adapted.BASE_VARIABLE, str(model_folder))
    loaded = Runtime.load(folder)
    assert _answers(loaded) == _answers(Runtime.load(merged))
    ids = torch.tensor([loaded.prompt_ids("Hello!")])
    plain = Runtime.load(model_folder).model(ids).logits
    assert not torch.allclose(loaded.model(ids).logits, plain, atol=1e-2)  # the adapter does something


@pytest.mark.parametrize("place", ["package/model/base", "package/base", "base"])
def test_a_base_in_or_beside_the_package_is_found(
    forms: tuple[Path, Path], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.delenv(adapted.BASE_VARIABLE, raising=False)
    shutil.copytree(model_folder, tmp_path / place)
    assert adapted.find_base(forms[0]) == tmp_path / place


def test_another_base_is_refused(
    forms: tuple[Path, Path], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(model_folder, tmp_path / "other")
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    monkeypatch.setenv(adapted.BASE_VARIABLE, str(other))
    with pytest.raises(ValueError, match="is not the base of this adapter"):
        Runtime.load(forms[0])


def test_a_missing_base_is_named(forms: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv(adapted.BASE_VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match=r"hf://org/base is not here; set INGOT_BASE_MODEL"):
        Runtime.load(forms[0])
    monkeypatch.setenv(adapted.BASE_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no config"):
        Runtime.load(forms[0])
