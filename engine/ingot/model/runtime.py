"""A finished model folder, ready to answer: the runtime behind the MLflow package (which holds a copy of this file)
and the
endpoint. Self-contained: standard library, torch, transformers, and its neighbours `generate.py` and `pooling.py`.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from .generate import (
    Generation,
    InputError,
    Sampling,
    context_limit,
    generate,
    make_rows,
    padding_id,
    plain_prompt_ids,
    stream,
)
from .pooling import CLASSIFIER_FILE, MeanPoolClassifier, class_probabilities

RUNTIME_FILE = "ingot.json"
DEFAULT_NEW_TOKENS = 128
KINDS: dict[str, Any] = {
    "summarization": AutoModelForSeq2SeqLM,
    "translation": AutoModelForSeq2SeqLM,
    "token-classification": AutoModelForTokenClassification,
    "question-answering": AutoModelForQuestionAnswering,
    "fill-mask": AutoModelForMaskedLM,
}
POOLED = ("text-classification", "multi-label-classification", "reward")
WRITING = ("chat-completion", "text-generation", "language-modeling")


def describe(folder: Path) -> dict[str, Any]:
    """What `ingot.json` says about a model folder; for a folder without one, what its configuration implies."""
    if (folder / RUNTIME_FILE).is_file():
        return json.loads((folder / RUNTIME_FILE).read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = folder / "tokenizer_config.json"
    chat = (folder / "chat_template.jinja").is_file() or (
        tokenizer.is_file() and "chat_template" in json.loads(tokenizer.read_text(encoding="utf-8"))
    )
    if (folder / CLASSIFIER_FILE).is_file():
        return {"task": "text-classification", "pooling": "mean"}
    if any("ForSequenceClassification" in name for name in config.get("architectures") or []):
        return {"task": "text-classification", "pooling": "head"}
    return {"task": "chat-completion" if chat else "text-generation"}


class Runtime:
    """A finished model folder, ready to answer. Not thread-safe: one caller at a time."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, about: dict[str, Any]) -> None:
        self.model, self.tokenizer, self.about = model.eval(), tokenizer, about
        self.task: str = about["task"]
        self.default_new_tokens = int(about.get("max_new_tokens") or DEFAULT_NEW_TOKENS)
        named = getattr(model.config, "id2label", None) or {}  # type: ignore[union-attr]
        self.labels: tuple[str, ...] = tuple(about.get("labels") or [named[i] for i in sorted(named)])

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto") -> "Runtime":
        """Load a complete Hugging Face folder (safetensors, no remote code, no network). On a CPU in float32."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} holds no config.json: not a model folder")
        about = describe(folder)
        where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        dtype: Any = "auto" if where.type == "cuda" else torch.float32
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        if about["task"] not in POOLED:
            auto = KINDS.get(about["task"], AutoModelForCausalLM)
            model = auto.from_pretrained(folder, dtype=dtype, use_safetensors=True, **local)
        elif (folder / CLASSIFIER_FILE).is_file():
            model = MeanPoolClassifier.from_pretrained(folder, dtype=dtype)
        else:
            kind = AutoModelForSequenceClassification
            model, loaded = kind.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **local
            )
            if loaded["missing_keys"]:  # transformers would go on with random weights in their place
                missing = ", ".join(sorted(loaded["missing_keys"])[:3])
                raise ValueError(f"{folder} lacks weights of the classifier ({missing}): it was not saved as a whole")
        return cls(model.to(where), tokenizer, about)

    def chat_ids(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """The prompt of a conversation, by the tokenizer's own chat template."""
        self._require_text()
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError("messages", "this model has no chat template: send a prompt instead")
        try:
            text = self.tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates are programs: they raise anything, mostly jinja2's TemplateError
            raise InputError("messages", f"the model's chat template refuses these messages: {error}") from error
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt_ids(self, prompt: str) -> list[int]:
        """The prompt of a completion."""
        self._require_text()
        return plain_prompt_ids(self.tokenizer, prompt)

    def _require_text(self) -> None:
        if self.task not in WRITING:
            what = "classifies text" if self.task == "text-classification" else f"is for {self.task}"
            raise InputError("model", f"this model {what}: it does not write any")

    def sampling(self, prompts: Sequence[list[int]], params: dict[str, Any]) -> Sampling:
        """`params` (max_new_tokens, temperature, top_p, stop, seed; None: default) -> `Sampling`.

        Without max_new_tokens the folder's default is used, or what the context leaves.
        """
        given = {key: value for key, value in params.items() if value is not None}
        if "max_new_tokens" not in given:
            limit, longest = context_limit(self.model), max(map(len, prompts), default=0)
            if limit is not None and longest >= limit:
                raise InputError(
                    "prompt", f"{longest} prompt tokens leave no room for an answer: the model reaches {limit}"
                )
            room = self.default_new_tokens if limit is None else limit - longest
            given["max_new_tokens"] = min(self.default_new_tokens, room)
        stop = given.pop("stop", ())
        return Sampling(stop=(stop,) if isinstance(stop, str) else tuple(stop), **given)

    def generate(self, prompts: Sequence[list[int]], **params: Any) -> list[Generation]:
        """Answer prompts given as ids; `params` as in `sampling`."""
        chosen = self.sampling(prompts, params)
        return generate(self.model, self.tokenizer, prompts, **vars(chosen))

    def stream(self, prompt: list[int], **params: Any) -> Iterator[str | Generation]:
        """As the module's `stream`; errors of `params` or of the prompt's length are raised by this call already."""
        chosen = self.sampling([prompt], params)
        make_rows(self.model, self.tokenizer, [prompt], chosen)
        return stream(self.model, self.tokenizer, prompt, chosen)

    def chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **params: Any
    ) -> Generation:
        """Answer one conversation."""
        return self.generate([self.chat_ids(messages, tools)], **params)[0]

    def complete(self, prompt: str, **params: Any) -> Generation:
        """Continue one prompt."""
        return self.generate([self.prompt_ids(prompt)], **params)[0]

    def classify(self, texts: Sequence[str], tokens_per_batch: int = 8192) -> list[tuple[str, dict[str, float]]]:
        """The most likely label of each text, and the probability of every label."""
        if self.task != "text-classification":
            does = "writes text" if self.task in WRITING else f"is for {self.task}"
            raise InputError("model", f"this model {does}: it does not classify")
        limits = [n for n in (context_limit(self.model), self.tokenizer.model_max_length) if n is not None]
        cut = self.about.get("max_tokens")  # training cut longer texts there, so the same is done here
        encoded = [list(self.tokenizer(t, truncation=cut is not None, max_length=cut)["input_ids"]) for t in texts]
        for ids in encoded:
            if not ids:
                raise InputError("text", "the text holds no token")
            if len(ids) > min(limits, default=len(ids)):
                raise InputError("text", f"{len(ids)} tokens, and the model reaches {min(limits)}")
        probs = class_probabilities(self.model, encoded, padding_id(self.tokenizer), tokens_per_batch)
        answers = [dict(zip(self.labels, row, strict=True)) for row in probs]
        return [(max(answer, key=answer.__getitem__), answer) for answer in answers]
