"""A row of a file -> an example of the task.

`to_example` is total: it returns an example or a `BadRow` with the reason, and raises only for mistakes of the
recipe (a prompt template that cannot be read).
"""

from collections.abc import Callable
from functools import partial

from ingot.data import conversation, labeled
from ingot.data.conversation import Conversation, Document, PromptCompletion, SourceTarget, prompt_columns
from ingot.data.fields import Unusable
from ingot.data.labeled import Asked, Labeled, MultiLabeled, Tagged
from ingot.data.preference import Preference, preference
from ingot.data.sources import BadRow, Row
from ingot.recipe import Data, Objective
from ingot.recipe_data import COLUMNS

Example = (
    Conversation | PromptCompletion | Document | SourceTarget | Labeled | MultiLabeled | Tagged | Asked | Preference
)
Builder = Callable[[Row, Data], Example]
BUILDERS: dict[str, Builder] = {
    "chat-completion": conversation.conversation,
    "text-generation": conversation.prompt_completion,
    "language-modeling": conversation.document,
    "fill-mask": conversation.document,
    "summarization": partial(conversation.source_target, names=("text", "summary")),
    "translation": partial(conversation.source_target, names=("source", "target")),
    "text-classification": labeled.labeled,
    "multi-label-classification": labeled.multi_labeled,
    "token-classification": labeled.tagged,
    "question-answering": labeled.asked,
}
IS_CHAT = {"chat-completion": True, "text-generation": False}


def to_example(row: Row, data: Data, objective: Objective) -> Example | BadRow:
    """Read `row` as `objective` wants it, through the column names of `data.columns`."""
    try:
        if objective.rows == "preference":
            return preference(row, data, chat=IS_CHAT.get(objective.task))
        return BUILDERS[objective.rows](row, data)
    except Unusable as error:
        return BadRow(row.where, str(error))


def required_columns(data: Data, objective: Objective) -> dict[str, str]:
    """Field of the recipe -> column of the file that it needs, for every column the task cannot do without."""
    names = {f"data.columns.{name}": name for name in COLUMNS[objective.rows]}
    if objective.rows == "text-generation":
        names = {f"data.columns.{name}" if name in ("prompt", "completion") else "data.prompt_template": name
                 for name in (*prompt_columns(data), "completion")}  # fmt: skip
    return {where: data.columns.get(name, name) for where, name in names.items()}


def classes_of(example: Example) -> tuple[str, ...]:
    """The different classes of a row, sorted; none where the task has no classes."""
    if isinstance(example, Labeled):
        return (example.label,)
    if isinstance(example, MultiLabeled):
        return example.labels
    return tuple(sorted(set(example.tags))) if isinstance(example, Tagged) else ()


def input_of(example: Example) -> str:
    """What the model is given, in a form in which repeats are equal: case and blanks do not make a new question."""
    if isinstance(example, Preference):
        example = example.chosen
    if isinstance(example, Conversation):
        text = "\n".join(f"{turn.role}: {turn.content}" for turn in example.messages if turn.role != "assistant")
    elif isinstance(example, PromptCompletion):
        text = example.prompt
    elif isinstance(example, SourceTarget):
        text = example.source
    elif isinstance(example, Asked):
        text = f"{example.question}\n{example.context}"
    else:
        text = example.text
    return " ".join(text.casefold().split())
