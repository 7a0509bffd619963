"""AdamW in 8 bits and over bfloat16 weights: against bitsandbytes and float32, by torch and by Triton."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from truth import DEVICES, poison

from ingot_kernels import adamw as module
from ingot_kernels.adamw import AdamW, Moment, adamw, dequantize, groups_of, key_of, quantize, random_bits

IMPLS = ["torch", "triton"]


def moment(shape: tuple[int, int], *, signed: bool, device: str = "cpu", eight: bool = True) -> Moment:
    if not eight:
        return Moment(torch.zeros(shape, device=device), None, signed)
    scales = torch.zeros(shape[0], groups_of(shape[1]), device=device)
    return Moment(torch.zeros(shape, dtype=torch.uint8, device=device), scales, signed)


def run(
    shape: tuple[int, int],
    impl: Any,
    *,
    steps: int = 3,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    eight: bool = True,
    key: int | None = None,
    grad_scale: float = 1.0,
) -> tuple[Tensor, Moment, Moment]:
    """Some steps with gradients of very uneven size; the weight and both moments afterwards."""
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype).to(device)
    first = moment(shape, signed=True, device=device, eight=eight)
    second = moment(shape, signed=False, device=device, eight=eight)
    for step in range(1, steps + 1):
        grad = (torch.randn(shape) * torch.randn(shape).exp()).to(dtype).to(device)
        adamw(weight, grad, first, second, update(step, key=key, grad_scale=grad_scale), impl=impl)
    return weight, first, second


def update(step: int, **more: Any) -> module.Update:
    return module.Update(**{"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "step": step, **more})


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_bitsandbytes(signed: bool) -> None:
    other = pytest.importorskip("bitsandbytes.functional")
    values = torch.randn(4, 512) * torch.randn(4, 512).exp()
    values = values if signed else values.square()
    ours = moment((4, 512), signed=signed)
    quantize(values, ours)
    table = other.create_dynamic_map(signed=signed)
    codes, state = other.quantize_blockwise(values, code=table, blocksize=256)
    assert torch.equal(state.absmax.view(4, 2), ours.scales)
    assert torch.equal(table, module.dynamic_codes(signed, values.device))
    # Its CPU code looks values up with less precision (a fifth of the unsigned codes differ): ours are the nearer ones.
    theirs = dequantize(Moment(codes.view(4, 512), ours.scales, signed))
    read = other.dequantize_blockwise(ours.values, absmax=ours.scales.view(-1), code=table, blocksize=256)
    assert torch.equal(read, dequantize(ours))
    assert (codes.view(4, 512) == ours.values).float().mean() > 0.7
    assert ((dequantize(ours) - values).abs() <= (theirs - values).abs() + 1e-6).all()


@pytest.mark.parametrize("signed", [True, False])
def test_the_lookup_finds_what_bisection_finds(signed: bool) -> None:
    edges = module.midpoints(signed, torch.device("cpu"))
    one = torch.tensor(1.0)
    near = [edges, torch.nextafter(edges, one), torch.nextafter(edges, -one), torch.tensor([0.0, -0.0, 1.0])]
    values = torch.cat([*near, torch.linspace(-1 if signed else 0, 1, 200_001)])
    assert torch.equal(module.nearest(values, signed), torch.bucketize(values, edges, out_int32=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (3, 256), (2, 300), (5, 512), (1, 769)])
def test_steps_stay_within_what_8_bits_lose(shape: tuple[int, int], impl: str, device: str) -> None:
    found, first, second = run(shape, impl, device=device)
    exact, *plain_moments = run(shape, "torch", eight=False)
    m, v = (each.values for each in plain_moments)
    # Steps of torch's own, which the float32 path must match to rounding.
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(shape))
    plain = torch.optim.AdamW([parameter], lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    for _ in range(3):
        parameter.grad = torch.randn(shape) * torch.randn(shape).exp()
        plain.step()
    torch.testing.assert_close(exact, parameter.detach(), atol=1e-6, rtol=1e-6)
    # Codes of the upper decade are 1/128 (signed, of absmax 2/128) apart; the moment is rounded once more a step.
    assert ((dequantize(first).cpu() - m).abs() <= 0.03 * m.abs().max() + 1e-9).all()
    assert ((dequantize(second).cpu() - v).abs() <= 0.03 * v.abs().max() + 1e-9).all()
    moved = (exact - run(shape, "torch", steps=0)[0]).abs().mean()
    assert (found.cpu() - exact).abs().mean() < 0.1 * moved


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("eight", [True, False])
@pytest.mark.parametrize("key", [None, 12345])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_does_what_torch_does(dtype: torch.dtype, key: int | None, eight: bool, device: str) -> None:
    if dtype == torch.bfloat16 and key is None and device == "cpu":
        pytest.skip("the interpreter cuts bits off where a GPU rounds")
    options = {"dtype": dtype, "key": key if dtype == torch.bfloat16 else None, "eight": eight, "grad_scale": 0.3}
    ours, expected = (run((5, 300), impl, device=device, **options) for impl in ("triton", "torch"))
    near = (ours[0].float() - expected[0].float()).abs()
    # One unit more or less where products of another order lie at an edge.
    assert near.max() <= 2e-6 if dtype == torch.float32 else (near > 0).float().mean() < 0.01
    for one, two in zip(ours[1:], expected[1:], strict=True):
        apart = (dequantize(one) - dequantize(two)).abs() > 1e-6 * dequantize(two).abs().max()
        assert apart.float().mean() < 0.01


def test_gradients_are_scaled_inside() -> None:
    torch.manual_seed(0)
    grad = torch.randn(2, 300)
    found = []
    for given, scale in ((grad, 0.25), (grad * 0.25, 1.0)):
        weight, before = torch.ones(2, 300), given.clone()
        first, second = moment((2, 300), signed=True), moment((2, 300), signed=False)
        adamw(weight, given, first, second, update(1, grad_scale=scale), impl="torch")
        assert torch.equal(given, before)
        found.append((weight, first.scales))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_random_rounding_keeps_the_mean() -> None:
    values = torch.full((64, 4096), 1.0 + 0.3 * 2**-7)  # 0.3 of the way to the next bfloat16
    values[32:] *= -1
    rounded = module.round_randomly(values, random_bits(values, 0, key_of(0, 1, 1)))
    assert torch.equal(rounded, rounded.bfloat16().float())
    for half, sign in ((rounded[:32], 1), (rounded[32:], -1)):
        up = (half.abs() > 1).float().mean().item()
        assert up == pytest.approx(0.3, abs=0.005)  # 4 standard deviations
        assert (half.sign() == sign).all()
    again = random_bits(values, 0, key_of(0, 2, 1))
    same = ((again & 0xFFFF) < 0x8000) == ((random_bits(values, 0, key_of(0, 1, 1)) & 0xFFFF) < 0x8000)
    assert same.float().mean().item() == pytest.approx(0.5, abs=0.005)  # steps draw on their own
    inf = torch.tensor([float("inf"), -float("inf")])
    assert torch.equal(module.round_randomly(inf, torch.tensor([0xFFFF, 1], dtype=torch.int32)), inf)


def test_bits_do_not_depend_on_the_cut() -> None:
    whole = random_bits(torch.empty(10, 7), 0, 99)
    assert torch.equal(random_bits(torch.empty(4, 7), 6 * 7, 99), whole[6:])


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_a_whole_are_rounded_as_in_it(impl: Any) -> None:
    weight, grad = torch.ones(6, 7, dtype=torch.bfloat16), torch.ones(6, 7)
    found = []
    for rows in (slice(0, 6), slice(4, 6)):
        part, moments = weight[rows].clone(), [moment(grad[rows].shape, signed=s, eight=False) for s in (True, False)]
        adamw(part, grad[rows], *moments, update(1, key=99, start=rows.start * 7), impl=impl)
        found.append(part)
    assert torch.equal(found[0][4:], found[1])
    assert found[0][:2].ne(found[1]).any()


@pytest.mark.parametrize("stochastic", [False, True])
def test_small_steps_are_lost_unless_rounded_at_random(stochastic: bool) -> None:
    parameter = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = AdamW([parameter], lr=1e-4, weight_decay=0.0, state="float32", stochastic=stochastic)
    for _ in range(100):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    moved = 1.0 - parameter.detach().float().mean().item()
    assert moved == (pytest.approx(0.01, rel=0.1) if stochastic else 0.0)


def fitted(make: Any, dtype: torch.dtype = torch.float32) -> float:
    """Loss after 150 steps of a small network on a task with noise, and so a floor."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).to(dtype)
    teacher = torch.randn(64, 64) / 8
    optimizer = make(model.parameters())
    losses = []
    for _ in range(150):
        x = torch.randn(128, 64)
        y = (x @ teacher).tanh() + 0.3 * torch.randn(128, 64)
        loss = (model(x.to(dtype)).float() - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


def test_8_bits_learn_as_float32() -> None:
    plain = fitted(lambda p: torch.optim.AdamW(p, lr=3e-3))
    assert plain < 0.2
    assert fitted(lambda p: AdamW(p, lr=3e-3, weight_decay=0.01)) == pytest.approx(plain, rel=0.02)
    random = fitted(lambda p: AdamW(p, lr=3e-3, weight_decay=0.01, stochastic=True), torch.bfloat16)
    assert random == pytest.approx(plain, rel=0.02)


def test_a_saved_state_continues_with_the_same_bits() -> None:
    def made() -> tuple[nn.Parameter, AdamW]:
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(64, 80).bfloat16())
        return parameter, AdamW([parameter], lr=1e-2, stochastic=True)

    def steps(parameter: nn.Parameter, optimizer: AdamW, numbers: range) -> None:
        for number in numbers:
            torch.manual_seed(number)
            parameter.grad = torch.randn(64, 80).bfloat16()
            optimizer.step()

    one, straight = made()
    steps(one, straight, range(6))
    two, first = made()
    steps(two, first, range(3))
    saved, weight = copy.deepcopy(first.state_dict()), two.detach().clone()
    three, second = made()
    three.data.copy_(weight)
    second.load_state_dict(saved)
    assert second.state[three]["exp_avg"].dtype == torch.uint8
    assert second.state[three]["exp_avg_scale"].dtype == torch.float32
    steps(three, second, range(3, 6))
    assert torch.equal(one, three)
    assert all(torch.equal(straight.state[one][key], value) for key, value in second.state[three].items())


def test_small_tensors_and_vectors_keep_float32() -> None:
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((64, 64), (63, 64), (8192,), ())]
    optimizer = AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert [optimizer.state[p]["exp_avg"].dtype for p in parameters] == [torch.uint8] + 3 * [torch.float32]
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in parameters)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_not_contiguous_is_updated_too(impl: Any) -> None:
    torch.manual_seed(0)
    weight, grad = torch.randn(6, 300), torch.randn(6, 300)
    turned = weight.t().contiguous().t()
    expanded = grad[:1].expand(6, 300)
    for one in (weight, turned):
        moments = moment((6, 300), signed=True), moment((6, 300), signed=False)
        adamw(one, expanded, *moments, update(1), impl=impl)
    assert torch.equal(weight, turned)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("eight", [True, False])
def test_what_is_around_changes_nothing(eight: bool, impl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Portions of two rows, memory that nobody wrote, and autocast."""
    options = {"dtype": torch.bfloat16, "key": 12345, "eight": eight}
    weight, *moments = run((5, 300), impl, **options)
    poison(monkeypatch)
    monkeypatch.setattr(module, "PORTION", 600)
    with torch.autocast("cpu", torch.bfloat16):
        found, *others = run((5, 300), impl, **options)
    assert torch.equal(found, weight)
    for one, two in zip(others, moments, strict=True):
        assert torch.equal(one.values, two.values)
        assert one.scales is None or torch.equal(one.scales, two.scales)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_nothing_to_update(shape: tuple[int, int], impl: Any) -> None:
    assert run(shape, impl)[0].shape == shape


FAULTS = {
    "stale scales": ("quantize", lambda values, into: into.values.copy_(quantize(values, into) or into.values * 0)),
    "no codes": ("dequantize", lambda into: dequantize(into) * 0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_finds_a_planted_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong = FAULTS[fault]
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(AssertionError):
        test_steps_stay_within_what_8_bits_lose((5, 512), "torch", "cpu")
