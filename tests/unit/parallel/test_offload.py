"""Activations that leave and come back: what moves, in which order, and that nothing stays behind."""

import gc
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ingot.errors import RecipeError
from ingot.parallel.offload import Cuda, Offload
from ingot.parallel.recompute import apply_activations
from ingot.recipe import Train

LEAST = 512


class Fake:
    """Copies at once, on the CPU, and remembers."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.hosts: WeakSet[Any] = WeakSet()
        self.present: WeakSet[Any] = WeakSet()
        self.most = 0

    def takes(self, tensor: Tensor) -> bool:
        return True

    def out(self, tensor: Tensor) -> Tensor:
        host = tensor.clone()
        self.hosts.add(host)
        self.log.append(("out", id(host)))
        return host

    def back(self, host: Tensor) -> tuple[Tensor, Any]:
        tensor = host.clone()
        self.present.add(tensor)
        self.most = max(self.most, len(self.present))
        self.log.append(("back", id(host)))
        return tensor, tensor.sum()

    def arrived(self, tensor: Tensor, ticket: Any) -> None:
        assert torch.equal(tensor.sum(), ticket)
        self.log.append(("arrived", 0))


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.sigmoid(self.one(x)))


class Stack(nn.Module):
    def __init__(self, depth: int = 4, size: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(size) for _ in range(depth))
        self.recomputed = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recomputed else block(x)
        return x.square().sum()


X = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def moved(depth: int = 4) -> tuple[Stack, Fake]:
    model, fake = Stack(depth), Fake()
    Offload(fake, LEAST).attach(list(model.blocks))
    return model, fake


def test_gradients_are_the_same_bits_and_copies_are_gone() -> None:
    plain, (model, fake) = Stack(), moved()
    plain(X).backward()
    expected = gradients(plain)
    for _ in range(2):  # the second pass must not find anything of the first
        loss = model(X)
        assert len(fake.hosts) > 0
        loss.backward()
        for one, other in zip(gradients(model), expected, strict=True):
            assert torch.equal(one, other)
        del loss
        gc.collect()
        assert len(fake.hosts) == len(fake.present) == 0


def test_weights_stay_and_what_is_saved_twice_moves_once() -> None:
    model, fake = moved(depth=1)
    loss = model(X)
    # The input of each product and the sigmoid's result, which is the second's input. No weight.
    assert sorted(tuple(host.shape) for host in fake.hosts) == [(24, 16), (24, 32)]
    del loss
    small, fake = Stack(1), Fake()
    Offload(fake, least=10**6).attach(list(small.blocks))
    small(X).backward()
    assert fake.log == []


def test_each_block_comes_back_while_the_one_after_it_is_computed() -> None:
    model, fake = moved(depth=4)
    model(X).backward()
    out = [host for what, host in fake.log if what == "out"]
    parts = [out[2 * number : 2 * number + 2] for number in range(4)]
    back = [host for what, host in fake.log if what == "back"]
    assert [set(back[2 * number : 2 * number + 2]) for number in range(4)] == [set(part) for part in reversed(parts)]
    first = next(number for number, (what, _) in enumerate(fake.log) if what == "arrived")
    assert [what for what, _ in fake.log[:first]].count("back") == 4, "the last block and the one before it"
    assert fake.most <= 5, "two blocks are there at a time, and the tensor in use"


def test_an_overwritten_tensor_is_not_taken_for_what_it_was() -> None:
    class Overwrites(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            z = y.square()  # saves y
            with torch.no_grad():
                kept = y.detach().clone()
            return (z * kept).sum() + (y * 3).exp().sum() * 1e-3

    block, fake = Overwrites(), Fake()
    x = X.clone().requires_grad_()
    [expected] = torch.autograd.grad(block(x), x)
    Offload(fake, LEAST).attach([block])
    [found] = torch.autograd.grad(block(x), x)
    assert torch.equal(found, expected)


def test_recomputed_blocks_move_their_input_alone() -> None:
    plain, (model, fake) = Stack(), moved()
    plain(X).backward()
    model.recomputed = True
    for block in model.blocks:  # as transformers does it: the repetition is within the block's forward
        del block.forward
        block.forward = lambda x, inner=block.forward: checkpoint(inner, x, use_reentrant=False)
    model.recomputed = False
    Offload(fake, LEAST).attach(list(model.blocks))
    loss = model(X)
    assert sorted(tuple(host.shape) for host in fake.hosts) == [(24, 16)] * 4
    loss.backward()
    for one, other in zip(gradients(model), gradients(plain), strict=True):
        assert torch.equal(one, other)


def test_backward_twice_and_two_passes_before_it() -> None:
    plain, (model, fake) = Stack(), moved()
    for each in (plain, model):
        loss = each(X)
        loss.backward(retain_graph=True)
        loss.backward()
        (each(X) + each(2 * X)).backward()
    for one, other in zip(gradients(model), gradients(plain), strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        fake.log.clear()
        model(X)
    assert fake.log == []


def test_a_wrong_copy_is_seen() -> None:
    class Wrong(Fake):
        def back(self, host: Tensor) -> tuple[Tensor, Any]:
            return super().back(host + 1e-3)

    plain, model = Stack(), Stack()
    Offload(Wrong(), LEAST).attach(list(model.blocks))
    plain(X).backward()
    model(X).backward()
    assert not all(torch.equal(one, other) for one, other in zip(gradients(model), gradients(plain), strict=True))


def test_a_cpu_has_nothing_to_move_to() -> None:
    with pytest.raises(RecipeError, match="activations are in CPU memory already") as caught:
        apply_activations(Stack(), Train(offload_activations=True), torch.device("cpu"))
    assert caught.value.field == "train.offload_activations"


@pytest.mark.gpu
@pytest.mark.parametrize("recomputed", [False, True])
def test_on_a_gpu_gradients_are_the_same_and_memory_is_free(recomputed: bool) -> None:
    device = torch.device("cuda")
    peaks, found = [], []
    for offloaded in (False, True):
        model = Stack(8, 1024).to(device)
        model.recomputed = recomputed
        if offloaded:
            Offload(Cuda(device)).attach(list(model.blocks))
        x = torch.randn(8192, 1024, device=device, generator=torch.Generator(device).manual_seed(0))
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            model.zero_grad()
            loss = model(x)
            held = torch.cuda.memory_allocated()
            loss.backward()
        torch.cuda.synchronize()
        peaks.append(held)
        found.append(gradients(model))
        del model, loss
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    if not recomputed:
        assert peaks[1] < peaks[0] / 2
