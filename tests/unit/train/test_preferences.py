"""dpo, orpo and reward: exact however the step is cut, learned from, and silent where a rank has no rows."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForSequenceClassification

from ingot.data.encoded import Encoded
from ingot.data.loader import batches_of
from ingot.data.pairs import answers_of, pairs
from ingot.data.plan import Cursor, Divisor, PlannedFeed, Portion
from ingot.data.rows import ListRows
from ingot.errors import RecipeError
from ingot.parallel.sharded import Sharded
from ingot.parallel.strategies import parallelize
from ingot.progress import Progress
from ingot.ranks import Ranks
from ingot.recipe_io import parse_recipe
from ingot.train.checkpoint import Checkpoints
from ingot.train.loop import Rows, fit
from ingot.train.objectives import OBJECTIVES, collator_of
from ingot.train.preferences import orpo
from ingot.train.reference import with_reference

VOCABULARY = 97
SECTIONS = {
    "dpo": {"task": "chat-completion", "method": "dpo", "beta": 0.5, "label_smoothing": 0.1},
    "orpo": {"task": "chat-completion", "method": "orpo", "beta": 0.5},
    "reward": {"task": "reward"},
}


def scorer() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, num_labels=1, pad_token_id=0, max_position_embeddings=64, **shape)
    return LlamaForSequenceClassification(config)


@pytest.fixture
def make(make_recipe, make_model):
    """make(name, **sections) -> (sharded, recipe) for an objective."""

    def build(name, **sections):
        recipe = make_recipe(objective=SECTIONS[name], **sections)
        model = scorer() if name == "reward" else make_model()
        return parallelize(model, Ranks(), recipe, torch.device("cpu"), torch.float32), recipe

    return build


def gradients(sharded: Sharded, rows, recipe, world: int, budget: int, flat: bool, even: bool = False):
    """(loss, gradients) of one step over all rows, cut into `world` ranks and microbatches of `budget` tokens."""
    sharded.plain.zero_grad()
    portion = Portion(ListRows(rows), [[index] for index in range(len(rows))], Cursor())
    total = 0.0
    for rank in range(world):
        for part in batches_of(portion, rank, world, budget, flat=flat, even=even):
            batch = collator_of(recipe.objective)(part, 0, flat=flat)
            loss = OBJECTIVES[recipe.objective.loss](sharded, batch, portion.divisor, recipe.objective)
            sharded.backward(loss)
            total += loss.item()
    return total, {name: p.grad.clone() for name, p in sharded.plain.named_parameters()}


@pytest.mark.parametrize("name", SECTIONS)
def test_loss_and_gradient_do_not_depend_on_how_the_step_is_cut(make, pair_rows, name):
    sharded, recipe = make(name)
    rows = pair_rows(11)
    loss, whole = gradients(sharded, rows, recipe, 1, 10_000, False)
    cuts = [(1, 40, False), (3, 60, False)]
    # The second has more ranks than rows: the others' rows are muted. Lines need a model that takes them.
    cuts += [] if name == "reward" else [(1, 10_000, True), (2, 50, True)]
    for world, budget, flat in cuts:
        other, parts = gradients(sharded, rows, recipe, world, budget, flat)
        assert other == pytest.approx(loss, abs=1e-5)
        for key, gradient in whole.items():
            torch.testing.assert_close(parts[key], gradient, rtol=0, atol=1e-5, msg=key)
    assert max(g.abs().max() for g in whole.values()) > 1e-3


@pytest.mark.parametrize("name", SECTIONS)
def test_a_rank_without_rows_adds_nothing(make, pair_rows, name):
    sharded, recipe = make(name)
    loss, alone = gradients(sharded, pair_rows(1), recipe, 1, 10_000, False)
    other, parts = gradients(sharded, pair_rows(1), recipe, 3, 10_000, False, even=True)
    assert other == loss
    assert all(torch.equal(parts[key], gradient) for key, gradient in alone.items())


@pytest.mark.parametrize("name", SECTIONS)
def test_equals_its_formula_row_by_row(make, pair_rows, name):
    sharded, recipe = make(name)
    rows = pair_rows(5, seed=3)
    section, n_chosen = recipe.objective, sum(row.n_targets for row in rows)
    expected = 0.0
    for row in rows:
        values, means = [], []
        for answer in answers_of(row):
            output = sharded.plain(input_ids=torch.tensor([answer.ids])).logits[0]
            if name == "reward":
                values.append(output[0])
                continue
            learned = [place for place, flag in enumerate(answer.trainable) if flag]
            logps = torch.stack([F.log_softmax(output[place - 1], -1)[answer.ids[place]] for place in learned])
            values.append(logps.sum())
            means.append(logps.mean())
        if name == "dpo":
            margin = 0.5 * ((values[0] - row.reference[0]) - (values[1] - row.reference[1]))
            lost = -0.9 * F.logsigmoid(margin) - 0.1 * F.logsigmoid(-margin)
        elif name == "orpo":
            odds = [mean.exp() / (1 - mean.exp()) for mean in means]
            lost = -values[0] * len(rows) / n_chosen - section.beta * F.logsigmoid((odds[0] / odds[1]).log())
        else:
            lost = -F.logsigmoid(values[0] - values[1])
        expected += lost.item() / len(rows)
    batch = pairs(rows, 0)
    loss = OBJECTIVES[section.loss](sharded, batch, Divisor(n_chosen, len(rows)), section)
    assert loss.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", SECTIONS)
def test_learns_which_answers_are_preferred(make, pair_rows, name, tmp_path):
    sharded, recipe = make(name, train={"max_steps": 24, "tokens_per_step": 250}, optim={"lr": 8e-3})
    feed = PlannedFeed(ListRows(pair_rows(40)), recipe.data, recipe.train)
    rows = Rows(feed, ListRows(pair_rows(20, seed=9)), pad_id=0)
    rows = with_reference(sharded, rows, recipe, tmp_path, Progress(quiet=True), begun=False)
    seen = []
    fit(sharded, rows, recipe, Checkpoints(tmp_path / "c", Ranks(), "hash", 1), on_step=(seen.append,))
    # orpo's likelihood has a floor: the answers are random.
    assert seen[-1].loss < 0.6 * seen[0].loss or name == "orpo"
    assert seen[-1].validation_loss < seen[0].loss - 0.2
    assert all(math.isfinite(info.grad_norm) for info in seen)


def test_orpo_is_finite_for_an_answer_that_is_certain(make):
    sharded, recipe = make("orpo")
    with torch.no_grad():
        sharded.plain.model.embed_tokens.weight.zero_()
        sharded.plain.model.embed_tokens.weight[5] = 100.0  # tied: whatever is asked, token 5 has all the mass
    row = Encoded([5, 5, 5, 5], [False, True, False, True], None, "row", (2, 2), 1)
    loss = orpo(sharded, pairs([row], 0), Divisor(1, 1), recipe.objective)
    sharded.backward(loss)
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in sharded.plain.parameters())


def test_scores_do_not_depend_on_padding_where_pad_is_eos(make, pair_rows):
    sharded, recipe = make("reward")
    sharded.plain.config.pad_token_id = 2
    rows = [replace(row, ids=[*row.ids[:-1], 2]) for row in pair_rows(6, seed=4)]
    together = OBJECTIVES["reward"](sharded, pairs(rows, 0), Divisor(1, 1), recipe.objective)
    alone = sum(OBJECTIVES["reward"](sharded, pairs([row], 0), Divisor(1, 1), recipe.objective) for row in rows)
    assert together.item() == pytest.approx(alone.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("objective", "named"),
    [
        ({"task": "reward", "method": "dpo"}, "method dpo is for"),
        ({"task": "language-modeling", "method": "orpo"}, "needs a prompt"),
        ({"task": "chat-completion", "method": "orpo", "label_smoothing": 0.1}, "no label_smoothing"),
        ({"task": "chat-completion", "method": "distillation"}, "needs teacher"),
        ({"task": "chat-completion", "method": "dpo", "teacher": "ingot://nano"}, "has no teacher"),
    ],
)
def test_what_cannot_be_is_refused(objective, named):
    with pytest.raises(RecipeError, match=named):
        parse_recipe({"name": "no", "model": {"source": "m"}, "data": {"train": "t"}, "objective": objective})
