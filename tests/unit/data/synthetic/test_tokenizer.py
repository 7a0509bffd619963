"""The embedded model's folder: tokenizer, template and configuration belong together."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

import ingot
from ingot.data.conversation import Conversation, Message
from ingot.data.synthetic import generate
from ingot.data.synthetic.tokenizer import CHAT_TEMPLATE, VOCABULARY, build
from ingot.data.template import encode, prompt_ids
from ingot.recipe import Data, Objective

NANO = Path(ingot.__file__).parent / "catalog" / "nano"
CHAT = Conversation((Message("system", "Be brief."), Message("user", "Pay 45."), Message("assistant", '{"a": 45.5}')))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(NANO, local_files_only=True)


@pytest.mark.parametrize("text", ["Müller owes 45.50 €.", "\t日本\n\n  🙂", '{"a": [1, null]}', "don't  stop"])
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_every_digit_is_a_token(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("2027-03") == ["2", "0", "2", "7", "-", "0", "3"]
    assert not [token for token in tokenizer.get_vocab() if any(c in "0123456789" for c in token) and len(token) > 1]


def test_special_tokens_are_distinct_and_known_to_the_configuration(tokenizer: PreTrainedTokenizerBase) -> None:
    config = AutoConfig.from_pretrained(NANO, local_files_only=True)
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    assert config.vocab_size == VOCABULARY == len(tokenizer)
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<|end|>"


def test_answer_and_stop_token_are_learned_and_nothing_else(tokenizer: PreTrainedTokenizerBase) -> None:
    data = Data.model_validate({"train": "x"})
    row = encode(CHAT, tokenizer, data, Objective(), ())
    learned = [token for token, kept in zip(row.ids, row.trainable, strict=True) if kept]
    assert tokenizer.decode(learned) == '{"a": 45.5}<|end|>'
    assert row.ids.count(tokenizer.bos_token_id) == 1
    prompt = prompt_ids(CHAT, tokenizer, data, Objective())
    assert row.ids[: len(prompt)] == prompt
    assert tokenizer.decode(prompt).endswith("<|assistant|>")


def test_rows_of_tool_calls_are_short(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in generate("tool-calls", "train")]
    assert max(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]) <= 110


def test_building_again_gives_the_shipped_files(tmp_path: Path) -> None:
    build(tmp_path)
    for name in ("tokenizer.json", "config.json", "generation_config.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text("utf-8")) == json.loads((NANO / name).read_text("utf-8")), name
    assert (NANO / "chat_template.jinja").read_text("utf-8") == CHAT_TEMPLATE


def test_the_folder_is_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in NANO.iterdir()) < 12_000_000
