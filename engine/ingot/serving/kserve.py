"""Routes of KServe's open inference protocol, version 2: a tensor is a column, its first dimension are rows."""

import json
from typing import Any

from ingot.model.sampling import InputError
from ingot.model.task_checks import schema_of
from ingot.model.task_schemas import Column
from ingot.serving.deployments import Deployed, Deployments
from ingot.serving.engine import ClosedError
from ingot.serving.faults import ApiError
from ingot.serving.schemas import InferRequest, Row, Tensor, counted

VERSION = "1"
DATATYPES = {"string": "BYTES", "long": "INT64", "double": "FP32", "boolean": "BOOL", "doubles": "FP32"}
CODED = ("str", "pd")  # MLServer's names of: tensors are strings, tensors are columns
KINDS: dict[str, tuple[type, ...]] = {
    "BYTES": (str,), "BOOL": (bool,), "INT32": (int,), "INT64": (int,), "FP32": (int, float), "FP64": (int, float),
}  # fmt: skip


class KServe:
    """The handlers over what is served. `version`: the server's."""

    def __init__(self, deployments: Deployments, version: str) -> None:
        self.deployments, self._version = deployments, version

    async def server(self) -> dict[str, Any]:
        """What this server is."""
        return {"name": "ingot", "version": self._version, "extensions": []}

    async def live(self) -> dict[str, bool]:
        """The process is alive."""
        return {"live": True}

    async def ready(self) -> dict[str, bool]:
        """A request sent now would be worked on."""
        self.deployments.require_ready()
        return {"ready": True}

    def _choose(self, model: str, version: str) -> Deployed:
        if version != VERSION:
            raise ApiError(404, f"no such version; this model has {VERSION!r}", "not_found_error", "version")
        return self.deployments.choose(model)

    async def model(self, model: str, version: str = VERSION) -> dict[str, Any]:
        """A model's columns as tensors. A row has one of its forms of input columns."""
        one = self._choose(model, version)
        schema = schema_of(one.task)
        return {
            "name": one.name,
            "versions": [VERSION],
            "platform": "ingot",
            "inputs": [_described(column) for column in schema.inputs],
            "outputs": [_described(column) for column in schema.outputs],
        }

    async def model_ready(self, model: str, version: str = VERSION) -> dict[str, Any]:
        """A request sent to it now would be worked on."""
        one = self._choose(model, version)
        if not one.engine.ready:
            raise ClosedError
        return {"name": one.name, "ready": True}

    async def infer(self, body: InferRequest, model: str, version: str = VERSION) -> dict[str, Any]:
        """Answer rows."""
        one = self._choose(model, version)
        schema, params = schema_of(one.task), dict(body.parameters or {})
        _check_coding("parameters", params)
        columns = {column.name: column for column in schema.outputs}
        wanted = [output.name for output in body.outputs or []]
        if unknown := set(wanted) - set(columns):
            raise InputError("outputs", f"outputs: no {min(unknown)!r}; the model answers {', '.join(columns)}")
        answers = await one.engine.answer(_rows(body.inputs), params)
        there = [name for name in columns if all(name in row for row in answers)]
        if lacking := [name for name in wanted if name not in there]:
            raise InputError("outputs", f"outputs: no {lacking[0]!r} in this answer: a parameter has to ask for it")
        names = [name for name in there if name in (wanted or there)]
        outputs = [_tensor(columns[name], [row[name] for row in answers]) for name in names]
        found = {"model_name": one.name, "model_version": VERSION, "outputs": outputs}
        return found if body.id is None else found | {"id": body.id}


def _check_coding(field: str, parameters: dict[str, Any]) -> None:
    coding = parameters.pop("content_type", None)
    if coding is not None and coding not in CODED:
        raise InputError(field, f"{field}.content_type: {' or '.join(CODED)}, or none")


def _rows(tensors: list[Tensor]) -> list[Row]:
    """Raises InputError."""
    columns: dict[str, list[Any]] = {}
    for place, tensor in enumerate(tensors):
        field, extra = f"inputs.{place}", dict(tensor.parameters or {})
        _check_coding(f"{field}.parameters", extra)
        if extra:
            raise InputError(f"{field}.parameters", f"{field}.parameters: only content_type is known")
        if tensor.name in columns:
            raise InputError(field, f"{field}: a second tensor of this name")
        n, width = tensor.shape[0], tensor.shape[1] if len(tensor.shape) == 2 else 1
        cells = [cell for row in tensor.data for cell in (row if isinstance(row, list) else [row])]
        if width != 1 or len(cells) != n:
            raise InputError(f"{field}.shape", f"{field}: shape [N] or [N, 1], with N values in data")
        kinds = KINDS[tensor.datatype]
        if not all(isinstance(cell, kinds) and isinstance(cell, bool) == (kinds == (bool,)) for cell in cells):
            raise InputError(f"{field}.data", f"{field}.data: values must be {tensor.datatype}")
        columns[tensor.name] = cells
    if len({len(cells) for cells in columns.values()}) != 1:
        raise InputError("inputs", "inputs: all tensors must have the same number of rows")
    return counted([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)], "inputs")


def _described(column: Column) -> dict[str, Any]:
    shape = [-1, -1] if column.type == "doubles" else [-1]
    return {"name": column.name, "datatype": DATATYPES.get(column.type, "BYTES"), "shape": shape}


def _tensor(column: Column, cells: list[Any]) -> dict[str, Any]:
    """Lists and objects are their JSON; vectors a second dimension."""
    shape = [len(cells)]
    if column.type == "doubles":
        shape.append(len(cells[0]))
        cells = [number for vector in cells for number in vector]
    elif column.type not in DATATYPES:
        cells = [json.dumps(cell, ensure_ascii=False) for cell in cells]
    return {"name": column.name, "shape": shape, "datatype": DATATYPES.get(column.type, "BYTES"), "data": cells}
