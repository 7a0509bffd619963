"""What a model of each task reads and answers: input columns, parameters, output columns.

This one table gives the MLflow signature, the check of every row and parameter (task_checks.py), the OpenAPI schema,
forms (JSON Schema), the columns that a batch needs, and a page of the documentation. Self-contained (standard library):
the MLflow package holds a copy.
"""

from dataclasses import dataclass
from typing import Any, Literal

Type = Literal["string", "long", "double", "boolean", "strings", "doubles", "objects", "messages", "words"]
TOP = "how many of them, likeliest first"


@dataclass(frozen=True)
class Column:
    """A column of the input or the output.

    `aliases`: other names that a request may use. `messages` and `words` are lists, or the same as JSON text. `objects`
    is a list of objects with `fields`. `asked`: an output column that is there only where a parameter asks for it.
    """

    name: str
    type: Type
    doc: str
    aliases: tuple[str, ...] = ()
    fields: tuple["Column", ...] = ()
    asked: bool = False


@dataclass(frozen=True)
class Param:
    """A parameter. `default` is the same as none given: a signature has no "not given", so 0, -1 or "auto" stand for
    what the model does of its own accord. Other values lie from `low` (or above `above`) to `high`, or among `choices`.
    """

    name: str
    type: Type
    default: Any
    doc: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskSchema:
    """A task. `forms`: which input columns a row has together, one of these sets. `example`: a row."""

    task: str
    inputs: tuple[Column, ...]
    forms: tuple[tuple[str, ...], ...]
    params: tuple[Param, ...]
    outputs: tuple[Column, ...]
    example: dict[str, Any]

    def param(self, name: str) -> Param:
        """The parameter of that name."""
        return next(param for param in self.params if param.name == name)


MAX_TOKENS = Param("max_tokens", "long", 0, "Most tokens to write. 0: the model's own number.", low=1)
WRITING_PARAMS = (
    MAX_TOKENS,
    Param("temperature", "double", 0.0, "0: always the likeliest token.", low=0.0, high=100.0),
    Param("top_p", "double", 1.0, "Draw among the likeliest tokens of this mass.", above=0.0, high=1.0),
    Param("stop", "strings", [], "Texts that end the answer, without being part of it. None: only the model ends it."),
    Param("seed", "long", -1, "The same seed draws the same answer. -1: another one every time.", low=0),
)
SEQUENCE_PARAMS = (
    MAX_TOKENS,
    Param("num_beams", "long", 1, "Beams of the search. 1: the likeliest token each time.", low=1, high=16),
)
PROMPT = Column("input_string", "string", "The text to continue.", ("prompt", "text"))
MESSAGES = Column("messages", "messages", "A conversation, each turn with `role` and `content`; or its JSON.")
TEXT = Column("text", "string", "The text.", ("input_string",))
WRITTEN = Column("output_string", "string", "What the model writes.")
LABEL = Column("label", "string", "A label's name.")
PROBABILITY = Column("probability", "double", "Its probability.")
GREETING = "Hello! What can you do?"


def _writing(task: str) -> TaskSchema:
    return TaskSchema(
        task, (PROMPT,), (("input_string",),), WRITING_PARAMS, (WRITTEN,), {"input_string": "The capital of France is"}
    )


def _sequence(task: str, source: Column, example: str) -> TaskSchema:
    return TaskSchema(task, (source,), ((source.name,),), SEQUENCE_PARAMS, (WRITTEN,), {source.name: example})


_ALL = (
    TaskSchema(
        "chat-completion",
        (Column("input_string", "string", "The only turn, the user's.", ("prompt", "text")), MESSAGES),
        (("input_string",), ("messages",)),
        WRITING_PARAMS,
        (WRITTEN,),
        {"input_string": GREETING},
    ),
    _writing("text-generation"),
    _writing("language-modeling"),
    _sequence(
        "summarization",
        Column("input_string", "string", "The text to summarize.", ("text",)),
        "Anna asks Paul to bring two chairs. Paul says that he will come at six.",
    ),
    _sequence(
        "translation",
        Column("input_string", "string", "The text to translate.", ("source", "text")),
        "Two men carry a table.",
    ),
    TaskSchema(
        "text-classification",
        (TEXT,),
        (("text",),),
        (Param("top_k", "long", 1, f"Labels in `probabilities`: {TOP}; above 1 the column is there.", 1),),
        (
            Column("label", "string", "The likeliest label."),
            PROBABILITY,
            Column("probabilities", "objects", "Labels, likeliest first.", fields=(LABEL, PROBABILITY), asked=True),
        ),
        {"text": "I have been waiting for my card for two weeks."},
    ),
    TaskSchema(
        "multi-label-classification",
        (TEXT,),
        (("text",),),
        (
            Param("threshold", "double", 0.5, "A label's probability from which on the text has it.", 0.0, 1.0),
            Param("top_k", "long", 0, f"Labels in `probabilities`: {TOP}. 0: all.", 1),
        ),
        (
            Column("labels", "strings", "The labels that the text has, in the model's order."),
            Column("probabilities", "objects", "Labels, likeliest first.", fields=(LABEL, PROBABILITY)),
        ),
        {"text": "The parcel came late and the cup was broken."},
    ),
    TaskSchema(
        "token-classification",
        (
            Column("text", "string", "Words with blanks between them.", ("input_string",)),
            Column("tokens", "words", "The words as a list, or its JSON."),
        ),
        (("text",), ("tokens",)),
        (),
        (
            Column("tags", "strings", "The tag of every word."),
            Column(
                "entities",
                "objects",
                "Words that belong together by their tags' B- and I-; without these, words with a tag.",
                fields=(
                    Column("type", "string", "Its type: the tag without B- or I-."),
                    Column("text", "string", "Its text."),
                    Column("start", "long", "Where it begins: the character of the text."),
                    Column("end", "long", "The character behind it."),
                    Column("score", "double", "The mean probability of its words' tags."),
                ),
            ),
        ),
        {"text": "Anna lives in Paris."},
    ),
    TaskSchema(
        "question-answering",
        (Column("question", "string", "The question."), Column("context", "string", "The text with the answer.")),
        (("question", "context"),),
        (
            Param("max_answer_tokens", "long", 0, "Longest answer in tokens. 0: as the model was measured.", low=1),
            Param(
                "no_answer",
                "string",
                "auto",
                "Whether the answer may be empty, where that is likelier. auto: as the model was measured.",
                choices=("allow", "forbid"),
            ),
        ),
        (
            Column("answer", "string", "The stretch of the context; empty: no answer."),
            Column("score", "double", "Its probability."),
            Column("start", "long", "Where it begins: the character of the context."),
            Column("end", "long", "The character behind it."),
        ),
        {"question": "Where does Anna live?", "context": "Anna lives in Paris, and Paul in Rome."},
    ),
    TaskSchema(
        "fill-mask",
        (Column("text", "string", "A text with the model's mask token, once or several times.", ("input_string",)),),
        (("text",),),
        (Param("top_k", "long", 5, f"Tokens for each mask: {TOP}.", 1, 1000),),
        (
            Column("output_string", "string", "The text with the likeliest token in place of every mask."),
            Column("tokens", "strings", "The likeliest token of every mask."),
            Column(
                "candidates",
                "objects",
                "Tokens of every mask, likeliest first.",
                fields=(
                    Column("mask", "long", "Which mask: 0 for the first."),
                    Column("token", "string", "The token's text."),
                    PROBABILITY,
                ),
            ),
        ),
        {"text": "The capital of France is [MASK]."},
    ),
    TaskSchema(
        "reward",
        (
            Column("messages", "messages", "A conversation with the answer as its last turn; or its JSON."),
            Column("prompt", "string", "What was asked."),
            Column("completion", "string", "The answer to it."),
            Column("text", "string", "An answer without a prompt.", ("input_string",)),
        ),
        (("messages",), ("prompt", "completion"), ("text",)),
        (),
        (Column("score", "double", "Higher is better; only differences mean something."),),
        {"prompt": "What is the capital of France?", "completion": "Paris."},
    ),
    TaskSchema(
        "embeddings",
        (Column("text", "string", "The text.", ("input_string", "input")),),
        (("text",),),
        (
            Param(
                "pooling",
                "string",
                "auto",
                "Which hidden states: the mean of all, the first, or the last. auto: the model's own way.",
                choices=("mean", "first", "last"),
            ),
            Param("normalize", "boolean", True, "Whether vectors have length 1."),
            Param("dimensions", "long", 0, "Keep the first numbers of each vector. 0: all.", low=1),
        ),
        (Column("embedding", "doubles", "The vector."),),
        {"text": "Anna lives in Paris."},
    ),
)
TASKS: dict[str, TaskSchema] = {schema.task: schema for schema in _ALL}
