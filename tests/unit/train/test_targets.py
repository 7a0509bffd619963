"""The loss of encoder-decoders against transformers' own, cut into microbatches, learned, adapted and merged."""

import random

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, BartConfig, M2M100Config, PegasusConfig, T5Config

from ingot.data.encoded import Encoded
from ingot.data.loader import IGNORE, batches_of, muted
from ingot.data.plan import Cursor, Divisor
from ingot.data.targets import collate_targets
from ingot.model import adapters
from ingot.model.export import probes
from ingot.parallel.recompute import recompute_blocks
from ingot.parallel.strategies import parallelize
from ingot.ranks import Ranks
from ingot.recipe import Adapter
from ingot.train.memory import Load
from ingot.train.targets import target_tokens

VOCABULARY = 97
NAMED = {"vocab_size": VOCABULARY, "d_model": 32, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
SIZES = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "dropout": 0.0}
KINDS = {
    "t5": T5Config(**NAMED, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0),
    "t5-gated": T5Config(**NAMED, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"),
    "bart": BartConfig(**NAMED, **LAYERS, **SIZES),
    "pegasus": PegasusConfig(**NAMED, **LAYERS, **SIZES),
    "m2m100": M2M100Config(**NAMED, **LAYERS, **SIZES),  # has no method that shifts
}


def model_of(kind, seed=0):
    torch.manual_seed(seed)
    return AutoModelForSeq2SeqLM.from_config(KINDS[kind], attn_implementation="ingot").eval()


def rows_of(n, seed=1, *, copied=False):
    """Rows of uneven sources and targets; `copied`: the target is the source."""
    draw, rows = random.Random(seed), []
    for number in range(n):
        source = [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(3, 12))] + [1]
        target = source if copied else [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(2, 9))] + [1]
        learned = [False] * len(source) + [True] * len(target)
        rows.append(Encoded(source + target, learned, None, f"row:{number}", (len(source), len(target))))
    return rows


@pytest.fixture
def seq2seq(make_recipe):
    """seq2seq(**sections) -> a recipe of a translation."""

    def make(**sections):
        sections["data"] = {"max_tokens": 20, "max_target_tokens": 20, **sections.get("data", {})}
        return make_recipe(**{"objective": {"task": "translation"}, **sections})

    return make


def sharded_of(kind, recipe, adapter=None):
    model = model_of(kind)
    if adapter is not None:
        model = adapters.attach_adapter(model, adapter, "translation", 0)
        with torch.no_grad():  # B starts at zero, and with it the gradient of A
            for name, parameter in adapters.trainable_tensors(model):
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    return parallelize(model, Ranks(), recipe, torch.device("cpu"), torch.float32)


def gradient(sharded):
    return {name: p.grad.clone() for name, p in adapters.trainable_tensors(sharded.plain)}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_models_own_loss(kind, seq2seq):
    recipe, rows = seq2seq(), rows_of(5)
    sharded, batch = sharded_of(kind, recipe), collate_targets(rows, 0)
    loss = target_tokens(sharded, batch, Divisor(batch.n_targets, 5), recipe.objective)
    sharded.backward(loss)
    model = model_of(kind)
    expected = model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT, labels=batch.targets_BU).loss
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    found = gradient(sharded)
    assert len(found) > 20
    for name, parameter in adapters.trainable_tensors(model):  # Pegasus has positions that are not learned
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-5, msg=name)


def test_label_smoothing_is_torchs(seq2seq):
    recipe, rows = seq2seq(objective={"task": "translation", "label_smoothing": 0.1}), rows_of(4)
    sharded, batch = sharded_of("bart", recipe), collate_targets(rows, 0)
    loss = target_tokens(sharded, batch, Divisor(batch.n_targets, 4), recipe.objective)
    output = model_of("bart")(input_ids=batch.ids_BT, attention_mask=batch.attention_BT, labels=batch.targets_BU)
    expected = torch.nn.CrossEntropyLoss(label_smoothing=0.1)(output.logits.flatten(0, 1), batch.targets_BU.flatten())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert abs(loss.item() - output.loss.item()) > 1e-3


@pytest.mark.parametrize("kind", ["t5", "bart", "m2m100"])
def test_gradient_does_not_depend_on_how_the_batch_is_cut(kind, seq2seq, make_feed):
    recipe = seq2seq(train={"tokens_per_step": 300})
    portion = next(iter(make_feed((rows_of(40), []), recipe).train.start(Cursor())))
    found = []
    for world, budget in ((1, 10_000), (1, 40), (3, 50)):
        sharded = sharded_of(kind, recipe)
        for rank in range(world):
            parts = batches_of(portion, rank, world, budget, flat=False, even=True)
            for batch in [collate_targets(part, 0) for part in parts]:
                sharded.backward(target_tokens(sharded, batch, portion.divisor, recipe.objective))
        found.append(gradient(sharded))
    for name, whole in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[name], whole, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["t5", "m2m100"])
def test_a_muted_row_adds_exactly_nothing(kind, seq2seq):
    recipe, [row] = seq2seq(), rows_of(1)
    sharded = sharded_of(kind, recipe)
    loss = target_tokens(sharded, collate_targets([muted(row)], 0), Divisor(7, 1), recipe.objective)
    sharded.backward(loss)
    assert loss.item() == 0
    assert all(bool((g == 0).all()) for g in gradient(sharded).values())


def test_learns_to_copy(seq2seq, curve):
    train = {"max_steps": 60, "tokens_per_step": 200, "tokens_per_microbatch": 200}
    recipe = seq2seq(train=train, optim={"lr": 1e-2, "weight_decay": 0.0})
    losses = curve(sharded_of("t5", recipe), (rows_of(8, copied=True), rows_of(2, 2, copied=True)), recipe)
    assert losses[0] > 4
    assert losses[-1] < 1, "8 rows should be known by heart"


def test_recomputing_blocks_changes_no_gradient(seq2seq):
    recipe, batch = seq2seq(), collate_targets(rows_of(4), 0)
    found = []
    for recompute in (False, True):
        sharded = sharded_of("t5", recipe, Adapter(rank=4))
        if recompute:
            recompute_blocks(sharded.plain)
        sharded.plain.train()
        sharded.backward(target_tokens(sharded, batch, Divisor(batch.n_targets, 4), recipe.objective))
        found.append(gradient(sharded))
    assert found[0]
    for name, plain in found[0].items():
        torch.testing.assert_close(found[1][name], plain, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_adapters_reach_encoder_and_decoder_and_merge(kind, seq2seq):
    recipe, rows = seq2seq(), rows_of(3)
    sharded, batch = sharded_of(kind, recipe, Adapter(rank=4)), collate_targets(rows, 0)
    sharded.backward(target_tokens(sharded, batch, Divisor(batch.n_targets, 3), recipe.objective))
    found = gradient(sharded)
    assert all(float(g.abs().max()) > 0 for g in found.values())
    assert {part for name in found for part in ("encoder", "decoder") if f".{part}." in name} == {"encoder", "decoder"}
    shown = probes(rows, torch.device("cpu"), decoder=True)
    plain, worst = adapters.merge(sharded.plain, shown)
    assert worst < 1e-4
    assert plain(**shown[0]).logits.shape == (1, rows[0].parts[1], VOCABULARY)


def test_memory_counts_both_sides():
    batch = collate_targets(rows_of(3), 0)
    width, written = batch.ids_BT.shape[1], batch.targets_BU.shape[1]
    assert Load.of(batch) == Load(3 * (width + written), 3, width + written, 3 * written)
    assert bool((batch.targets_BU == IGNORE).any()), "rows must be uneven here"
