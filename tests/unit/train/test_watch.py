"""Metrics beside training: when they are measured, which step they choose, and that nothing else changes by them."""

import json
import random

import pytest
import torch

from ingot.errors import CheckpointError, DataError, OutOfMemory
from ingot.model.adapters import attach_adapter
from ingot.model.generate import generate
from ingot.parallel.recompute import compile_blocks
from ingot.parallel.strategies import parallelize
from ingot.ranks import Ranks
from ingot.recipe import Adapter
from ingot.train.checkpoint import Checkpoints
from ingot.train.loop import fit
from ingot.train.watch import Reading, Watch


class Words:
    """Enough of a tokenizer to write: w7 is token 7."""

    eos_token_id, pad_token_id, chat_template = 2, 0, None

    def decode(self, ids, **_):
        return " ".join(f"w{token}" for token in ids)


class Planned:
    """A metric that takes the given values; counts how often it was measured."""

    def __init__(self, *values, name="exact_match"):
        self.values, self.name, self.asked = list(values), name, 0

    def __call__(self, sharded):
        value = self.values[self.asked]
        self.asked += 1
        if isinstance(value, Exception):
            raise value
        return {self.name: Reading(value, value - 0.1, value + 0.1)}


class Written:
    """A metric of the model as it stands: shares of its written tokens that are even."""

    def __init__(self):
        self.asked, self.seen = 0, []

    def __call__(self, sharded):
        self.asked += 1
        with sharded.at_rest() as model:
            found = generate(model, Words(), [[5, 6], [7, 8, 9], [11]], max_new_tokens=9, tokens_per_batch=64)
            torch.rand(3), random.random()  # a task may draw
        ids = [token for answer in found for token in answer.ids]
        share = sum(token % 2 == 0 for token in ids) / len(ids)
        self.seen.append(ids)
        return {"exact_match": Reading(share, share, share)}


@pytest.fixture
def fitted(row_lists, make_recipe, make_feed, make_sharded, tmp_path):
    """fitted(watch, name, recipe, sharded, **options of fit) -> (Fitted, sharded)."""

    def run(watch, name="run", recipe=None, sharded=None, **options):
        recipe = recipe or make_recipe()
        sharded = sharded or make_sharded(recipe)
        checkpoints = Checkpoints(tmp_path / name, sharded.layout.ranks, "hash", recipe.train.keep_checkpoints)
        return fit(sharded, make_feed(row_lists, recipe), recipe, checkpoints, watch=watch, **options), sharded

    return run


def weights(sharded):
    return {name: value.clone() for name, value in sharded.state().items()}


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


def test_the_base_model_is_first_and_the_best_step_becomes_the_model(fitted, tmp_path):
    heard = []
    planned = Planned(0.9, 0.2, 0.7, 0.7, 0.3)
    found, _ = fitted(
        Watch(6, planned, "exact_match", True), on_measured=lambda point, state: heard.append((point, state.best_step))
    )
    assert [point.step for point in found.measured] == [0, 6, 12, 18, 20]
    assert [point for point, _ in heard] == list(found.measured)
    # The base has the highest value and no checkpoint; of equal steps the first counts.
    assert [best for _, best in heard] == [None, 6, 12, 12, 12]
    assert (found.best_by, found.best_step, found.best_value, found.final_step) == ("exact_match", 12, 0.7, 12)
    assert (tmp_path / "run" / "best").resolve().name == "step-000012"


def test_less_is_better_where_the_metric_says_so(fitted):
    found, _ = fitted(Watch(10, Planned(9.0, 4.0, 5.0, name="perplexity"), "perplexity", False))
    assert (found.best_step, found.best_value) == (10, 4.0)


def test_the_validation_loss_still_decides_where_it_should(fitted, make_recipe):
    recipe = make_recipe(train={"evaluate_every_steps": 5, "max_steps": 10})
    found, _ = fitted(Watch(10, Planned(0.0, 1.0)), recipe=recipe)
    alone, _ = fitted(None, "alone", recipe=recipe)
    assert (found.best_by, found.best_step, found.best_value) == ("validation_loss", alone.best_step, alone.best_loss)
    assert len(found.measured) == 2


def with_dropout(recipe, make_model):
    model = attach_adapter(make_model(), Adapter(rank=4, dropout=0.4), "language-modeling", 0)
    return parallelize(model, Ranks(), recipe, torch.device("cpu"), torch.float32)


def test_training_knows_nothing_of_it(fitted, make_recipe, make_model):
    recipe = make_recipe(optim={"lr": 2e-2})
    written, losses = Written(), {True: [], False: []}
    results = {}
    for watched in (True, False):
        watch = Watch(3, written) if watched else None
        found, sharded = fitted(
            watch,
            str(watched),
            recipe,
            with_dropout(recipe, make_model),
            on_step=(lambda info, kept=losses[watched]: kept.append(info.loss),),
        )
        results[watched] = weights(sharded)
        assert found.final_step == 20
    assert losses[True] == losses[False]
    assert same(results[True], results[False])
    assert written.asked == 8
    assert len({tuple(ids) for ids in written.seen}) > 2, "the model writes the same all along: nothing is shown"


class Power(Exception):
    """A failure that nobody expects."""


def test_a_resumed_run_measures_what_an_uninterrupted_one_does(fitted, make_recipe, make_model, tmp_path):
    recipe = make_recipe(train={"checkpoint_every_steps": 5}, optim={"lr": 2e-2})

    def watch():
        return Watch(4, Written(), "exact_match", True)

    whole, sharded = fitted(watch(), "whole", recipe, with_dropout(recipe, make_model))

    def cut(info):
        if info.step == 14:
            raise Power

    with pytest.raises(Power):
        fitted(watch(), "cut", recipe, with_dropout(recipe, make_model), on_step=(cut,))
    again = watch()
    resumed, other = fitted(again, "cut", recipe, with_dropout(recipe, make_model), resume=True)
    newest = 12 if whole.best_step == 12 else 10  # the best step gets a checkpoint, too
    assert again.measure.asked == len([step for step in (12, 16, 20) if step > newest])
    assert resumed.measured == whole.measured
    assert (resumed.best_step, resumed.best_value) == (whole.best_step, whole.best_value)
    assert same(weights(other), weights(sharded))
    assert len({point.scores["exact_match"].value for point in whole.measured}) > 2


def test_a_failure_costs_the_point_not_the_run(fitted):
    notes = []
    planned = Planned(0.1, DataError("data.validation", 1, "cannot be asked"), 0.5)
    found, _ = fitted(Watch(10, planned, "exact_match", True), notify=notes.append)
    assert [point.step for point in found.measured] == [0, 20]
    assert any(note.startswith("step 10: not measured: ") and "cannot be asked" in note for note in notes)


def test_what_fails_for_the_base_model_stops_the_run(fitted, tmp_path):
    with pytest.raises(DataError, match="cannot be asked"):
        fitted(Watch(10, Planned(DataError("data.validation", 1, "cannot be asked"))))
    assert list((tmp_path / "run").glob("step-*")) == []


def test_the_model_is_put_back_as_it_was(make_recipe, make_model):
    sharded = with_dropout(make_recipe(), make_model)
    sharded.plain.train()
    sharded.plain.get_submodule("base_model.model.model.norm").eval()  # a module that somebody froze
    modes = [module.training for module in sharded.plain.modules()]
    before, drawn, state = weights(sharded), random.getstate(), torch.get_rng_state()

    def fails():
        with sharded.at_rest() as model:
            assert not any(module.training for module in sharded.plain.modules())
            assert model is sharded.plain.get_base_model()
            output = model(input_ids=torch.tensor([[5, 6, 7]])).logits
            assert not output.requires_grad
            assert not output.is_inference()
            torch.rand(2), random.random()
            raise Power

    with pytest.raises(Power):
        fails()
    assert [module.training for module in sharded.plain.modules()] == modes
    assert same(before, weights(sharded))
    assert random.getstate() == drawn
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in sharded.plain.parameters())
    assert torch.is_grad_enabled()


def test_nothing_of_inference_mode_stays_in_a_model_that_trains(make_recipe, make_sharded):
    """Buffers that a forward pass replaces, as those of dynamic rotary embeddings, are written to in the next step."""
    sharded = make_sharded(make_recipe())

    def keep(module, args, output):
        module.kept = output[0] if isinstance(output, tuple) else output

    block = sharded.plain.model.layers[0]
    block.register_forward_hook(keep)
    with sharded.at_rest() as model:
        generate(model, Words(), [[5, 6]], max_new_tokens=2, tokens_per_batch=64)
    assert not block.kept.is_inference()
    block.kept.mul_(2)  # would raise


def test_compiled_blocks_are_not_compiled_for_it(make_recipe, make_model):
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    recipe = make_recipe()
    model = make_model()
    compile_blocks(model, backend=backend)
    sharded = parallelize(model, Ranks(), recipe, torch.device("cpu"), torch.float32)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        sharded.forward(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    compiled = len(graphs)
    assert compiled > 0
    with sharded.at_rest() as inner:
        generate(inner, Words(), [[5, 6], [9]], max_new_tokens=4, tokens_per_batch=64)
    assert len(graphs) == compiled


def test_the_next_best_is_named_by_what_decides(fitted, make_recipe, tmp_path):
    recipe = make_recipe(train={"keep_checkpoints": 5, "checkpoint_every_steps": 5})
    planned = Planned(0.0, 0.2, 0.9, 0.4, 0.3)
    fitted(Watch(5, planned, "exact_match", True), recipe=recipe)
    record = json.loads((tmp_path / "run" / "step-000010" / "checkpoint.json").read_text())
    assert record["progress"]["judged"] == 0.9
    for file in (tmp_path / "run" / "step-000010").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    again = Planned(0.0)
    with pytest.raises(CheckpointError, match=r"next best is step-000015 \(exact_match 0\.4\)"):
        fitted(Watch(5, again, "exact_match", True), recipe=recipe, resume=True)


def test_a_measurement_that_does_not_fit_says_what_to_lower(fitted):
    planned = Planned(0.1, torch.OutOfMemoryError("Tried to allocate 2.00 GiB"))
    with pytest.raises(
        OutOfMemory, match=r"in step 10 \(evaluation\): keys and values .* evaluate\.tokens_per_batch=4096"
    ):
        fitted(Watch(10, planned, "exact_match", True))
