"""Which engine writes: what auto and an unsupported model come to, what is recorded; vLLM through a stand-in."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ingot import evaluating
from ingot.errors import DataError, IngotError, MissingPackage, ModelError, RecipeError
from ingot.evaluation.definition import load_definition
from ingot.evaluation.result import load_evaluation
from ingot.evaluation.subject import Local, engine_of
from ingot.evaluation.vllm_engine import Vllm, require_vllm
from ingot.progress import Progress

PROMPTS = ["Hello!", "The quick brown fox", "What is the capital of France? Paris is the", "1 2 3"]


@pytest.fixture
def model(model_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


# --- which engine ---


def test_auto_is_static_here_and_continuous_is_taken_at_its_word(model: Any) -> None:
    assert engine_of(model, "auto") == "static"
    assert engine_of(model, "static") == "static"
    assert engine_of(model, "continuous") == "continuous"


def test_auto_pages_with_flash_attention_on_a_gpu(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        device = torch.device("cuda", 0)

        def is_floating_point(self) -> bool:
            return True

    monkeypatch.setattr(model, "parameters", lambda: iter([OnGpu()]))
    assert engine_of(model, "auto") == "static"
    model.config._attn_implementation_internal = "flash_attention_2"
    assert engine_of(model, "auto") == "continuous"


def test_an_unsupported_model_is_answered_by_static_batches_with_one_note(model: Any, model_folder: Path) -> None:
    notes: list[str] = []
    local = Local(model, AutoTokenizer.from_pretrained(model_folder), wanted="continuous", note=notes.append)
    model.config.attn_logit_softcapping = 5.0
    for _ in range(2):
        assert [it.engine for it in local.write(PROMPTS, max_new_tokens=3)] == ["static"] * len(PROMPTS)
    [note] = notes
    assert "caps the logits of attention" in note and "static batches answer" in note


def test_an_encoder_decoder_says_that_it_is_not_batched_so(make_tokenizer: Any) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 97, "d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 16}
    notes: list[str] = []
    local = Local(
        T5ForConditionalGeneration(T5Config(**sizes)), make_tokenizer(), wanted="continuous", note=notes.append
    )
    assert local.engine == "static"
    assert "it is an encoder-decoder" in notes[0]


def test_beams_are_refused(model: Any) -> None:
    model.generation_config.num_beams = 3
    with pytest.raises(ModelError, match="num_beams = 3"):
        engine_of(model, "continuous")


def _task(folder: Path) -> Path:
    rows = [{"question": text, "answer": "x"} for text in PROMPTS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = folder / "task.yaml"
    path.write_text(
        "task: ask\nversion: 1\nkind: text-generation\ndata: rows.jsonl\nprompt: '{{question}}'\ntarget: '{{answer}}'\n"
        "max_new_tokens: 6\nstop: ['.']\nmetrics: [exact_match]\n",
        encoding="utf-8",
    )
    return path


def test_the_engine_is_recorded_and_changes_nothing_else(model_folder: Path, tmp_path: Path) -> None:
    path = _task(tmp_path)
    found = {}
    for engine in ("static", "continuous"):
        out = tmp_path / engine
        definitions = [(load_definition(path, []), tmp_path)]
        evaluating.measure_target(
            str(model_folder),
            definitions,
            out,
            Progress(quiet=True),
            engine=engine,  # type: ignore[arg-type]
        )
        found[engine] = load_evaluation(out, "ask")
        assert found[engine].about["engine"] == engine
        assert {row.output["engine"] for row in found[engine].samples} == {engine}
    static, continuous = found["static"], found["continuous"]
    assert static.asked == continuous.asked
    assert static.about["key"] == continuous.about["key"]
    assert [row.prediction for row in static.samples] == [row.prediction for row in continuous.samples]
    # Answered before: another engine asks nothing anew, and the record still says who wrote.
    definitions = [(load_definition(path, []), tmp_path)]
    evaluating.measure_target(
        str(model_folder), definitions, tmp_path / "static", Progress(quiet=True), engine="continuous"
    )
    assert load_evaluation(tmp_path / "static", "ask").about["engine"] == "static"


# --- vLLM ---


@dataclass
class SamplingParams:
    """Of vLLM, as far as it is used."""

    n: int = 1
    temperature: float = 1.0
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    prompt_logprobs: int | None = None
    detokenize: bool = True


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class Completion:
    index: int
    text: str
    token_ids: Sequence[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = True


@dataclass
class LLM:
    """vLLM's offline engine, by transformers; where it would see a stop string in its own text, it goes on instead."""

    model: str
    dtype: str = "auto"
    max_model_len: int | None = None
    trust_remote_code: bool = False
    generation_config: str = "auto"
    seed: int = 0
    asked: list[SamplingParams] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.generation_config == "vllm" and not self.trust_remote_code
        assert os.environ["VLLM_NO_USAGE_STATS"] == "1"  # or it tells its makers what it runs
        self.net: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype=getattr(torch, self.dtype)).eval()

    def generate(self, prompts: Any, sampling_params: SamplingParams, *, use_tqdm: bool = True) -> list[RequestOutput]:
        self.asked.append(sampling_params)
        return [self._one(list(prompt["prompt_token_ids"]), sampling_params) for prompt in prompts]

    @torch.inference_mode()
    def _one(self, ids: list[int], how: SamplingParams) -> RequestOutput:
        assert how.temperature == 0.0 and how.max_tokens is not None
        assert self.max_model_len is None or len(ids) + 1 <= self.max_model_len
        written: list[int] = []
        while len(written) < how.max_tokens and not set(written) & set(how.stop_token_ids or []):
            written.append(int(self.net(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax()))
        told: list[dict[int, Logprob] | None] | None = None
        if how.prompt_logprobs is not None:
            logps = torch.log_softmax(self.net(input_ids=torch.tensor([ids])).logits[0].float(), -1)
            told = [None]
            for row, token in zip(logps[:-1], ids[1:], strict=True):
                rank = int((row > row[token]).sum()) + 1
                told.append({int(row.argmax()): Logprob(row.max().item(), 1), token: Logprob(row[token].item(), rank)})
        return RequestOutput(ids, [Completion(0, "", tuple(written), "length")], told)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.machinery import ModuleSpec

    # Set and removed, so that it is gone after the test whoever sets it.
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    monkeypatch.delenv("VLLM_NO_USAGE_STATS")
    module: Any = ModuleType("vllm")
    module.LLM, module.SamplingParams, module.__spec__ = LLM, SamplingParams, ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", module)


@pytest.fixture
def both(vllm: None, model: Any, model_folder: Path) -> tuple[Local, Vllm]:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    return Local(model, tokenizer), Vllm(model_folder, tokenizer, "float32")


def test_vllm_writes_and_scores_as_a_model_of_this_process(both: tuple[Local, Vllm]) -> None:
    local, vllm = both
    [free] = local.write(PROMPTS[:1], max_new_tokens=12)
    for stop in ((), (free.text[3:5],)):
        found = vllm.write(PROMPTS, max_new_tokens=12, stop=stop)
        assert [it[:4] for it in found] == [it[:4] for it in local.write(PROMPTS, max_new_tokens=12, stop=stop)]
        assert {it.engine for it in found} == {"vllm"}
    asked: Any = [("What is the capital of", [" France?", " the city centre"]), ("", ["Hello!"])]
    for ours, theirs in zip(local.score(asked), vllm.score(asked), strict=True):
        assert [it[1:] for it in ours] == [it[1:] for it in theirs]
        assert [it.logprob for it in ours] == pytest.approx([it.logprob for it in theirs], abs=1e-4)
    ours_rolled, theirs_rolled = local.roll([*PROMPTS, ""]), vllm.roll([*PROMPTS, ""])
    assert [n for _, n in ours_rolled] == [n for _, n in theirs_rolled]
    assert [x for x, _ in ours_rolled] == pytest.approx([x for x, _ in theirs_rolled], abs=1e-4)
    with pytest.raises(DataError, match=r"cut a text of \d+ tokens elsewhere"):
        vllm.roll(["Hello! " * 200])
    with pytest.raises(DataError, match="the model reaches 256"):
        vllm.write(PROMPTS, max_new_tokens=400)


def test_vllm_measures_task_files(vllm: None, model_folder: Path, tmp_path: Path) -> None:
    definitions = [(load_definition(_task(tmp_path), []), tmp_path)]
    for engine in ("vllm", "static"):
        evaluating.measure_target(
            str(model_folder),
            definitions,
            tmp_path / engine,
            Progress(quiet=True),
            engine=engine,  # type: ignore[arg-type]
        )
    one, other = (load_evaluation(tmp_path / engine, "ask") for engine in ("vllm", "static"))
    assert one.about["engine"] == "vllm"
    assert [row.prediction for row in one.samples] == [row.prediction for row in other.samples]


def test_without_vllm_it_is_said_how_to_get_it(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(MissingPackage, match=r"pip install 'ingot\[vllm\]'"):
        require_vllm()
    definitions = [(load_definition(_task(tmp_path), []), tmp_path)]
    with pytest.raises(MissingPackage, match="vllm"):
        evaluating.measure_target(str(model_folder), definitions, tmp_path / "x", Progress(quiet=True), engine="vllm")
    assert not (tmp_path / "x").exists()


def test_what_vllm_cannot_take_is_refused(vllm: None, model_folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from ingot.subjects import open_target

    base: Any = AutoModelForCausalLM.from_pretrained(model_folder)
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    target = open_target(str(tmp_path / "adapter"), base=str(model_folder))
    with pytest.raises(RecipeError, match="this is an adapter"):
        target.vllm(torch.float32)
    with pytest.raises(IngotError, match="backend of its own"):
        evaluating.measure_harness(str(model_folder), ["x"], engine="vllm")
