"""What to learn from and what is learned: the recipe's `data` and `objective`. `recipe.py` holds the whole."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(gt=0)]

Task = Literal[
    "chat-completion",
    "text-generation",
    "language-modeling",
    "summarization",
    "translation",
    "text-classification",
    "multi-label-classification",
    "token-classification",
    "question-answering",
    "fill-mask",
    "reward",
]
# What the rows of a kind need. `preference` is what dpo, orpo and reward learn from, not a task of its own.
COLUMNS: dict[str, tuple[str, ...]] = {
    "chat-completion": ("messages",),
    "text-generation": ("prompt", "completion"),
    "language-modeling": ("text",),
    "summarization": ("text", "summary"),
    "translation": ("source", "target"),
    "text-classification": ("text", "label"),
    "multi-label-classification": ("text", "labels"),
    "token-classification": ("tokens", "tags"),
    "question-answering": ("question", "context", "answers"),
    "fill-mask": ("text",),
    "preference": ("chosen", "rejected"),
}
OPTIONAL_COLUMNS = ("tools", "prompt")
CAUSAL = ("chat-completion", "text-generation", "language-modeling")
SEQUENCE_TO_SEQUENCE = ("summarization", "translation")
# Tasks that learn a choice among named classes; the names come from the training rows.
CLASSES = ("text-classification", "multi-label-classification", "token-classification")
PREFERENCE_METHODS = ("dpo", "orpo")


class Section(BaseModel):
    """Base of all sections: immutable, and strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class Source(Section):
    """One set of rows."""

    uri: str = Field(min_length=1)
    """File, folder, glob, `ingot://NAME` (generated), or `hf://datasets/ID`. Relative paths start at the recipe's
    folder.
    """
    format: Literal[
        "auto", "jsonl", "json", "csv", "tsv", "parquet", "conll", "text", "text-pair", "hf", "generated"
    ] = "auto"
    """auto: from the file's extension (a trailing .gz is looked through)."""
    pair: str | None = None
    """text-pair: the second, line-aligned file; rows get the columns `source` and `target`."""
    split: str | None = None
    """Split of a Hugging Face data set or of a generated one."""
    config: str | None = None
    """Configuration name of a Hugging Face data set."""
    license: str | None = None
    """Licence of these rows, as SPDX writes it. None: as the card beside them says, else unknown. It goes into the
    package with what it asks for."""

    weight: float = Field(default=1.0, gt=0)
    """Share of the rows of an epoch that comes from here, where `data.train` is a list; relative to the other weights.
    """


def _as_source(value: Any) -> Any:
    return {"uri": value} if isinstance(value, str) else value


def _as_sources(value: Any) -> Any:
    return [_as_source(inner) for inner in value] if isinstance(value, list) else _as_source(value)


Rows = Annotated[Source, BeforeValidator(_as_source)]
ONE, SEVERAL = "one source", "several sources"  # which of the two is wrong, in pydantic's errors; no key is called so
Mixture = Annotated[
    Annotated[Source, Tag(ONE)] | Annotated[list[Source], Field(min_length=1), Tag(SEVERAL)],
    Discriminator(lambda value: SEVERAL if isinstance(value, list) else ONE),
    BeforeValidator(_as_sources),
]


class Data(Section):
    """Which rows to learn from and to measure on, and how to read them."""

    train: Mixture
    """Rows to learn from: a path or URI, a mapping with `uri` and `format`, or a list of these with a `weight` each."""
    validation: Rows | None = None
    """Rows to watch while training. None: `validation_share` of the training rows, drawn with `split_seed`."""
    test: Rows | None = None
    """Rows to measure on. None: `test_share` of the training rows, drawn with `split_seed`."""
    columns: dict[str, str] = Field(default_factory=dict)
    """What the engine calls a column -> what the file calls it, e.g. `{prompt: mr, completion: ref}`."""
    prompt_template: str = "{prompt}"
    """text-generation: how the prompt is written; `{name}` is replaced by that column of the row."""
    validation_share: Share = 0.05
    """Share of the training rows drawn for validation when `validation` is missing (stratified by label)."""
    test_share: Share = 0.1
    """Share of the training rows drawn for test when `test` is missing (stratified by label)."""
    split_seed: int = 0
    """Seed of the drawn splits; independent of `train.seed`, so that reseeding training keeps the test rows."""
    max_train_rows: Positive | None = None
    """Learn from this many rows, drawn with `split_seed`. None: all."""
    max_tokens: Positive = 1024
    """Longest row in tokens; what is longer loses its end. A row that loses every trainable token is dropped and
    counted.
    """
    max_target_tokens: Positive = 256
    """summarization, translation: longest target in tokens; `max_tokens` is for the source."""
    overlap_tokens: Positive = 64
    """question-answering: a context that is too long is cut into windows that share this many tokens."""
    batches: Literal["auto", "padded", "padding-free", "packed"] = "auto"
    """How rows lie in a forward pass. padded: one below the other, filled up to the longest. padding-free: end to end
    in one line, attention kept inside each row; the same steps and gradients as padded. packed: padding-free, and steps
    are made of best-fit packs of `pack_tokens`, so that every step is full. auto: padding-free where the model can."""
    pack_tokens: Positive | None = None
    """packed: tokens of a pack. None: `max_tokens`."""
    streaming: bool = False
    """Read, encode and train window by window instead of encoding everything first: for sets that fit on no disk.
    Needs `train.max_steps`, and `validation` and `test` given or switched off."""
    stream_window_rows: Positive = 10_000
    """streaming: rows that are held, shuffled and packed at a time."""
    cache: str | None = None
    """Folder for encoded rows, shared by runs. None: INGOT_CACHE, else `~/.cache/ingot`. Safe to delete."""
    max_bad_rows: int = Field(default=0, ge=0)
    """How many unreadable rows are tolerated (counted and reported) before the run stops."""


class Objective(Section):
    """What is learned from a row, and how."""

    task: Task = "chat-completion"
    """chat-completion: the assistant's turns. text-generation: the completion. language-modeling: every token.
    summarization, translation: the target, by an encoder-decoder. text-classification: the label.
    multi-label-classification: which labels. token-classification: a tag for each word. question-answering: where in
    the context the answer stands. fill-mask: hidden tokens. reward: a score, higher for the preferred answer."""
    method: Literal["supervised", "dpo", "orpo", "distillation"] = "supervised"
    """supervised: the right answer. dpo (Rafailov et al. 2023), orpo (Hong et al. 2024): the preferred of two answers.
    distillation: the teacher's distribution at every learned token (Hinton et al. 2015)."""
    train_on: Literal["all-assistant", "last-assistant"] = "all-assistant"
    """chat-completion: which assistant turns are learned. A turn with `"train": false` never is."""
    label_smoothing: Share = 0.0
    """Share of the probability mass spread evenly over all classes (Szegedy et al. 2016, section 7). dpo,
    reward: the share of pairs that are thought to be the wrong way round (Mitchell 2023)."""
    beta: float = Field(default=0.1, gt=0)
    """dpo: weight of staying near the starting model. orpo: weight of the odds ratio beside the likelihood."""
    teacher: str | None = None
    """distillation: the model to learn from, written as `model.source` is. It must have the same tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """distillation: both distributions are softened by it."""
    teacher_share: float = Field(default=1.0, gt=0.0, le=1.0)
    """distillation: weight of the teacher's distribution; the rest is that of the right answer."""
    mask_share: float = Field(default=0.15, gt=0.0, lt=1.0)
    """fill-mask: share of a row's tokens that are learned, drawn anew in every epoch (Devlin et al. 2019)."""

    @property
    def rows(self) -> str:
        """What kind of rows it learns from: a key of COLUMNS."""
        return "preference" if self.method in PREFERENCE_METHODS or self.task == "reward" else self.task

    @property
    def loss(self) -> str:
        """Which loss it is: the method's, or that of the task."""
        return self.task if self.method == "supervised" else self.method

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.method != "supervised" and self.task not in CAUSAL:
            raise ValueError(f"method {self.method} is for {', '.join(CAUSAL)}, and task is {self.task}")
        if self.method in PREFERENCE_METHODS and self.task == "language-modeling":
            raise ValueError(f"method {self.method} needs a prompt; use task chat-completion or text-generation")
        if self.method == "orpo" and self.label_smoothing:
            raise ValueError("method orpo has no label_smoothing; remove it, or use dpo")
        if (self.teacher is None) == (self.method == "distillation"):
            what = "needs teacher: a model" if self.teacher is None else "has no teacher; remove it"
            raise ValueError(f"method {self.method} {what}")
        return self
