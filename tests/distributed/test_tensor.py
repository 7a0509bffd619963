"""Two ranks share every matrix: the same losses, gradients and model as one rank that holds whole ones."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # launches of several ranks; test_matrix.py has a cell of each kind

LORA = {"kind": "lora", "rank": 4}
ATTENTION = {**LORA, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def cell(name: str, kind: str = "llama", model: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    sections = {"parallel": {"strategy": "ddp", "tensor": 2}, **more.pop("sections", {})}
    return {"name": name, "model": {"kind": kind, **(model or {})}, "sections": sections, **more}


CELLS = [
    # 120 tokens a step in microbatches of 48, clipped; 97 words are no even number; embedding and head are tied
    cell("full"),
    cell("shared vocabulary", model={"vocab_size": 98}, sections={"objective": {"label_smoothing": 0.1}}),
    cell("padded", sections={"adapter": LORA, "data": {"batches": "padded"}}),
    cell("packed", sections={"data": {"batches": "packed"}, "train": {"activation_checkpointing": "full"}}),
    # Ranks of a group draw the same masks as one rank, also for what they hold a part of.
    cell("dropout", sections={"adapter": {**LORA, "dropout": 0.3}}),
    cell("norms of heads", "qwen3", {"head_dim": 8}),
    cell("biases", "phi", sections={"adapter": LORA}),
    cell("gathered between", "phi3", sections={"adapter": LORA}),
    cell("tied to what is whole", "gpt_neox"),
    cell("latent attention", "deepseek_v3", {
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "head_dim": 4,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 2,
    }),
    cell("experts", "mixtral", {"num_local_experts": 4}, sections={"adapter": ATTENTION}),
]  # fmt: skip
HEAD = {**LORA, "targets": ["lm_head", "q_proj"]}
EVEN = {"vocab_size": 98, "tie_word_embeddings": False}
HEADS = [  # 98 words: each rank makes its part of the loss of its 49
    cell("one for both ends", model={"vocab_size": 98}, sections={"train": {"activation_checkpointing": "full"}}),
    cell("its own", model=EVEN, sections={"objective": {"label_smoothing": 0.1}}),
    cell("frozen", model=EVEN, sections={"adapter": LORA, "data": {"batches": "padded"}}),
    cell("with an adapter", model=EVEN, sections={"adapter": HEAD}),
    cell("with an adapter, no longer tied", model={"vocab_size": 98}, sections={"adapter": HEAD}),
    cell("biased", "phi", EVEN),
    cell("capped", "gemma2", {**EVEN, "head_dim": 8, "attn_logit_softcapping": None, "final_logit_softcapping": 0.5}),
    cell("scaled", "granite", {**EVEN, "logits_scaling": 4.0}),
    # rows are learned whose words are all on the second rank; 100 words: 50 are the others
    cell("labels of one rank", model={**EVEN, "vocab_size": 100}, lengths={"two_kinds": True}),
]
LOGITS = [  # 97 words
    cell("uneven"),
    cell("uneven, with an adapter", model={"tie_word_embeddings": False}, sections={"adapter": HEAD}),
]
WIDE = 32  # what a layer gives for a token
CUT_OFF = {"stop": 5}  # the last checkpoint before is that of step 3
REFUSED = {
    "three heads": (
        cell("", model={"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 48}),
        "parallel.tensor = 2: each rank takes whole heads, and LlamaForCausalLM has 3 for queries and 3 for keys",
    ),
    "no plan": (cell("", "gpt2"), "no tensor-parallel plan for GPT2LMHeadModel"),
    "dora": (cell("", sections={"adapter": {**LORA, "dora": True}}), "adapter.dora = True"),
    "trained experts": (cell("", "mixtral", {"num_local_experts": 4}), "is cut in stripes"),
}


@pytest.fixture(scope="session")
def ran(compared: Any, trainer: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tensor")
    one_rank = {"parallel": {}}
    trainer.train(cell("begun by one", folder="handed to two", sections=one_rank, **CUT_OFF), folder / "many")
    more = [
        cell("half", model={"vocab_size": 98}, sections={"adapter": LORA}, dtype="bfloat16"),
        cell("begun by two", folder="handed to one", **CUT_OFF),
        cell("taken over by two", folder="handed to two", resume=True, alone=True),
        *({**refused, "name": name, "fails": True} for name, (refused, _) in REFUSED.items()),
    ]
    heads = [{**head, "carried": True} for head in (*HEADS, *LOGITS)]
    compare = compared(2, [*CELLS, *heads, *more], folder)
    trainer.train(cell("taken over by one", folder="handed to one", sections=one_rank, resume=True), folder / "many")
    return compare


@pytest.mark.parametrize("name", [cell["name"] for cell in CELLS])
def test_two_ranks_train_as_one(ran: Any, name: str) -> None:
    ran(name)


@pytest.mark.parametrize("name", [cell["name"] for cell in (*HEADS, *LOGITS)])
def test_ranks_make_a_loss_of_parts_of_the_vocabulary(ran: Any, trainer: ModuleType, name: str) -> None:
    ran(name)
    (curve, found), (_, expected) = (trainer.results(out, name) for out in (ran.many, ran.one))
    weights = [key for key in expected if key.startswith("weight/")]
    assert weights
    for key in weights:
        difference = (found[key] - expected[key]).abs().max().item()
        assert difference < 1e-4, f"{key} differs by {difference}"
    whole = name in [cell["name"] for cell in LOGITS]
    assert curve["carried"] > WIDE if whole else curve["carried"] == WIDE  # no logits are gathered


def test_half_precision_differs_by_its_rounding(ran: Any, trainer: ModuleType) -> None:
    (curve, found), (reference, expected) = (trainer.results(out, "half") for out in (ran.many, ran.one))
    assert curve["losses"] == pytest.approx(reference["losses"], abs=0.02)  # of 4.6; bfloat16 keeps 8 bits
    gradients = [key for key in expected if key.startswith("grad/")]
    difference = sum((found[key] - expected[key]).square().sum() for key in gradients) ** 0.5
    assert difference / sum(expected[key].square().sum() for key in gradients) ** 0.5 < 0.1  # measured: 0.06
    assert curve["same"]


@pytest.mark.parametrize("by", ["one", "two"])
def test_a_run_goes_on_with_whole_or_with_cut_matrices(ran: Any, trainer: ModuleType, by: str) -> None:
    whole, rest = (trainer.results(ran.many, name)[0] for name in ("full", f"taken over by {by}"))
    assert len(rest["losses"]) == 3
    assert rest["losses"] == pytest.approx(whole["losses"][3:], abs=1e-5)
    assert rest["watched"] == pytest.approx(whole["watched"][1:], abs=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_is_turned_away(ran: Any, name: str) -> None:
    said = json.loads((ran.many / f"{name}.json").read_text())
    assert said["kind"] == "RecipeError"
    assert REFUSED[name][1] in said["error"]


@pytest.fixture(scope="session")
def loaded(trainer: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("models")
    trainer.finished(trainer.launch(2, [], out, str(Path(__file__).with_name("tensor_models.py"))))
    found: dict[str, Any] = json.loads((out / "found.json").read_text())
    return found


@pytest.mark.parametrize(
    "name", ["lora", "lora on the head", "full", "norms of heads", "biases", "experts", "tied to what is whole"]
)
def test_a_rank_reads_its_part_and_steps_as_one_does(loaded: dict[str, Any], name: str) -> None:
    found = loaded[name]
    assert (found["weights"], found["buffers"], found["same trained"]) == (0, 0, True)
    assert found["gradients"] < 1e-5
    assert found["steps"] < 1e-4  # of 1e-2
    assert found["in parts"]
    assert found["held"] < (0.9 if name == "tied to what is whole" else 0.6)


@pytest.mark.parametrize("name", ["no plan", "three heads"])
def test_a_model_is_turned_away_before_it_is_read(loaded: dict[str, Any], name: str) -> None:
    assert loaded[name]["error"].startswith("parallel.tensor = 2: ")
