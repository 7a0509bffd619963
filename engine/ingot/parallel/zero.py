"""DeepSpeed's ZeRO stages 1 to 3 behind the verbs of `Sharded`. The only file that imports deepspeed.

One value owns the loss divisor: deepspeed averages gradients over all ranks, and
`backward` multiplies by their number, as under DistributedDataParallel.
"""

# w ranks, R rows of a tensor (its first dimension)

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ingot.errors import IngotError, MissingPackage
from ingot.model.adapters import trainable_tensors
from ingot.parallel.layout import Layout
from ingot.parallel.optim import fresh_moments, make_optimizer
from ingot.parallel.sharded import MODEL, OPTIMIZER, Sharded
from ingot.recipe import Optim, Parallel

VERSION = (0, 19)  # what is used below of its insides was read in 0.19.8
Fill = Callable[[nn.Module], None]
MOMENTS = ("exp_avg", "exp_avg_sq")
# Elements that are reduced or gathered at a time. deepspeed's 5e8 takes 2 GB of float32 beside the model; from a tenth
# of it on links are full.
BUCKET_ELEMENTS = 50_000_000
# ZeRO-3 keeps parameters of at most so many elements whole on every rank (deepspeed's default): norms, biases and most
# adapter matrices, for which a gathering costs more than it saves.
WHOLE_ELEMENTS = 100_000


def stage1(
    model: nn.Module, layout: Layout, section: Parallel, optim: Optim, device: torch.device, dtype: torch.dtype
) -> Sharded:
    """The optimizer's state is cut over all ranks."""
    return _start(1, model, layout, section, optim, device, dtype)


def stage2(
    model: nn.Module, layout: Layout, section: Parallel, optim: Optim, device: torch.device, dtype: torch.dtype
) -> Sharded:
    """Gradients are cut too: each rank keeps its part of their sum from one microbatch to the next."""
    return _start(2, model, layout, section, optim, device, dtype)


def stage3(
    model: nn.Module,
    layout: Layout,
    section: Parallel,
    optim: Optim,
    device: torch.device,
    dtype: torch.dtype,
    fill: Fill | None = None,
) -> Sharded:
    """Parameters are cut too, frozen ones included, and gathered module by module when they are used.

    `fill` puts this rank's rows into what lies on the meta device, once it is there as DTensors.
    """
    if fill is not None:
        _filled(model, fill, section, device, dtype)
    return _start(3, model, layout, section, optim, device, dtype)


def _filled(model: nn.Module, fill: Fill, section: Parallel, device: torch.device, dtype: torch.dtype) -> None:
    """Let `fill` read this rank's rows, and make them ZeRO-3's parts. One parameter at a time is whole.

    Measured on two gloo ranks with a Llama of 1,284 MiB and LoRA: each held 727 MiB when its rows were read, and 1,291
    at most while they were cut (the largest tensor takes 250, and gloo copies what it gathers); loaded whole, 1,499.
    """
    deepspeed = _joined(device)
    config = settings(3, model, section, device, dtype)
    # Parameters that live in CPU memory go there at once.
    mesh = init_device_mesh("cpu" if section.offload == "parameters" else device.type, (dist.get_world_size(),))
    for parameter, places in _places(model):
        if parameter.is_meta:
            _place(places, distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None), parameter)
    fill(model)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)  # deepspeed moves those of a model that it cuts by itself
    todo, cut = _places(model), None
    while todo:
        parameter, places = todo.pop()
        if isinstance(parameter, DTensor):
            whole: Any = _place(places, _whole(parameter.detach(), device), parameter)
            if cut is None:
                deepspeed.zero.Init(module=nn.ParameterList([whole]), config_dict_or_path=config)
                cut = whole
            else:
                cut.convert_to_zero_parameters(param_list=[whole])


Places = list[tuple[nn.Module, str]]


def _places(model: nn.Module) -> list[tuple[nn.Parameter, Places]]:
    """Every parameter with all (module, name in it) where it stands: tied ones stand in two."""
    found: dict[int, tuple[nn.Parameter, Places]] = {}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            found.setdefault(id(parameter), (parameter, []))[1].append((module, key))
    return list(found.values())


def _place(places: Places, tensor: Tensor, instead: nn.Parameter) -> nn.Parameter:
    parameter = nn.Parameter(tensor, requires_grad=instead.requires_grad)
    for module, key in places:
        setattr(module, key, parameter)
    return parameter


def _start(
    stage: int,
    model: nn.Module,
    layout: Layout,
    section: Parallel,
    optim: Optim,
    device: torch.device,
    dtype: torch.dtype,
) -> Sharded:
    deepspeed = _joined(device)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(model, optim),
        config=settings(stage, model, section, device, dtype),
        dist_init_required=False,
    )
    return Zero(stage, model, engine, layout, dtype, device)


def _joined(device: torch.device) -> Any:
    """Import deepspeed and join it to the process group that is there.

    Raises MissingPackage when it is not installed, IngotError when it is another version than the one known here.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # else it probes for every vendor's package
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise MissingPackage("deepspeed", "parallel.strategy = zero1, zero2 or zero3") from error
    if (deepspeed.__version_major__, deepspeed.__version_minor__) != VERSION:
        known = ".".join(map(str, VERSION))
        raise IngotError(
            f"deepspeed {deepspeed.__version__} is installed, and Ingot works with deepspeed {known}: "
            f"pip install 'deepspeed=={known}.*'"
        )
    # Which operators could be compiled here: none is wanted. Without this, a CPU with a compiler builds a
    # shared-memory all-reduce at the first start (158 s measured), and a GPU probes for compilers.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})
    # Our loop says it, with the step and what was found.
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    # torch 2.13 renamed the collectives that deepspeed calls.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, dist_init_required=False)
    return deepspeed


def _is_news(record: logging.LogRecord) -> bool:
    return "OVERFLOW!" not in record.getMessage()


def settings(
    stage: int, model: nn.Module, section: Parallel, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """deepspeed's configuration.

    As under every other strategy what is trained, and what travels of it, is float32, a frozen base stays in its own
    type, and matrix products run in `dtype` by autocast. Batch sizes are counted by our loop.
    """
    trainable = sum(getattr(p, "ds_numel", p.numel()) for _, p in trainable_tensors(model))
    bucket = max(2, min(BUCKET_ELEMENTS, trainable) // 2 * 2)  # must be even
    memory = {"device": "cpu", "pin_memory": device.type == "cuda"}
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if section.offload != "none":
        zero["offload_optimizer"] = memory
    if section.offload == "parameters":
        zero["offload_param"] = memory
    if stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": WHOLE_ELEMENTS,
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
        }
    # On a GPU deepspeed switches an autocast that it was not told of off again.
    autocast = {"enabled": dtype != torch.float32, "dtype": str(dtype), "lower_precision_safe_modules": []}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "torch_autocast": autocast,
        "zero_allow_untested_optimizer": True,
        # Offloaded, torch's own fused AdamW runs on the CPU: deepspeed's would have to be compiled first.
        "zero_force_ds_cpu_optimizer": False,
    }


class Zero(Sharded):
    """`plain` under deepspeed's engine. `even` from stage 2 on: gradients travel in every backward pass there."""

    def __init__(
        self, stage: int, plain: nn.Module, engine: nn.Module, layout: Layout, dtype: torch.dtype, device: torch.device
    ) -> None:
        zero: Any = engine.optimizer
        self._engine: Any = engine
        super().__init__(plain, engine, layout, dtype, zero)
        self.stage, self.device, self.even, self.whole = stage, device, stage >= 2, stage < 3
        self._zero = zero
        self._mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        # deepspeed would make them at the first step; then a checkpoint could not be loaded before it.
        for flat in self._masters:
            zero.optimizer.state[flat] = fresh_moments(flat)
        if stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    @property
    def _masters(self) -> list[Tensor]:
        """This rank's parts of the float32 masters, each many parameters end to end: what the optimizer updates."""
        name = "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        return getattr(self._zero, name)

    @property
    def answering(self) -> tuple[int, int]:
        """One group in stage 3: parameters are gathered from all ranks whenever they are used."""
        return (0, 1) if self.stage == 3 else super().answering

    @contextlib.contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        """Context for forward and backward of one microbatch; `last` completes the step's gradient."""
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of this rank's part of the global loss."""
        self._engine.backward(loss * self.layout.loss_parts, scale_wrt_gas=False)

    def step(self, lr: float, limit: float | None) -> float:
        """Scale the gradient to a global L2 norm of at most `limit`, update, forget the gradient; return the norm.

        Nothing is updated when the norm is not finite.
        """
        self._zero.set_lr(lr)
        self._zero.clip_grad = limit or 0.0  # deepspeed's own code divides by it plus 1e-6, as torch's does
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        self._forget()
        return norm

    def drop(self) -> None:
        """Forget the gradient, also that of a step which was cut off in the middle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # reductions may be under way in streams of their own
        for _, parameter in trainable_tensors(self.plain):
            parameter.grad = None
        self._forget()
        if self.stage == 3:
            self._engine.empty_partition_cache()  # what a broken pass has gathered

    def _forget(self) -> None:
        """Make deepspeed's sums, buckets and counts those of a new step."""
        zero = self._zero
        zero.zero_grad(set_to_none=True)
        if self.stage == 3:
            zero.averaged_gradients = {}
            # deepspeed overwrites these sums where a gradient comes, and keeps the old ones where none does.
            zero.grad_partitions_flat_buffer.zero_()
            for bucket in zero.ipg_buckets.values():
                bucket.clear_params()
        else:
            zero.micro_step_id = -1
            zero.averaged_gradients.clear()
            zero.all_grad_tensors.clear()
            zero.params_already_reduced = [False] * len(zero.params_already_reduced)
            zero.extra_large_param_to_reduce.clear()
            for bucket in zero.ipg_buckets.values():
                bucket.clear()
            zero._release_ipg_buffers()
        if zero.offload_optimizer if self.stage == 3 else zero.cpu_offload:
            zero.reset_cpu_buffers()
            for flat in self._masters:
                if flat.grad is not None:
                    flat.grad.zero_()

    def state(self) -> dict[str, Tensor]:
        """Everything that training changes, under the names of every other strategy: DTensors in host memory that hold
        this rank's rows, or plain tensors where every rank holds all.

        Collective. Tensors are gathered one at a time, so that no rank ever holds the whole.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        step: Tensor = self._zero.optimizer.state[self._masters[0]]["step"]
        found: dict[str, Tensor] = {}
        for name, parameter in trainable_tensors(self.plain):
            whole = self.stage < 3
            found[MODEL + name] = parameter.detach() if whole else self._rows(safe_get_full_fp32_param(parameter))
            for key in MOMENTS:
                found[f"{OPTIMIZER}{name}/{key}"] = self._rows(safe_get_full_optimizer_state(parameter, key))
            found[f"{OPTIMIZER}{name}/step"] = step.detach().cpu().clone()
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned and a checkpoint filled. Without moments in it only weights are taken.

        Collective. Raises nothing of its own: names and shapes were checked by whoever filled it.
        """
        if self.stage == 3:
            self._engine.empty_partition_cache()  # what is gathered now would be stale
        steps = [0.0]
        for name, parameter in trainable_tensors(self.plain):
            self._put(parameter, state[MODEL + name])
            if f"{OPTIMIZER}{name}/step" in state:
                for key in MOMENTS:
                    self._put(parameter, state[f"{OPTIMIZER}{name}/{key}"], key)
                steps.append(state[f"{OPTIMIZER}{name}/step"].item())
        if len(steps) > 1:
            for flat in self._masters:
                self._zero.optimizer.state[flat]["step"].fill_(max(steps))

    @torch.no_grad()
    def _put(self, parameter: Any, value: Tensor, key: str | None = None) -> None:
        """Write a weight (of master and parameter) or the moment `key`."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        whole = _whole(value, self.device)
        if self.stage < 3:
            if key is None:
                safe_set_full_fp32_param(parameter, whole)
                parameter.copy_(whole)
            else:
                safe_set_full_optimizer_state(parameter, whole, key)
            return
        part = _cut(whole.flatten(), parameter.partition_numel())
        if key is None:
            safe_set_local_fp32_param(parameter, part)
            parameter.ds_tensor.copy_(part)
        else:
            safe_set_local_optimizer_state(parameter, part, key)

    def _rows(self, whole: Tensor) -> Tensor:
        """This rank's rows of `whole` in host memory."""
        if whole.ndim == 0:
            return whole.cpu().clone()
        parts = whole.chunk(self._mesh.size())
        mine = parts[dist.get_rank()] if dist.get_rank() < len(parts) else whole[:0]
        local = torch.empty(mine.shape, dtype=mine.dtype).copy_(mine)
        return DTensor.from_local(
            local, self._mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )


def _whole(value: Tensor, device: torch.device) -> Tensor:
    """All of `value` on this rank's `device`."""
    if not isinstance(value, DTensor):
        return value.to(device)
    local, n_rows, n_ranks = value.to_local().to(device), value.shape[0], value.device_mesh.size()
    most = -(-n_rows // n_ranks)
    if n_rows % n_ranks:  # every rank sends as much
        local = torch.cat([local, local.new_zeros(most - local.shape[0], *value.shape[1:])])
    gathered = local.new_empty(n_ranks * most, *value.shape[1:])
    # Not into a list of tensors: that makes a second copy of the whole.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, local.contiguous())
    return gathered[:n_rows]


def _cut(flat: Tensor, size: int) -> Tensor:
    """This rank's part of `flat` as ZeRO-3 cuts it: `size` elements, zeros behind the end."""
    part = flat.new_zeros(size)
    mine = flat[dist.get_rank() * size :][:size]
    part[: mine.numel()] = mine
    return part
