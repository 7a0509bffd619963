"""Activations in CPU memory between the forward and the backward pass, moved beside the computation.

Inside a block every tensor that autograd saves is copied to pinned memory on a stream of its own and given free. In the
backward pass a block's tensors come back while the block after it is computed: two blocks at a time are on the device.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

LEAST = 2**16  # bytes; a copy of less takes longer to start than to make


class Mover(Protocol):
    """Who copies. `out` and `back` only begin a copy; `arrived` makes the computation wait for what `back` began."""

    def takes(self, tensor: Tensor) -> bool: ...
    def out(self, tensor: Tensor) -> Tensor: ...
    def back(self, host: Tensor) -> tuple[Tensor, Any]: ...
    def arrived(self, tensor: Tensor, ticket: Any) -> None: ...


class Cuda:
    """To pinned memory and back on a side stream; the host never waits."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def takes(self, tensor: Tensor) -> bool:
        """Whether it is on a GPU."""
        return tensor.is_cuda

    def out(self, tensor: Tensor) -> Tensor:
        """A copy in pinned memory, of the same shape and strides."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)  # its memory is not given to others before the copy is done
        return host

    def back(self, host: Tensor) -> tuple[Tensor, Any]:
        """The copy on the device, and the event of its arrival."""
        with torch.cuda.stream(self.stream):
            tensor = torch.empty_like(host, device=self.device)
            tensor.copy_(host, non_blocking=True)
            return tensor, self.stream.record_event()

    def arrived(self, tensor: Tensor, ticket: Any) -> None:
        """Let the current stream wait."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(ticket)
        tensor.record_stream(current)


class _Away:
    """A saved tensor that is in CPU memory. Autograd owns it: it goes when the graph goes."""

    __slots__ = ("__weakref__", "held", "host", "part", "ticket")

    def __init__(self, host: Tensor, part: "_Part") -> None:
        self.host, self.part = host, part
        self.held: Tensor | None = None  # on the device
        self.ticket: Any = None


class _Part:
    """What one block saved in one forward pass. `before`: the block that the backward pass comes to next."""

    def __init__(self, before: "_Part | None") -> None:
        self.before = before
        self.after: ReferenceType[_Part] | None = None
        self.saved: list[ReferenceType[_Away]] = []
        self.seen: dict[Any, tuple[StorageWeakRef, ReferenceType[_Away]]] = {}  # within the forward pass
        if before is not None:
            before.after = ref(self)

    def alive(self) -> list[_Away]:
        return [away for away in (reference() for reference in self.saved) if away is not None]


class Offload:
    """Moves what blocks save. `least`: bytes of the smallest tensor that is moved."""

    def __init__(self, mover: Mover, least: int = LEAST) -> None:
        self.mover, self.least = mover, least
        self.last: _Part | None = None

    def attach(self, blocks: list[nn.Module]) -> None:
        """Let each block's forward save into CPU memory; `blocks` in the order in which they run."""
        for number, block in enumerate(blocks):
            block.forward = partial(self._inside, block.forward, first=number == 0)

    def _inside(self, forward: Callable[..., Any], *args: Any, first: bool, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **named)
        part = self.last = _Part(None if first else self.last)
        try:
            with saved_tensors_hooks(partial(self._pack, part), self._unpack):
                return forward(*args, **named)
        finally:
            part.seen.clear()

    def _pack(self, part: _Part, tensor: Tensor) -> Any:
        if not self._wanted(tensor):
            return tensor
        storage = tensor.untyped_storage()
        place = (storage.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        key = (*place, tensor._version)
        if key in part.seen:  # several operations save the same tensor: it moves once
            owner, known = part.seen[key]
            away = known()
            if away is not None and not owner.expired():
                return away
        away = _Away(self.mover.out(tensor.detach()), part)
        part.saved.append(ref(away))
        part.seen[key] = (StorageWeakRef(storage), ref(away))
        return away

    def _wanted(self, tensor: Tensor) -> bool:
        """Weights and their views stay anyway, so nothing is won by a copy of them."""
        base = tensor if tensor._base is None else tensor._base
        if isinstance(base, nn.Parameter) or type(tensor) is not Tensor:
            return False
        return tensor.numel() * tensor.element_size() >= self.least and self.mover.takes(tensor)

    def _unpack(self, saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        part: _Part = saved.part
        self._fetch(part)
        if part.before is not None:
            self._fetch(part.before)
        later = part.after() if part.after is not None else None
        if later is not None:
            for away in later.alive():
                away.held = away.ticket = None
        tensor = saved.held
        assert tensor is not None
        self.mover.arrived(tensor, saved.ticket)
        return tensor  # type: ignore[no-any-return]

    def _fetch(self, part: _Part) -> None:
        for away in part.alive():
            if away.held is None:
                away.held, away.ticket = self.mover.back(away.host)
