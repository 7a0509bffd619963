"""A tiny Llama and random rows: the training core needs no files."""

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ingot.data.plan import PlannedFeed
from ingot.data.rows import ListRows
from ingot.data.template import Encoded
from ingot.parallel.sharded import Sharded
from ingot.parallel.strategies import parallelize
from ingot.ranks import Ranks
from ingot.recipe import Recipe
from ingot.recipe_io import parse_recipe
from ingot.train.checkpoint import Checkpoints
from ingot.train.loop import Rows, fit

VOCABULARY = 97


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        attn_implementation="ingot",
    )
    return LlamaForCausalLM(config)


def random_rows(n: int, seed: int = 1) -> list[Encoded]:
    """Rows of uneven length with a masked prompt of uneven length: what makes means of means go wrong."""
    draw = random.Random(seed)
    rows = []
    for number in range(n):
        length = draw.randint(4, 24)
        prompt = draw.randint(1, length - 2)
        ids = [draw.randrange(3, VOCABULARY) for _ in range(length)]
        rows.append(Encoded(ids, [position >= prompt for position in range(length)], None, f"row:{number}"))
    return rows


@pytest.fixture
def row_lists() -> tuple[list[Encoded], list[Encoded]]:
    """Rows to learn from and to watch."""
    return random_rows(60), random_rows(10, seed=2)


def feed_of(lists: tuple[list[Encoded], list[Encoded]], recipe: Recipe) -> Rows:
    """What the loop takes, for a recipe."""
    train, watched = lists
    return Rows(PlannedFeed(ListRows(train), recipe.data, recipe.train), ListRows(watched), pad_id=0)


def single_rank(recipe: Recipe, seed: int = 0) -> Sharded:
    return parallelize(tiny_llama(seed), Ranks(), recipe, torch.device("cpu"), torch.float32)


@pytest.fixture
def sharded() -> Sharded:
    return single_rank(recipe())


def recipe(**sections: dict) -> Recipe:
    """A recipe for the loop alone; its model and data are never opened."""
    train = {"max_steps": 20, "tokens_per_step": 120, "tokens_per_microbatch": 64, **sections.pop("train", {})}
    data = {"train": "unused", "max_tokens": 32, "batches": "padded", **sections.pop("data", {})}
    return parse_recipe(
        {
            "name": "loop",
            "model": {"source": "unused"},
            "data": data,
            "objective": {"task": "language-modeling"},
            "adapter": {"kind": "none"},
            "parallel": {"strategy": "none"},
            "optim": {"lr": 3e-3, "weight_decay": 0.1, **sections.pop("optim", {})},
            "train": train,
            **sections,
        }
    )


@pytest.fixture
def make_recipe():
    return recipe


@pytest.fixture
def make_model():
    return tiny_llama


@pytest.fixture
def make_feed():
    return feed_of


@pytest.fixture
def make_sharded():
    return single_rank


@pytest.fixture
def curve(tmp_path):
    """curve(sharded, row_lists, recipe, name="", **options of fit) -> every loss; checkpoints in tmp_path/name."""

    def train(sharded, lists, recipe, name="", **options):
        losses = []
        checkpoints = Checkpoints(tmp_path / name, sharded.layout.ranks, "hash", recipe.train.keep_checkpoints)
        on_step = (*options.pop("on_step", ()), lambda info: losses.append(info.loss))
        fit(sharded, feed_of(lists, recipe), recipe, checkpoints, on_step=on_step, **options)
        return losses

    return train


def random_pairs(n: int, seed: int = 1) -> list[Encoded]:
    """Pairs of uneven answers to prompts of uneven length. Chosen answers are of low ids, rejected ones of high ids."""
    draw, rows = random.Random(seed), []
    for number in range(n):
        prompt = [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 8))]
        chosen = [draw.randrange(3, 40) for _ in range(draw.randint(1, 9))]
        rejected = [draw.randrange(60, VOCABULARY) for _ in range(draw.randint(1, 9))]
        trainable = [flag for answer in (chosen, rejected) for flag in [False] * len(prompt) + [True] * len(answer)]
        parts = len(prompt) + len(chosen), len(prompt) + len(rejected)
        reference = (-draw.random() * 9, -draw.random() * 9)
        ids = prompt + chosen + prompt + rejected
        rows.append(Encoded(ids, trainable, None, f"row:{number}", parts, len(chosen), reference))
    return rows


@pytest.fixture
def pair_rows():
    return random_pairs
