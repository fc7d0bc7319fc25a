"""The oracle itself, compared with hand-computed rows, numerical derivatives and every order of
ties."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from akl_triton.reference import Head, Ties, authors_adaptive_kl, reference_adaptive_kl
from akl_triton.verify import at_head, head_faults

INF = math.inf


def log_rows(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def random_logits(*shape: int, seed: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def test_one_row_by_hand() -> None:
    teacher, student = log_rows([0.6, 0.3, 0.1]), log_rows([0.4, 0.4, 0.2])
    result = reference_adaptive_kl(student, teacher, mu=0.95)
    forward = 0.6 * math.log(1.5) + 0.3 * math.log(0.75) + 0.1 * math.log(0.5)
    reverse = 0.4 * math.log(2 / 3) + 0.4 * math.log(4 / 3) + 0.2 * math.log(2.0)
    # The head is the first two tokens: 0.2 + 0.1 of a gap of 0.4.
    w = 0.75
    expected = {
        "forward_kl": forward,
        "reverse_kl": reverse,
        "gap": 0.4,
        "g_head": 0.3,
        "g_tail": 0.1,
        "forward_weight": w,
        "head_mass": 0.9,
        "head_size": 2.0,
        "loss": w * forward + (1 - w) * reverse,
    }
    for name, value in expected.items():
        assert getattr(result, name).item() == pytest.approx(value, abs=1e-14), name
    assert result.head.tolist() == [[True, True, False]]
    grad = [
        w * (q - p) - (1 - w) * q * (math.log(p / q) + reverse)
        for p, q in zip((0.6, 0.3, 0.1), (0.4, 0.4, 0.2), strict=True)
    ]
    assert result.grad[0].tolist() == pytest.approx(grad, abs=1e-14)


@pytest.mark.parametrize(
    ("mu", "head", "members"),
    [
        (0.39, "exclusive", [3]),  # the first token always
        (0.39, "inclusive", [3]),
        (0.45, "exclusive", [3]),
        (0.45, "inclusive", [3, 0]),
        (0.75, "exclusive", [3, 0]),
        (0.75, "inclusive", [3, 0, 2]),
        (0.95, "exclusive", [3, 0, 2]),
        (0.95, "inclusive", [3, 0, 2, 1]),
    ],
)
def test_head_rules(mu: float, head: Head, members: list[int]) -> None:
    teacher = log_rows([0.3, 0.1, 0.2, 0.4])
    result = reference_adaptive_kl(torch.zeros(1, 4), teacher, mu=mu, head=head)
    assert result.head[0].nonzero().flatten().tolist() == sorted(members)
    assert result.head_size.item() == len(members)


@pytest.mark.parametrize(
    ("mu", "head", "stable", "average"),
    [
        # Masses 0.4 and three times 0.2, at the indices 1, 0, 2, 3.
        (0.65, "exclusive", [1.0, 1.0, 0.0, 0.0], [1 / 3, 1.0, 1 / 3, 1 / 3]),
        (0.65, "inclusive", [1.0, 1.0, 1.0, 0.0], [2 / 3, 1.0, 2 / 3, 2 / 3]),
        (0.85, "exclusive", [1.0, 1.0, 1.0, 0.0], [2 / 3, 1.0, 2 / 3, 2 / 3]),
        (0.30, "exclusive", [0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]),
    ],
)
def test_tie_rules(mu: float, head: Head, stable: list[float], average: list[float]) -> None:
    teacher = torch.tensor([[1.0, 1.0 + math.log(2.0), 1.0, 1.0]], dtype=torch.float64)
    student = random_logits(1, 4, seed=0)
    first = reference_adaptive_kl(student, teacher, mu=mu, head=head, ties="stable")
    shared = reference_adaptive_kl(student, teacher, mu=mu, head=head, ties="average")
    assert first.head.double()[0].tolist() == stable
    assert shared.head[0].tolist() == pytest.approx(average)
    assert shared.head_mass.item() == pytest.approx(first.head_mass.item(), abs=1e-14)


def test_first_token_alone_when_all_tie() -> None:
    """With a mu below 1/V the exclusive head is still one token: the first, or 1/V of each."""
    student, teacher = random_logits(1, 8, seed=1), torch.zeros(1, 8)
    stable = reference_adaptive_kl(student, teacher, mu=0.05)
    average = reference_adaptive_kl(student, teacher, mu=0.05, ties="average")
    assert stable.head[0].tolist() == [True] + [False] * 7
    assert average.head[0].tolist() == [1 / 8] * 8


@pytest.mark.parametrize("head", ["exclusive", "inclusive"])
@pytest.mark.parametrize("mu", [0.2, 0.3, 0.8])
def test_average_ties_are_the_mean_over_all_orders(head: Head, mu: float) -> None:
    teacher = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    student = random_logits(1, 5, seed=2)
    average = reference_adaptive_kl(student, teacher, mu=mu, head=head, ties="average")
    g_heads = []
    for order in itertools.permutations(range(5)):
        permuted = reference_adaptive_kl(student[:, order], teacher[:, order], mu=mu, head=head)
        g_heads.append(permuted.g_head.item())
    assert max(g_heads) - min(g_heads) > 1e-3, "the boundary must split a group of ties"
    assert average.g_head.item() == pytest.approx(sum(g_heads) / len(g_heads), abs=1e-14)


def test_average_ties_ignore_the_order_of_the_vocabulary() -> None:
    teacher = random_logits(6, 500, seed=3, scale=1.0).round()
    student = random_logits(6, 500, seed=4)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(5))
    average = reference_adaptive_kl(student, teacher, ties="average")
    permuted = reference_adaptive_kl(student[:, order], teacher[:, order], ties="average")
    torch.testing.assert_close(permuted.head, average.head[:, order], rtol=0, atol=1e-12)
    torch.testing.assert_close(permuted.grad, average.grad[:, order], rtol=0, atol=1e-12)
    stable = reference_adaptive_kl(student[:, order], teacher[:, order])
    assert not torch.equal(stable.head, reference_adaptive_kl(student, teacher).head[:, order])


class _ClosedForm(torch.autograd.Function):
    """The oracle's loss and gradient of one row, with its weight held fixed."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        temperature: float,
        weight: float,
    ) -> Tensor:
        result = reference_adaptive_kl(student, teacher, temperature=temperature, weight=weight)
        ctx.save_for_backward(result.grad)
        return result.loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return upstream[0][:, None] * grad, None, None, None


def forbid(logits: Tensor, tokens: list[int]) -> Tensor:
    return logits.index_fill(-1, torch.tensor(tokens, dtype=torch.long), -INF)


GRADIENT_CASES = {
    "plain": (7, 7, [], []),
    "teacher forbids": (7, 7, [0, 4], []),
    "student forbids": (7, 7, [], [2, 5]),
    "each its own and one in common": (7, 7, [0, 4], [2, 4]),
    "teacher has more": (7, 5, [1], [2]),
    "student has more": (5, 7, [1], [2]),
    "nothing in common": (4, 4, [0, 1], [2, 3]),
}


@pytest.mark.parametrize("case", GRADIENT_CASES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_closed_form_gradient(case: str, temperature: float) -> None:
    """The gradient agrees with finite differences, and with autograd through the definition."""
    v_t, v_s, not_teacher, not_student = GRADIENT_CASES[case]
    teacher = forbid(random_logits(1, v_t, seed=6), not_teacher)
    weight = reference_adaptive_kl(
        forbid(random_logits(1, v_s, seed=7), not_student), teacher
    ).forward_weight.item()
    # Finite differences need finite numbers, so that the forbidden tokens are set inside of the
    # function.
    allowed = [token for token in range(v_s) if token not in not_student]
    free = random_logits(1, v_s, seed=7)[:, allowed].requires_grad_()

    def student(x: Tensor) -> Tensor:
        return torch.full((1, v_s), -INF, dtype=torch.float64).index_copy(
            1, torch.tensor(allowed), x
        )

    def closed_form(x: Tensor) -> Any:
        return _ClosedForm.apply(student(x), teacher, temperature, weight)

    assert torch.autograd.gradcheck(closed_form, free)

    width = max(v_s, v_t)
    logits = student(free)
    log_p = F.pad((teacher / temperature).log_softmax(-1), (0, width - v_t), value=-INF)
    log_q = F.pad((logits / temperature).log_softmax(-1), (0, width - v_s), value=-INF)
    kept = (log_p > -INF) & (log_q > -INF)
    u = torch.where(kept, log_p, 0.0) - torch.where(kept, log_q, 0.0)
    loss = weight * (log_p.exp() * u).sum() - (1 - weight) * (log_q.exp() * u).sum()
    (expected,) = torch.autograd.grad(loss, free)
    result = reference_adaptive_kl(logits, teacher, temperature=temperature, weight=weight)
    assert result.loss.item() == pytest.approx(loss.item(), abs=1e-13)
    torch.testing.assert_close(result.grad[:, allowed], expected, rtol=0, atol=1e-12)
    assert (result.grad[:, not_student] == 0.0).all()


MAPS = {  # softcap and scale of the student, of the teacher
    "softcaps": (3.0, 5.0, 1.0, 1.0),
    "scales": (None, None, 0.5, 2.0),
    "both": (4.0, 2.0, 3.0, 0.25),
}


@pytest.mark.parametrize("maps", MAPS)
def test_closed_form_gradient_of_mapped_logits(maps: str) -> None:
    """The factor of the chain rule agrees with finite differences, and the maps with their
    definition."""
    names = ("student_softcap", "teacher_softcap", "student_logit_scale", "teacher_logit_scale")
    options: dict[str, Any] = dict(zip(names, MAPS[maps], strict=True)) | {"temperature": 1.5}
    student, teacher = random_logits(1, 7, seed=20), forbid(random_logits(1, 7, seed=21), [2])
    options["weight"] = reference_adaptive_kl(student, teacher, **options).forward_weight.item()

    class Mapped(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            result = reference_adaptive_kl(x, teacher, **options)
            ctx.save_for_backward(result.grad)
            return result.loss

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> Tensor:
            (grad,) = ctx.saved_tensors
            return upstream[:, None] * grad  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(Mapped.apply, student.clone().requires_grad_())

    def mapped(x: Tensor, softcap: float | None, scale: float) -> Tensor:
        if softcap is None:
            return scale * x
        return (softcap * torch.tanh(scale * x / softcap)).masked_fill(x == -INF, -INF)

    del options["weight"]
    softcap_s, softcap_t, scale_s, scale_t = MAPS[maps]
    ours = reference_adaptive_kl(student, teacher, **options)
    explicit = reference_adaptive_kl(
        mapped(student, softcap_s, scale_s), mapped(teacher, softcap_t, scale_t), temperature=1.5
    )
    for name in set(ours._fields) - {"grad", "terms"}:
        torch.testing.assert_close(getattr(ours, name), getattr(explicit, name), rtol=0, atol=1e-13)


def test_a_saturated_softcap_keeps_the_order() -> None:
    """Logits that the softcap makes equal to the last bit are still ordered by their inputs."""
    teacher = torch.tensor([[400.0, 600.0, 500.0]], dtype=torch.float64)
    result = reference_adaptive_kl(torch.zeros(1, 3), teacher, mu=0.7, teacher_softcap=1.0)
    assert result.head.tolist() == [[False, True, True]]
    assert result.head_mass.item() == pytest.approx(2 / 3)


def test_forbidden_tokens_by_hand() -> None:
    """Forbidden tokens leave both KL sums, but stay in the softmax and in the gap."""
    teacher = torch.tensor([[math.log(0.7), math.log(0.3), -INF]], dtype=torch.float64)
    student = torch.tensor([[math.log(0.2), -INF, math.log(0.8)]], dtype=torch.float64)
    result = reference_adaptive_kl(student, teacher)
    assert result.forward_kl.item() == pytest.approx(0.7 * math.log(3.5))
    assert result.reverse_kl.item() == pytest.approx(-0.2 * math.log(3.5))
    assert result.gap.item() == pytest.approx(0.5 + 0.3 + 0.8)
    assert result.g_head.item() == pytest.approx(0.5)


@pytest.mark.parametrize(("v_s", "v_t"), [(9, 12), (12, 9)])
def test_a_shorter_vocabulary_is_one_padded_with_minus_infinity(v_s: int, v_t: int) -> None:
    student, teacher = random_logits(4, v_s, seed=8), random_logits(4, v_t, seed=9)
    padded = reference_adaptive_kl(
        F.pad(student, (0, 12 - v_s), value=-INF), F.pad(teacher, (0, 12 - v_t), value=-INF)
    )
    result = reference_adaptive_kl(student, teacher)
    torch.testing.assert_close(result.loss, padded.loss, rtol=0, atol=0)
    torch.testing.assert_close(result.grad, padded.grad[:, :v_s], rtol=0, atol=0)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("poison", ["nan", "inf", "all -inf"])
def test_a_broken_row_is_nan_alone(side: str, poison: str) -> None:
    logits = {"student": random_logits(3, 6, seed=10), "teacher": random_logits(3, 6, seed=11)}
    sound = reference_adaptive_kl(logits["student"], logits["teacher"])
    if poison == "all -inf":
        logits[side][1] = -INF
    else:
        logits[side][1, 3] = float(poison)
    result = reference_adaptive_kl(logits["student"], logits["teacher"])
    for name, value in result._asdict().items():
        if name != "head":
            assert value[1].isnan().all(), name
        assert torch.equal(value[::2], getattr(sound, name)[::2]), name


def test_student_equal_to_teacher() -> None:
    logits = random_logits(4, 50, seed=12)
    result = reference_adaptive_kl(logits, logits.clone())
    for name in ("forward_kl", "reverse_kl", "gap", "loss"):
        assert (getattr(result, name) == 0.0).all(), name
    assert (result.forward_weight == 0.5).all()
    assert result.grad.abs().max() < 1e-16


def test_fixed_weight_is_the_plain_divergence() -> None:
    student, teacher = random_logits(5, 40, seed=13), random_logits(5, 40, seed=14)
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    forward = reference_adaptive_kl(student, teacher, weight=1.0)
    reverse = reference_adaptive_kl(student, teacher, weight=0.0)
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(forward.loss, expected)
    expected = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(reverse.loss, expected)
    torch.testing.assert_close(forward.grad, log_q.exp() - log_p.exp())
    assert forward.head_mass.isnan().all() and not forward.head.any()


@pytest.mark.parametrize("mu", [0.3, 0.5, 0.9])
def test_authors_computation_agrees(mu: float) -> None:
    teacher = forbid(random_logits(12, 300, seed=15), [7]).float()
    student = forbid(random_logits(12, 300, seed=16), [7, 9]).float()
    # Their sums skip infinite entries, but autograd would turn the skipped 0 * inf into NaN.
    finite_student, finite_teacher = student[:, 10:].clone().requires_grad_(), teacher[:, 10:]
    loss = authors_adaptive_kl(finite_student, finite_teacher, mu=mu)
    (grad,) = torch.autograd.grad(loss, finite_student)
    result = reference_adaptive_kl(finite_student, finite_teacher, mu=mu)
    assert loss.item() == pytest.approx(result.loss.mean().item(), rel=1e-5)
    torch.testing.assert_close(grad.double() * 12, result.grad, rtol=1e-4, atol=1e-6)
    masked = reference_adaptive_kl(student, teacher, mu=mu).loss.mean().item()
    assert authors_adaptive_kl(student, teacher, mu=mu).item() == pytest.approx(masked, rel=1e-5)


def claims(
    student: Tensor,
    teacher: Tensor,
    mu: float = 0.5,
    head: Head = "exclusive",
    ties: Ties = "stable",
) -> dict[str, Any]:
    result = reference_adaptive_kl(student, teacher, mu=mu, head=head, ties=ties)
    return {name: getattr(result, name) for name in ("head_size", "head_mass", "forward_weight")}


@pytest.mark.parametrize("ties", ["stable", "average"])
@pytest.mark.parametrize("head", ["exclusive", "inclusive"])
def test_boundary_rule_takes_the_oracle_and_nothing_else(head: Head, ties: Ties) -> None:
    teacher, student = random_logits(5, 200, seed=17).bfloat16(), random_logits(5, 200, seed=18)
    teacher[4, 3] = float("nan")
    claim = claims(student, teacher, head=head, ties=ties)
    assert head_faults(student, teacher, head=head, ties=ties, **claim) == []
    for name, error in (("head_size", 1.0), ("head_mass", 1e-5), ("forward_weight", 1e-4)):
        wrong = {**claim, name: claim[name] + error}
        assert name in " ".join(head_faults(student, teacher, head=head, ties=ties, **wrong))
    mended = {**claim, "head_size": claim["head_size"].nan_to_num()}
    assert head_faults(student, teacher, head=head, ties=ties, **mended) == [
        "head_size of a row without a softmax is not NaN"
    ]


def test_boundary_rule_leaves_a_mass_that_hits_mu_open() -> None:
    teacher, student = torch.zeros(1, 8), random_logits(1, 8, seed=19)
    taken = at_head(student, teacher, torch.tensor([3.0]), mu=0.5)
    assert (taken.least.item(), taken.most.item()) == (3, 4)
    for size, mu in ((3, 0.5 * (1 - 1e-6)), (4, 0.5 * (1 + 1e-6))):
        claim = claims(student, teacher, mu=mu)
        assert claim["head_size"].item() == size
        assert head_faults(student, teacher, **claim) == []
    faults = head_faults(student, teacher, **claims(student, teacher, mu=0.3))
    assert faults[0] == "row 0: head_size 2 is not in [3, 4]"


def test_a_fixed_weight_has_no_head_of_a_size() -> None:
    teacher, student = random_logits(1, 8, seed=20), random_logits(1, 8, seed=21)
    with pytest.raises(ValueError, match=r"^size: expected None with a fixed weight"):
        reference_adaptive_kl(student, teacher, size=torch.tensor([3]), weight=0.5)


@pytest.mark.parametrize("ties", ["stable", "average"])
def test_a_head_of_a_size_is_that_of_the_mu_which_has_it(ties: Ties) -> None:
    teacher, student = random_logits(5, 60, seed=22).bfloat16(), random_logits(5, 60, seed=23)
    of_mu = reference_adaptive_kl(student, teacher, mu=0.7, ties=ties)
    sized = reference_adaptive_kl(student, teacher, mu=0.1, ties=ties, size=of_mu.head_size.long())
    for ours, expected in zip(sized, of_mu, strict=True):
        assert torch.equal(ours, expected)
