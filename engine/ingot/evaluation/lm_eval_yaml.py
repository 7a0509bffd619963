"""Task files of lm-evaluation-harness (0.4.13) as definitions: some of their keys, asked byte for byte alike.

`KEYS` says what is read, and as what. Everything else is refused by name: a key that was silently passed over would
give a score under the right name and of another question.
"""

from pathlib import Path
from typing import Any, NamedTuple

from ingot.errors import RecipeError
from ingot.evaluation.harness_rows import part_of
from ingot.evaluation.metrics import METRICS
from ingot.recipe_errors import Draft
from ingot.recipe_io import parse_draft, read_text

HARNESS = "run the task by its own library: ingot evaluate --harness"
KINDS = {
    "generate_until": "text-generation",
    "multiple_choice": "multiple-choice",
    "loglikelihood_rolling": "perplexity",
}
CHANGES = {"remove_whitespace": "strip", "lowercase": "lower", "uppercase": "upper"}
# The harness's own defaults (its config/task.py and evaluator.py).
SEED, MAX_NEW_TOKENS, DELIMITER, SEPARATOR = 1234, 256, " ", "\n\n"
DEFAULT_METRICS = {
    "generate_until": ["exact_match"],
    "multiple_choice": ["acc", "acc_norm"],
    "loglikelihood_rolling": ["word_perplexity", "byte_perplexity", "bits_per_byte"],
}


class Key(NamedTuple):
    """What becomes of a key: the fields of a definition that it gives, and what of it is read."""

    gives: str
    read: str


KEYS: dict[str, Key] = {
    "task": Key("task", "a name; a list of tasks is refused"),
    "task_alias": Key("notes", "passed over, with a note"),
    "tag": Key("notes", "passed over, with a note"),
    "include": Key("", "a file, or a list of files, relative to this one; what this one says wins"),
    "dataset_path": Key("data", "`json`, `csv`, `parquet`, a local folder, or the name of a hub's data set"),
    "dataset_name": Key("data.config", "a hub's configuration"),
    "dataset_kwargs": Key(
        "data.uri",
        "`data_files`: a file, or a file a split; `data_dir`; `trust_remote_code` is passed over, with a note",
    ),
    "training_split": Key("fewshot.data", "where no other split is named for examples"),
    "validation_split": Key("data.split", "asked where there is no `test_split`"),
    "test_split": Key("data.split", "asked"),
    "fewshot_split": Key("fewshot.data", "where examples come from"),
    "num_fewshot": Key("fewshot.count", "a number"),
    "fewshot_config": Key("fewshot", "`sampler`: `first_n` or `default` (seed 1234); `split`; nothing else"),
    "output_type": Key("kind", "`generate_until`, `multiple_choice`, `loglikelihood_rolling`"),
    "doc_to_text": Key("prompt", "a column or a Jinja template; a number is refused"),
    "doc_to_target": Key("target, answer", "a column, a Jinja template, a number or a list of numbers"),
    "doc_to_choice": Key("choices", "a list, a mapping, a column or a Jinja template"),
    "description": Key("header", "a column or a Jinja template"),
    "target_delimiter": Key("delimiter", "text"),
    "fewshot_delimiter": Key("fewshot.separator", "text; also what ends an answer where `until` is missing"),
    "generation_kwargs": Key(
        "stop, max_new_tokens",
        "`until`, `max_gen_toks`, `do_sample: false`, `temperature: 0`; what greedy ignores",
    ),
    "filter_list": Key(
        "extract", "`regex`, `remove_whitespace`, `lowercase`, `uppercase`, `take_first`; one `regex` a list"
    ),
    "metric_list": Key(
        "metrics",
        "exact_match with its options, bleu, chrf, ter; acc, acc_norm, acc_bytes, acc_mutual_info, brier_score; "
        "word_perplexity, byte_perplexity, bits_per_byte; each by its usual aggregation",
    ),
    "repeats": Key("", "1 only: answers are greedy"),
    "metadata": Key("version", "`version`; the rest is passed over"),
    "should_decontaminate": Key("notes", "passed over, with a note: `ingot evaluate --against` finds shared rows"),
    "doc_to_decontamination_query": Key("notes", "passed over, with a note"),
    "unsafe_code": Key("", "false only"),
}
# Keys that nobody else has: one of them makes a file the harness's.
_ITS_OWN = {"output_type", "dataset_path", "doc_to_text", "doc_to_target", "doc_to_choice", "metric_list", "include"}
_ITS_OWN |= {"aggregate_metric_list", "group_alias", "task_list"}  # of groups of tasks, which are refused
_PASSED_OVER = ("task_alias", "tag", "should_decontaminate", "doc_to_decontamination_query")
# Output type -> its metrics: their name, ours, how it is aggregated.
_METRICS = {
    "generate_until": {
        "exact_match": ("exact_match", "mean"),
        "bleu": ("bleu", "bleu"),
        "chrf": ("chrf", "chrf"),
        "ter": ("ter", "ter"),
    },
    "multiple_choice": {
        "acc": ("acc", "mean"),
        "acc_norm": ("acc_norm", "mean"),
        "acc_bytes": ("acc_bytes", "mean"),
        "acc_mutual_info": ("acc_mutual_info", "mean"),
        "brier_score": ("brier", "brier_score"),
    },
    "loglikelihood_rolling": {
        "word_perplexity": ("word_perplexity", "weighted_perplexity"),
        "byte_perplexity": ("byte_perplexity", "weighted_perplexity"),
        "bits_per_byte": ("bits_per_byte", "bits_per_byte"),
    },
}
_TEXT_OPTIONS = ("ignore_case", "ignore_punctuation", "ignore_numbers", "regexes_to_ignore")
_GREEDY_LEAVES_IDLE = ("top_p", "top_k", "num_beams")


def is_of_harness(values: dict[str, Any]) -> bool:
    """Whether a file is one of the harness's."""
    return bool(_ITS_OWN & set(values)) or isinstance(values.get("task"), list)


def to_draft(draft: Draft, folder: Path) -> Draft:
    """The fields of a definition that a harness's file comes to; each points at the line that it comes from.

    Raises RecipeError, naming the key, for whatever is not read.
    """
    merged = _included(draft, folder, ())
    return _Reader(merged, folder).draft()


def _included(draft: Draft, folder: Path, above: tuple[Path, ...]) -> Draft:
    """`draft` over the files that it includes."""
    named = draft.values.get("include")
    if named is None:
        return draft
    whole = Draft(draft.source)
    for name in named if isinstance(named, list) else [named]:
        path = (folder / str(name)).resolve()
        if path in above:
            raise RecipeError("include", name, "the files include each other", where=draft.where(("include",)))
        inner = parse_draft(read_text(path, "include"), str(path), "task", "task and output_type")
        inner = _included(inner, path.parent, (*above, path))
        _lay_over(whole, inner)
    _lay_over(whole, draft)
    del whole.values["include"]
    return whole


def _lay_over(whole: Draft, upper: Draft) -> None:
    for key, value in upper.values.items():
        whole.places |= {place: where for place, where in upper.places.items() if place and place[0] == key}
        whole.values[key] = value


class _Reader:
    """One file of the harness, on its way to a definition."""

    def __init__(self, theirs: Draft, folder: Path) -> None:
        self._draft, self._values, self._folder = theirs, theirs.values, folder
        self._made = Draft(theirs.source)
        self._notes: list[str] = []

    def draft(self) -> Draft:
        """Everything, in the order of a definition."""
        self._refuse_unknown()
        output = self._one_of("output_type", KINDS, default="generate_until")
        self._put("task", self._values.get("task"), "task")
        metadata = self._mapping("metadata")
        self._put("version", metadata.get("version", 0), "metadata")
        self._put("kind", KINDS[output], "output_type")
        self._put("data", part_of(self, self._asked_split()), "dataset_path")
        if output == "loglikelihood_rolling":
            self._put("target", self._text("doc_to_target"), "doc_to_target")
        else:
            self._ask(output)
        if output == "generate_until":
            self._generation()
        self._put("metrics", self._metrics(output), "metric_list")
        self._notes += [f"{name} is passed over" for name in _PASSED_OVER if self._values.get(name)]
        self._put("notes", self._notes, "task")
        return self._made

    # --- what harness_rows needs ---

    def value(self, name: str) -> Any:
        """A key's value, None without it."""
        return self._values.get(name)

    @property
    def folder(self) -> Path:
        """Where the file stands."""
        return self._folder

    def note(self, text: str) -> None:
        """Keep a note for whoever reads the results."""
        self._notes.append(text)

    def refusal(self, name: str, value: object, fix: str) -> RecipeError:
        """The error about a key."""
        keys = tuple(name.split("."))
        return RecipeError(
            name, value, f"{fix}; or {HARNESS} {self._values.get('task') or 'TASK'}", where=self._draft.where(keys)
        )

    # --- keys ---

    def _put(self, field: str, value: Any, key: str) -> None:
        self._made.values[field] = value
        self._made.places[(field,)] = f"{self._draft.where((key,))} ({key})"

    def _refuse_unknown(self) -> None:
        if isinstance(self._values.get("task"), list):
            raise self.refusal("task", self._values["task"], "a group of tasks is not read; name one task's file")
        for name, value in self._values.items():
            if name not in KEYS:
                raise self.refusal(name, value, "is not read of a harness's task file")
        if self._values.get("repeats", 1) != 1:
            raise self.refusal("repeats", self._values["repeats"], "answers are greedy, so repeats are alike; write 1")
        if self._values.get("unsafe_code"):
            raise self.refusal("unsafe_code", True, "no code of an answer is run")

    def _one_of(self, name: str, known: dict[str, str], default: str) -> str:
        value = self._values.get(name, default)
        if not isinstance(value, str) or value not in known:
            raise self.refusal(name, value, f"must be one of {', '.join(known)}")
        return value

    def _mapping(self, name: str) -> dict[str, Any]:
        value = self._values.get(name) or {}
        if not isinstance(value, dict):
            raise self.refusal(name, value, "must be a mapping")
        return value

    def _list(self, name: str) -> list[Any]:
        value = self._values.get(name) or []
        if not isinstance(value, list):
            raise self.refusal(name, value, "must be a list")
        return value

    def _text(self, name: str, default: str | None = None) -> str:
        value = self._values.get(name, default)
        if not isinstance(value, str):
            raise self.refusal(name, value, "is missing" if value is None else "must be a column or a template")
        return value

    def _asked_split(self) -> str:
        split = self._values.get("test_split") or self._values.get("validation_split")
        if not isinstance(split, str):
            raise self.refusal("test_split", split, "is missing, and so is validation_split: name the split to ask")
        return split

    def _ask(self, output: str) -> None:
        self._put("header", self._values.get("description") or "", "description")
        self._put("prompt", self._text("doc_to_text"), "doc_to_text")
        self._put("delimiter", self._text("target_delimiter", DELIMITER), "target_delimiter")
        choices, target = self._values.get("doc_to_choice"), self._values.get("doc_to_target")
        if isinstance(choices, dict):
            choices = list(choices.values())
        if target is None:
            raise self.refusal("doc_to_target", None, "is missing")
        if choices is None and output == "multiple_choice":
            raise self.refusal("doc_to_choice", None, "is missing")
        if choices is None:
            self._put("target", target, "doc_to_target")
        else:
            self._put("choices", choices, "doc_to_choice")
            self._put("answer", target, "doc_to_target")
            is_template = isinstance(target, str) and "{" in target
            self._put("answer_as", "index-or-text" if is_template else "text", "doc_to_target")
        count = self._values.get("num_fewshot") or 0
        if count:
            self._put("fewshot", self._fewshot(count), "num_fewshot")

    def _fewshot(self, count: Any) -> dict[str, Any]:
        section = self._mapping("fewshot_config")
        for name, value in section.items():
            if name not in ("sampler", "split"):
                raise self.refusal(f"fewshot_config.{name}", value, "is not read")
        sampler = section.get("sampler", "default")
        if sampler not in ("default", "first_n"):
            raise self.refusal("fewshot_config.sampler", sampler, "must be default or first_n")
        named = section.get("split", self._values.get("fewshot_split"))
        asked, tested = self._asked_split(), self._values.get("test_split")
        split = named or self._values.get("training_split") or self._values.get("validation_split") or asked
        # The harness leaves out the asked row where both names are equal, also where neither is given.
        leave_out = named == tested
        if split == asked and not leave_out:
            self.note(f"examples come from the asked split {asked} and may be the asked row, as in the harness")
        found = {"count": count, "separator": self._text("fewshot_delimiter", SEPARATOR), "leave_out_asked": leave_out}
        if split != asked:
            found["data"] = part_of(self, split)
        if sampler == "default":
            self.note(f"examples are drawn in turn with seed {SEED}, as the harness draws them for all rows in order")
            return found | {"pick": "in-turn", "seed": SEED, "among": None}
        return found | {"pick": "first"}

    def _generation(self) -> None:
        section = self._mapping("generation_kwargs")
        until = section.get("until", [self._text("fewshot_delimiter", SEPARATOR)])
        for name, value in section.items():
            if name == "do_sample" and value is not False:
                raise self.refusal("generation_kwargs.do_sample", value, "answers are greedy; write false")
            if name == "temperature" and value not in (None, 0, 0.0):
                raise self.refusal("generation_kwargs.temperature", value, "answers are greedy; write 0")
            if name == "num_beams" and value != 1:
                raise self.refusal("generation_kwargs.num_beams", value, "answers are greedy; write 1")
            if name not in ("until", "max_gen_toks", "do_sample", "temperature", *_GREEDY_LEAVES_IDLE):
                raise self.refusal(f"generation_kwargs.{name}", value, "is not read")
        self._put("stop", [until] if isinstance(until, str) else until, "generation_kwargs")
        self._put("max_new_tokens", section.get("max_gen_toks", MAX_NEW_TOKENS), "generation_kwargs")
        self._put("extract", self._extracts(), "filter_list")

    def _extracts(self) -> list[dict[str, Any]]:
        named = self._list("filter_list") or [{"name": "none", "filter": []}]
        return [self._extract(number, one) for number, one in enumerate(named)]

    def _extract(self, number: int, one: Any) -> dict[str, Any]:
        place = f"filter_list[{number}]"
        if not isinstance(one, dict) or set(one) != {"name", "filter"} or not isinstance(one["filter"], list):
            raise self.refusal(place, one, "must be a mapping with name and filter, a list")
        found: dict[str, Any] = {"name": one["name"], "before": [], "after": []}
        for step in one["filter"]:
            options = dict(step) if isinstance(step, dict) else {"function": step}
            function = options.pop("function", None)
            if function == "take_first" and not options:
                continue  # of one answer
            if function in CHANGES and not options:
                found["after" if "regex" in found else "before"].append(CHANGES[function])
                continue
            if function != "regex" or "regex" in found or set(options) - {"regex_pattern", "group_select", "fallback"}:
                raise self.refusal(place, step, f"must be one of {', '.join(['regex (once)', *CHANGES, 'take_first'])}")
            found["regex"] = options.get("regex_pattern", r"#### (\-?[0-9\.\,]+)")
            found["which"] = {0: "first", -1: "last"}.get(options.get("group_select", 0), options.get("group_select"))
            found["fallback"] = options.get("fallback", "[invalid]")
        return found

    def _metrics(self, output: str) -> list[dict[str, Any]]:
        named = self._list("metric_list") or [{"metric": name} for name in DEFAULT_METRICS[output]]
        return [self._metric(number, one, output) for number, one in enumerate(named)]

    def _metric(self, number: int, one: Any, output: str) -> dict[str, Any]:
        place = f"metric_list[{number}]"
        options = dict(one) if isinstance(one, dict) else {}
        name = options.pop("metric", None)
        if not isinstance(name, str):
            raise self.refusal(place, one, "must be a mapping with the name of a metric")
        known = _METRICS[output]
        if name not in known:
            raise self.refusal(place, name, f"is not read; of {output} there are {', '.join(known)}")
        ours, usual = known[name]
        better = METRICS[ours].higher_is_better
        if options.pop("aggregation", usual) != usual:
            raise self.refusal(place, one, f"{name} is aggregated by {usual} only")
        if options.pop("higher_is_better", better) != better:
            raise self.refusal(place, one, f"higher_is_better of {name} is {better}")
        if options.pop("hf_evaluate", False) is not False:
            raise self.refusal(place, one, "metrics of the package evaluate are not run; leave hf_evaluate out")
        if options and output == "multiple_choice":
            self.note(f"{', '.join(options)} of {name} is passed over, as by the harness: choices are not compared")
            options = {}
        for option, value in options.items():
            if name != "exact_match" or option not in _TEXT_OPTIONS:
                raise self.refusal(place, {option: value}, f"is no option of {name}")
        if ours != "exact_match":
            return {"name": ours}
        return {"name": ours, "options": {**options, "blanks_matter": True}}
