"""The `transformers` flavour stands only where mlflow's own loader gives the answers that the package gives."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from every_task import folder_of, packaged

from ingot.model.runtime import Runtime
from ingot.packaging.bundle import Origin


def _packaged(folder: Path, out: Path, task: str, example: dict[str, Any], form: str = "merged") -> Path:
    found = packaged(folder, out, task=task, example_input=example, origin=Origin(form=form))
    (found / "manifest.json").unlink()  # mlflow is not to be kept from anything here
    return found


def _load(package: Path) -> Any:
    import mlflow.transformers

    return mlflow.transformers.load_model(str(package))


def test_text_generation(text_folder: Path, tmp_path: Path) -> None:
    pipe = _load(_packaged(text_folder, tmp_path / "p", "text-generation", {"input_string": "Hello!"}))
    wanted = Runtime.load(text_folder).complete("What is the", max_new_tokens=8).text
    assert wanted
    found = pipe("What is the", max_new_tokens=8, do_sample=False, return_full_text=False)
    assert found[0]["generated_text"] == wanted


def test_chat(chat_folder: Path, tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
    pipe = _load(_packaged(chat_folder, tmp_path / "p", "chat-completion", {"input_string": "Hello!"}))
    wanted = Runtime.load(chat_folder).chat(turns, max_new_tokens=8).text
    found = pipe(turns, max_new_tokens=8, do_sample=False)
    assert found[0]["generated_text"][-1]["content"] == wanted


def test_classification_with_its_own_head(head_folder: Path, tmp_path: Path) -> None:
    config = json.loads((head_folder / "config.json").read_text())
    config |= {"id2label": {"0": "bad", "1": "fair", "2": "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
    (head_folder / "config.json").write_text(json.dumps(config))
    pipe = _load(_packaged(head_folder, tmp_path / "p", "text-classification", {"text": "Hello!"}))
    [(label, probs)] = Runtime.load(head_folder).classify(["Thank you very much"])
    [found] = pipe(["Thank you very much"])
    assert found["label"] == label
    assert found["score"] == pytest.approx(probs[label], abs=1e-5)


def test_token_classification(make_tokenizer: Callable[..., Any], tmp_path: Path) -> None:
    folder = folder_of("token-classification", make_tokenizer(), tmp_path / "m")
    row = {"text": "Paris is the capital of France"}
    pipe = _load(_packaged(folder, tmp_path / "p", "token-classification", row))
    tokens = pipe(row["text"], aggregation_strategy="none", ignore_labels=[])
    starts = [match.start() for match in re.finditer(r"\S+", row["text"])]
    # Ours is a tag a word, that of its first token.
    found = [next(it["entity"] for it in tokens if it["start"] <= at < it["end"]) for at in starts]
    assert found == Runtime.load(folder).answer([row])[0]["tags"]
    assert len(set(found)) > 1


def test_fill_mask(make_tokenizer: Callable[..., Any], tmp_path: Path) -> None:
    folder = folder_of("fill-mask", make_tokenizer(mask_token="<|im_start|>"), tmp_path / "m")
    row = {"text": "The quick <|im_start|> fox"}
    pipe = _load(_packaged(folder, tmp_path / "p", "fill-mask", row))
    wanted = Runtime.load(folder).answer([row], {"top_k": 3})[0]["candidates"]
    found = pipe(row["text"], top_k=3)
    assert [it["token_str"].strip() for it in found] == [it["token"].strip() for it in wanted]
    assert [it["score"] for it in found] == pytest.approx([it["probability"] for it in wanted], rel=1e-4)


@pytest.mark.parametrize("form", ["quantized"])
def test_other_forms_have_none(text_folder: Path, tmp_path: Path, form: str) -> None:
    out = _packaged(text_folder, tmp_path / "p", "text-generation", {"input_string": "Hello!"}, form)
    assert set(yaml.safe_load((out / "MLmodel").read_text())["flavors"]) == {"python_function"}
    assert not (out / "components").exists()


def test_mean_pooling_has_none(mean_folder: Path, tmp_path: Path) -> None:
    # transformers would load the encoder under a head of random weights
    out = _packaged(mean_folder, tmp_path / "p", "text-classification", {"text": "Hello!"})
    assert set(yaml.safe_load((out / "MLmodel").read_text())["flavors"]) == {"python_function"}


def test_the_tokenizer_is_linked(text_folder: Path, tmp_path: Path, make_tokenizer: Callable[..., Any]) -> None:
    out = _packaged(text_folder, tmp_path / "p", "text-generation", {"input_string": "Hello!"})
    assert (out / "components/tokenizer/tokenizer.json").samefile(out / "model/tokenizer.json")
    assert torch.is_tensor(_load(out).model.get_input_embeddings().weight)
