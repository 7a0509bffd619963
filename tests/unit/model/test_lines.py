"""Which models may learn from lines, and who computes their attention: decided before anything is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig

from ingot.errors import IngotError, MissingPackage, RecipeError
from ingot.model import lines
from ingot.model.lines import Needs, examine, pick, settle, shrunk, trial
from ingot.recipe import Recipe
from ingot.recipe_io import parse_recipe

CPU, HALF, FULL = torch.device("cpu"), torch.bfloat16, torch.float32
BOTH = frozenset({"varlen", "flash"})
NEITHER: frozenset[str] = frozenset()
HOME = Path()


def needs(*features: str, sizes: tuple[int, int] = (64, 64)) -> Needs:
    return Needs(frozenset(features), frozenset({sizes}))


@pytest.mark.parametrize(
    ("kind", "features"),
    [
        ("llama", set()),
        ("mistral", {"window"}),
        ("qwen2", {"window"}),
        ("gemma2", {"window", "softcap"}),
        ("gpt_oss", {"window", "sinks"}),
        ("mixtral", set()),
    ],
)
def test_decoders_that_keep_rows_apart(kind: str, features: set[str], small_config: Callable[..., Any]) -> None:
    reason, found = trial(small_config(kind), pooled=False)
    assert reason is None
    assert found.features == features
    assert found.head_sizes == {(8, 8)}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("falcon_h1", "carries information from one row of a line to the next"),  # attention beside a state
        ("mamba", "does not take rows end to end"),
        ("gptj", "does not hand the bounds of rows"),  # an attention of its own that takes any argument
        ("stablelm", "is not told where rows end"),  # the arguments end on the way
        ("qwen2_moe", "other outputs"),  # its window is in its masks only
        ("phimoe", "other outputs"),
        ("llama4_text", "other outputs"),  # attends within chunks, by masks only
        ("bart", "other outputs"),  # numbers its positions through the line
        ("t5", "could not be tried out"),
    ],
)
def test_decoders_that_do_not(kind: str, reason: str, small_config: Callable[..., Any]) -> None:
    found, _ = trial(small_config(kind), pooled=False)
    assert found is not None
    assert reason in found


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "distilbert"])
def test_encoders_that_keep_rows_apart(kind: str, small_config: Callable[..., Any]) -> None:
    assert trial(small_config(kind), pooled=True)[0] is None


@pytest.mark.parametrize("kind", ["mpnet", "fnet", "t5"])
def test_encoders_that_do_not(kind: str, small_config: Callable[..., Any]) -> None:
    assert trial(small_config(kind), pooled=True)[0] is not None


def test_dropout_is_asked_for_in_training_only(small_config: Callable[..., Any]) -> None:
    _, found = trial(small_config("llama", attention_dropout=0.1), pooled=False)
    assert found.features == {"dropout"}


def test_a_trial_draws_nothing_from_the_generator_of_the_run(small_config: Callable[..., Any]) -> None:
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    trial(small_config("llama"), pooled=False)
    assert torch.equal(torch.rand(3), wanted)


def test_a_model_is_made_small(small_config: Callable[..., Any]) -> None:
    kinds = ["full_attention"] * 5 + ["sliding_attention"] * 7
    big = small_config("qwen2", num_hidden_layers=12, layer_types=kinds, vocab_size=50_000, intermediate_size=9_000)
    big.pad_token_id = 49_999
    small: Any = shrunk(big, narrow=True)
    assert small.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert (small.num_hidden_layers, small.vocab_size, small.pad_token_id) == (3, lines.WORDS, 0)
    assert (small.sliding_window, small.intermediate_size, small.hidden_size) == (lines.WINDOW, lines.WIDTH, 32)
    assert (big.num_hidden_layers, big.vocab_size) == (12, 50_000)


@pytest.mark.parametrize(
    ("asked", "device", "dtype", "installed", "found", "note"),
    [
        (needs(), "cpu", FULL, BOTH, "sdpa", None),
        (needs("window", "dropout"), "cpu", FULL, NEITHER, "sdpa", None),
        (needs("softcap"), "cpu", FULL, NEITHER, "eager", "sdpa has no capped scores"),
        (needs("sinks"), "cpu", FULL, NEITHER, "eager", "sdpa has no attention sinks"),
        (needs("window"), "cuda", HALF, BOTH, "varlen", None),
        (needs("window"), "cuda", HALF, frozenset({"flash"}), "flash", "varlen needs torch 2.11"),
        (needs(), "cuda", HALF, NEITHER, "flex", "flash is not installed"),
        (needs("dropout"), "cuda", HALF, BOTH, "flash", "varlen has no dropout"),
        (needs("dropout"), "cuda", HALF, frozenset({"varlen"}), "sdpa", "flex has no dropout"),
        (needs("softcap", "window"), "cuda", HALF, BOTH, "flash", "varlen has no capped scores"),
        (needs("sinks", "window"), "cuda", HALF, BOTH, "flex", "flash has no attention sinks"),
        (needs("sinks", "dropout"), "cuda", HALF, BOTH, "eager", "sdpa has no attention sinks"),
        (needs(), "cuda", FULL, BOTH, "flex", "varlen computes in half precision only"),
        (needs(sizes=(192, 128)), "cuda", HALF, BOTH, "flex", "192 with values of 128"),
        (needs(sizes=(8, 8)), "cuda", FULL, BOTH, "sdpa", "flex takes heads of at least 16"),
    ],
)
def test_auto_takes_the_first_that_can(
    asked: Needs, device: str, dtype: torch.dtype, installed: frozenset[str], found: str, note: str | None
) -> None:
    picked, why = pick("auto", asked, device, dtype, installed)
    assert picked == found
    assert (why is None) if note is None else (why is not None and note in why)


@pytest.mark.parametrize(
    ("name", "asked", "device", "dtype", "fix"),
    [
        ("varlen", needs(), "cpu", FULL, "varlen runs on CUDA only; use sdpa or eager, or auto"),
        ("flex", needs(), "cpu", FULL, "flex has a backward pass on CUDA only; use sdpa or eager"),
        ("sdpa", needs("softcap"), "cpu", FULL, "sdpa has no capped scores, which this model uses; use eager"),
        (
            "varlen",
            needs("dropout"),
            "cuda",
            HALF,
            "varlen has no dropout, which this model uses; use sdpa or flash or",
        ),
        ("flash", needs(), "cuda", FULL, "flash computes in half precision only; use sdpa or flex or eager"),
    ],
)
def test_a_named_backend_is_never_replaced(name: str, asked: Needs, device: str, dtype: torch.dtype, fix: str) -> None:
    with pytest.raises(RecipeError) as error:
        pick(name, asked, device, dtype, BOTH)
    assert (error.value.field, error.value.value) == ("model.attention", name)
    assert error.value.fix.startswith(fix)


def test_flash_says_how_to_install_it() -> None:
    with pytest.raises(MissingPackage, match="flash-attn"):
        pick("flash", needs(), "cuda", HALF, NEITHER)
    with pytest.raises(RecipeError, match="sinks"):  # installing it would not help
        pick("flash", needs("sinks"), "cuda", HALF, NEITHER)


def recipe(folder: Path, *, task: str = "language-modeling", **sections: dict[str, Any]) -> Recipe:
    base: dict[str, dict[str, Any]] = {"model": {"source": str(folder)}, "data": {"train": "unused"}}
    merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in {**base, **sections}}
    return parse_recipe({"name": "lines", "objective": {"task": task}, **merged})


@pytest.fixture
def folder_of(small_config: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """folder_of(kind) -> a folder that holds the configuration alone: the weights are never needed."""

    def make(kind: str, **changes: Any) -> Path:
        config: PreTrainedConfig = small_config(kind, **changes)
        config.save_pretrained(tmp_path / kind)
        (tmp_path / kind / "tokenizer.json").write_text("{}", encoding="utf-8")
        return tmp_path / kind

    return make


def test_auto_lays_rows_end_to_end_where_they_stay_apart(folder_of: Callable[..., Path]) -> None:
    assert settle(recipe(folder_of("llama")), HOME, CPU, FULL) == ("padding-free", "sdpa", [])
    classes = recipe(folder_of("bert"), task="text-classification")
    assert settle(classes, HOME, CPU, FULL) == ("padding-free", "sdpa", [])
    packed = recipe(folder_of("llama"), data={"batches": "packed"})
    assert settle(packed, HOME, CPU, FULL) == ("packed", "sdpa", [])


def test_auto_pads_where_rows_would_mix_and_says_why(folder_of: Callable[..., Path]) -> None:
    batches, backend, [note] = settle(recipe(folder_of("falcon_h1")), HOME, CPU, FULL)
    assert (batches, backend) == ("padded", "sdpa")
    assert note.startswith("data.batches=padded: FalconH1ForCausalLM carries information")


@pytest.mark.parametrize("batches", ["padding-free", "packed"])
def test_lines_that_would_mix_are_refused(batches: str, folder_of: Callable[..., Path]) -> None:
    asked = recipe(folder_of("stablelm"), data={"batches": batches})
    with pytest.raises(RecipeError, match=r"StableLmAttention is not told where rows end; use padded") as error:
        settle(asked, HOME, CPU, FULL)
    assert (error.value.field, error.value.value) == ("data.batches", batches)
    assert error.value.fix.count("use padded") == 1


def test_ranks_cannot_share_lines_that_would_mix(folder_of: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match=r"only share lines .* not told where rows end; use parallel.context=1"):
        settle(recipe(folder_of("stablelm"), parallel={"context": 2}), HOME, CPU, FULL)


def test_a_head_of_its_own_is_padded(folder_of: Callable[..., Path]) -> None:
    sections = {"model": {"source": str(folder_of("llama")), "pooling": "head"}}
    reason, _ = examine(recipe(Path(), task="text-classification", **sections).model, HOME, "text-classification")
    assert reason is not None
    assert "finds a row's last or first token by padding" in reason
    with pytest.raises(RecipeError, match="use padded"):
        settle(
            recipe(Path(), task="text-classification", data={"batches": "padding-free"}, **sections), HOME, CPU, FULL
        )


def test_padded_rows_take_a_backend_that_knows_masks(folder_of: Callable[..., Path]) -> None:
    folder = folder_of("llama")
    for name in ("sdpa", "eager"):
        asked = recipe(folder, data={"batches": "padded"}, model={"source": str(folder), "attention": name})
        assert settle(asked, HOME, CPU, FULL) == ("padded", name, [])
    asked = recipe(folder, data={"batches": "padded"}, model={"source": str(folder), "attention": "varlen"})
    with pytest.raises(IngotError, match=r"only where rows lie end to end"):
        settle(asked, HOME, torch.device("cuda"), HALF)
