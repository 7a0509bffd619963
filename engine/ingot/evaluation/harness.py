"""Any task of lm-evaluation-harness, run by its own library with a model of this process as its backend.

The only file that imports lm_eval, an optional package: `pip install ingot[harness]`.
"""

import logging
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ingot.errors import DataError, IngotError, MissingPackage, RecipeError
from ingot.evaluation.subject import Local, chat_text
from ingot.model.continuations import encode_texts
from ingot.registry import nearest

NEW_TOKENS = 256  # where a task names no limit, as the harness has it
TAKEN = {"until", "max_gen_toks", "do_sample", "temperature", "max_new_tokens"}


def run_harness(
    local: Local,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    include: Path | None = None,
) -> dict[str, Any]:
    """Task -> `metrics` and their standard errors, `version` and `rows`, as the harness reports them.

    `include`: a folder of further task files. `chat`: prompts by the tokenizer's template. Raises MissingPackage
    without the library, RecipeError for a task that it does not know, DataError where a data set cannot be read.
    """
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise MissingPackage("'ingot[harness]'", "a task of lm-evaluation-harness") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager: Any = TaskManager(include_path=None if include is None else str(include))
    known = manager.all_tasks
    for task in tasks:
        if task not in known:
            raise RecipeError("--harness", task, nearest(task, known))
    try:
        found: Any = simple_evaluate(
            _backend(local),
            tasks=list(tasks),
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=chat,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=False,
        )
    except (OSError, ConnectionError) as error:  # data sets are read by name, from a hub or its cache
        reason = str(error).splitlines()[0][:300]
        raise DataError("--harness", ", ".join(tasks), f"its data set cannot be read: {reason}") from error
    return {task: _plain(found, task) for task in found["results"]}


def _plain(found: Any, task: str) -> dict[str, Any]:
    numbers = {name: value for name, value in found["results"][task].items() if isinstance(value, int | float)}
    rows = found.get("n-samples", {}).get(task, {}).get("effective")
    return {"metrics": numbers, "version": found["versions"].get(task), "rows": rows}


def _backend(local: Local) -> Any:
    from lm_eval.api.model import LM

    class Engine(LM):  # type: ignore[misc,unused-ignore]
        """The harness's requests, answered by `local`."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            """Neighbours with one context are one question: the context is run once."""
            together = [list(some) for _, some in groupby((it.args for it in requests), key=lambda pair: pair[0])]
            asked = [(some[0][0], [continuation for _, continuation in some]) for some in together]
            return [(it.logprob, it.greedy) for found in local.score(asked) for it in found]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [logprob for logprob, _ in local.roll([it.args[0] for it in requests])]

        def generate_until(self, requests: list[Any]) -> list[str]:
            answers = [""] * len(requests)
            for settings, places in _by_settings([it.args[1] for it in requests]):
                written = _written(local, [requests[place].args[0] for place in places], settings)
                for place, text in zip(places, written, strict=True):
                    answers[place] = text
            return answers

        def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
            if not add_generation_prompt:
                raise IngotError("a task that begins the assistant's answer itself (gen_prefix) is not asked as a chat")
            return chat_text(local.tokenizer, chat_history)

        def chat_template(self, chat_template: bool | str = False) -> str:
            return str(local.tokenizer.chat_template or "")

        @property
        def tokenizer_name(self) -> str:
            return str(local.tokenizer.name_or_path).replace("/", "__")

    return Engine()


def _by_settings(settings: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Requests that are generated alike, together."""
    places: dict[str, list[int]] = {}
    for place, own in enumerate(settings):
        places.setdefault(repr(sorted(own.items())), []).append(place)
    for some in places.values():
        yield settings[some[0]], some


def _written(local: Local, prompts: Sequence[str], settings: dict[str, Any]) -> list[str]:
    """Greedy answers. Raises RecipeError for a setting that would change them and is not honoured here."""
    sampled = settings.get("do_sample") and settings.get("temperature") not in (0, 0.0, None)
    if sampled or (strange := sorted(set(settings) - TAKEN)):
        name = "do_sample" if sampled else strange[0]
        raise RecipeError(f"generation_kwargs.{name}", settings[name], "answers are greedy here; the task needs more")
    until = settings.get("until") or []
    most = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or NEW_TOKENS)
    ids = encode_texts(local.tokenizer, prompts)
    room = None if local.context is None else local.context - most
    if room is not None and room < 1:
        raise RecipeError("generation_kwargs.max_gen_toks", most, f"the model's context is {local.context}")
    found = local.written(
        [ids[prompt] if room is None else ids[prompt][-room:] for prompt in prompts],
        max_new_tokens=most,
        stop=[until] if isinstance(until, str) else until,
    )
    return [answer.text for answer in found]
