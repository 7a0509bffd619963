"""Which AdamW a recipe gets, and that clipping happens inside of our own."""

import math

import pytest
import torch
from torch import nn

from ingot.parallel.layout import Layout
from ingot.parallel.optim import fresh_moments, make_optimizer
from ingot.parallel.sharded import Sharded
from ingot.recipe import Optim
from ingot_kernels.adamw import AdamW


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(80, 64), nn.Linear(64, 128), nn.Linear(128, 8))


def sharded(optim: Optim) -> Sharded:
    plain = model()
    return Sharded(plain, plain, Layout(), torch.float32, make_optimizer(plain, optim))


def test_plain_settings_keep_the_fused_one() -> None:
    assert isinstance(make_optimizer(model(), Optim()), torch.optim.AdamW)
    assert isinstance(make_optimizer(model(), Optim(weights="bfloat16")), AdamW)


def test_only_large_matrices_are_held_in_8_bits() -> None:
    plain = model()
    optimizer = make_optimizer(plain, Optim(state="int8"))
    types = {name: fresh_moments(p, optimizer)["exp_avg"].dtype for name, p in plain.named_parameters()}
    assert types.pop("1.weight") == torch.uint8
    assert set(types.values()) == {torch.float32}


@pytest.mark.parametrize("limit", [None, 0.5])
def test_clipping_inside_of_the_update(limit: float | None) -> None:
    """The same step as torch's AdamW over scaled gradients, and gradients are left as they are."""
    made = [sharded(Optim(weights=weights, weight_decay=0.1)) for weights in ("float32", "bfloat16")]
    for one in made:
        loss = one.plain(torch.arange(16)).square().sum()
        loss.backward()
    assert isinstance(made[1].optimizer, AdamW)
    kept = {name: p.grad for name, p in made[1].plain.named_parameters()}
    copies = {name: grad.clone() for name, grad in kept.items() if grad is not None}
    norms = [one.step(1e-2, limit) for one in made]
    assert norms[0] == norms[1] > 0.5
    assert made[1].optimizer.grad_scale == pytest.approx(1.0 if limit is None else limit / norms[0], rel=1e-5)
    assert all(torch.equal(kept[name], copy) for name, copy in copies.items() if kept[name] is not None)
    for one, other in zip(made[0].plain.parameters(), made[1].plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_nothing_moves_when_the_norm_is_not_finite() -> None:
    one = sharded(Optim(state="int8"))
    before = [p.detach().clone() for p in one.plain.parameters()]
    for parameter in one.plain.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    assert not math.isfinite(one.step(1e-2, 1.0))
    assert all(torch.equal(p, kept) for p, kept in zip(one.plain.parameters(), before, strict=True))
