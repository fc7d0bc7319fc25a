"""torch.func and forward mode give the right value, or an error of our own that names the
argument."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vjp, vmap

from akl_triton import adaptive_kl, linear_adaptive_kl

V, H = 11, 5
g = torch.Generator().manual_seed(0)
LOGITS, TEACHER = (torch.randn(2, 3, V, generator=g) for _ in range(2))
HIDDEN, TEACHER_HIDDEN = (torch.randn(2, 3, H, generator=g) for _ in range(2))
WEIGHT, TEACHER_WEIGHT = (torch.randn(V, H, generator=g) for _ in range(2))
LABELS = torch.tensor([[0, -100, 1], [2, 3, -100]])

# Losses as functions of the argument that is differentiated.
OF: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "student_logits": (lambda x: adaptive_kl(x, TEACHER), LOGITS),
    "teacher_logits": (lambda x: adaptive_kl(LOGITS, x), TEACHER),
    "student_logits, in place": (lambda x: adaptive_kl(x * 1, TEACHER, inplace=True), LOGITS),
    "student_hidden": (
        lambda x: linear_adaptive_kl(x, WEIGHT, TEACHER_HIDDEN, TEACHER_WEIGHT),
        HIDDEN,
    ),
    "student_weight": (
        lambda x: linear_adaptive_kl(
            HIDDEN, x, TEACHER_HIDDEN, TEACHER_WEIGHT, reduction="none"
        ).sum(),
        WEIGHT,
    ),
    "student_bias": (
        lambda x: linear_adaptive_kl(HIDDEN, WEIGHT, TEACHER_HIDDEN, WEIGHT, student_bias=x),
        torch.zeros(V),
    ),
    "teacher_weight": (
        lambda x: linear_adaptive_kl(HIDDEN, WEIGHT, TEACHER_HIDDEN, x),
        TEACHER_WEIGHT,
    ),
}


def dual(function: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, torch.ones_like(x)))


TRANSFORMS: dict[str, Callable[[Any, Tensor], Any]] = {
    "dual": dual,
    "jvp": lambda f, x: jvp(f, (x,), (torch.ones_like(x),)),
    "grad": lambda f, x: grad(f)(x),
    "vjp": lambda f, x: vjp(f, x),
    "hessian": lambda f, x: hessian(f)(x),
    "forward over reverse": lambda f, x: jvp(grad(f), (x,), (torch.ones_like(x),)),
    "reverse over forward": lambda f, x: grad(lambda y: jvp(f, (y,), (x,))[1])(x),
    "reverse over reverse": lambda f, x: grad(lambda y: grad(f)(y).sum())(x),
    "vmap of grad": lambda f, x: vmap(grad(f))(torch.stack([x, x])),
    "grad of vmap": lambda f, x: grad(lambda y: vmap(f)(torch.stack([y, y])).sum())(x),
    "jvp of vmap": lambda f, x: jvp(
        lambda y: vmap(f)(torch.stack([y, y])).sum(), (x,), (torch.ones_like(x),)
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("argument", OF)
def test_refused_by_name(argument, transform):
    function, x = OF[argument]
    name = argument.partition(",")[0]
    with pytest.raises(RuntimeError, match=rf"^akl_triton: {name}: expected .* (tangent|grad)"):
        TRANSFORMS[transform](function, x)


@pytest.mark.parametrize("transform", ["jvp", "grad", "vjp", "vmap of grad"])
@pytest.mark.parametrize("argument", ["student_logits", "student_hidden"])
def test_refused_by_name_under_compile(argument, transform):
    """Under torch.compile, jvp gave a tangent of 0, and grad an error of PyTorch's."""
    function, x = OF[argument]
    compiled = torch.compile(partial(TRANSFORMS[transform], function), backend="eager")
    with pytest.raises(RuntimeError, match=rf"^akl_triton: {argument}: expected .* (tangent|grad)"):
        compiled(x)


@pytest.mark.parametrize("transform", ["jvp", "grad"])
def test_refused_in_one_graph(transform):
    function, x = OF["student_logits"]
    whole = partial(TRANSFORMS[transform], function)
    with pytest.raises(Exception, match="akl_triton: student_logits: expected"):
        torch.compile(whole, backend="eager", fullgraph=True)(x)


def test_vmap_under_compile():
    many = torch.stack([LOGITS, 2 * LOGITS])
    compiled = torch.compile(vmap(lambda x: adaptive_kl(x, TEACHER)), backend="eager")
    expected = [adaptive_kl(x, TEACHER).item() for x in many]
    assert compiled(many).tolist() == pytest.approx(expected)


def test_constants_within_a_transform_are_no_business_of_it():
    """A loss may be logged under jvp or grad, as long as it is not differentiated."""
    expected = adaptive_kl(LOGITS, TEACHER)

    def logs(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sum(), adaptive_kl(LOGITS * 1, TEACHER)

    assert torch.equal(grad(logs, has_aux=True)(HIDDEN)[1], expected)
    _, _, logged = cast(Any, jvp(logs, (HIDDEN,), (HIDDEN,), has_aux=True))
    assert torch.equal(logged, expected)
    detached = grad(lambda x: (x * adaptive_kl(x.detach(), TEACHER)).sum())(LOGITS)
    torch.testing.assert_close(detached, expected.expand_as(LOGITS))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_vmap_is_a_loop(reduction):
    """vmap works over a batch dimension of any argument, and so does reverse mode through it."""
    many = torch.randn(4, 2, 3, V, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = torch.stack([LABELS, LABELS.flip(0), LABELS.flip(1), LABELS])

    def loss(student: Tensor, of_batch: Tensor) -> Any:
        return adaptive_kl(student, TEACHER, of_batch, shift=1, reduction=reduction)

    batched = vmap(loss)(many, labels)
    looped = torch.stack([loss(x, y) for x, y in zip(many, labels, strict=True)])
    torch.testing.assert_close(batched, looped, rtol=0, atol=0)
    of, like = (torch.autograd.grad(x.sum(), many)[0] for x in (batched, looped))
    torch.testing.assert_close(of, like, rtol=0, atol=0)


def test_vmap_of_the_linear_form():
    many = torch.randn(4, 2, 3, H, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weight = WEIGHT.clone().requires_grad_()

    def loss(hidden: Tensor) -> Any:
        return linear_adaptive_kl(hidden, weight, TEACHER_HIDDEN, TEACHER_WEIGHT, LABELS)

    batched, looped = vmap(loss)(many), torch.stack([loss(x) for x in many])
    torch.testing.assert_close(batched, looped, rtol=0, atol=0)
    of, like = (torch.autograd.grad(x.sum(), (many, weight)) for x in (batched, looped))
    torch.testing.assert_close(of, like)


def test_vmap_of_num_items():
    counts = torch.tensor([2, 0, 5])
    batched = vmap(lambda n: adaptive_kl(LOGITS, TEACHER, num_items=n))(counts)
    looped = [adaptive_kl(LOGITS, TEACHER, num_items=n) for n in counts]
    assert batched.tolist() == pytest.approx([x.item() for x in looped])


def test_vmap_in_place():
    with pytest.raises(ValueError, match=r"^inplace: expected .* torch.func"):
        vmap(lambda x: adaptive_kl(x, TEACHER, inplace=True))(torch.stack([LOGITS, LOGITS]))
