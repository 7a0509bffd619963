"""Divergence of two heads without their logits: every option and gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from truth import DEVICES, check_against_truth, poison

from ingot_kernels import head as shared
from ingot_kernels import linear_kl as module
from ingot_kernels.head import Head, LowRank
from ingot_kernels.linear_kl import linear_kl, linear_kl_reference

N, H, V, R = 13, 11, 37, 3
TAUGHT_H, TAUGHT_V = 7, 41
CHUNK = 4 * V * 4  # bytes: several chunks in every type
ALL = {"bias": 1, "adapter": 1, "scale": 0.5, "softcap": 2.0, "temperature": 1.7}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": 1},
    "adapter": {"adapter": 1},
    "capped": {"scale": 0.5, "softcap": 2.0},
    "warm": {"temperature": 2.0},
    "all": ALL,
    "narrow teacher": {**ALL, "width": 29},
    "wide teacher": {**ALL, "width": TAUGHT_V},
}


def drawn(width: int = V, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states, weight, bias, a, b of the student, and of the teacher."""
    torch.manual_seed(0)
    student, teacher = (
        [torch.randn(shape).to(device, dtype) for shape in ((N, h), (v, h), (v,), (R, h), (v, R))]
        for h, v in ((H, V), (TAUGHT_H, width))
    )
    return student, teacher


def rows_of(device: str = "cpu") -> Tensor:
    return torch.tensor([0, 2, 3, 12, 7, 8, 9, 5], device=device)


def head_of(tensors: Any, options: dict[str, Any], scale: float, cap: float | None) -> Head:
    weight, bias, a, b = tensors
    adapter = LowRank(a, b, 0.7) if "adapter" in options else None
    return Head(weight, bias if "bias" in options else None, adapter, scale, cap)


def call(
    function: Callable[..., Any], options: dict[str, Any], taught: list[Tensor], rows: Tensor,
    frozen: list[Tensor] | None, **more: Any,
) -> Callable[..., Any]:  # fmt: skip
    """`function` of hidden states and the student's head: of the tensors given, or of `frozen` ones."""

    def run(hidden: Tensor, *trained: Tensor) -> Any:
        parts = trained if frozen is None else [t.to(hidden.dtype) for t in frozen]
        known, *above = (t.to(hidden.dtype) for t in taught)
        student = head_of(parts, options, options.get("scale", 1.0), options.get("softcap"))
        teacher = head_of(above, options, 0.8, 3.0 if "softcap" in options else None)
        return function(hidden, student, known, teacher, rows, temperature=options.get("temperature", 1.0), **more)

    return run


def check(
    student: list[Tensor], taught: list[Tensor], options: dict[str, Any], trainable: bool, rows: Tensor, **more: Any
) -> None:
    frozen, given = (None, student) if trainable else (student[1:], student[:1])
    ours = call(linear_kl, options, taught, rows, frozen, **more)
    plain = call(linear_kl_reference, options, taught, rows, frozen)
    if student[0].dtype == torch.bfloat16:
        # Errors of rows cancel in one sum or the other by luck: their sum has a bound, not a competitor.
        assert float(ours(*given)) == pytest.approx(float(plain(*(t.double() for t in given))), rel=2e-2)
        own, other = ours, plain
        ours = lambda *t: (loss := own(*t)) - loss.detach()  # noqa: E731
        plain = lambda *t: (loss := other(*t)) - loss.detach()  # noqa: E731
    check_against_truth(ours, plain, given)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("name", OPTIONS)
def test_is_the_definition(name: str, trainable: bool, dtype: torch.dtype, device: str) -> None:
    options = OPTIONS[name]
    student, taught = drawn(options.get("width", V), dtype, device)
    for chunk_bytes in (None, CHUNK, 1):
        check(student, taught, options, trainable, rows_of(device), chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("n_rows", [0, 1])
def test_few_rows(n_rows: int) -> None:
    student, taught = drawn()
    rows = rows_of()[:n_rows]
    check(student, taught, ALL, True, rows)
    leaves = [t.requires_grad_() for t in student]
    loss = call(linear_kl, ALL, taught, rows, None)(*leaves)
    gradient = torch.autograd.grad(loss, leaves[0])[0]
    rest = torch.ones(N, dtype=torch.bool)
    rest[rows] = False
    assert not gradient[rest].any()
    assert bool(loss == 0) == (n_rows == 0)


def test_no_states_at_all() -> None:
    student, taught = drawn()
    student[0], taught[0] = student[0][:0], taught[0][:0]
    check(student, taught, ALL, True, rows_of()[:0])


def test_strided_and_expanded_inputs() -> None:
    student, taught = drawn()
    turned = [student[0].t().contiguous(), student[1].t().contiguous(), *student[2:]]
    known = [taught[0].t().contiguous().t(), *taught[1:]]

    def turn(function: Any, **more: Any) -> Any:
        inner = call(function, ALL, known, rows_of(), None, **more)
        return lambda h, w, *rest: inner(h.t(), w.t(), *rest)

    check_against_truth(turn(linear_kl, chunk_bytes=CHUNK), turn(linear_kl_reference), turned)

    def stretch(function: Any, **more: Any) -> Any:
        inner = call(function, ALL, [taught[0][:1].expand(N, -1), *taught[1:]], rows_of(), None, **more)
        return lambda h, *rest: inner(h.expand(N, H), *rest)

    one = [student[0][:1].clone(), *student[1:]]
    check_against_truth(stretch(linear_kl, chunk_bytes=CHUNK), stretch(linear_kl_reference), one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_nothing_that_it_did_not_write(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    for width in (29, V, TAUGHT_V):
        for trainable in (False, True):
            check(*drawn(width, dtype), ALL, trainable, rows_of(), chunk_bytes=CHUNK)


@pytest.mark.parametrize("trainable", [False, True])
def test_gradients_add_up_and_inputs_stay_as_they_are(trainable: bool) -> None:
    student, taught = drawn()
    copies = [t.clone() for t in (*student, *taught)]
    leaves = [t.requires_grad_() for t in (student if trainable else student[:1])]
    teachers = [t.requires_grad_() for t in taught]
    ours = call(linear_kl, ALL, teachers, rows_of(), None if trainable else student[1:], chunk_bytes=CHUNK)
    upstream = torch.tensor(3.0)
    loss = ours(*leaves)
    assert loss.dtype == torch.float32 and loss.shape == ()
    loss.backward(upstream, retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    assert len(first) == len(leaves)
    loss.backward(upstream)
    for leaf, gradient in zip(leaves, first, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * gradient)
    for reentrant in (False, True):
        for leaf in leaves:
            leaf.grad = None
        checkpoint(ours, *leaves, use_reentrant=reentrant).backward(upstream)
        for leaf, gradient in zip(leaves, first, strict=True):
            torch.testing.assert_close(leaf.grad, gradient)
    assert all(t.grad is None for t in teachers), "a gradient went to the teacher"
    assert upstream == 3.0
    for now, then in zip((*student, *taught), copies, strict=True):
        assert torch.equal(now, then)


def test_autocast_takes_products_in_its_type_and_leaves_parameters_in_theirs() -> None:
    student, taught = drawn()
    leaves = [t.requires_grad_() for t in student]
    ours = call(linear_kl, ALL, taught, rows_of(), None, chunk_bytes=CHUNK)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(*leaves)
    assert loss.dtype == torch.float32
    rounded = [t.detach().bfloat16().requires_grad_() for t in leaves]  # the same products, asked for by hand
    by_hand = ours(*rounded)
    torch.testing.assert_close(loss, by_hand)
    gradients = torch.autograd.grad(loss, leaves)
    for gradient, other in zip(gradients, torch.autograd.grad(by_hand, rounded), strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, other.float(), rtol=2e-2, atol=1e-2)
    assert not torch.equal(loss, ours(*leaves)), "autocast changed nothing"


def test_without_gradients_only_losses_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("a gradient was made")

    monkeypatch.setattr(shared._Totals, "add", fail)
    student, taught = drawn()
    leaves = [t.requires_grad_() for t in student]
    with torch.no_grad():
        loss = call(linear_kl, ALL, taught, rows_of(), None)(*leaves)
        expected = call(linear_kl_reference, ALL, taught, rows_of(), None)(*leaves)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)
    with pytest.raises(AssertionError, match="a gradient was made"):
        call(linear_kl, ALL, taught, rows_of(), None)(*leaves)


def test_a_student_that_is_its_teacher_has_no_loss() -> None:
    student, _ = drawn()
    head = Head(student[1])
    hidden = student[0].requires_grad_()
    loss = linear_kl(hidden, head, student[0], head, rows_of(), temperature=2.0)
    [gradient] = torch.autograd.grad(loss, hidden)
    assert abs(float(loss.detach())) < 1e-5 and float(gradient.abs().max()) < 1e-5


@pytest.mark.parametrize("fault", ["sign", "softcap", "scale", "outside", "stale", "last"])
def test_planted_faults_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    own_job, add = module.Job, shared._add_product

    def job(grade: Any, *rest: Any) -> Any:
        def wrong(logits: Tensor, part: slice, weights: Any, gradient: bool) -> Tensor:
            raw = logits.clone()
            losses: Tensor = grade(logits, part, weights, gradient)
            if fault == "sign":
                logits.neg_()
            if fault == "softcap":
                logits.div_(1 - torch.tanh(raw * ALL["scale"] / ALL["softcap"]).square())
            if fault == "scale":
                logits.div_(ALL["scale"])
            if fault == "outside":
                logits[:, 29:] = raw[:, 29:]  # classes that the teacher does not know
            if fault == "stale":
                seen.append(logits.clone())
                logits.copy_(seen[0][: len(logits)])
            return losses

        return own_job(wrong, *rest)

    if fault == "last":
        monkeypatch.setattr(shared, "_add_product", lambda total, *rest: add(None, *rest))
    else:
        monkeypatch.setattr(module, "Job", job)
    with pytest.raises(AssertionError, match="from the truth"):
        check(*drawn(29), ALL, True, rows_of(), chunk_bytes=CHUNK)


def test_compiled_equals_eager() -> None:
    student, taught = drawn()
    compiled = torch.compile(call(linear_kl, ALL, taught, rows_of(), None, chunk_bytes=CHUNK), backend="aot_eager")
    check_against_truth(compiled, call(linear_kl_reference, ALL, taught, rows_of(), None), student)
    torch._dynamo.reset()


@pytest.mark.gpu
def test_more_logits_than_32_bits_count() -> None:
    n, width, size = 2**31 // 32768 + 3, 32768, 64
    torch.manual_seed(0)
    hidden = torch.randn(n, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    taught = torch.randn(n, size, device="cuda", dtype=torch.bfloat16)
    student, teacher = (Head(torch.randn(width, size, device="cuda", dtype=torch.bfloat16) / 8) for _ in range(2))
    linear_kl(hidden, student, taught, teacher, torch.arange(n, device="cuda")).backward()
    last = hidden.detach()[-5:].requires_grad_()
    linear_kl_reference(last, student, taught[-5:], teacher, torch.arange(5, device="cuda")).backward()
    assert hidden.grad is not None and last.grad is not None
    torch.testing.assert_close(hidden.grad[-5:], last.grad, rtol=5e-2, atol=2e-2)


@pytest.mark.gpu
def test_waits_for_nothing() -> None:
    student, taught = drawn(device="cuda")
    leaves = [t.requires_grad_() for t in student]
    ours = call(linear_kl, ALL, taught, rows_of("cuda"), None, chunk_bytes=CHUNK)
    ours(*leaves).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(*leaves).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
