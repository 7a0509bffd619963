"""What is measured and what that decides: the recipe's `evaluate`. `recipe.py` holds the whole."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ingot.address import read_address
from ingot.errors import RecipeError
from ingot.recipe_data import Positive, Section

Engine = Literal["auto", "static", "continuous", "vllm"]
JUDGED = ("text-generation", "chat-completion", "summarization", "translation")  # kinds whose answers are texts
RESAMPLES_BEYOND = 5
"""Resamples that must lie beyond the end of an interval: fewer make it a matter of the draw."""


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class Judge(Section):
    """Models behind OpenAI-style endpoints that grade written answers. Where one does not answer, all other metrics
    come, and the judge's is missing with the reason."""

    endpoint: Annotated[list[str], BeforeValidator(_as_list)] = Field(default_factory=list)
    """Who judges: `https://HOST/v1#MODEL`, or a list of them, whose agreement is then told too."""
    key_env: str | None = None
    """Environment variable that holds the key. None: OPENAI_API_KEY, where it is set."""
    allow_http: bool = False
    """Send texts over plain http to another machine; a key is never sent so."""
    kind: Literal["score", "pairwise"] = "score"
    """score: each answer gets a whole number (`judge_score`). pairwise: each answer against the row's first reference,
    asked in both orders (`judge_win_rate`)."""
    rubric: str = Field(default="quality", min_length=1)
    """What to judge by: quality, coherence, fluency, groundedness, relevance, similarity, or a text of your own."""
    scale: Annotated[list[int], Field(min_length=2, max_length=2)] = Field(default_factory=lambda: [1, 5])
    """score: the worst and the best number; they become 0 and 1."""
    max_new_tokens: Positive = 1024
    """Longest verdict in tokens, a reasoning model's thoughts included."""
    at_once: int = Field(default=8, ge=1, le=256)
    """Requests at once to each judge."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.scale[0] >= self.scale[1]:
            raise ValueError(f"scale must be the worst and then a larger, best number, not {self.scale}")
        if self.kind == "pairwise" and "scale" in self.model_fields_set:
            raise ValueError("scale is for kind: score; pairwise knows better, worse and tie only: remove it")
        for place in self.endpoint:
            try:
                named = read_address(place, "endpoint").model
            except RecipeError as error:
                raise ValueError(str(error)) from None
            if named is None:
                raise ValueError(f"endpoint must name the judge's model: {place.partition('?')[0]}#MODEL")
        if len(set(self.endpoint)) < len(self.endpoint):
            raise ValueError("endpoint names one judge twice")
        return self


Way = Literal["exact", "ngram", "minhash"]


class Contamination(Section):
    """Test rows that training saw, and the scores without them."""

    enabled: bool = True
    """Look for them."""
    ways: Annotated[list[Way], Field(min_length=1)] = Field(default=["exact", "ngram", "minhash"])
    """exact: the same text but for case, blanks and the forms that NFKC makes equal. ngram: training saw `threshold` of
    the row's n-grams, wherever. minhash: the row and one of training share `threshold` of the 5-grams of both."""
    ngram: int = Field(default=13, ge=3)
    """Words of an n-gram; in scripts without blanks, characters. A shorter row of 8 words or more is one n-gram."""
    threshold: float = Field(default=0.8, gt=0.0, le=1.0)
    """Share from which a row counts as seen, by ngram and minhash."""
    against: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Files, folders or data sets that training saw beside `data.train`, e.g. of pretraining: all their columns with
    text are read. Relative paths start at the recipe's folder."""
    max_words: Positive = 100_000_000
    """Read so many words of what training saw, and say so where there are more."""


class During(Section):
    """Measuring the model while it trains, on validation rows and never on test rows. The base model comes first."""

    every_steps: Positive
    """Measure after so many optimizer steps, and after the last one."""
    metrics: Annotated[list[str], Field(min_length=1)] | None = None
    """Names of metrics. None: those of `evaluate.metrics`."""
    max_rows: Positive = 128
    """Measure on this many validation rows, drawn with `data.split_seed`, and on this many of each task file."""
    max_new_tokens: Positive | None = None
    """Longest answer in tokens. None: `evaluate.max_new_tokens`."""
    tasks: list[str] = Field(default_factory=list)
    """Paths of further task files that say how to ask, relative to the recipe. Their metrics are called TASK/METRIC."""


class Rule(Section):
    """One condition of a promotion policy."""

    task: str = "test"
    """What it is measured on: `test` is the recipe's own test rows."""
    metric: str
    """A metric that is measured there."""
    require: Literal["better", "not_worse", "at_least"] = "better"
    """better: the tuned model gains more than `margin` over the base model. not_worse: it loses less than `margin`.
    at_least: its own score reaches `value`; where lower is better, it comes down to it."""
    margin: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """better, not_worse: a difference in the metric's own unit, as it is printed (0.02 of a share, 2 BLEU points)."""
    value: float | None = Field(default=None, allow_inf_nan=False)
    """at_least: a score in the metric's own unit."""
    slices: list[str] = Field(default_factory=list)
    """Fields of the rows: the rule must also hold among the rows of each of their values that has `min_rows`."""
    min_rows: Positive = 100
    """Fewer rows decide nothing: on them the rule does not hold, and a slice of fewer is left out and named."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.require == "at_least":
            if self.value is None:
                raise ValueError("value is missing: at_least needs the score to reach")
            if self.margin:
                raise ValueError("margin is for better and not_worse; at_least has value, remove it")
        elif self.value is not None:
            raise ValueError(f"value is for at_least; {self.require} has margin, remove it")
        if self.require == "not_worse" and not self.margin:
            raise ValueError("margin must be above 0: no test set can show that nothing at all was lost")
        return self


class Promotion(Section):
    """What a model must have shown before it is packaged or served: every rule must hold."""

    alpha: float = Field(default=0.025, gt=0.0, lt=0.5)
    """Chance of promoting a model that breaks a rule, one-sided: each rule is judged by the end of an interval of level
    1 - 2 alpha (0.025: the 95 % interval)."""
    rules: Annotated[list[Rule], Field(min_length=1)]
    """The conditions."""


class Evaluate(Section):
    """Measuring the base and the tuned model on the test rows."""

    enabled: bool = True
    """Off: `ingot run` skips the stage."""
    base: bool = True
    """Measure the base model too, and test the difference."""
    metrics: Annotated[list[str], Field(min_length=1)] | None = None
    """Names of metrics. None: those of the task."""
    metric_options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Options of single metrics, e.g. `{bleu: {language: ja}}`; docs/metrics.md names them."""
    tasks: list[str] = Field(default_factory=list)
    """Task files that both models are asked beside the test rows. Relative paths start at the recipe's folder."""
    max_rows: Positive | None = None
    """Measure on this many test rows, drawn with `data.split_seed`, and on the first so many of each of `tasks`.
    None: all."""
    max_new_tokens: Positive = 128
    """Longest generated answer, or answer found in a context, in tokens."""
    tokens_per_batch: Positive = 8192
    """Prompt and answer tokens of one generation batch."""
    engine: Engine = "auto"
    """What writes greedy answers; they are the same but for rounding, and the result's record names it. static: own
    batches, where the next row takes a finished one's place. continuous: transformers' continuous batching; a model
    that it cannot run is answered by static, with a note. vllm: that library (`pip install ingot[vllm]`), for tasks
    that write or score text. auto: continuous with flash attention on a GPU, else static."""
    save_every_rows: Positive = 64
    """Answers are stored in portions of so many rows of similar length, which an interrupted evaluation goes on from.
    """
    merge_references: bool = False
    """text-generation, summarization, translation: test rows with the same prompt or source are one item with several
    references (BLEU, ROUGE)."""
    bootstrap_samples: int = Field(default=1000, ge=100)
    """Resamples behind each interval and the paired test."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)
    """Level of the intervals."""
    judge: Judge | None = None
    """Have written answers graded by a model. None: nobody is asked."""
    contamination: Contamination = Contamination()
    """Look for test rows that training saw, and score without them too."""
    cluster_by: str | None = None
    """Column of the test rows whose equal values are no independent measurements, e.g. the passage that questions are
    about, or the user who wrote: whole clusters are resampled. None: rows are independent."""
    slices: list[str] = Field(default_factory=list)
    """Columns of the test rows that name parts of the set, e.g. `[language]`; each part is compared for itself."""
    during: During | None = None
    """The same metrics while the model trains; `train.best_by` may choose by one of them. None: only the loss."""
    promotion: Promotion | None = None
    """What the tuned model must have shown before `package` and `serve` take it. None: they take any."""


def check_decidable(section: Evaluate, *, later: bool) -> None:
    """Raise ValueError where the promotion policy would go without what decides it. `later`: stages wait for that."""
    if section.promotion is None:
        return
    if later and not section.enabled:
        raise ValueError(
            "evaluate.enabled = False leaves evaluate.promotion undecided, and package and serve wait for it; set it "
            "to true, or package.enabled and serve.enabled to false"
        )
    alpha, samples = section.promotion.alpha, section.bootstrap_samples
    needed = math.ceil(RESAMPLES_BEYOND / alpha)
    if samples < needed:
        raise ValueError(
            f"evaluate.bootstrap_samples = {samples} are too few to tell evaluate.promotion.alpha = {alpha:g}; raise "
            f"it to {needed}"
        )
    compared = [number for number, rule in enumerate(section.promotion.rules) if rule.require != "at_least"]
    if compared and not section.base:
        raise ValueError(
            f"evaluate.base = False leaves evaluate.promotion.rules[{compared[0]}] nothing to compare with; set it to "
            "true, or require at_least"
        )
