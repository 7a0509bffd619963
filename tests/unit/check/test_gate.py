"""Each fault that users of other systems met, planted: the gate names it, and says nothing of a sound recipe."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ingot import verbs
from ingot.check import on_saving, on_training, room
from ingot.check.gate import PROOFS
from ingot.check.verdict import Status
from ingot.data.encoded import IGNORE
from ingot.data.plan import Divisor
from ingot.errors import CheckFailed, RecipeError
from ingot.model import adapters, export
from ingot.parallel.sharded import Sharded
from ingot.recipe_io import parse_recipe
from ingot.train import forward, objectives

WORDS = "table city centre quick brown fox lazy dog capital France Paris Hello goodbye book people two".split()


def chats(start: int, count: int) -> list[dict]:
    """Rows of uneven length, in which no two ask the same."""
    rows = []
    for n in range(start, start + count):
        asked = " ".join(WORDS[(n * step) % len(WORDS)] for step in range(1, 3 + n % 5))
        said = " ".join(WORDS[(n + step) % len(WORDS)] for step in range(1 + n % 7))
        rows.append({"messages": [{"role": "user", "content": f"{asked} {n * 7919 % 10007}"},
                                  {"role": "assistant", "content": f"{said} {n}"}]})  # fmt: skip
    return rows


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def found(tmp_path, model_folder):
    """found(**sections) -> proof -> verdict, of a small sound recipe with these changes."""
    write(tmp_path / "train.jsonl", chats(0, 40))
    write(tmp_path / "test.jsonl", chats(1000, 20))

    def check(**sections):
        recipe = {
            "name": "gate",
            "model": {"source": str(model_folder), "dtype": "float32", **sections.pop("model", {})},
            "data": {"train": "train.jsonl", "test": "test.jsonl", "validation_share": 0, "max_tokens": 128,
                     "cache": str(tmp_path / "cache"), **sections.pop("data", {})},
            "adapter": {"rank": 4, **sections.pop("adapter", {})},
            "train": {"tokens_per_step": 512, "tokens_per_microbatch": 256},
            "check": {"max_probe_tokens": 200, **sections.pop("check", {})},
            "evaluate": {"max_new_tokens": 16},
            **sections,
        }  # fmt: skip
        report = verbs.check(parse_recipe(recipe), home=tmp_path)
        assert [verdict.name for verdict in report.verdicts] == list(PROOFS)
        return {verdict.name: verdict for verdict in report.verdicts}

    return check


def failed(verdicts) -> list[str]:
    return [name for name, verdict in verdicts.items() if verdict.status is Status.failed]


@pytest.mark.parametrize("batches", ["padded", "padding-free", "packed"])
def test_a_sound_recipe_passes(found, batches):
    verdicts = found(data={"batches": batches})
    assert failed(verdicts) == []
    assert [name for name, it in verdicts.items() if it.status is Status.not_applicable] == ["right-labels"]


def test_a_sound_full_fine_tuning_passes(found):
    verdicts = found(adapter={"kind": "none"})
    assert failed(verdicts) == []
    assert verdicts["same-after-merge"].status is Status.not_applicable


def test_prompts_that_are_learned(found, monkeypatch):
    import ingot.data.template as template

    original = template.masks
    monkeypatch.setattr(
        template, "masks", lambda *a: [(ids, [False] + [True] * (len(ids) - 1)) for ids, _ in original(*a)]
    )
    verdict = found()["prompt-mask"]
    assert verdict.status is Status.failed
    assert "train.jsonl:" in verdict.because


def test_a_second_bos(found, tmp_path, marked_template):
    (tmp_path / "twice.jinja").write_text("{{ bos_token }}" + marked_template, encoding="utf-8")
    verdicts = found(model={"chat_template": "twice.jinja"})
    assert "one-bos" in failed(verdicts)
    assert "has 2" in verdicts["one-bos"].because


def test_a_bos_that_the_template_forgets(found, tmp_path, marked_template, make_tokenizer, model_folder):
    make_tokenizer(adds_bos=True).save_pretrained(model_folder)
    (tmp_path / "none.jinja").write_text(marked_template.replace("{{ bos_token }}", ""), encoding="utf-8")
    assert "one-bos" in failed(found(model={"chat_template": "none.jinja"}))


def test_a_stop_token_that_is_masked_with_the_padding(found, monkeypatch, tiny_tokenizer):
    """Padding told by its id, where that is the stop token's."""
    original, stop = objectives.collate, tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")

    def by_id(*args, **options):
        batch = original(*args, **options)
        return replace(batch, labels_BT=batch.labels_BT.masked_fill(batch.labels_BT == stop, IGNORE))

    monkeypatch.setattr(objectives, "collate", by_id)
    assert {"stop-token"} <= set(failed(found()))


def test_a_package_with_another_template(found, monkeypatch, plain_template):
    def save(tokenizer, folder):
        before = tokenizer.chat_template
        tokenizer.chat_template = plain_template.replace("<|im_start|>", "<|im_start|> ")
        tokenizer.save_pretrained(folder)
        tokenizer.chat_template = before

    monkeypatch.setattr(export, "save_tokenizer", save)
    assert failed(found()) == ["same-template"]


def test_rows_that_see_each_other(found, monkeypatch):
    documents = forward.Documents
    one = SimpleNamespace(of=lambda lengths, *rest: documents.of((sum(lengths),), *rest))
    monkeypatch.setattr(forward, "Documents", one)
    assert "isolated-rows" in failed(found(data={"batches": "padding-free"}))


def test_a_mean_of_means(found, monkeypatch):
    def mean(sharded, batch, divisor, section):
        return objectives.next_token(sharded, batch, Divisor(batch.n_targets, divisor.rows), section)

    monkeypatch.setitem(objectives.OBJECTIVES, "chat-completion", mean)
    assert "invariant-loss" in failed(found())


def test_labels_shifted_twice(found, monkeypatch):
    def twice(sharded, batch, divisor, section):
        shifted = torch.nn.functional.pad(batch.labels_BT[:, 1:], (0, 1), value=IGNORE)
        return objectives.next_token(sharded, replace(batch, labels_BT=shifted), divisor, section)

    monkeypatch.setitem(objectives.OBJECTIVES, "chat-completion", twice)
    assert "right-loss" in failed(found())


def attached(change):
    """`attach_adapter`, and then `change(model)`."""
    original = adapters.attach_adapter

    def attach(*args, **options):
        model = original(*args, **options)
        change(model)
        return model

    return attach


def test_an_adapter_that_does_nothing(found, monkeypatch):
    def silence(model):
        next(module for module in model.modules() if hasattr(module, "lora_A")).scaling["default"] = 0.0

    monkeypatch.setattr(adapters, "attach_adapter", attached(silence))
    verdicts = found()
    assert "everything-moves" in failed(verdicts)
    assert len(verdicts["everything-moves"].facts["still"]) == 2


def test_nothing_is_trainable(found, monkeypatch):
    monkeypatch.setattr(adapters, "attach_adapter", attached(lambda model: model.requires_grad_(False)))
    verdicts = found()
    assert failed(verdicts)[:1] == ["everything-moves"]
    assert "frozen" in verdicts["everything-moves"].because


def test_a_frozen_weight_that_moves(found, monkeypatch):
    original = Sharded.step

    def step(self, *args):
        frozen = next(p for p in self.plain.parameters() if not p.requires_grad)
        frozen.data.view(-1)[-1] += 1e-4
        return original(self, *args)

    monkeypatch.setattr(Sharded, "step", step)
    assert failed(found()) == ["everything-moves"]


def test_an_adapter_that_is_saved_empty(found, monkeypatch):
    original = PeftModel.save_pretrained

    def save(self, folder, **options):
        original(self, folder, **options)
        tensors = {name: torch.zeros(0) for name, _ in adapters.trainable_tensors(self)}
        save_file(tensors, Path(folder) / "adapter_model.safetensors")

    monkeypatch.setattr(PeftModel, "save_pretrained", save)
    verdicts = found()
    assert failed(verdicts) == ["same-after-reload"]
    assert "empty" in verdicts["same-after-reload"].because


def test_a_merge_that_forgets_the_head(found, monkeypatch):
    original = adapters.merge

    def forget(model, probes):
        merged, difference = original(model, probes)
        merged.lm_head.weight.data.mul_(0.5)
        return merged, difference

    monkeypatch.setattr(adapters, "merge", forget)
    assert failed(found()) == ["same-after-merge"]


@pytest.mark.filterwarnings("ignore:.*tie:UserWarning")  # peft sees it coming
def test_a_tied_head_that_is_lost_when_it_is_merged(found, monkeypatch, model_folder):
    config = LlamaConfig.from_pretrained(model_folder, tie_word_embeddings=True, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(model_folder)
    targets = {"targets": ["q_proj", "lm_head"], "alpha": 400}
    assert failed(found(adapter=targets)) == []
    monkeypatch.setattr(adapters, "_untie", lambda *_: None)
    assert failed(found(adapter=targets)) == ["same-after-merge"]


# A learning rate at which two steps change the loss by less than any tolerance: nothing may hide behind it.
TINY = {"optim": {"lr": 1e-6}}


@pytest.fixture
def any_cpu(monkeypatch):
    """Here bfloat16 may be slow: models are tiny, and their rounding is what matters."""
    monkeypatch.setattr("ingot.model.load.cpu_has_bf16", lambda: True)


@pytest.mark.usefixtures("any_cpu")
def test_a_sound_recipe_of_tiny_steps_passes(found):
    assert failed(found(**TINY)) == []
    assert failed(found(**TINY, model={"dtype": "bfloat16"})) == []


def rewritten(monkeypatch, change):
    """Adapter files as `change(tensors)` leaves them."""
    original = adapters.save_adapter

    def save(model, folder, base):
        original(model, folder, base)
        file = Path(folder) / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    monkeypatch.setattr(adapters, "save_adapter", save)


def swap(tensors):
    """Two layers' adapters, each in the other's place."""
    for name in [name for name in tensors if ".layers.0." in name]:
        other = name.replace(".layers.0.", ".layers.1.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def forget_a_half(tensors):
    for name in tensors:
        if "lora_B" in name:
            tensors[name] = torch.zeros_like(tensors[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("change", [swap, forget_a_half])
@pytest.mark.usefixtures("any_cpu")
def test_an_adapter_that_comes_back_as_another(found, monkeypatch, model_folder, change, dtype):
    config = LlamaConfig.from_pretrained(model_folder, initializer_range=0.2)  # a head that tells hidden states apart
    LlamaForCausalLM(config).save_pretrained(model_folder)
    rewritten(monkeypatch, change)
    assert "same-after-reload" in failed(found(**TINY, model={"dtype": dtype}))


def test_a_full_model_that_is_saved_as_it_was(found, monkeypatch, model_folder):
    original = export.export_model

    def untrained(model, *args):
        model.load_state_dict(LlamaForCausalLM.from_pretrained(model_folder).state_dict())
        return original(model, *args)

    monkeypatch.setattr(on_saving, "export_model", untrained)
    assert failed(found(**TINY, adapter={"kind": "none"})) == ["same-after-reload"]


def test_a_weight_that_only_decays(found, monkeypatch):
    """No gradient reaches it, and weight decay moves it all the same."""

    def cut(model):
        inner = model.model.layers[1].mlp
        inner.register_forward_hook(lambda module, inputs, output: output.detach())

    monkeypatch.setattr(adapters, "attach_adapter", attached(cut))
    verdicts = found(adapter={"kind": "none"}, optim={"weight_decay": 0.1, "lr": 1e-2})
    assert "everything-moves" in failed(verdicts)
    assert "model.layers.1.mlp.up_proj.weight" in verdicts["everything-moves"].facts["still"]


def test_an_optimizer_that_is_given_no_rate(found, monkeypatch):
    original = Sharded.step
    monkeypatch.setattr(Sharded, "step", lambda self, lr, limit: original(self, 0.0, limit))
    assert "everything-moves" in failed(found())


def test_padding_that_is_attended_to(found, monkeypatch, model_folder, tmp_path):
    original = Sharded.forward

    def blind(self, **inputs):
        return original(self, **inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])})

    config = BertConfig(
        vocab_size=420, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    BertModel(config).save_pretrained(model_folder)
    for name, start in (("train", 0), ("test", 1000)):
        texts = [row["messages"][0]["content"] for row in chats(start, 20)]
        rows = [{"text": text, "label": "ab"[number % 2]} for number, text in enumerate(texts)]
        write(tmp_path / f"labeled-{name}.jsonl", rows)
    sections = {"objective": {"task": "text-classification"}, "adapter": {"kind": "none"}}
    data = {"train": "labeled-train.jsonl", "test": "labeled-test.jsonl", "batches": "padded"}
    assert failed(found(**sections, data=data)) == []
    monkeypatch.setattr(Sharded, "forward", blind)
    assert "isolated-rows" in failed(found(**sections, data=data))


def test_positions_that_do_not_start_again(found, monkeypatch, model_folder, tiny_tokenizer):
    config = GPT2Config(vocab_size=len(tiny_tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=512)
    GPT2LMHeadModel(config).save_pretrained(model_folder)
    data = {"batches": "padding-free"}
    assert failed(found(data=data)) == []
    original = objectives.collate

    def onwards(*args, **options):
        batch = original(*args, **options)
        return replace(batch, positions_BT=torch.arange(batch.ids_BT.shape[1]).unsqueeze(0))

    monkeypatch.setattr(objectives, "collate", onwards)
    assert "isolated-rows" in failed(found(data=data))


def test_answers_that_are_cut(found):
    verdicts = found(data={"max_tokens": 32})
    assert "whole-answers" in failed(verdicts)
    assert "raise data.max_tokens" in verdicts["whole-answers"].fix


def test_test_rows_that_were_trained_on(found, tmp_path):
    near = chats(0, 1)[0]
    near["messages"][0]["content"] = "a long question about " + " ".join(WORDS)
    almost = json.loads(json.dumps(near).replace("a long question", "a long Question,"))
    write(tmp_path / "train.jsonl", [*chats(0, 40), near])
    write(tmp_path / "test.jsonl", [*chats(1000, 20), *chats(3, 2), almost])
    verdicts = found()
    assert failed(verdicts) == ["no-leakage"]
    assert (verdicts["no-leakage"].facts["exact"], verdicts["no-leakage"].facts["near"]) == (2, 1)


def test_an_adapter_on_a_name_that_matches_nothing(found):
    verdicts = found(adapter={"targets": ["q_prj"]})
    assert failed(verdicts) == ["adapter-coverage"]
    assert "q_proj" in verdicts["adapter-coverage"].because
    assert verdicts["everything-moves"].status is Status.not_applicable


def test_a_waived_proof_does_not_stop_a_run(found):
    verdicts = found(data={"max_tokens": 32}, check={"waive": ["whole-answers"]})
    assert verdicts["whole-answers"].status is Status.waived
    with pytest.raises(RecipeError, match="did you mean 'whole-answers'"):
        found(check={"waive": ["whole-answer"]})


def test_a_run_stops_before_it_trains_and_keeps_the_report(tmp_path, found, model_folder):
    (tmp_path / "runs").mkdir()
    recipe = parse_recipe({
        "name": "stops", "output": str(tmp_path / "runs"), "model": {"source": str(model_folder)},
        "data": {"train": "train.jsonl", "test": "test.jsonl", "validation_share": 0, "max_tokens": 32},
        "evaluate": {"max_new_tokens": 16}, "track": {"enabled": False},
    })  # fmt: skip
    with pytest.raises(CheckFailed, match="whole-answers") as caught:
        verbs.run(recipe, home=tmp_path)
    assert caught.value.exit_code == 2
    [run] = (tmp_path / "runs").iterdir()
    assert {"check.json", "check.html", "run.json"} <= {path.name for path in run.iterdir()}
    assert not (run / "checkpoints").exists()
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["status"] == "refused"


def test_a_model_that_is_too_large_for_this_machine_is_not_tried(found, monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda device: 1000)
    verdicts = found()
    assert failed(verdicts) == []
    left_out = [name for name, verdict in verdicts.items() if verdict.status is Status.not_applicable]
    assert left_out == ["right-labels", *PROOFS[PROOFS.index("adapter-coverage") :]]
    assert "0 GiB are free on this cpu; run `ingot check` on a larger machine" in verdicts["right-loss"].because


def test_memory_that_runs_out_leaves_the_rest_of_the_proofs_out(found, monkeypatch):
    def hungry(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(on_training, "gradients", hungry)
    verdicts = found()
    assert failed(verdicts) == []
    assert verdicts["isolated-rows"].status is Status.passed
    assert verdicts["invariant-loss"].status is verdicts["same-after-merge"].status is Status.not_applicable
    assert "no memory left" in verdicts["invariant-loss"].because
