"""Adapters over one base: each answers as its merged model does, whatever is asked beside it."""

import copy
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ingot.errors import ModelError
from ingot.model.adapters import with_saved_adapter
from ingot.model.runtime import Runtime
from ingot.model.side_by_side import side_by_side

PROMPTS = ["Hello!", "What is the capital of France?", "Thank you"]


def _adapter(base: Path, folder: Path, seed: int, **options: Any) -> Path:
    """An adapter over the model in `base` that changes its answers much."""
    runtime = Runtime.load(base)
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    model = get_peft_model(runtime.model, LoraConfig(**settings | options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture
def adapters(text_folder: Path, tmp_path: Path) -> dict[str, Path]:
    others: dict[str, Any] = {"target_modules": ["o_proj"], "r": 2, "use_dora": True}
    return {
        "letters.v1": _adapter(text_folder, tmp_path / "letters", 1),
        "poems": _adapter(text_folder, tmp_path / "poems", 2, **others),
    }


def _texts(runtime: Runtime) -> list[str]:
    return [runtime.complete(prompt, max_new_tokens=12).text for prompt in PROMPTS]


def test_each_answers_as_its_merged_model(text_folder: Path, adapters: dict[str, Path]) -> None:
    wanted = {"": _texts(Runtime.load(text_folder))}
    for name, folder in adapters.items():
        merged = Runtime.load(text_folder)
        merged.model = with_saved_adapter(merged.model, folder)
        wanted[name] = _texts(merged)
    assert len(set(map(tuple, wanted.values()))) == 3
    base, views = side_by_side(Runtime.load(text_folder), adapters)
    for _ in range(2):
        for name, runtime in {"": base, **views}.items():
            assert _texts(runtime) == wanted[name]
    # From threads of their own at the same time, token by token.
    found: dict[str, list[list[str]]] = {name: [] for name in wanted}

    def ask(name: str, runtime: Runtime) -> None:
        for _ in range(4):
            found[name].append(_texts(runtime))

    threads = [threading.Thread(target=ask, args=it) for it in {"": base, **views}.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: [texts] * 4 for name, texts in wanted.items()}


def test_the_base_is_in_memory_once(text_folder: Path, adapters: dict[str, Path]) -> None:
    alone = sum(it.numel() for it in Runtime.load(text_folder).model.parameters())
    base, views = side_by_side(Runtime.load(text_folder), adapters)
    stores = {id(it): it.numel() for one in (base, *views.values()) for it in one.model.parameters()}
    saved = sum(path.stat().st_size for folder in adapters.values() for path in folder.glob("*.safetensors")) // 4
    assert alone < sum(stores.values()) <= alone + saved


def test_a_classifiers_head_belongs_to_its_adapter(head_folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["score"], "task_type": "SEQ_CLS"}
    folders = {
        name: _adapter(head_folder, tmp_path / name, seed, **options) for seed, name in enumerate(("one", "two"))
    }
    for seed, folder in enumerate(folders.values()):  # heads that differ
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "adapter_model.safetensors")
        torch.manual_seed(seed)
        changed = {name: torch.randn_like(it) if "score" in name else it for name, it in tensors.items()}
        save_file(changed, folder / "adapter_model.safetensors")
    base, views = side_by_side(Runtime.load(head_folder), folders)
    rows = [{"text": prompt} for prompt in PROMPTS]
    for name, folder in folders.items():
        merged = Runtime.load(head_folder)
        model = with_saved_adapter(merged.model, folder)
        wanted = Runtime(model, merged.tokenizer, merged.about).answer(rows, {})
        found = views[name].answer(rows, {})
        assert [row["label"] for row in found] == [row["label"] for row in wanted]
        assert [row["probability"] for row in found] == pytest.approx([row["probability"] for row in wanted], abs=1e-5)
    assert base.answer(rows, {}) == Runtime.load(head_folder).answer(rows, {})


def _edited(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "only LORA"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa"}, "base's own weights"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
    ],
)
def test_what_would_change_the_others_is_refused(
    text_folder: Path, adapters: dict[str, Path], fields: dict[str, Any], words: str
) -> None:
    _edited(adapters["poems"], **fields)
    with pytest.raises(ModelError, match=rf"--adapter = 'poems': .*{words}"):
        side_by_side(Runtime.load(text_folder), adapters)


def test_what_is_no_adapter_of_this_base(text_folder: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    base = Runtime.load(text_folder)
    with pytest.raises(ModelError, match="adapter_config"):
        side_by_side(base, {"poems": tmp_path})
    other = copy.deepcopy(adapters)
    _edited(other["poems"], r=3)
    with pytest.raises(ModelError, match="does not fit"):
        side_by_side(base, other)
    _edited(other["letters.v1"], target_modules=["q_proj"])
    with pytest.raises(ModelError, match="no place in the base model"):
        side_by_side(Runtime.load(text_folder), {"letters.v1": other["letters.v1"]})
    (tmp_path / "letters" / "adapter_model.safetensors").rename(tmp_path / "letters" / "adapter_model.bin")
    with pytest.raises(ModelError, match="never opened"):
        side_by_side(Runtime.load(text_folder), {"poems": tmp_path / "letters"})


def test_an_adapter_may_bring_its_own_tokenizer(
    text_folder: Path, adapters: dict[str, Path], make_tokenizer: Callable[..., Any]
) -> None:
    make_tokenizer().save_pretrained(adapters["poems"])
    _, views = side_by_side(Runtime.load(text_folder), adapters)
    assert views["poems"].tokenizer.chat_template
    assert not views["letters.v1"].tokenizer.chat_template
