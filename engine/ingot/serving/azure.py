"""Routes as Azure ML's hosts have them: /score in its three shapes, with each task's own answer."""

from collections.abc import Callable
from typing import Any

from fastapi.responses import PlainTextResponse

from ingot.model.runtime import Runtime
from ingot.model.sampling import InputError
from ingot.serving.deployments import Deployments
from ingot.serving.schemas import Row, ScoreRequest, Split, counted, tensor_rows

FIELD = "input_data"
LABELLED = ("text-classification", "multi-label-classification")
Record = dict[str, Any]


class Azure:
    """The handlers over what is served."""

    def __init__(self, deployments: Deployments) -> None:
        self.deployments = deployments

    async def score(self, body: ScoreRequest, model: str | None = None) -> Any:
        """Answer rows: a list with an answer for each; of one conversation, an object."""
        chosen = self.deployments.choose(model)
        data, given = body.read()
        rows, alone = _rows(data, chosen.task)
        params, shape = _params(given, chosen.task, chosen.engine.runtime)
        found = await chosen.engine.answer(rows, params)
        answers = [shape(row, answer) for row, answer in zip(rows, found, strict=True)]
        return answers[0] if alone else answers

    async def health(self) -> PlainTextResponse:
        """Whether a request sent now would be worked on."""
        self.deployments.require_ready()
        return PlainTextResponse("Healthy")


def _rows(data: Any, task: str) -> tuple[list[Row], bool]:
    """Rows, and whether they are one conversation. Raises InputError."""
    if isinstance(data, dict) and {"columns", "data"} <= set(data) <= {"columns", "data", "index"}:
        try:
            return counted(Split.model_validate(data).rows(FIELD), FIELD), False
        except ValueError as error:  # pydantic's, and what InputError is
            if isinstance(error, InputError):
                raise
            needs = "names as columns, rows as data"
            raise InputError(FIELD, f"{FIELD}: not a DataFrame in the orientation split: {needs}") from error
    if task == "chat-completion":
        turns = data.get("input_string") if isinstance(data, dict) and set(data) == {"input_string"} else data
        if isinstance(turns, list) and turns and all(isinstance(turn, dict) and "role" in turn for turn in turns):
            return [{"messages": turns}], True
        if isinstance(turns, list) and turns and all(isinstance(turn, list) for turn in turns):
            return counted([{"messages": conversation} for conversation in turns], FIELD), False
    return counted(tensor_rows(FIELD, data), FIELD), False


def _params(given: Record, task: str, runtime: Runtime) -> tuple[Record, Callable[[Row, Record], Any]]:
    """Azure's names of parameters -> the task's, and what an answer looks like. Raises InputError."""
    params, full = dict(given), False
    if "max_new_tokens" in params:
        if "max_tokens" in params:
            raise InputError("max_new_tokens", "max_new_tokens and max_tokens are two names of one limit: send one")
        params["max_tokens"] = params.pop("max_new_tokens")
    for name in ("do_sample", "return_full_text", "return_all_scores"):
        if name in params and not isinstance(params[name], bool):
            raise InputError(name, f"{name} must be true or false")
    if task in ("chat-completion", "text-generation", "language-modeling"):
        drawn = params.pop("do_sample", None)
        if drawn is False and params.get("temperature"):
            raise InputError("do_sample", "do_sample: false takes the likeliest token, and temperature draws: send one")
        if drawn:
            params.setdefault("temperature", 1.0)
        full = params.pop("return_full_text", False)
        if full and task == "chat-completion":
            raise InputError("return_full_text", "return_full_text: a conversation is not continued as one text")
    if task in LABELLED and params.pop("return_all_scores", False):
        params["top_k"] = len(runtime.labels)
        return params, lambda _, answer: _scores(answer)
    return params, _SHAPES.get(task, _continued if full else _written)


def _written(_: Row, answer: Record) -> str:
    return str(answer["output_string"])


def _continued(row: Row, answer: Record) -> str:
    return str(next(iter(row.values()))) + _written(row, answer)


def _scores(answer: Record) -> list[Record]:
    if "probabilities" not in answer:  # one label is all there are
        return [{"label": answer["label"], "score": answer["probability"]}]
    return [{"label": one["label"], "score": one["probability"]} for one in answer["probabilities"]]


_SHAPES: dict[str, Callable[[Row, Record], Any]] = {
    "chat-completion": lambda _, answer: {"output": answer["output_string"]},
    "text-classification": lambda _, answer: answer["label"],
    "multi-label-classification": lambda _, answer: answer["labels"],
    "token-classification": lambda _, answer: answer["tags"],
    "question-answering": lambda _, answer: answer["answer"],
    "fill-mask": lambda _, answer: answer["tokens"][0] if len(answer["tokens"]) == 1 else answer["tokens"],
    "reward": lambda _, answer: answer["score"],
    "embeddings": lambda _, answer: answer["embedding"],
}
