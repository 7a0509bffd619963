"""Model folders that cannot be used are refused before anything is loaded from them, each with its reason."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ingot.errors import ModelError
from ingot.model.load import load_tokenizer
from ingot.model.source import model_folder
from ingot.recipe import Model


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "my-model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (path / "tokenizer.json").write_text("{}")
    save_file({"w": torch.zeros(1)}, path / "model.safetensors")
    return path


def refused(source: str, home, field: str = "model.source", **settings) -> str:
    with pytest.raises(ModelError) as caught:
        model_folder(Model(source=source, **settings), home)
    assert caught.value.field == field
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_complete_folder_is_found_from_the_recipes_folder(folder, tmp_path):
    assert model_folder(Model(source="my-model"), tmp_path) == folder
    assert model_folder(Model(source=str(folder)), tmp_path / "elsewhere") == folder


def test_missing_folder_suggests_its_neighbour(folder, tmp_path):
    assert "did you mean 'my-model'?" in refused("my-modle", tmp_path)


def test_file_instead_of_folder(folder, tmp_path):
    assert "name the folder" in refused("my-model/config.json", tmp_path)


def test_folder_without_tokenizer(folder, tmp_path):
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer" in refused("my-model", tmp_path)


def test_folder_without_config(folder, tmp_path):
    (folder / "config.json").unlink()
    assert "config.json" in refused("my-model", tmp_path)


def test_folder_with_a_broken_config(folder, tmp_path):
    (folder / "config.json").write_text("{")
    assert "config.json is not JSON" in refused("my-model", tmp_path)


def test_pickle_only_model_is_refused_with_the_reason(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    message = refused("my-model", tmp_path)
    assert "pytorch_model.bin" in message
    assert "can run any code" in message
    assert "convert" in message


def test_remote_code_is_refused_unless_the_recipe_says_so(folder, tmp_path):
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": {"AutoModel": "modeling_x.X"}}))
    assert "its own Python code" in refused("my-model", tmp_path, field="model.trust_remote_code")
    assert model_folder(Model(source="my-model", trust_remote_code=True), tmp_path) == folder


def test_unknown_scheme_and_embedded_name(tmp_path):
    assert "hf://" in refused("s3://bucket/model", tmp_path)
    assert "did you mean 'nano'?" in refused("ingot://nanoo", tmp_path)
    assert "organisation/name" in refused("hf://Qwen3-0.6B", tmp_path)


def test_package_source(tmp_path, monkeypatch, folder):
    assert "pip install not-there" in refused("package://not_there/model", tmp_path)
    package = tmp_path / "site" / "my_models"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    folder.rename(package / "model")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert model_folder(Model(source="package://my_models/model"), tmp_path) == package / "model"
    assert "no folder" in refused("package://my_models/other", tmp_path)


@pytest.mark.parametrize(
    "error", [OSError("Name or service not known"), RuntimeError("ConnectError")], ids=["os", "transport"]
)
def test_hub_model_offline_fails_at_once(tmp_path, monkeypatch, error):
    """The real loading code, with the network's answer replaced by what an offline machine says."""
    import huggingface_hub

    calls = []

    def unreachable(self, repo, **options):
        calls.append((repo, options["revision"], options["timeout"]))
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    message = refused("hf://Qwen/ingot-test-absent", tmp_path, revision="abc")
    assert "hub cannot be reached" in message
    assert "local folder" in message
    assert calls == [("Qwen/ingot-test-absent", "abc", 10)]


def test_the_embedded_encoder_decoder_has_no_weights(tmp_path):
    source = "ingot://nano-t5"
    assert "no *.safetensors" in refused(source, tmp_path)
    folder = model_folder(Model(source=source, initialization="random"), tmp_path, weights=False)
    tokenizer = load_tokenizer(Model(source=source), tmp_path)
    nano = load_tokenizer(Model(source="ingot://nano"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert tokenizer.get_vocab() == nano.get_vocab()
    assert len(tokenizer) == config["vocab_size"]
    assert tokenizer("a parcel")["input_ids"] == [*nano("a parcel")["input_ids"][1:], config["eos_token_id"]]
    assert tokenizer.pad_token_id == config["pad_token_id"] == config["decoder_start_token_id"]
