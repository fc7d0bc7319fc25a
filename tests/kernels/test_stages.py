"""Each stage as a kernel of its own, which gets the results of earlier stages from the oracle."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from akl_triton.kernels.arithmetic import scaled, softcap_slope
from akl_triton.kernels.cross_entropy import row_cross_entropy
from akl_triton.kernels.divergence import row_divergence
from akl_triton.kernels.gradient import kl_coefficients, row_gradient
from akl_triton.kernels.head import head_boundary
from akl_triton.kernels.statistics import normalisers, row_statistics
from akl_triton.reference import reference_adaptive_kl, reference_cross_entropy

V = 3001  # two full blocks and one that is not
BLOCK = 1024
LOG2E = tl.constexpr(1.4426950408889634)
LABEL = 1234


@triton.jit
def statistics_kernel(
    t_ptr, s_ptr, out_ptr, slots_ptr, V, scale, label,
    apart,  # an offset that is left out, or None
    BLOCK: tl.constexpr,
):  # fmt: skip
    (
        reference_t, z_t, reference_s, z_s, reference_1, z_1, slots, top, _, hidden,
        forward_kl, reverse_kl, kept_p, kept_q, entropy_t, entropy_s, agreement, full_end,
    ) = row_statistics(
        t_ptr, s_ptr, 0, V, V, scale, None, scale, None, LOG2E, apart,
        True, True, True, True, True, True, True, BLOCK,
    )  # fmt: skip
    cross_entropy = row_cross_entropy(
        s_ptr, label, 0, V, LOG2E, None, reference_1, z_1, full_end, BLOCK
    )
    tl.store(out_ptr + 0, reference_t)
    tl.store(out_ptr + 1, z_t)
    tl.store(out_ptr + 2, reference_s)
    tl.store(out_ptr + 3, z_s)
    tl.store(out_ptr + 4, hidden)
    tl.store(out_ptr + 5, forward_kl)
    tl.store(out_ptr + 6, reverse_kl)
    tl.store(out_ptr + 7, kept_p)
    tl.store(out_ptr + 8, kept_q)
    tl.store(out_ptr + 9, entropy_t)
    tl.store(out_ptr + 10, entropy_s)
    tl.store(out_ptr + 11, agreement)
    tl.store(out_ptr + 12, cross_entropy)
    tl.store(out_ptr + 13, full_end.to(tl.float32))
    tl.store(out_ptr + 14, top)
    tl.store(slots_ptr + tl.arange(0, BLOCK), slots)


@triton.jit
def head_kernel(
    t_ptr, slots_ptr, out_ptr, V, scale, reference, z, hidden, mu,
    INCLUSIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slots = tl.load(slots_ptr + tl.arange(0, BLOCK))
    crossing, mass, k, each, cut = head_boundary(
        t_ptr, 0, V, scale, None, reference, z, slots, tl.max(slots, axis=0), hidden, V // BLOCK,
        mu, INCLUSIVE, True, False, BLOCK,
    )  # fmt: skip
    tl.store(out_ptr + 0, crossing)
    tl.store(out_ptr + 1, mass)
    tl.store(out_ptr + 2, k)
    tl.store(out_ptr + 3, each)
    tl.store(out_ptr + 4, cut.to(tl.float32))


@triton.jit
def divergence_kernel(
    t_ptr, s_ptr, out_ptr, V, scale,
    reference_t, z_t, reference_s, z_s, crossing, k, cut,
    BLOCK: tl.constexpr,
):  # fmt: skip
    w, gap, size, _, _, _, full_end = row_divergence(
        t_ptr, s_ptr, 0, V, V, scale, None, scale, None,
        reference_t, z_t, reference_s, z_s, V // BLOCK, crossing, k, cut,
        None, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, True, True, True, None, False, False, True, BLOCK,
    )  # fmt: skip
    tl.store(out_ptr + 0, w)
    tl.store(out_ptr + 1, gap)
    tl.store(out_ptr + 2, size)
    tl.store(out_ptr + 3, full_end.to(tl.float32))


@triton.jit
def gradient_kernel(
    ds_ptr, t_ptr, s_ptr, V, scale, inverse_temperature,
    reference_t, z_t, reference_s, z_s, lse_1, w, reverse_kl, full_end,
    label, label_rate,
    HAS_LABELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lse_t, lse_s, factor_t, factor_s, shift = normalisers(reference_t, z_t, reference_s, z_s)
    slope, offset, teacher, lost = kl_coefficients(
        factor_t, factor_s, shift, w, 1.0 - w, reverse_kl, 1.0, 1.0, inverse_temperature, 0.0
    )
    nothing = 0.0 * w
    row_gradient(
        ds_ptr, t_ptr, s_ptr, 0, V, V, scale, None, scale, None, LOG2E, full_end,
        lse_t, lse_s, lse_1, (slope, offset, teacher, lost, nothing, nothing),
        label_rate, label, label_rate,
        0.0, 0.0, 0.0, 0.0,
        True, True, None, False, False, False, HAS_LABELS, HAS_LABELS, False, True, True, BLOCK,
    )  # fmt: skip


class Row:
    """A teacher and a student row, the oracle, and the quantities that pass between stages."""

    def __init__(self, device: torch.device, temperature: float = 2.0):
        g = torch.Generator().manual_seed(0)
        self.teacher = (3 * torch.randn(V, generator=g)).bfloat16().to(device)
        noise = torch.randn(V, generator=g).to(device)
        self.student = (self.teacher.float() + noise).bfloat16()
        self.temperature, self.scale = temperature, LOG2E.value / temperature
        self.oracle = reference_adaptive_kl(
            self.student[None].cpu(), self.teacher[None].cpu(), temperature=temperature
        )
        # Any reference will do; it is not the kernel's own, so that the test does not depend on
        # that.
        self.reference_t, self.z_t = self._normaliser(self.teacher)
        self.reference_s, self.z_s = self._normaliser(self.student)
        t = self.teacher.double().cpu()
        order = t.argsort(descending=True, stable=True)
        self.size = int(self.oracle.head_size)
        self.crossing = float(t[order[self.size - 1]])
        self.above = int((t > self.crossing).sum())
        self.k = self.size - self.above
        self.cut = int(order[self.size - 1]) + 1
        padded = torch.nn.functional.pad(self.teacher.float(), (0, -V % BLOCK), value=-torch.inf)
        self.slots = padded.view(-1, BLOCK).amax(0)
        masses = (padded.double().cpu() * self.scale - self.reference_t).exp2().view(-1, BLOCK)
        # The mass of a slot without its maximum bounds every token that is not a maximum;
        # `heaviest_hidden` is the heaviest of these.
        self.hidden = float((masses.sum(0) - masses.amax(0)).max())
        self.heaviest_hidden = float(masses.sort(0, descending=True).values[1].max())

    def _normaliser(self, x: torch.Tensor) -> tuple[float, float]:
        scaled = x.double().cpu() * self.scale
        reference = float(scaled.max().float()) - 3.0
        return reference, float((scaled - reference).exp2().sum())


@pytest.fixture
def row(device: torch.device) -> Row:
    return Row(device)


def test_statistics(row: Row, device: torch.device) -> None:
    out = torch.full((15,), torch.nan, device=device)
    slots = torch.full((BLOCK,), torch.nan, device=device)
    statistics_kernel[(1,)](
        row.teacher, row.student, out, slots, V, row.scale, LABEL, None, BLOCK=BLOCK
    )
    assert torch.equal(slots, row.slots)
    assert out[14] == slots.max()
    share = out[4].item() / out[1].item()
    assert row.heaviest_hidden < share * row.z_t < 1.001 * row.hidden
    for logits, (reference, z) in ((row.teacher, out[:2]), (row.student, out[2:4])):
        lse = torch.logsumexp(logits.double().cpu() / row.temperature, 0) * LOG2E.value
        assert abs(reference.double().cpu() + z.double().cpu().log2() - lse) < 1e-6
    o = row.oracle
    entropies = [
        float(torch.special.entr(torch.softmax(x.double().cpu() / row.temperature, -1)).sum())
        for x in (row.teacher, row.student)
    ]
    agreement = float(row.teacher.argmax() == row.student.argmax())
    cross_entropy = float(
        torch.nn.functional.cross_entropy(row.student.double(), torch.tensor(LABEL))
    )
    expected = [float(o.forward_kl), float(o.reverse_kl), 1.0, 1.0]
    expected += [*entropies, agreement, cross_entropy, V // BLOCK]
    torch.testing.assert_close(
        out[5:14].cpu().double(), torch.tensor(expected).double(), rtol=1e-6, atol=1e-6
    )


def statistics_of(teacher: torch.Tensor, student: torch.Tensor) -> list[float]:
    """(reference_t, Z_t, reference_s, Z_s, hidden) of two rows whose logits are to base 2."""
    out = torch.full((15,), torch.nan, device=teacher.device)
    slots = torch.full((BLOCK,), torch.nan, device=teacher.device)
    statistics_kernel[(1,)](teacher, student, out, slots, V, 1.0, LABEL, None, BLOCK=BLOCK)
    return out[:5].tolist()


@pytest.mark.parametrize("apart", [3, LABEL, V - 1])
def test_statistics_leave_a_token_out(row: Row, apart: int, device: torch.device) -> None:
    """In the first block, in a full one and in the last: both sums and both KLs are those of the
    other tokens."""
    out = torch.full((15,), torch.nan, device=device)
    slots = torch.full((BLOCK,), torch.nan, device=device)
    teacher, student = row.teacher.clone(), row.student.clone()
    teacher[apart], student[apart] = 60.0, -60.0  # of all weight, if they counted
    statistics_kernel[(1,)](teacher, student, out, slots, V, row.scale, LABEL, apart, BLOCK=BLOCK)
    others = torch.arange(V) != apart
    t, s = (x.double().cpu()[others][None] for x in (teacher, student))
    for logits, (reference, z) in ((t, out[:2]), (s, out[2:4])):
        lse = torch.logsumexp(logits[0] / row.temperature, 0) * LOG2E.value
        assert abs(reference.double().cpu() + z.double().cpu().log2() - lse) < 1e-6
    kls = [
        float(reference_adaptive_kl(s, t, weight=weight, temperature=row.temperature).loss)
        for weight in (1.0, 0.0)
    ]
    expected = torch.tensor([*kls, 1.0, 1.0]).double()
    torch.testing.assert_close(out[5:9].cpu().double(), expected, rtol=1e-6, atol=1e-6)
    assert out[13].item() == V // BLOCK


def test_sums_that_outgrow_the_first_maximum_are_made_anew(device: torch.device) -> None:
    """The references are each side's true maximum, wherever that is, so that the sums stay far from
    fp32's largest number."""
    late = torch.zeros(V, device=device)
    late[2000:] = 40.0
    early = torch.zeros(V, device=device)
    early[3] = 200.0
    reference_t, z_t, reference_s, z_s, _ = statistics_of(late, early)
    assert (reference_t, z_t) == (40.0, V - 2000)
    assert (reference_s, z_s) == (200.0, 1.0)


def test_a_token_lost_in_the_rounding_of_its_slot_is_hidden(device: torch.device) -> None:
    """1 + 2^-25 is 1 in fp32: the bound of the tokens that a slot hides allows for that."""
    row = torch.full((V,), -60.0, device=device)
    row[5], row[5 + BLOCK] = 0.0, -25.0
    reference, *_, hidden = statistics_of(row, row)
    assert reference == 0.0
    assert hidden >= 2.0**-25


def test_slots_as_heavy_as_a_hidden_token_do_not_suffice(device: torch.device) -> None:
    """Two tokens of mass 1/4, one of them hidden behind a token of 1/2, are seen as ties."""
    teacher = torch.full((V,), -torch.inf, device=device)
    teacher[0], teacher[1], teacher[BLOCK] = 0.0, -1.0, -1.0
    slots = torch.full((BLOCK,), -torch.inf, device=device)
    slots[0], slots[1] = 0.0, -1.0
    out = torch.full((5,), torch.nan, device=device)
    head_kernel[(1,)](teacher, slots, out, V, 1.0, 0.0, 2.0, 0.5, 0.7, INCLUSIVE=True, BLOCK=BLOCK)
    crossing, mass, k, each, cut = out.tolist()
    assert (crossing, mass, k, each) == (-1.0, 0.5, 1.0, 0.25)
    assert cut == 2  # not after the other


@pytest.mark.parametrize("slots_suffice", [False, True])
@pytest.mark.parametrize("temperature", [0.25, 1.0, 2.0, 4.0])
def test_head(temperature: float, slots_suffice: bool, device: torch.device, mode: str) -> None:
    """The head is the same whether the row is swept or, where that is sound, the slot maxima are
    used."""
    if mode == "interpreter" and temperature < 1.0:
        pytest.skip("it has no FMA: large arguments are for compiled kernels")
    row = Row(device, temperature)
    if slots_suffice and row.hidden > 2.0 ** (row.crossing * row.scale - row.reference_t):
        pytest.skip("lighter tokens than some hidden one are in the head")
    out = torch.full((5,), torch.nan, device=device)
    head_kernel[(1,)](
        row.teacher, row.slots, out, V, row.scale, row.reference_t, row.z_t,
        row.hidden if slots_suffice else row.z_t, 0.5, INCLUSIVE=False, BLOCK=BLOCK,
    )  # fmt: skip
    crossing, mass, k, each, cut = out.tolist()
    if k == 0:  # the oracle's last head token then stands above the crossing logit
        above = row.teacher.float() > crossing
        assert (int(above.sum()), cut) == (row.size, 0)
    else:
        assert (crossing, k) == (row.crossing, row.k)
        assert cut == row.cut or (cut == V and k == int((row.teacher.float() == crossing).sum()))
    assert abs(mass + k * each - float(row.oracle.head_mass)) < 1e-6


def test_divergence(row: Row, device: torch.device) -> None:
    out = torch.full((4,), torch.nan, device=device)
    divergence_kernel[(1,)](
        row.teacher, row.student, out, V, row.scale,
        row.reference_t, row.z_t, row.reference_s, row.z_s,
        row.crossing, float(row.k), row.cut, BLOCK=BLOCK,
    )  # fmt: skip
    o = row.oracle
    expected = [float(x) for x in (o.forward_weight, o.gap, o.head_size)] + [V // BLOCK]
    torch.testing.assert_close(
        out.cpu().double(), torch.tensor(expected).double(), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("label_rate", [0.0, 0.3])
def test_gradient(label_rate: float, row: Row, device: torch.device) -> None:
    """The same with a cross-entropy, whose softmax is at T = 1."""
    gradient = torch.full((V,), torch.nan, device=device)
    lse_1 = float(torch.logsumexp(row.student.double().cpu(), 0)) * LOG2E.value
    gradient_kernel[(1,)](
        gradient, row.teacher, row.student, V, row.scale, 1 / row.temperature,
        row.reference_t, row.z_t, row.reference_s, row.z_s, lse_1,
        float(row.oracle.forward_weight), float(row.oracle.reverse_kl), V // BLOCK,
        LABEL, label_rate, HAS_LABELS=label_rate > 0.0, BLOCK=BLOCK,
    )  # fmt: skip
    of_labels = reference_cross_entropy(row.student[None].cpu(), torch.tensor([LABEL]))
    exact = row.oracle.grad[0] + label_rate * of_labels.grad[0]
    # A few roundings of its two terms are allowed, and more without an FMA (in the interpreter).
    assert (gradient.cpu().double() - exact).abs().max() < 5e-6 * exact.abs().max()


@triton.jit
def softcap_kernel(x_ptr, scaled_ptr, slope_ptr, scale, gain, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(scaled_ptr + tl.arange(0, BLOCK), scaled(x, scale, gain, 0.0))
    tl.store(slope_ptr + tl.arange(0, BLOCK), softcap_slope(x, gain))


def test_softcap(device: torch.device) -> None:
    """tanh and its derivative to a few units in the last place, over all magnitudes and signs."""
    magnitudes = torch.logspace(-6, 2, 510, base=10)
    x = torch.cat((magnitudes, -magnitudes, torch.tensor([0.0, 0.625, torch.inf, -torch.inf])))
    x = x.to(device)
    out, slope = torch.full((2, len(x)), torch.nan, device=device)
    softcap_kernel[(1,)](x, out, slope, 3.0, 0.5, BLOCK=len(x))
    exact = 3.0 * torch.tanh(0.5 * x.double().cpu())
    exact[-2:] = x.double().cpu()[-2:]
    torch.testing.assert_close(out.double().cpu(), exact, rtol=4e-7, atol=0)
    exact = 1.0 / torch.cosh(0.5 * x.double().cpu()).square()
    torch.testing.assert_close(slope.double().cpu(), exact, rtol=1e-5, atol=1e-37)
