"""Teachers that are k pairs: the PyTorch backend, both doors, what the definition promises, errors.

The kernels are compared with the same oracle in tests/kernels/test_pairs.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from akl_triton import (
    DKD,
    AdaptiveKL,
    Alpha,
    DistillationLoss,
    Divergence,
    EntropySwitch,
    ForwardKL,
    Jeffreys,
    JensenShannon,
    LinearDistillationLoss,
    LKHybrid,
    MixedKL,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    SparseTeacher,
    TotalVariation,
    adaptive_kl,
    checks,
    distillation_loss,
    forward_kl,
    linear_distillation_loss,
    teacher_pairs,
)
from akl_triton.reference import reference_sparse
from akl_triton.verify import exact, exact_of_pairs, faults, head_faults_of_pairs
from tests.support.cases import labels_of, rows_of_every_kind
from tests.support.pairs import SPARSE_DIVERGENCES, pairs_of_every_kind

# Of which the divergence of two coarser distributions is never larger.
F_DIVERGENCES = (
    *(ForwardKL(), ReverseKL(), MixedKL(0.3), JensenShannon(0.3), SkewKL(), SkewReverseKL()),
    *(TotalVariation(), LKHybrid(), Alpha(0.5), Alpha(1.5), Jeffreys()),
)
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "labels": {"kd_ratio": 0.7},
    "temperature, labels, softcap": {
        "temperature": 2.0,
        "kd_ratio": 0.25,
        "student_softcap": 6.0,
        "student_logit_scale": 0.5,
    },
}


def some_pairs(n: int = 6, v: int = 300, k: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher."""
    g = torch.Generator().manual_seed(seed)
    teacher = torch.randn(n, v, generator=g) * 3
    return teacher + torch.randn(n, v, generator=g), teacher


# ---------------------------------------------------------------- the oracle


@pytest.mark.parametrize("outside", ["bucket", "zero", "renormalise"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_oracle_is_its_formula_and_its_gradient(outside: Any, divergence: str) -> None:
    """Against autograd through the formulas of `SparseTeacher`, written out for one row."""
    if outside == "zero" and divergence != "forward_kl":
        pytest.skip("only the forward KL is finite where tau is 0")
    g = torch.Generator().manual_seed(0)
    s = torch.randn(1, 9, generator=g, dtype=torch.float64, requires_grad=True)
    ids, p = torch.tensor([[7, 2, 4]]), torch.tensor([[0.3, 0.4, 0.1]], dtype=torch.float64)
    numbers: dict[str, Any] = {"beta": 0.3} if divergence == "jensen_shannon" else {}

    def loss(s: Tensor) -> Tensor:
        q = torch.softmax(s / 2.0, dim=-1)[0]
        own, of_teacher = q[ids[0]], p[0]
        sigma, tau = 1.0 - own.sum(), 1.0 - of_teacher.sum()
        if outside == "renormalise":
            own, of_teacher = own / own.sum(), of_teacher / of_teacher.sum()
        elif outside == "zero":
            of_teacher = of_teacher / of_teacher.sum()
        else:
            own, of_teacher = torch.cat([own, sigma[None]]), torch.cat([of_teacher, tau[None]])
        if divergence == "forward_kl":
            return (of_teacher * (of_teacher.log() - own.log())).sum()
        if divergence == "reverse_kl":
            return (own * (own.log() - of_teacher.log())).sum()
        m = 0.3 * of_teacher + 0.7 * own
        return (0.3 * of_teacher * (of_teacher / m).log() + 0.7 * own * (own / m).log()).sum()

    result = reference_sparse(
        s, ids, p.log(), divergence=divergence, outside=outside, temperature=2.0, **numbers
    )
    expected = loss(s)
    (gradient,) = torch.autograd.grad(expected, s)
    torch.testing.assert_close(result.loss[0], expected.detach())
    torch.testing.assert_close(result.grad, gradient)
    assert torch.autograd.gradcheck(loss, s)


# ---------------------------------------------------------------- the PyTorch backend


@pytest.mark.parametrize("divergence", SPARSE_DIVERGENCES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_member(divergence: Divergence, options: dict[str, Any]) -> None:
    student, teacher = pairs_of_every_kind(temperature=options.get("temperature", 1.0))
    labels = labels_of(student) if "kd_ratio" in options else None
    maps = {name: options[name] for name in options if name.startswith("student_")}
    upstream = torch.rand(len(student), generator=torch.Generator().manual_seed(2)) + 0.5
    gradients = []
    for inplace in (False, True):
        leaf = student.clone().requires_grad_()
        loss, stats = distillation_loss(
            leaf * 1 if inplace else leaf,
            teacher,
            labels,
            divergence=divergence,
            reduction="none",
            return_stats=True,
            inplace=inplace,
            backend="torch",
            **options,
        )
        (loss * upstream).sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    of_head = {}
    if isinstance(divergence, AdaptiveKL):
        of_head = {name: getattr(stats, name) for name in ("head_size", "forward_weight", "gap")}
        claims = {**of_head, "head_mass": stats.head_mass}
        assert head_faults_of_pairs(divergence, student, teacher, **claims, **maps) == []
    of = exact_of_pairs(
        divergence,
        student,
        teacher,
        labels=labels,
        kd_ratio=options.get("kd_ratio", 1.0),
        **of_head,
        **maps,
    )
    for gradient in gradients:
        assert faults(loss.detach(), gradient, of, upstream=upstream) == []


def test_statistics_are_of_the_whole_student() -> None:
    """Entropy and cross-entropy are those of the dense loss; agreement asks the first pair."""
    student, teacher = some_pairs()
    student[0] = teacher[0]
    labels = torch.arange(6)
    _, dense = adaptive_kl(student, teacher, labels, kd_ratio=0.5, return_stats=True)
    _, stats = adaptive_kl(
        student, teacher_pairs(teacher, 12), labels, kd_ratio=0.5, return_stats=True
    )
    for name in ("student_entropy", "cross_entropy", "top1_agreement"):
        torch.testing.assert_close(getattr(stats, name), getattr(dense, name))
    assert stats.top1_agreement[0] == 1.0
    assert (stats.teacher_entropy < dense.teacher_entropy).all()


# ---------------------------------------------------------------- what the definition promises


@pytest.mark.parametrize("divergence", SPARSE_DIVERGENCES, ids=str)
def test_all_tokens_as_pairs_are_the_dense_loss(divergence: Divergence) -> None:
    student, teacher = some_pairs(v=64)
    teacher = teacher.round()  # heads that end within a group of equal logits
    pairs = teacher_pairs(teacher, 64)
    assert pairs.log_tail is not None and (pairs.log_tail == -torch.inf).all()
    results = []
    for given in (teacher, pairs):
        leaf = student.clone().requires_grad_()
        loss = distillation_loss(leaf, given, divergence=divergence, reduction="none")
        loss.sum().backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*results, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("divergence", F_DIVERGENCES, ids=str)
def test_more_pairs_never_make_less_of_it_and_never_more_than_all(divergence: Divergence) -> None:
    """Of the float64 oracle, with which the losses are compared elsewhere."""
    student, teacher = rows_of_every_kind(finite=True)
    teacher = teacher[:, : student.shape[-1]]
    dense = exact(divergence, student, teacher).oracle.loss
    losses = []
    for k in (1, 4, 16, 64, 256, 1024):
        top = teacher.double().log_softmax(-1).topk(k)
        tail = (1.0 - top.values.exp().sum(-1)).clamp(min=0.0).log()
        result = reference_sparse(
            student, top.indices, top.values, tail, divergence.name, **vars(divergence)
        )
        losses.append(result.loss)
    for less, more in zip(losses, [*losses[1:], dense], strict=True):
        assert (less <= more * (1.0 + 1e-9) + 1e-12).all()
    assert (losses[0] < 0.9 * dense).any(), "it is not merely all the same"


@pytest.mark.parametrize("divergence", [AdaptiveKL(), JensenShannon()], ids=str)
def test_the_order_of_pairs_changes_no_bit(divergence: Divergence) -> None:
    student, logits = some_pairs()
    pairs = teacher_pairs(logits.round(), 12)
    results = []
    for seed in range(3):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
        shuffled = SparseTeacher(pairs.ids[:, order], pairs.log_probs[:, order], pairs.log_tail)
        leaf = student.clone().requires_grad_()
        loss = distillation_loss(leaf, shuffled, divergence=divergence)
        loss.backward()
        assert leaf.grad is not None
        results.append((loss.detach(), leaf.grad))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


def test_pairs_of_pairs_are_the_same() -> None:
    """As `to` and dataclasses.replace make them; an absent pair stays absent."""
    teacher = SparseTeacher(torch.tensor([[-1, 3, -7, 1]]), torch.full((1, 4), 0.2).log())
    for again in (teacher.to("cpu"), dataclasses.replace(teacher)):
        assert torch.equal(again.ids, teacher.ids)
        assert torch.equal(again.entries(), teacher.entries())


def test_absent_pairs_are_not_there() -> None:
    student, logits = some_pairs()
    pairs = teacher_pairs(logits, 12)
    nothing = torch.full((6, 3), -1)
    padded = SparseTeacher(
        torch.cat([nothing, pairs.ids], 1),
        torch.cat([torch.full((6, 3), torch.nan), pairs.log_probs], 1),
        pairs.log_tail,
    )
    losses = [adaptive_kl(student, x, reduction="none", return_stats=True) for x in (pairs, padded)]
    torch.testing.assert_close(*losses, equal_nan=True)


def test_a_head_that_the_pairs_do_not_hold_is_all_of_them() -> None:
    student, logits = some_pairs()
    _, stats = adaptive_kl(student, teacher_pairs(logits, 2), mu=0.999, return_stats=True)
    mass = logits.softmax(-1).topk(2).values.sum(-1)
    torch.testing.assert_close(stats.head_mass, mass)
    assert (stats.head_size == 2).all()


def test_random_sampling_is_unbiased() -> None:
    """The mean gradient of count / n over many draws is the dense one, but for a few times its
    standard error, that of a mean of p."""
    student, logits = some_pairs(n=1, v=40)
    p = logits.softmax(-1)
    leaf = student.clone().requires_grad_()
    forward_kl(leaf, logits).backward()
    dense, leaf.grad = leaf.grad, None
    g = torch.Generator().manual_seed(0)
    draws, samples = 4000, 8
    ids = torch.multinomial(p.expand(draws, -1), samples, replacement=True, generator=g)
    counts = torch.zeros(draws, 40).scatter_add_(1, ids, torch.ones(draws, samples))
    weights, tokens = counts.topk(samples, dim=1)
    tokens = tokens.where(weights > 0, -1)
    teacher = SparseTeacher(tokens, (weights / samples).log(), outside="zero")
    rows = student.expand(draws, -1).clone().requires_grad_()
    forward_kl(rows, teacher, reduction="sum").backward()
    assert rows.grad is not None and dense is not None
    error = (rows.grad.mean(0) - dense[0]).abs()
    standard = (p * (1.0 - p) / (samples * draws)).sqrt()[0]
    assert (error <= 4.0 * standard + 1e-6).all()
    # What most people train with instead is far from it, however many rows there are.
    truncated = teacher_pairs(logits, samples)
    renormalised = SparseTeacher(truncated.ids, truncated.log_probs, outside="renormalise")
    forward_kl(leaf, renormalised).backward()
    assert leaf.grad is not None
    assert ((leaf.grad - dense)[0].abs() > 4.0 * standard).any()


# ---------------------------------------------------------------- doors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hidden_states(dtype: torch.dtype, reduction: Any) -> None:
    """The loss of hidden states is that of their logits, chunk by chunk."""
    g = torch.Generator().manual_seed(0)
    n, v, h = 10, 300, 32
    given = [
        (torch.randn(shape, generator=g) / scale).to(dtype).requires_grad_()
        for shape, scale in (((n, h), 1.0), ((v, h), 3.0), ((v,), 1.0))
    ]
    hidden, weight, bias = given
    teacher = teacher_pairs(torch.randn(n, v, generator=g) * 3, 16)
    labels = torch.randint(v, (n,), generator=g)
    labels[3] = -100
    options: dict[str, Any] = {"kd_ratio": 0.7, "student_softcap": 10.0, "reduction": reduction}
    upstream = torch.rand(n, generator=g) if reduction == "none" else torch.ones(())
    loss = linear_distillation_loss(
        hidden, weight, teacher, None, labels, student_bias=bias, chunk_bytes=4 * v * 4, **options
    )
    (loss * upstream).sum().backward()

    wide = [x.detach().float().requires_grad_() for x in given]
    logits = wide[0] @ wide[1].T + wide[2]
    expected = distillation_loss(logits, teacher, labels, **options)
    (expected * upstream).sum().backward()
    rounding = 4.0 * torch.finfo(dtype).eps
    torch.testing.assert_close(loss, expected, rtol=rounding, atol=2 * rounding)
    for ours, theirs in zip(given, wide, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        largest = theirs.grad.abs().max()
        assert (ours.grad.float() - theirs.grad).abs().max() <= rounding * largest
    assert hidden.grad is not None and not hidden.grad[3].any()


def test_modules_and_leading_dimensions() -> None:
    student, logits = some_pairs()
    teacher = teacher_pairs(logits.view(2, 3, -1), 12)
    expected = adaptive_kl(student, teacher_pairs(logits, 12))
    torch.testing.assert_close(DistillationLoss()(student.view(2, 3, -1), teacher), expected)
    weight = torch.eye(300)
    of_hidden = LinearDistillationLoss()(student.view(2, 3, -1), weight, teacher)
    torch.testing.assert_close(of_hidden, expected)


def test_one_graph() -> None:
    student, logits = some_pairs()
    pairs = teacher_pairs(logits, 12)
    assert pairs.log_tail is not None

    def loss(student: Tensor, ids: Tensor, log_probs: Tensor, log_tail: Tensor) -> Tensor:
        return adaptive_kl(student, SparseTeacher(ids, log_probs, log_tail))

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaf = student.clone().requires_grad_()
        function(leaf, pairs.ids, pairs.log_probs, pairs.log_tail).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_a_tail_of_16_bits_is_taken_from_its_logarithm() -> None:
    """1 - sum p would lose a tail that is smaller than the rounding of p."""
    student, logits = some_pairs()
    pairs = teacher_pairs(logits * 3, 12)
    assert pairs.log_tail is not None
    rounded = pairs.log_probs.bfloat16()
    errors = []
    for tail in (pairs.log_tail, None):
        teacher = SparseTeacher(pairs.ids, rounded, tail)
        of = exact(ForwardKL(), student, logits * 3).oracle.loss
        errors.append((forward_kl(student, teacher, reduction="none") - of).abs().max())
    assert errors[0] < errors[1]


# ---------------------------------------------------------------- what is refused


def teacher_of(**changes: Any) -> SparseTeacher:
    fields: dict[str, Any] = {
        "ids": torch.tensor([[3, 1]]),
        "log_probs": torch.tensor([[0.5, 0.25]]).log(),
    }
    return SparseTeacher(**{**fields, **changes})


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"ids": torch.tensor([[3.0, 1.0]])}, TypeError, "ids: expected int64 or int32, got"),
        ({"ids": torch.tensor(3)}, ValueError, r"ids: expected \[..., k\] with 1 <= k <= 1024"),
        ({"ids": torch.zeros(1, 1025, dtype=torch.long)}, ValueError, "1 <= k <= 1024"),
        ({"ids": torch.tensor([[1, 1]])}, ValueError, "ids: expected ids of which no row has one"),
        ({"log_probs": torch.zeros(1, 3)}, ValueError, r"log_probs: expected \[1, 2\], for ids"),
        ({"log_probs": torch.zeros(1, 2, dtype=torch.long)}, TypeError, "log_probs: expected"),
        ({"log_probs": torch.tensor([[0.5, 0.25]])}, ValueError, "sum to no more than 1"),
        (
            {"log_probs": torch.full((1, 2), -1.0, requires_grad=True)},
            ValueError,
            "log_probs: expected a tensor that does not require grad",
        ),
        ({"log_tail": torch.zeros(2)}, ValueError, r"log_tail: expected \[1\], for ids"),
        ({"log_tail": torch.tensor([-4.0])}, ValueError, "log_tail: expected ln of the mass"),
        (
            {"log_tail": torch.tensor([-1.4]), "outside": "renormalise"},
            ValueError,
            "log_tail: expected None with outside='renormalise'",
        ),
        ({"outside": "elsewhere"}, ValueError, "outside: expected one of 'bucket', 'zero'"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number"),
    ],
)
def test_teachers_that_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        teacher_of(**changes)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"temperature": 2.0},
            "temperature: expected 1, that of the teacher's pairs, got 2; store log-probabilities",
        ),
        ({"divergence": DKD()}, r"divergence: expected one that a SparseTeacher suffices for \("),
        ({"divergence": EntropySwitch()}, "which needs the teacher's probability of every token"),
        ({"teacher_softcap": 30.0}, "teacher_softcap, teacher_logit_scale: expected None and 1"),
    ],
)
def test_losses_that_are_refused(options: dict[str, Any], message: str) -> None:
    labels = torch.tensor([2])
    with pytest.raises(ValueError, match=message):
        distillation_loss(torch.zeros(1, 5), teacher_of(), labels, **options)


def test_zero_is_for_the_forward_kl() -> None:
    with pytest.raises(ValueError, match=r"divergence: expected ForwardKL\(\) for outside='zero'"):
        adaptive_kl(torch.zeros(1, 5), teacher_of(outside="zero"))


def test_shapes_and_weights_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"teacher_logits: expected the leading dimensions"):
        adaptive_kl(torch.zeros(2, 5), teacher_of())
    with pytest.raises(ValueError, match="teacher_weight: expected None with a SparseTeacher"):
        linear_distillation_loss(
            torch.zeros(1, 4), torch.zeros(5, 4), teacher_of(), torch.zeros(5, 4)
        )
    with pytest.raises(TypeError, match=r"teacher_weight: expected a torch\.Tensor, got NoneType"):
        linear_distillation_loss(torch.zeros(1, 4), torch.zeros(5, 4), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="k: expected an integer from 1 to 5"):
        teacher_pairs(torch.zeros(1, 5), 6)


@pytest.mark.parametrize("wrong", [300, 2**31 - 2, 2**40])
def test_a_pair_that_is_no_token_is_refused_on_a_cpu(wrong: int) -> None:
    """In rows that count; an id beyond int32 is no pair that is absent."""
    student, logits = some_pairs()
    pairs = teacher_pairs(logits, 12)
    ids = pairs.ids.long()
    ids[2, 5] = wrong
    teacher = SparseTeacher(ids, pairs.log_probs, pairs.log_tail)
    message = "ids: expected tokens from 0 to 299, those of the student"
    with pytest.raises(ValueError, match=message):
        adaptive_kl(student, teacher)
    with pytest.raises(ValueError, match=message):
        linear_distillation_loss(student, torch.eye(300), teacher)
    assert adaptive_kl(student, teacher, mask=torch.arange(6) != 2).isfinite()


@pytest.mark.parametrize("fault", ["twice", "no token"])
def test_a_row_with_broken_pairs_is_nan_and_no_other(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody looks at values: on a GPU, and here without the check."""
    monkeypatch.setattr(checks, "check_ids", lambda *_: None)
    student, logits = some_pairs()
    teacher = teacher_pairs(logits, 12)
    broken = dataclasses.replace(teacher)
    broken.ids[2, -1] = broken.ids[2, -2] if fault == "twice" else 300
    leaf = student.clone().requires_grad_()
    loss = adaptive_kl(leaf, broken, reduction="none", backend="torch")
    loss.sum().backward()
    assert leaf.grad is not None
    others = torch.arange(6) != 2
    assert loss[2].isnan() and leaf.grad[2].isnan().all()
    assert loss[others].isfinite().all() and leaf.grad[others].isfinite().all()
