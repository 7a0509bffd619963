"""Written targets: greedy, the same in every batch, cut and scored as the recipe says."""

import time
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, BartConfig, NllbTokenizer, T5Config

from ingot.data.conversation import SourceTarget
from ingot.evaluation.measure import measure
from ingot.model.targets import write
from ingot.recipe_io import parse_recipe

SOURCES = ["hello there", "what is the capital of France?", "a", "the quick brown fox jumps over the lazy dog"]


@pytest.fixture(params=["t5", "bart"])
def model(request, tiny_tokenizer):
    torch.manual_seed(0)
    named = {"vocab_size": len(tiny_tokenizer), "d_model": 32, "pad_token_id": 0, "eos_token_id": 2}
    if request.param == "t5":
        config = T5Config(**named, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    else:
        sizes = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 2, "decoder_layers": 2}
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 2}
        config = BartConfig(
            **named,
            **sizes,
            **heads,
            max_position_embeddings=64,
            init_std=0.3,
            tie_word_embeddings=False,
            forced_eos_token_id=None,
        )
    return AutoModelForSeq2SeqLM.from_config(config, attn_implementation="ingot").eval()


def greedy(model, ids, steps, forced=None):
    """By the definition: the whole decoder again for every token."""
    source = torch.tensor([ids])
    written = [model.config.decoder_start_token_id]
    for step in range(steps):
        logits = model(input_ids=source, decoder_input_ids=torch.tensor([written]), use_cache=False).logits
        written.append(forced if step == 0 and forced is not None else int(logits[0, -1].argmax()))
        if written[-1] == model.config.eos_token_id:
            break
    return written[1:]


def test_writes_what_is_most_likely_in_any_batch(model, tiny_tokenizer):
    sources = [tiny_tokenizer(text)["input_ids"] for text in SOURCES]
    forced = getattr(model.generation_config, "forced_bos_token_id", None)
    expected = [
        tiny_tokenizer.decode(greedy(model, ids, 8, forced), skip_special_tokens=True).strip() for ids in sources
    ]
    assert len(set(expected)) > 1
    seen = []
    for tokens in (1, 60, 10_000):
        assert write(model, tiny_tokenizer, sources, 8, tokens, seen.append) == expected
    assert sum(seen) == 3 * len(sources)
    assert seen[:4] == [1, 1, 1, 1]
    assert seen[-1] == 4


def test_the_first_token_is_the_tokenizers_where_the_model_names_none():
    asked = []

    class Model(torch.nn.Linear):
        generation_config = SimpleNamespace(forced_bos_token_id=None)

        def generate(self, **options):
            asked.append(options["forced_bos_token_id"])
            return torch.tensor([[0]])

    model, nllb = Model(1, 1), NllbTokenizer(vocab=None, src_lang="deu_Latn", tgt_lang="eng_Latn")
    write(model, nllb, [[5]], 4, 100)
    model.generation_config.forced_bos_token_id = 7
    write(model, nllb, [[5]], 4, 100)
    assert asked == [nllb.convert_tokens_to_ids("eng_Latn"), 7]


def recipe_of(task, **evaluate):
    return parse_recipe(
        {
            "name": "a",
            "model": {"source": "unused"},
            "data": {"train": "unused", "max_tokens": 6},
            "objective": {"task": task},
            "evaluate": {"max_new_tokens": 5, "bootstrap_samples": 100, **evaluate},
        }
    )


def test_measures_each_task_by_its_metrics(model, tiny_tokenizer):
    rows = [SourceTarget(text, f"the target number {n} of all", f"row:{n}") for n, text in enumerate(SOURCES)]
    names = {}
    for task in ("summarization", "translation"):
        found = measure("base", model, tiny_tokenizer, rows, (), recipe_of(task))
        names[task] = list(found.scores)
        assert [row.id for row in found.samples] == [row.where for row in rows]
        cut = tiny_tokenizer(SOURCES[3])["input_ids"][:6]
        assert found.samples[3].prediction == write(model, tiny_tokenizer, [cut], 5, 100)[0]
        assert found.seconds <= time.perf_counter()
    assert names == {"summarization": ["rouge1", "rouge2", "rougeL", "rougeLsum"], "translation": ["bleu", "chrf"]}


def test_rows_of_one_source_are_its_references(model, tiny_tokenizer):
    rows = [SourceTarget("hello", f"the target number {n} of all", f"row:{n}") for n in range(3)]
    found = measure("base", model, tiny_tokenizer, rows, (), recipe_of("summarization", merge_references=True))
    assert [len(row.references) for row in found.samples] == [3]
