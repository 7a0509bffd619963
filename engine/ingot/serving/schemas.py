"""What a request of rows may hold: the envelopes of MLflow and Azure ML. Which columns and parameters a row and its
task have is the table's matter (`model/task_schemas.py`): here they only find their place.
"""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ingot.model.sampling import STOP_CHARACTERS, InputError
from ingot.model.task_schemas import TaskSchema

StopText = Annotated[str, Field(max_length=STOP_CHARACTERS)]
Stop = StopText | Annotated[list[StopText], Field(max_length=16)]
Row = dict[str, Any]
ROWS = 4096  # of one request


class Body(BaseModel):
    """Base of all bodies: no unknown fields, and no conversion between types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Split(Body):
    """A pandas DataFrame in the orientation `split`."""

    columns: list[str]
    data: list[list[Any]]
    index: list[Any] | None = None

    def rows(self, field: str) -> list[Row]:
        """One mapping a row. Raises InputError."""
        if len(set(self.columns)) < len(self.columns):
            raise InputError(field, "columns must have different names")
        if any(len(row) != len(self.columns) for row in self.data):
            raise InputError(field, f"every row of data must hold {len(self.columns)} values, as columns do")
        return [dict(zip(self.columns, row, strict=True)) for row in self.data]


FORMS = ("dataframe_split", "dataframe_records", "inputs", "instances")
UNWRAPPED = ("messages", "prompt", "input")  # MLflow answers a bare row with one of these without its envelope


class InvocationRequest(BaseModel):
    """POST /invocations: exactly one form of input, with `params` beside it; or one bare row, whose columns and
    parameters stand at the top.
    """

    model_config = ConfigDict(extra="allow", strict=True)

    dataframe_split: Split | None = None
    dataframe_records: list[Row] | None = None
    inputs: dict[str, Any] | list[Any] | str | None = None
    instances: list[Any] | dict[str, Any] | None = None
    params: dict[str, Any] | None = None
    model: str | None = None
    stream: bool | None = None

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if self.stream:
            raise ValueError("stream: this route answers whole; /v1/chat/completions and /v1/completions stream")
        given = [form for form in FORMS if getattr(self, form) is not None]
        if len(given) > 1 or (not given and not self.model_extra):
            needs = f"send exactly one of {', '.join(FORMS)}, or the columns of one row"
            raise ValueError(f"{needs}; got {' and '.join(given) or 'none'}")
        return self

    @property
    def unwrapped(self) -> bool:
        """Whether the answer has no envelope either."""
        return any(name in (self.model_extra or {}) for name in UNWRAPPED)

    def read(self, schema: TaskSchema) -> tuple[list[Row], dict[str, Any]]:
        """Rows and parameters, for a model of this task. Raises InputError."""
        bare = self.model_extra or {}
        form = next((form for form in FORMS if getattr(self, form) is not None), None)
        names = {param.name for param in schema.params}
        if form is None:
            beside = {name: value for name, value in bare.items() if name in names}
            if beside and self.params is not None:
                raise InputError(min(beside), f"{min(beside)} belongs into params here")
            return [{k: v for k, v in bare.items() if k not in names}], self.params or beside
        if bare:
            first = min(bare)
            what = "belongs into params here" if first in names else f"is not a field beside {form}"
            raise InputError(first, f"{first} {what}")
        return counted(self._rows(form), form), self.params or {}

    def _rows(self, form: str) -> list[Row]:
        if self.dataframe_split is not None:
            return self.dataframe_split.rows(form)
        value = getattr(self, form)
        return list(value) if form == "dataframe_records" else tensor_rows(form, value)


def counted(rows: list[Row], field: str) -> list[Row]:
    """`rows`, if there are any and not too many. Raises InputError."""
    if not rows:
        raise InputError(field, f"{field} holds no row")
    if len(rows) > ROWS:
        raise InputError(field, f"{field}: {len(rows)} rows; at most {ROWS} in one request")
    return rows


def tensor_rows(form: str, value: Any) -> list[Row]:
    """`{column: [cells]}`, `{column: cell}`, `[rows]`, `[strings]` or a string -> rows; a bare string is column ""."""
    if isinstance(value, str):
        return [{"": value}]
    if isinstance(value, list):
        return [row if isinstance(row, dict) else {"": row} for row in value]
    if not any(isinstance(cells, list) for cells in value.values()):
        return [value]
    if all(isinstance(cells, list) and cells and isinstance(cells[0], dict) for cells in value.values()):
        return [value]  # {"messages": [{...}, {...}]}: one conversation
    lengths = {len(cells) if isinstance(cells, list) else -1 for cells in value.values()}
    if len(lengths) != 1:
        raise InputError(form, f"{form}: all columns must be lists of one length")
    return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]


class ScoreRequest(Body):
    """POST /score: `inputs` and `parameters`, or `input_data` with `parameters` in it or `params` beside it."""

    inputs: dict[str, Any] | list[Any] | str | None = None
    input_data: dict[str, Any] | list[Any] | str | None = None
    parameters: dict[str, Any] | None = None
    params: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.inputs is None) == (self.input_data is None):
            raise ValueError("send exactly one of inputs and input_data")
        return self

    def read(self) -> tuple[Any, dict[str, Any]]:
        """The input and its parameters, wherever they stand. Raises InputError."""
        data, places = self.inputs if self.input_data is None else self.input_data, [self.parameters, self.params]
        if isinstance(data, dict) and "parameters" in data:
            data = dict(data)
            places.append(data.pop("parameters"))
        found = [place for place in places if place is not None]
        if len(found) > 1 or not all(isinstance(place, dict) for place in found):
            raise InputError("parameters", "parameters: one object, in one place")
        return data, dict(found[0]) if found else {}


class Tensor(Body):
    """A column of the input: its cells, flat or one list each."""

    name: str
    shape: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=2)]
    datatype: Annotated[str, Field(pattern="^(BYTES|BOOL|FP32|FP64|INT32|INT64)$")]
    data: list[Any]
    parameters: dict[str, Any] | None = None


class WantedTensor(Body):
    """An output that is wanted."""

    name: str


class InferRequest(Body):
    """POST /v2/models/{model}/infer."""

    id: str | None = None
    inputs: list[Tensor] = Field(min_length=1)
    outputs: list[WantedTensor] | None = None
    parameters: dict[str, Any] | None = None
