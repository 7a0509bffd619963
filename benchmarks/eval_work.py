"""What both contenders of `eval.py` are given: seeded models, a tokenizer of whole words, and documents.

The models are random Llamas, so their numbers mean nothing but can be compared. One is made to write a known chain of
words, so that answers end where they should, at very different lengths, whoever asks.
"""

import csv
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHARED = Path(__file__).resolve().parents[2] / "shared"
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
CHAIN = 256  # words of a chain; the last ends the answer
ANSWER = 250  # place of the word that holds the answer's number
UNTIL = ["Question:", "</s>", "<|im_end|>"]  # GSM8K's
REACH = 1024  # positions of the random models


class Size(NamedTuple):
    """Of the models and of what is asked of them."""

    hidden: int
    layers: int
    wide: int  # the large vocabulary
    narrow: int
    context: int  # words that the choices of a question share
    questions: int
    texts: int
    prompts: int
    new_tokens: int
    stories: int  # documents of each kind for the small real model


FULL = Size(512, 12, 128_000, 32_000, 500, 8, 5, 24, 256, 24)
QUICK = Size(32, 2, 1024, 512, 30, 3, 2, 4, 256, 3)


def word(index: int) -> str:
    """The vocabulary: a number in GSM8K's form, a stop, or a plain word."""
    if index < len(SPECIAL):
        return SPECIAL[index]
    if index % CHAIN == 0:
        return f"Question:{index}"
    return f"#### {index}" if index % CHAIN == ANSWER else f"w{index}"


def prepare(folder: Path, size: Size, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Write models, tokenizers and each case's documents; the cases by name."""
    draws = random.Random(seed)
    for name, vocabulary in (("narrow", size.narrow), ("wide", size.wide)):
        write_model(folder / name, vocabulary, size, chain=False)
    write_model(folder / "chain", size.narrow, size, chain=True)
    cases = {
        "choices_32k": case("narrow", "choices", questions(draws, size, size.narrow, (6, 14))),
        "choices_128k": case("wide", "choices", questions(draws, size, size.wide, (6, 14))),
        "one_token_32k": case("narrow", "choices", questions(draws, size, size.narrow, (1, 1))),
        "rolling_32k": case("narrow", "rolling", texts(draws, size)),
        "generation_32k": case("chain", "generation", prompts(draws, size), new_tokens=size.new_tokens),
        "exact_match_chain": case("chain", "generation", prompts(draws, size)[: size.stories // 2 + 2], new_tokens=256),
    }
    if (SHARED / "models/stories260k").is_dir():
        cases |= stories(size.stories)
    for name, found in cases.items():
        (folder / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
    return cases


def case(model: str, kind: str, documents: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"model": model, "kind": kind, "documents": documents, **more}


def write_model(folder: Path, vocabulary: int, size: Size, *, chain: bool) -> None:
    """A random Llama and its tokenizer. `chain`: it writes the word that comes next in the vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 11 // 4,
        num_hidden_layers=size.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=REACH,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=not chain,
    )
    model = LlamaForCausalLM(config)
    if chain:
        with torch.no_grad():
            embedding = model.model.embed_tokens.weight.normal_()
            model.lm_head.weight.copy_(embedding.roll(1, 0))
    model.save_pretrained(folder)
    words = {word(index): index for index in range(vocabulary)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)


def words(draws: random.Random, count: int, vocabulary: int) -> str:
    found = []
    while len(found) < count:
        index = draws.randrange(len(SPECIAL), vocabulary)
        if index % CHAIN not in (0, ANSWER):
            found.append(word(index))
    return " ".join(found)


def questions(draws: random.Random, size: Size, vocabulary: int, lengths: tuple[int, int]) -> list[dict[str, Any]]:
    """Four choices behind a context whose length differs by a twentieth."""
    spread = size.context // 20
    return [
        {
            "context": words(draws, size.context + draws.randint(-spread, spread), vocabulary),
            "choices": [words(draws, draws.randint(*lengths), vocabulary) for _ in range(4)],
            "gold": draws.randrange(4),
        }
        for _ in range(size.questions)
    ]


def texts(draws: random.Random, size: Size) -> list[dict[str, Any]]:
    """Texts of which some take several windows."""
    return [{"text": words(draws, draws.randint(REACH // 4, REACH * 3 // 2), size.narrow)} for _ in range(size.texts)]


def prompts(draws: random.Random, size: Size) -> list[dict[str, Any]]:
    """Prompts of 20 to 400 words; answers end after few words mostly, and seldom after many (some at the limit).

    A third of the targets is the number behind `####`, a third the answer's last number, a third neither.
    """
    found = []
    for number in range(size.prompts):
        length = min(CHAIN - 2, max(6, round(draws.lognormvariate(4.0, 0.9))))  # never from a number or a stop
        start = draws.randrange(1, size.narrow // CHAIN) * CHAIN + CHAIN - 1 - length
        written = list(range(start + 1, start + 1 + min(length, size.new_tokens)))
        marked = [index for index in written if index % CHAIN == ANSWER]
        target = [marked[0] if marked else written[-1], written[-1], 0][number % 3]
        prompt = f"{words(draws, draws.randint(20, 400) - 1, size.narrow)} {word(start)}"
        found.append({"prompt": prompt, "target": f"so #### {target}"})
    return found


def stories(count: int) -> dict[str, dict[str, Any]]:
    """Real texts for the small real model: restaurants, dialogues, word problems."""
    with (SHARED / "data/e2e/devset.csv").open(encoding="utf-8") as file:
        pairs = list(csv.DictReader(file))
    draws = random.Random(1)
    asked = []
    for row in draws.sample(pairs, count):
        others = draws.sample([one["ref"] for one in pairs if one["mr"] != row["mr"]], 3)
        gold = draws.randrange(4)
        asked.append({"context": row["mr"], "choices": [*others[:gold], row["ref"], *others[gold:]], "gold": gold})
    dialogues = [{"text": row["dialogue"]} for row in _lines("dialogsum/dev.jsonl")[:count]]
    problems = [
        {"prompt": f"Question: {row['question']}\nAnswer:", "target": row["answer"]}
        for row in _lines("gsm8k/train.jsonl")[:count]
    ]
    return {
        "choices_stories": case("stories260k", "choices", asked),
        "perplexity_stories": case("stories260k", "rolling", dialogues),
        "exact_match_stories": case("stories260k", "generation", problems, new_tokens=48),
    }


def _lines(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (SHARED / "data" / name).read_text(encoding="utf-8").splitlines()]


def model_folder(folder: Path, name: str) -> Path:
    return SHARED / "models/stories260k" if name == "stories260k" else folder / name
