"""The formulas of other libraries, and the translation of their numbers in docs/choosing.md.

Each is written out from its public source in a few lines, on float64 logits that are already
divided by the temperature, and compared with the oracle, loss and gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from akl_triton.reference import reference_divergence

CHOOSING = (Path(__file__).resolve().parents[1] / "docs" / "choosing.md").read_text("utf-8")
T = 2.0
LABELS = torch.tensor([0, 10, 4, 4])
GENERATOR = torch.Generator().manual_seed(0)
STUDENT, TEACHER = 3.0 * torch.randn(2, 4, 11, generator=GENERATOR, dtype=torch.float64)


def kl(of: Tensor, to: Tensor) -> Tensor:
    """KL(of || to) from log-probabilities"""
    return (of.exp() * (of - to)).sum(-1)


def mixture(a: Tensor, b: Tensor, weight_of_a: float) -> Tensor:
    return torch.logsumexp(
        torch.stack([a + math.log(weight_of_a), b + math.log1p(-weight_of_a)]), dim=0
    )


def trl(q: Tensor, p: Tensor, beta: float) -> Tensor:
    """huggingface/trl, trl/experimental/gkd/gkd_trainer.py: GKDTrainer.generalized_jsd_loss"""
    if beta == 0:
        return kl(p, q)
    if beta == 1:
        return kl(q, p)
    m = mixture(p, q, beta)
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def trl_0_12_to_0_15(q: Tensor, p: Tensor, beta: float) -> Tensor:
    """huggingface/trl, commit 7e5924d, before #3043: beta is the student's weight in m alone"""
    m = mixture(q, p, beta)
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def liger(q: Tensor, p: Tensor, beta: float) -> Tensor:
    """linkedin/Liger-Kernel, src/liger_kernel/ops/jsd.py: _jsd_kernel, where X = q and Y = p"""
    m = beta * p.exp() + (1 - beta) * q.exp()
    return (beta * p.exp() * p + (1 - beta) * q.exp() * q - m * m.log()).sum(-1)


def ms_swift(q: Tensor, p: Tensor, beta: float) -> Tensor:
    """modelscope/ms-swift, swift/rlhf_trainers/gkd_loss.py: jsd_loss; KL(target || input)"""

    def kl_div(input_log: Tensor, target_log: Tensor) -> Tensor:
        return (target_log.exp() * (target_log - input_log)).sum(-1)

    m = torch.logsumexp(torch.stack([q + math.log1p(-beta), p + math.log(beta)]), dim=0)
    return beta * kl_div(m, p) + (1 - beta) * kl_div(m, q)


# jongwooko/distillm, distillm/losses.py


def distillm_js_distance(q: Tensor, p: Tensor, lam: float) -> Tensor:
    m = ((1 - lam) * p.exp() + lam * q.exp()).log()
    of_student = -(q.exp() * m - q.exp() * q).sum(-1)
    of_teacher = -(p.exp() * m - p.exp() * p).sum(-1)
    return lam * of_student + (1 - lam) * of_teacher


def distillm_symmetric_kl(q: Tensor, p: Tensor, lam: float) -> Tensor:
    forward = -(p.exp() * q).sum(-1)
    reverse = -(q.exp() * p - q.exp() * q).sum(-1)
    return (1 - lam) * forward + lam * reverse


def distillm_skewed_forward_kl(q: Tensor, p: Tensor, lam: float) -> Tensor:
    m = lam * p.exp() + (1 - lam) * q.exp()
    return -(p.exp() * m.log()).sum(-1)


def distillm_skewed_reverse_kl(q: Tensor, p: Tensor, lam: float) -> Tensor:
    m = (1 - lam) * p.exp() + lam * q.exp()
    return -(q.exp() * m.log() - q.exp() * q).sum(-1)


def distillm_tv_distance(q: Tensor, p: Tensor) -> Tensor:
    return (0.5 * (p.exp() - q.exp()).abs()).sum(-1)


# jongwooko/distillm-2, src/distillm_trainer.py: get_batch_logps


def distillm_2_chosen(q: Tensor, p: Tensor, alpha: float) -> Tensor:
    return kl(p, mixture(p, q, alpha))


def distillm_2_rejected(q: Tensor, p: Tensor, alpha: float) -> Tensor:
    return kl(q, mixture(q.detach(), p, alpha))


def gkl(q: Tensor, p: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """jiequancui/DKL, GKL-KD: dkl_loss with GI=False and T = T2, whose logits are divided by T"""
    pairs = (p[:, :, None] - p[:, None, :]) - (q[:, :, None] - q[:, None, :])
    weights = p.exp() ** gamma
    weights = weights[:, :, None] * weights[:, None, :]
    mse = 0.25 * (pairs**2 * weights).sum((1, 2)) / weights.sum((1, 2))
    return beta * mse - alpha * (p.exp() * q).sum(-1)


def mdistiller_dkd(q: Tensor, p: Tensor, alpha: float, beta: float) -> Tensor:
    """megvii-research/mdistiller, distillers/DKD.py: dkd_loss of a row, less its factor T^2"""
    at_label = torch.nn.functional.one_hot(LABELS, q.shape[-1]).bool()
    both = []
    for log in (q, p):
        parts = [(log.exp() * mask).sum(-1, keepdim=True) for mask in (at_label, ~at_label)]
        both.append(torch.cat(parts, dim=-1).log())
    tckd = kl(both[1], both[0])
    nckd = kl((p - 1000.0 * at_label).log_softmax(-1), (q - 1000.0 * at_label).log_softmax(-1))
    return alpha * tckd + beta * nckd


def abkd(q: Tensor, p: Tensor, alpha: float, beta: float) -> Tensor:
    """ghwang-s/abkd, distillation_llm/distillm/losses.py: ab_div, with its branches"""
    p, q = p.exp(), q.exp()
    if alpha == 0 and beta == 0:
        return 0.5 * ((q / p).log() ** 2).sum(-1)
    if alpha == 0:
        return ((q**beta) * (q**beta / p**beta).log() - q**beta + p**beta).sum(-1) / beta
    if beta == 0:
        return ((p**alpha) * (p**alpha / q**alpha).log() - p**alpha + q**alpha).sum(-1) / alpha
    if alpha + beta == 0:
        return ((q**alpha / p**alpha).log() + p**alpha / q**alpha - 1).sum(-1) / alpha
    total = alpha + beta
    terms = p**alpha * q**beta - alpha / total * p**total - beta / total * q**total
    return -terms.sum(-1) / (alpha * beta)


class Translation(NamedTuple):
    """A row of the table in docs/choosing.md, and our divergences with their factors."""

    row: str
    theirs: Callable[..., Tensor]
    their_numbers: dict[str, float]
    ours: list[tuple[float, str, dict[str, float]]]
    of_entropy: float = 0.0  # the multiple of the teacher's entropy that their value adds


def translations(x: float) -> list[Translation]:
    """The translations, with x as beta, lam or alpha."""
    jensen_shannon = [(1.0, "jensen_shannon", {"beta": x})]
    skew = [(1.0, "skew_kl", {"alpha": x})]
    return [
        Translation(
            "| `generalized_jsd_loss(beta)` | TRL, 0.16 and newer | `JensenShannon(beta)` |",
            trl,
            {"beta": x},
            jensen_shannon,
        ),
        Translation(
            "| `generalized_jsd_loss(beta)` | TRL, 0.12 to 0.15 | "
            "beta `SkewKL(1 - beta)` + (1 - beta) `SkewReverseKL(beta)` |",
            trl_0_12_to_0_15,
            {"beta": x},
            [
                (x, "skew_kl", {"alpha": 1 - x}),
                (1 - x, "skew_reverse_kl", {"alpha": x, "detach": False}),
            ],
        ),
        Translation(
            "| `LigerJSD(beta)`, `LigerFusedLinearJSDLoss(beta)` | Liger-Kernel | "
            "`JensenShannon(beta)` |",
            liger,
            {"beta": x},
            jensen_shannon,
        ),
        Translation(
            "| `jsd_loss(beta)` | ms-swift | `JensenShannon(beta)` |",
            ms_swift,
            {"beta": x},
            jensen_shannon,
        ),
        Translation(
            "| `js_distance(lam)` | DistiLLM | `JensenShannon(1 - lam)` |",
            distillm_js_distance,
            {"lam": x},
            [(1.0, "jensen_shannon", {"beta": 1 - x})],
        ),
        Translation(
            "| `symmetric_kl(lam)` | DistiLLM | `MixedKL(1 - lam)`, less the teacher's entropy |",
            distillm_symmetric_kl,
            {"lam": x},
            [(1.0, "mixed_kl", {"alpha": 1 - x})],
            of_entropy=1 - x,
        ),
        Translation(
            "| `skewed_forward_kl(lam)` | DistiLLM | `SkewKL(lam)`, less the teacher's entropy |",
            distillm_skewed_forward_kl,
            {"lam": x},
            skew,
            of_entropy=1.0,
        ),
        Translation(
            "| `skewed_reverse_kl(lam)` | DistiLLM | `SkewReverseKL(lam, detach=False)` |",
            distillm_skewed_reverse_kl,
            {"lam": x},
            [(1.0, "skew_reverse_kl", {"alpha": x, "detach": False})],
        ),
        Translation(
            "| `tv_distance` | DistiLLM | `TotalVariation()` |",
            distillm_tv_distance,
            {},
            [(1.0, "total_variation", {})],
        ),
        Translation(
            "| `distillm_v2`, chosen (alpha 1) | DistiLLM-2 | `SkewKL(alpha)` |",
            distillm_2_chosen,
            {"alpha": x},
            skew,
        ),
        Translation(
            "| `distillm_v2`, rejected (alpha 2) | DistiLLM-2 | "
            "`SkewReverseKL(alpha, detach=True)` |",
            distillm_2_rejected,
            {"alpha": x},
            [(1.0, "skew_reverse_kl", {"alpha": x, "detach": True})],
        ),
        Translation(
            "| `ab_div(alpha, beta)` | ABKD | `AlphaBeta(alpha, beta)` |",
            abkd,
            {"alpha": x, "beta": 0.7},
            [(1.0, "alpha_beta", {"a": x, "b": 0.7})],
        ),
        Translation(
            "| `dkl_loss(alpha, beta, gamma)` | GKL-KD | `DecoupledKL(alpha, beta, kappa=gamma)`, "
            "plus alpha times the teacher's entropy |",
            gkl,
            {"alpha": x, "beta": 3.0, "gamma": 2.0 * x},
            [(1.0, "decoupled_kl", {"alpha": x, "beta": 3.0, "kappa": 2.0 * x})],
            of_entropy=x,
        ),
        Translation(
            "| `dkd_loss(alpha, beta)` | mdistiller | `DKD(alpha, beta)` with `scale_by_t2` |",
            mdistiller_dkd,
            {"alpha": x, "beta": 8.0},
            [(1.0, "dkd", {"alpha": x, "beta": 8.0})],
        ),
    ]


def oracle(name: str, numbers: dict[str, Any], temperature: float = T) -> tuple[Tensor, Tensor]:
    result = reference_divergence(
        STUDENT, TEACHER, name, labels=LABELS, temperature=temperature, **numbers
    )
    return result.loss, result.grad


@pytest.mark.parametrize("x", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("index", range(len(translations(0.5))), ids=lambda i: f"row{i}")
def test_the_translation_gives_their_loss_and_gradient(index: int, x: float) -> None:
    translation = translations(x)[index]
    assert translation.row in CHOOSING
    student = STUDENT.clone().requires_grad_()
    q, p = (student / T).log_softmax(-1), (TEACHER / T).log_softmax(-1)
    theirs = translation.theirs(q, p, **translation.their_numbers)
    (their_grad,) = torch.autograd.grad(theirs.sum(), student)
    parts = [(factor, *oracle(name, numbers)) for factor, name, numbers in translation.ours]
    entropy = -(p.exp() * p).sum(-1)
    loss = sum(factor * loss for factor, loss, _ in parts) + translation.of_entropy * entropy
    torch.testing.assert_close(loss, theirs.detach())
    torch.testing.assert_close(sum(factor * grad for factor, _, grad in parts), their_grad)


def test_every_row_of_the_table_is_checked() -> None:
    _, table = CHOOSING.split("| theirs | where | ours |\n|---|---|---|\n")
    rows = table.split("\n\n", 1)[0].splitlines()
    unchecked = [row for row in rows if row not in {t.row for t in translations(0.5)}]
    assert all("| none: " in row for row in unchecked) and len(unchecked) == 1


@pytest.mark.parametrize(("end", "forward_weight"), [(0.0, 1.0), (1.0, 0.0)])
def test_jensen_shannon_tends_to_0_where_others_jump_to_a_kl(
    end: float, forward_weight: float
) -> None:
    q, p = (STUDENT / T).log_softmax(-1), (TEACHER / T).log_softmax(-1)
    divergence, _ = oracle("mixed_kl", {"alpha": forward_weight})
    torch.testing.assert_close(trl(q, p, end), divergence)
    near, _ = oracle("jensen_shannon", {"beta": abs(end - 1e-6)})
    torch.testing.assert_close(near / 1e-6, divergence, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(
    ("alpha", "beta", "factor"),
    [
        (0.0, 2.0, 2.0),
        (0.0, 0.5, 0.5),
        (0.0, 1.0, 1.0),
        (2.0, 0.0, 2.0),
        (1.0, 0.0, 1.0),
        (0.5, -0.5, 0.5),
        (2.0, -2.0, 2.0),
    ],
)
def test_limits_of_abkd_are_off_by_a_factor(alpha: float, beta: float, factor: float) -> None:
    q, p = (STUDENT / T).log_softmax(-1), (TEACHER / T).log_softmax(-1)
    limit, _ = oracle("alpha_beta", {"a": alpha + 1e-6, "b": beta + 1e-6})
    torch.testing.assert_close(abkd(q, p, alpha, beta), factor * limit, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(("weight", "a"), [(1.0, 1.0 - 1e-6), (0.0, 1e-6)])
def test_alpha_is_the_line_between_the_two_kl(weight: float, a: float) -> None:
    """At its other points it is the divergence that the document names."""
    divergence, _ = oracle("mixed_kl", {"alpha": weight})
    torch.testing.assert_close(oracle("alpha", {"a": a})[0], divergence, rtol=1e-3, atol=0.0)
    p, q = (TEACHER / T).softmax(-1), (STUDENT / T).softmax(-1)
    hellinger = 0.5 * ((p.sqrt() - q.sqrt()) ** 2).sum(-1)
    torch.testing.assert_close(oracle("alpha", {"a": 0.5})[0], 4.0 * hellinger)
    torch.testing.assert_close(oracle("alpha", {"a": 2.0})[0], 0.5 * ((p - q) ** 2 / q).sum(-1))
    torch.testing.assert_close(
        oracle("alpha", {"a": 0.3})[0], oracle("alpha_beta", {"a": 0.3, "b": 0.7})[0]
    )
    both = oracle("mixed_kl", {"alpha": 0.5})
    for ours, half in zip(oracle("jeffreys", {}), both, strict=True):
        torch.testing.assert_close(ours, 2.0 * half)
