"""FSDP2: parameters, gradients and optimizer are cut over ranks (Rajbhandari et al. 2020, stage 3), and a block is
whole only while it runs. HSDP cuts inside a group of ranks and repeats the cut across groups.
"""

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from ingot.errors import RecipeError
from ingot.model.adapters import trainable_tensors
from ingot.parallel.layout import Layout
from ingot.parallel.optim import make_optimizer
from ingot.parallel.sharded import Sharded
from ingot.ranks import Ranks
from ingot.recipe import Optim, Parallel

Fill = Callable[[nn.Module], None]


class FullySharded(Sharded):
    """A model whose parameters are DTensors between uses."""

    even = True
    whole = False

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        compute_dtype: torch.dtype,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
    ) -> None:
        super().__init__(model, model, layout, compute_dtype, optimizer)
        self.device = device  # with offloaded parameters theirs is the CPU
        self._root: Any = model  # fully_shard has made it an FSDPModule, which no annotation can say
        # Gradients that wait for the last microbatch are whole on every rank. With adapters that is little and saves
        # a collective a microbatch; in full fine-tuning it would take more memory than cutting the parameters saved.
        trained = sum(p.numel() for _, p in trainable_tensors(model))
        self._broken = False  # a step has begun and not ended
        self.waits = trained * layout.ranks.world <= sum(p.numel() for p in model.parameters())

    def forward(self, **inputs: Any) -> Any:
        """Call the model; matrix products run in `compute_dtype`."""
        # autocast would keep a cast copy of every weight that it meets until forward ends: the whole model again.
        with torch.autocast(
            self.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32, cache_enabled=False
        ):
            output = self.wrapped(**inputs)
        if not torch.is_grad_enabled():
            # The root waits for a backward pass that does not come: its whole tensors would stand in the places of the
            # parameters that the optimizer and checkpoints know.
            self._root.reshard()
        return output

    @property
    def answering(self) -> tuple[int, int]:
        """One group: blocks are gathered from all ranks whenever they run."""
        return 0, 1

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[nn.Module]:
        """What the root holds (embeddings, head) is whole inside, blocks while they run: so parts of the model can be
        called by themselves.
        """
        # Of torch 2.13's internals: without it the first block that runs would take itself for the root.
        self._root._get_fsdp_state()._lazy_init()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the gathering's own stream does not wait for the last update
        self._root.unshard()
        try:
            with super().at_rest() as inner:
                yield inner
        finally:
            self._root.reshard()

    @contextlib.contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        """Gradients of adapters travel on the `last` microbatch; others at each one, across copies on the last."""
        self._root.set_requires_gradient_sync(last or not self.waits)
        self._root.set_requires_all_reduce(last)
        self._broken = True
        yield
        self._broken = not last

    def drop(self) -> None:
        """Forget the gradient, and what a step that ran out of memory half-way left behind."""
        if self._broken:
            self._root.reset_iter_state()
            _forget_whole_gradients(self._root)
            self._broken = False
        super().drop()


def _forget_whole_gradients(root: nn.Module) -> None:
    """Gradients of whole parameters, which wait to be cut. Of torch 2.13's internals: its reset leaves them, so they
    would be added to the next step's, and no other way to them asks nothing of other ranks.
    """
    for module in root.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                for parameter in group.fsdp_params:
                    parameter.unsharded_accumulated_grad = None
                    if hasattr(parameter, "_unsharded_param"):  # it has been whole before
                        parameter._unsharded_param.grad = None


def shard(
    model: nn.Module,
    layout: Layout,
    section: Parallel,
    optim: Optim,
    device: torch.device,
    dtype: torch.dtype,
    fill: Fill | None = None,
) -> FullySharded:
    """Cut `model` over all ranks (hsdp: over `shard_ranks` of them). It moves to `device` block by block.

    `fill` puts weights into what lay on the meta device, after the cut. The optimizer comes last: one that is made
    before holds parameters that are no longer the model's and steps nothing.
    """
    mesh = _mesh(layout, section, device)
    # On a CPU parameters are in its memory anyway.
    offload = section.offload == "parameters" and device.type != "cpu"
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, offload_policy=policy)
    fully_shard(model, mesh=mesh, offload_policy=policy)
    if fill is not None:
        fill(model)
    return FullySharded(model, layout, dtype, make_optimizer(model, optim), device)


def grid(section: Parallel, ranks: Ranks) -> tuple[int, int]:
    """(copies of the model, ranks that cut one copy); rank = copy * ranks + part. Raises RecipeError for a rest."""
    if section.strategy != "hsdp":
        return 1, ranks.world
    size = section.shard_ranks or ranks.local_world
    if ranks.world % size:
        raise RecipeError("parallel.shard_ranks", size, f"must divide the {ranks.world} ranks")
    return ranks.world // size, size


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks: by the class that transformers says not to split, else the largest list of modules.

    A block that shares a parameter with the rest of the model (tied embeddings) is left to the root, where both meet.
    """
    names: set[str] = set()
    for module in model.modules():
        names |= set(getattr(module, "_no_split_modules", None) or ())
    found = _outermost([module for module in model.modules() if type(module).__name__ in names])
    if not found:
        lists = _outermost([module for module in model.modules() if isinstance(module, nn.ModuleList)])
        sizes = [sum(p.numel() for p in part.parameters()) for part in lists]
        found = list(lists[sizes.index(max(sizes))].children()) if lists else []
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    inside = [[p for m in block.modules() for p in m.parameters(recurse=False)] for block in found]
    return [
        block
        for block, held in zip(found, inside, strict=True)
        if held and all(sum(p is q for q in held) == owners[id(p)] for p in held)
    ]


def _outermost(modules: list[nn.Module]) -> list[nn.Module]:
    inner = {id(part) for module in modules for part in module.modules() if part is not module}
    return [module for module in modules if id(module) not in inner]


def _mesh(layout: Layout, section: Parallel, device: torch.device) -> DeviceMesh:
    """Ranks that add up gradients: [shard], or [copies, shard] under hsdp."""
    if layout.tensor > 1:
        assert layout.grid is not None
        return layout.grid["parts"]
    copies, size = grid(section, layout.ranks)
    if section.strategy != "hsdp":
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    everyone, timeout = torch.arange(copies * size).view(-1, size), timedelta(minutes=section.timeout_minutes)
    across, _ = dist.new_subgroups_by_enumeration(everyone.t().tolist(), timeout=timeout)
    inside, _ = dist.new_subgroups_by_enumeration(everyone.tolist(), timeout=timeout)
    return DeviceMesh.from_group([across, inside], device.type, mesh=everyone, mesh_dim_names=("copies", "shard"))
