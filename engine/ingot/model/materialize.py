"""Big models: every rank reads its rows of each weight from safetensors, and none ever holds the whole model.

The reading is transformers' own (its renamings, fused experts and tied weights included). It cuts a model over ranks
before it reads, and a model with adapters must be cut after they are attached. So weights are read through a model of
transformers' making, and moved into the one that trains.
"""

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from ingot.errors import IngotError
from ingot.model.matrices import WRAPPERS
from ingot.model.split import whole_because_tied


class ShardReader:
    """Reads a model cut over `size` ranks, repeated `copies` times (rank = copy * size + part).

    `tensor`: ranks that share a part by the model's own plan (rank = (copy * size + part) * tensor + share).

    Called in place of `from_pretrained`, it returns a model whose read weights take no memory; `lay_out` makes them
    tensors on the meta device, and `fill` puts this rank's rows in after the model has been cut along their first
    dimension. `device`: where they lie then; None: where they were read to (the GPU, if there is one).
    """

    def __init__(self, size: int, copies: int = 1, device: torch.device | None = None, tensor: int = 1) -> None:
        self.size, self.copies, self.device, self.tensor = size, copies, device, tensor
        self._rows: dict[str, Tensor] = {}
        self._shapes: dict[str, torch.Size] = {}

    def __call__(self, kind: Any, path: Path, **options: Any) -> nn.Module:
        """`kind.from_pretrained(path, **options)`, without memory for what is read. New weights are drawn as there."""
        before = torch.get_rng_state()
        with _quiet(), _own_device():
            hull, info = kind.from_pretrained(path, **options, device_map="meta", output_loading_info=True)
            if self.tensor > 1 and whole_because_tied(hull, self.tensor):  # there transformers would cut otherwise
                whole: nn.Module = kind.from_pretrained(path, **options)
                return whole
            cut = kind.from_pretrained(path, **options, distributed_config=self._config(hull))
        new = set(info["missing_keys"]) | {name for name, *_ in info["mismatched_keys"]}
        known: dict[str, Tensor] = {}
        for name, tensor in cut.state_dict().items():
            if name in new:
                continue
            known[name] = tensor
            if isinstance(tensor, DTensor):
                known[name] = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
                self._rows[name], self._shapes[name] = tensor.to_local(), tensor.shape
        torch.set_rng_state(before)
        model: nn.Module = type(hull).from_pretrained(None, **{"config": hull.config, **options}, state_dict=known)
        return model

    def lay_out(self, model: nn.Module) -> None:
        """Put every read weight of `model`, which may have been wrapped since, on the meta device."""
        for parameter, places in _places(model):
            if self._key(places[0][2]) is not None:
                shape, dtype = parameter.shape, parameter.dtype
                _place(places, torch.empty(shape, dtype=dtype, device="meta"), parameter.requires_grad)

    def fill(self, model: nn.Module) -> None:
        """Put the rows in. Raises IngotError when a parameter is left without values, or the cut is another."""
        used: set[str] = set()
        for parameter, places in _places(model):
            name = places[0][2]
            key = self._key(name)
            if key is None:
                if parameter.is_meta:
                    raise IngotError(f"no weights were read for {name}; please report this model")
                continue
            rows = self._rows[key].to(self.device or self._rows[key].device, parameter.dtype)
            part = parameter.to_local().shape if isinstance(parameter, DTensor) else parameter.shape
            if rows.shape != part or parameter.shape != self._shapes[key]:
                raise IngotError(f"{name}: rows {list(rows.shape)} were read for a part {list(part)}")
            # A head that is trained beside its frozen original is read once.
            fresh = rows.clone() if key in used else rows
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                fresh = DTensor.from_local(
                    fresh, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
                )
            _place(places, fresh, parameter.requires_grad)
            used.add(key)
        self._rows.clear()

    def _config(self, hull: PreTrainedModel) -> DistributedConfig:
        """transformers wants a plan: any one module will do, since the rest of the model is cut with its root."""
        holder = next(name for name, module in hull.named_modules() if name and module._parameters)
        plan = {re.sub(r"\.\d+(?=\.|$)", ".*", holder): "free_full_weight"}
        return DistributedConfig(
            tp_size=self.tensor, fsdp_size=self.size, dp_replicate_size=self.copies, fsdp_plan=plan
        )

    def _key(self, name: str) -> str | None:
        """What a parameter of the model that trains was called where it was read."""
        plain = WRAPPERS.sub("", name)
        return next((key for key in (plain, plain.removeprefix("backbone.")) if key in self._rows), None)


Places = list[tuple[nn.Module, str, str]]


def _places(model: nn.Module) -> list[tuple[nn.Parameter, Places]]:
    """Every parameter with (module, its name there, its whole name) of all its places: tied ones have two."""
    found: dict[int, tuple[nn.Parameter, Places]] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                places = found.setdefault(id(parameter), (parameter, []))[1]
                places.append((module, key, f"{prefix}.{key}".removeprefix(".")))
    return list(found.values())


def _place(places: Places, tensor: Tensor, requires_grad: bool) -> None:
    parameter = nn.Parameter(tensor, requires_grad=requires_grad)
    for module, key, _ in places:
        setattr(module, key, parameter)


@contextlib.contextmanager
def _own_device() -> Iterator[None]:
    """transformers binds this rank to the GPU LOCAL_RANK, which may not be its number: a task of Slurm sees one GPU."""
    before = os.environ.get("LOCAL_RANK")
    if torch.cuda.is_available():
        os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())
    try:
        yield
    finally:
        if before is not None:
            os.environ["LOCAL_RANK"] = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The last of three readings of the same folder says what there is to say."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # New weights are drawn on every rank's part first, and again as one rank draws them.
            warnings.filterwarnings("ignore", "DTensor random operators may not have complete support")
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
