import dataclasses
import time

import pytest
from transformers import AutoTokenizer

from ingot.data.conversation import Conversation, Document, Message, PromptCompletion
from ingot.data.labeled import Labeled
from ingot.data.template import DroppedReport, encode, encode_all, prompt_ids, prompt_text, reference_text, request_of
from ingot.errors import DataError, ModelError
from ingot.recipe import Data, Objective

GENERATION, LANGUAGE, CLASSES = (
    Objective(task=task) for task in ("text-generation", "language-modeling", "text-classification")
)
DATA = Data(train="f")
PAIRS = [
    ("name[X], area[city]", "X is in the city."),
    ("Question: what?", " An answer"),
    ("Translate: ", "ein Hund"),
    ("Answer:\n", "Paris"),
    ("Two spaces  ", "here"),
    ("tab\t", "x"),
    ("é 😀", "😀 é"),
    ("What is", "the capital\nof France?"),
]


def encoded(prompt: str, completion: str, tokenizer, data: Data = DATA):
    return encode(PromptCompletion(prompt, completion, "f:1"), tokenizer, data, GENERATION, ())


def learned(row) -> list[int]:
    return [token for token, on in zip(row.ids, row.trainable, strict=True) if on]


@pytest.fixture
def stories(shared_dir):
    return AutoTokenizer.from_pretrained(shared_dir / "models" / "stories260k")


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
@pytest.mark.parametrize("kind", ["bytes", "bytes trimmed", "bytes with bos", "stories"])
def test_the_model_is_asked_with_the_tokens_it_was_trained_behind(kind, prompt, completion, make_tokenizer, request):
    if kind == "stories":
        tokenizer = request.getfixturevalue("stories")
    else:
        tokenizer = make_tokenizer(trim_offsets="trimmed" in kind, adds_bos="bos" in kind)
    row = encoded(prompt, completion, tokenizer)
    asked = prompt_ids(PromptCompletion(prompt, completion), tokenizer, DATA, GENERATION)
    assert row.ids[: len(asked)] == asked
    assert row.trainable == [False] * len(asked) + [True] * (len(row.ids) - len(asked))
    assert tokenizer.decode(row.ids[len(asked) : -1]).strip() == completion.strip()
    assert row.ids[-1] == tokenizer.eos_token_id
    assert row.ids.count(tokenizer.eos_token_id) == 1
    has_bos = kind in ("bytes with bos", "stories")
    assert row.ids.count(tokenizer.bos_token_id) == has_bos
    assert (row.ids[0] == tokenizer.bos_token_id) == has_bos


def test_one_space_is_put_between_and_only_where_there_is_none(tiny_tokenizer):
    assert tiny_tokenizer.decode(encoded("a", "b", tiny_tokenizer).ids) == "a b</s>"
    assert tiny_tokenizer.decode(encoded("a\n", "b", tiny_tokenizer).ids) == "a\nb</s>"
    assert tiny_tokenizer.decode(encoded("a", "\nb", tiny_tokenizer).ids) == "a\nb</s>"


def test_the_stop_token_is_learned_when_it_is_the_pad_token_too(make_tokenizer):
    tokenizer = make_tokenizer(pad_token="</s>")
    row = encoded("a", "b", tokenizer)
    assert tokenizer.pad_token_id == row.ids[-1]
    assert row.trainable[-1]


def test_special_tokens_that_the_text_brings_are_not_doubled(make_tokenizer):
    tokenizer = make_tokenizer(adds_bos=True)
    row = encoded("<s>a", "b</s>", tokenizer)
    assert row.ids.count(tokenizer.bos_token_id) == 1
    assert row.ids.count(tokenizer.eos_token_id) == 1
    assert row.trainable[-1]
    document = encode(Document("<s>a</s>"), tokenizer, DATA, LANGUAGE, ())
    assert document.ids == tokenizer.convert_tokens_to_ids(["<s>", "a", "</s>"])
    assert document.trainable == [False, True, True]


def test_documents_learn_every_token_and_one_stop(make_tokenizer):
    tokenizer = make_tokenizer(adds_bos=True)
    row = encode(Document("Hello</s>you", "f:1"), tokenizer, DATA, LANGUAGE, ())
    assert row.ids[0] == tokenizer.bos_token_id
    assert row.ids.count(tokenizer.eos_token_id) == 2  # one in the text, one at its end
    assert row.trainable == [False] + [True] * (len(row.ids) - 1)
    assert all(encode(Document("a b"), make_tokenizer(), DATA, LANGUAGE, ()).trainable)


def test_a_tokenizer_without_eos_cannot_teach_to_stop(make_tokenizer):
    tokenizer = make_tokenizer(eos_token=None)
    with pytest.raises(ModelError, match="no eos token"):
        encoded("a", "b", tokenizer)


def test_classification_keeps_the_closing_special_token_when_cut(make_tokenizer):
    from tokenizers import processors

    tokenizer = make_tokenizer()
    frame = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=frame
    )
    rows = [Labeled("Hello! How can I help you today?", "b", "f:1"), Labeled("a", "a", "f:2")]
    short = DATA.model_copy(update={"max_tokens": 5})
    (first, second), report = encode_all(rows, tokenizer, short, CLASSES, ("a", "b"))
    assert (first.labels, second.labels) == ([1], [0])
    assert len(first.ids) == 5
    assert (first.ids[0], first.ids[-1]) == (1, 2)
    assert not any(first.trainable)
    assert report.as_dict() == {"total": 2, "truncated": 1, "dropped": 0, "where": []}
    assert prompt_ids(rows[1], tokenizer, DATA, CLASSES) == second.ids


def test_a_label_that_is_not_known(tiny_tokenizer):
    with pytest.raises(DataError, match="did you mean 'card'") as caught:
        encode(Labeled("x", "cart", "f:3"), tiny_tokenizer, DATA, CLASSES, ("card", "refund"))
    assert caught.value.where == "f:3"


def test_truncation_takes_the_end_and_rows_without_a_target_are_dropped_and_counted(tiny_tokenizer):
    rows = [PromptCompletion("word " * (1 if n % 2 else 40), "yes and no", f"f:{n}") for n in range(60)]
    kept, report = encode_all(rows, tiny_tokenizer, DATA.model_copy(update={"max_tokens": 12}), GENERATION, ())
    assert [row.where for row in kept] == [f"f:{n}" for n in range(60) if n % 2]
    assert report.count == 30
    assert report.total == 60
    assert report.where == [f"f:{n}" for n in range(0, 40, 2)]
    assert all(len(row.ids) <= 12 and any(row.trainable) for row in kept)
    full = encoded("word ", "yes and no", tiny_tokenizer)
    cut = encoded("word ", "yes and no", tiny_tokenizer, DATA.model_copy(update={"max_tokens": len(full.ids) - 2}))
    assert cut.ids == full.ids[:-2]
    assert cut.trainable == full.trainable[:-2]


def test_a_row_with_its_first_token_alone_teaches_nothing(tiny_tokenizer):
    one = DATA.model_copy(update={"max_tokens": 1})
    assert encode_all([Document("hello you")], tiny_tokenizer, one, LANGUAGE, ()) == (
        [],
        DroppedReport(total=1, truncated=1, count=1, where=[""]),
    )


def test_batches_give_what_single_rows_give(tiny_tokenizer):
    rows = [PromptCompletion(prompt, completion, f"f:{n}") for n, (prompt, completion) in enumerate(PAIRS * 300)]
    told = []
    kept, _ = encode_all(rows, tiny_tokenizer, DATA, GENERATION, (), lambda done, total: told.append((done, total)))
    assert kept[:8] == [encode(row, tiny_tokenizer, DATA, GENERATION, ()) for row in rows[:8]]
    assert [row.where for row in kept] == [row.where for row in rows]
    assert told == [(1000, 2400), (2000, 2400), (2400, 2400)]
    assert encode_all([], tiny_tokenizer, DATA, GENERATION, ())[0] == []


@pytest.mark.parametrize("objective", [GENERATION, Objective(task="chat-completion"), LANGUAGE, CLASSES])
def test_ten_thousand_short_rows_take_seconds(objective, plain_tokenizer):
    chat = Conversation((Message("user", "What is the capital of France?"), Message("assistant", "Paris.")))
    row = {
        "text-generation": PromptCompletion("What is the capital of France?", "Paris."),
        "chat-completion": chat,
        "language-modeling": Document("Paris is the capital of France."),
        "text-classification": Labeled("What is the capital?", "a"),
    }[objective.task]
    start = time.process_time()
    kept, _ = encode_all([dataclasses.replace(row) for _ in range(10_000)], plain_tokenizer, DATA, objective, ("a",))
    assert len(kept) == 10_000
    assert time.process_time() - start < 6  # 3 s on an idle machine


def test_references():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    user = Message("user", "hi")
    assert (
        reference_text(Conversation((user, Message("assistant", "one"), user, Message("assistant", "two"), user)))
        == "two"
    )
    assert (
        reference_text(Conversation((user, Message("assistant", "", (call,)))))
        == '{"name": "add", "arguments": {"a": 1}}'
    )
    assert reference_text(PromptCompletion("a", " b")) == " b"
    assert reference_text(Labeled("a", "b")) == "b"
    assert reference_text(Document("a")) == "a"


def test_documents_cannot_be_asked(tiny_tokenizer):
    with pytest.raises(DataError, match="no prompt"):
        prompt_ids(Document("a"), tiny_tokenizer, DATA, LANGUAGE)


def test_real_pairs_through_a_real_tokenizer(shared_dir, stories):
    from ingot.data.splits import load_splits
    from ingot.recipe import Recipe

    data = {"train": "e2e/devset.csv", "columns": {"prompt": "mr", "completion": "ref"}, "max_train_rows": 200}
    recipe = Recipe.model_validate(
        {"name": "t", "model": {"source": "x"}, "data": data, "objective": {"task": "text-generation"}}
    )
    rows = load_splits(recipe, shared_dir / "data").train
    kept, report = encode_all(rows, stories, recipe.data, recipe.objective, ())
    assert report.count == 0
    for row, example in zip(kept, rows, strict=True):
        asked = prompt_ids(example, stories, recipe.data, recipe.objective)
        assert row.ids[: len(asked)] == asked
        assert learned(row) == row.ids[len(asked) :]
        assert stories.decode(learned(row)[:-1]).strip() == example.completion.strip()


def test_what_people_and_endpoints_are_shown():
    turns = (Message("system", "Be brief."), Message("user", "hi"), Message("assistant", "one"), Message("user", "bye"))
    conversation = Conversation((*turns, Message("assistant", "two")))
    assert prompt_text(conversation) == "bye"
    assert request_of(conversation, "chat-completion") == {"messages": [turn.as_dict() for turn in turns]}
    assert prompt_text(PromptCompletion("a ", "b")) == "a"
    assert request_of(PromptCompletion("a", "b"), "text-generation") == {"input_string": "a"}
    assert request_of(Labeled("a", "b"), "text-classification") == {"text": "a"}
    assert request_of(Document("1 2 3 4 5 6 7 8 9"), "language-modeling") == {"input_string": "1 2 3 4 5 6 7 8"}
