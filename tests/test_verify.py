"""The rule of what is right: what it allows, and what its stricter arguments no longer allow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from akl_triton import ForwardKL, JensenShannon
from akl_triton.reference import reference_adaptive_kl
from akl_triton.verify import EPSILON, YARDSTICK, exact, faults, sum_faults
from tests.support.logits import rows_of_vocabulary

STUDENT, TEACHER = rows_of_vocabulary(300)
OF = exact(JensenShannon(), STUDENT, TEACHER)


def off_by(fp32: Tensor, oracle: Tensor, factor: float, epsilon: Tensor | float) -> Tensor:
    """`oracle` plus `factor` times the error of fp32 plus an epsilon, in float64."""
    error = fp32 - oracle
    return oracle + factor * error + torch.where(error < 0.0, -1.0, 1.0) * epsilon


@pytest.mark.parametrize("yardstick", [1.01, YARDSTICK])
def test_a_multiple_of_the_error_of_fp32_and_an_epsilon_are_allowed(yardstick: float) -> None:
    epsilon = EPSILON * OF.oracle.loss.clamp(min=1.0)
    for factor, right in ((0.999, True), (1.001, False)):
        loss = off_by(OF.fp32.loss, OF.oracle.loss, factor * yardstick, factor * epsilon)
        found = faults(loss, None, OF, yardstick=yardstick)
        assert len(found) == (0 if right else 8)  # of each norm the first four rows


def test_the_epsilon_is_of_each_row() -> None:
    loss = OF.oracle.loss + 4.0 * EPSILON
    epsilon = torch.full((10,), 5.0 * EPSILON).double()
    assert faults(loss, None, OF, epsilon=epsilon) == []
    epsilon[3] = EPSILON
    assert {x.split(":")[0] for x in faults(loss, None, OF, epsilon=epsilon)} == {"row 3"}


def test_the_terms_of_each_entry_are_stricter_than_the_largest() -> None:
    """An error in every entry, as large as the largest term allows."""
    fp32 = OF.fp32.grad.double()
    gradient = fp32 + 0.9 * EPSILON * OF.oracle.terms[:, None] * (fp32 - OF.oracle.grad).sign()
    assert faults(None, gradient, OF, roundings=0.0) == []
    terms = torch.zeros_like(gradient)
    terms[:, 0] = OF.oracle.terms
    assert any("rms" in x for x in faults(None, gradient, OF, roundings=0.0, terms=terms))


def test_a_gradient_that_is_truncated() -> None:
    """A truncated gradient may be a unit in the last place off, unless it has to be rounded as that
    of fp32."""
    of = exact(ForwardKL(), STUDENT, TEACHER)
    rounded = of.fp32.grad.bfloat16()
    truncated = (of.fp32.grad.view(torch.int32) & -(2**16)).view(torch.float32).bfloat16()
    assert faults(None, rounded, of, roundings=0.0, yardstick=1.01) == []
    assert faults(None, truncated, of, roundings=1.0, yardstick=1.01) == []
    assert faults(None, truncated, of, roundings=0.0, yardstick=1.01) != []


def test_sums_of_a_row() -> None:
    sums = reference_adaptive_kl(STUDENT, TEACHER, weight=0.5, temperature=2.0)
    claims = {name: getattr(sums, name).float() for name in ("forward_kl", "gap")}
    assert sum_faults(claims, STUDENT, TEACHER, temperature=2.0) == []
    assert len(sum_faults(claims, STUDENT, TEACHER, temperature=1.0)) == 16
    claims["gap"][5] += 1e-5
    found = sum_faults(claims, STUDENT, TEACHER, temperature=2.0)
    assert len(found) == 2 and all("row 5" in x and "gap" in x for x in found)
