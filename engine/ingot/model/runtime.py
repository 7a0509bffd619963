"""A finished model folder, ready to answer: the runtime behind the MLflow package (which holds a copy of this file)
and the endpoint. Self-contained: standard library, torch, transformers, pydantic, and its neighbours.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .adapted import is_adapter, over_base, view_of, whole_tensors
from .answers import ANSWERS, DEFAULT_NEW_TOKENS, TOKENS_PER_BATCH, Answering, shares_of, vectors
from .folder import CLASSIFIER_FILE, describe
from .generate import context_limit, generate, make_rows, plain_prompt_ids, stream
from .kinds import KINDS, POOLED
from .pooling import MeanPoolClassifier
from .sampling import Generation, InputError, Sampling
from .task_checks import SchemaError, read_params, read_row

# Sampling parameters as clients name them -> as `generate` does; the others have one name.
PARAMS = {"max_tokens": "max_new_tokens"}
WRITING = ("chat-completion", "text-generation", "language-modeling")


class Runtime:
    """A finished model folder, ready to answer. Not thread-safe: one caller at a time."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, about: dict[str, Any]) -> None:
        self.model, self.tokenizer, self.about = model.eval(), tokenizer, about
        self.task: str = about["task"]
        self.default_new_tokens = int(about.get("max_new_tokens") or DEFAULT_NEW_TOKENS)
        named = getattr(model.config, "id2label", None) or {}  # type: ignore[union-attr]
        self.labels: tuple[str, ...] = tuple(about.get("labels") or [named[i] for i in sorted(named)])
        self.answering = Answering(self.task, self.model, tokenizer, self.labels, about)

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto", base: Path | None = None) -> "Runtime":
        """Load a complete Hugging Face folder (safetensors, no remote code, no network), or an adapter over `base`
        (None: over the one that it names). On a CPU in float32.

        Raises OSError, ValueError or KeyError where it cannot be read.
        """
        folder = Path(folder)
        try:
            if is_adapter(folder):
                adapted: Runtime = over_base(cls._whole, folder, device, base)
                return adapted
            return cls._whole(folder, device)
        except torch.OutOfMemoryError:
            raise
        except (SafetensorError, RuntimeError) as error:  # cut short, or not what the configuration says
            raise ValueError(f"the weights cannot be read: {' '.join(str(error).split())}") from error

    @classmethod
    def _whole(cls, folder: Path, device: str, elsewhere: frozenset[str] = frozenset()) -> "Runtime":
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} holds no config.json: not a model folder")
        about = describe(folder)
        where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        dtype: Any = "auto" if where.type == "cuda" else torch.float32
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return cls(_model(folder, about["task"], dtype, elsewhere).to(where), tokenizer, about)

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
            raise InputError("model", f"this model {what}: it does not write any; send rows to /invocations")

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

    def answer(
        self,
        rows: Sequence[Mapping[str, Any]],
        params: Mapping[str, Any] | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> list[dict[str, Any]]:
        """One record of output columns for each row of input columns, as `task_schemas.py` has them: what package,
        endpoint and batches answer. `params`: as clients name them, None where not given. `stopped`: asked between two
        tokens of a summary or translation, whether nobody waits any more. Raises InputError.
        """
        asked, given = self.read(rows, params)
        if not asked:
            return []
        if self.task not in WRITING:
            return ANSWERS[self.task](replace(self.answering, stopped=stopped), asked, given)
        written = self.generate([self.prompt_of(row) for row in asked], **self.sampling_params(given))
        return [{"output_string": answer.text} for answer in written]

    def read(
        self, rows: Sequence[Mapping[str, Any]], params: Mapping[str, Any] | None = None
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Rows and parameters by the table's own names, checked. Raises InputError."""
        try:
            return [read_row(self.task, row) for row in rows], read_params(self.task, params or {})
        except SchemaError as error:
            raise InputError(error.field, str(error)) from error

    def prompt_of(self, row: Mapping[str, Any]) -> list[int]:
        """The prompt of a row that `read` gave, for what writes text."""
        if self.task != "chat-completion":
            return self.prompt_ids(row["input_string"])
        return self.chat_ids(row.get("messages") or [{"role": "user", "content": row["input_string"]}])

    @staticmethod
    def sampling_params(given: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters that `read` gave, as `generate` and `sampling` name them."""
        return {PARAMS.get(name, name): value for name, value in given.items()}

    def classify(
        self, texts: Sequence[str], tokens_per_batch: int = TOKENS_PER_BATCH
    ) -> list[tuple[str, dict[str, float]]]:
        """The most likely label of each text, and the probability of every label."""
        if self.task != "text-classification":
            does = "writes text" if self.task in WRITING else f"is for {self.task}"
            raise InputError("model", f"this model {does}: it does not classify")
        answers = shares_of(self.answering, texts, tokens_per_batch)
        return [(max(answer, key=answer.__getitem__), answer) for answer in answers]

    def embed(self, texts: Sequence[str], pooling: str | None = None, *, normalize: bool = True) -> Tensor:
        """The vector of each text [texts, D] float32: hidden states of the last layer, of any model. `pooling` mean,
        first or last; None: what `embedding` of ingot.json says, else mean. Raises InputError.
        """
        return vectors(self.answering, texts, pooling, normalize)


def missing_over_base(folder: Path, base: Path) -> list[str]:
    """Names of the weights that neither the adapter in `folder` nor `base` holds, so that they would be drawn anew.
    Nothing is computed, and of the base no tensor is read.
    """
    with view_of(folder, base) as view:
        task = describe(view)["task"]
        if task in POOLED and (view / CLASSIFIER_FILE).is_file():
            return []  # it has no weights between its encoder and what that file holds
        return _read(view, task, whole_tensors(folder), device_map="meta")[1]


def _model(folder: Path, task: str, dtype: Any, elsewhere: frozenset[str]) -> nn.Module:
    """The weights of a folder under what the task needs. Raises ValueError where some are missing, or have another
    shape, that are not `elsewhere`.
    """
    if task in POOLED and (folder / CLASSIFIER_FILE).is_file():
        return MeanPoolClassifier.from_pretrained(folder, dtype=dtype)
    model, missing = _read(folder, task, elsewhere, dtype=dtype)
    if missing:  # transformers would go on with random weights in their place
        what = "the classifier" if task in POOLED else f"a model for {task}"
        lost = f"lacks weights of {what} ({', '.join(missing[:3])}), or has them in other shapes than config.json says"
        raise ValueError(f"{folder} {lost}: it was not saved as a whole")
    return model


def _read(folder: Path, task: str, elsewhere: frozenset[str], **how: Any) -> tuple[nn.Module, list[str]]:
    """(the model, the names of what it has no weights for, or weights of another shape, and is not `elsewhere`)."""
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    # Weights of another shape are told below as missing. A base may have such a head, which the adapter's takes the
    # place of.
    local["ignore_mismatched_sizes"] = True
    auto = AutoModelForSequenceClassification if task in POOLED else KINDS.get(task, AutoModelForCausalLM)
    auto = AutoModel if task == "embeddings" else auto
    level = logging.get_verbosity()
    if elsewhere:
        logging.set_verbosity_error()  # of the head transformers would say that it is missing and drawn anew
    try:
        model, loaded = auto.from_pretrained(folder, output_loading_info=True, **local, **how)
    finally:
        logging.set_verbosity(level)
    missing = {*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])} - elsewhere
    if task == "embeddings":  # hidden states are wanted: a pooler behind them is not used
        missing = {name for name in missing if not name.startswith("pooler.")}
    return model, sorted(missing)
