"""A student beside a frozen teacher: the formula, the mixture, other widths, and what is refused before training."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from ingot.data.loader import batches_of, collate, muted
from ingot.data.plan import Cursor, Divisor, Portion
from ingot.data.rows import ListRows
from ingot.errors import ModelError, RecipeError
from ingot.parallel.strategies import parallelize
from ingot.ranks import Ranks
from ingot.recipe_io import parse_recipe
from ingot.train.distillation import check_teacher, distillation, load_teacher, settled
from ingot.train.objectives import next_token

TASK = {"task": "language-modeling", "method": "distillation", "teacher": "unused"}


@pytest.fixture
def taught(make_recipe, make_model):
    """taught(**objective) -> (sharded with a teacher of other weights, recipe)."""

    def build(batches="padded", **objective):
        recipe = make_recipe(objective={**TASK, **objective}, data={"batches": batches})
        sharded = parallelize(make_model(), Ranks(), recipe, torch.device("cpu"), torch.float32)
        sharded.teacher = make_model(9).eval().requires_grad_(False)
        # Surer than a fresh model: near to uniform, KL is the same both ways round.
        sharded.teacher.model.embed_tokens.weight.mul_(10)
        return sharded, recipe

    return build


def loss_of(sharded, rows, recipe, flat=False):
    divisor = Divisor(sum(row.n_targets for row in rows), len(rows))
    return distillation(sharded, collate(rows, 0, flat=flat), divisor, recipe.objective)


@pytest.mark.parametrize("flat", [False, True], ids=["padded", "end to end"])
def test_is_the_divergence_of_softened_distributions(taught, row_lists, flat):
    sharded, recipe = taught("padding-free", temperature=3.0, teacher_share=0.6)
    rows, total, n_targets = row_lists[0][:5], 0.0, 0
    for row in rows:
        ids = torch.tensor([row.ids])
        student, teacher = (model(input_ids=ids).logits[0, :-1] for model in (sharded.plain, sharded.teacher))
        for place in (place for place, flag in enumerate(row.trainable[1:]) if flag):
            wanted, held = (F.softmax(logits[place] / 3.0, -1) for logits in (teacher, student))
            total += 0.6 * 9 * (wanted * (wanted.log() - held.log())).sum().item()
            total -= 0.4 * F.log_softmax(student[place], -1)[row.ids[place + 1]].item()
            n_targets += 1
    assert loss_of(sharded, rows, recipe, flat).item() == pytest.approx(total / n_targets, abs=1e-5)


def test_does_not_depend_on_how_the_step_is_cut(taught, row_lists):
    sharded, recipe = taught("padding-free", temperature=2.0, teacher_share=0.5)
    rows = ListRows(row_lists[0][:9])
    portion = Portion(rows, [[index] for index in range(9)], Cursor())
    losses, gradients = [], []
    for world, budget, flat in ((1, 10_000, False), (3, 30, False), (2, 60, True)):
        sharded.plain.zero_grad()
        losses.append(0.0)
        for rank in range(world):
            for part in batches_of(portion, rank, world, budget, flat=flat, even=True):
                loss = distillation(sharded, collate(part, 0, flat=flat), portion.divisor, recipe.objective)
                sharded.backward(loss)
                losses[-1] += loss.item()
        gradients.append(torch.cat([p.grad.flatten() for p in sharded.plain.parameters()]))
    assert losses[1:] == pytest.approx([losses[0]] * 2, abs=1e-5)
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0], rtol=0, atol=1e-6)
    assert all(p.grad is None for p in sharded.teacher.parameters())


def test_muted_rows_add_nothing(taught, row_lists):
    sharded, recipe = taught()
    loss = distillation(sharded, collate([muted(row_lists[0][0])], 0), Divisor(7, 1), recipe.objective)
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in sharded.plain.parameters())


def test_a_student_that_is_its_teacher_has_nothing_to_learn(taught, row_lists, make_model):
    sharded, recipe = taught()
    sharded.teacher = make_model().eval()
    assert loss_of(sharded, row_lists[0][:4], recipe).item() == pytest.approx(0, abs=1e-6)


def test_the_rest_of_the_weight_is_the_likelihoods(taught, row_lists, make_model):
    sharded, recipe = taught(teacher_share=0.25)
    sharded.teacher = make_model().eval()  # leaves only the likelihood
    rows = row_lists[0][:4]
    divisor = Divisor(sum(row.n_targets for row in rows), len(rows))
    whole = next_token(sharded, collate(rows, 0), divisor, recipe.objective)
    assert loss_of(sharded, rows, recipe).item() == pytest.approx(0.75 * whole.item(), abs=1e-6)


def test_embeddings_may_be_filled_up_to_other_widths(taught, row_lists, make_model):
    sharded, recipe = taught()
    config = LlamaConfig(**{**sharded.teacher.config.to_dict(), "vocab_size": 128})
    wide = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in sharded.teacher.named_parameters():
            wide.get_parameter(name)[: len(parameter)] = parameter
    before = loss_of(sharded, row_lists[0][:4], recipe).item()
    sharded.teacher = wide
    assert loss_of(sharded, row_lists[0][:4], recipe).item() == pytest.approx(before, abs=1e-5)


def test_learns_what_the_teacher_would_say(taught, row_lists, make_model, curve):
    sharded, recipe = taught(temperature=1.0)
    sharded.teacher = make_model(9).eval()
    before = [loss_of(sharded, rows, recipe).item() for rows in row_lists]
    losses = curve(sharded, row_lists, recipe)
    after = [loss_of(sharded, rows, recipe).item() for rows in row_lists]
    assert losses[-1] < 0.5 * losses[0]
    assert [late < 0.6 * early for late, early in zip(after, before, strict=True)] == [True, True]


def recipe_for(model, teacher, **data):
    return parse_recipe(
        {
            "name": "taught",
            "model": {"source": str(model)},
            "data": {"train": "unused", **data},
            "objective": {"task": "chat-completion", "method": "distillation", "teacher": str(teacher)},
        }
    )


def test_a_teacher_is_loaded_frozen(model_folder, tmp_path):
    recipe = recipe_for(model_folder, model_folder, batches="padding-free")
    teacher = load_teacher(recipe, tmp_path, torch.device("cpu"), torch.float32)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert settled(recipe, tmp_path, torch.device("cpu"), torch.float32).batches == "padding-free"


def test_a_teacher_of_other_tokens_is_refused(model_folder, tiny_tokenizer, tmp_path):
    recipe = recipe_for(model_folder, "ingot://nano")
    check_teacher(recipe_for(model_folder, model_folder), tmp_path, tiny_tokenizer)
    with pytest.raises(RecipeError, match=r"objective\.teacher.*ingot://nano") as caught:
        check_teacher(recipe, tmp_path, tiny_tokenizer)
    assert str(model_folder) in str(caught.value)
    assert "2,048 and 420" in str(caught.value)


def test_a_teacher_that_is_not_there_is_refused(model_folder, tiny_tokenizer, tmp_path):
    with pytest.raises(ModelError, match=r"objective\.teacher = .gone.: no such folder"):
        check_teacher(recipe_for(model_folder, "gone"), tmp_path, tiny_tokenizer)


def test_a_teacher_that_cannot_read_lines_decides(model_folder, tiny_tokenizer, tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    folder = tmp_path / "teacher"
    tiny_tokenizer.save_pretrained(folder)
    MambaForCausalLM(MambaConfig(vocab_size=420, hidden_size=32, num_hidden_layers=2, state_size=4)).save_pretrained(
        folder
    )
    found = settled(recipe_for(model_folder, folder), tmp_path, torch.device("cpu"), torch.float32)
    assert found.batches == "padded"
    assert any("teacher" in note for note in found.notes)
    with pytest.raises(RecipeError, match=r"data\.batches"):
        settled(recipe_for(model_folder, folder, batches="padding-free"), tmp_path, torch.device("cpu"), torch.float32)
