"""Learnable quantizers: their values, their derivatives, their state."""

import copy
import io
import itertools

import pytest
import torch
import walk
from torch.autograd import gradcheck

from reality_stone.quantizers import SEQ, STE, Codebook, Gumbel, TauSchedule, formulas, quantize

EVERY = pytest.mark.parametrize(
    "make",
    [
        lambda **k: STE(4, **k),
        lambda **k: STE(16, attenuated=True, **k),
        lambda **k: STE(7, zero=False, learned=False, **k),
        lambda **k: Gumbel(16, **k),
        lambda **k: Gumbel(5, noise=True, **k),
        lambda **k: Codebook(16, **k),
        lambda **k: SEQ(4, **k),
        lambda **k: SEQ(3, **k),
    ],
    ids=["ste4", "attenuated", "halves", "gumbel", "noise", "codebook", "seq4", "seq3"],
)


def double(*shape, seed=0):
    return walk.gaussian(*shape, seed=seed).double()


# --- values ---------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("per_row", [False, True])
def test_hard_values_are_the_nearest_levels_and_the_loss_is_their_mean_squared_error(make, per_row):
    quantizer = make(per_row=per_row).eval()
    weight = walk.gaussian(9, 33) * torch.arange(1, 10)[:, None]
    q, codes, loss = quantizer(weight)
    assert (codes.dtype, codes.shape) == (torch.uint8, weight.shape)
    scale = quantizer.safe_scale()[:, None]
    levels = scale * quantizer.centers
    nearest = (weight[..., None] - levels[:, None]).abs().amin(-1)
    assert len(quantizer.scale) == (9 if per_row else 1)
    # A product and a quotient of float32 round once each.
    assert torch.allclose((weight - q).abs(), nearest, atol=1e-5)
    assert torch.equal(q, scale * quantizer.centers[codes.long()])
    assert torch.allclose(loss, (weight - q).square().mean())
    assert walk.same_bits(q, quantizer.hard(weight).weight)


def test_gumbel_has_the_centres_and_the_softmax_of_the_definition():
    quantizer = Gumbel(16, tau=0.02)
    assert torch.equal(quantizer.centers, (torch.arange(16) + 0.5) / 8 - 1)
    weight = walk.gaussian(3, 5)
    q, codes, loss = quantizer.double()(weight.double())
    u, c = weight.double() / quantizer.scale, quantizer.centers
    e = torch.exp(-((u[..., None] - c) ** 2) / 0.02)
    want = quantizer.scale * (e * c).sum(-1) / e.sum(-1)
    assert torch.allclose(q, want, rtol=1e-9)
    assert torch.allclose(loss, (weight - want).square().mean())
    assert torch.equal(codes.long(), (u[..., None] - c).abs().argmin(-1))


def test_gumbel_is_finite_and_hard_at_the_lowest_temperatures():
    weight = torch.tensor([[0.0, 0.125, 1e-30, 0.06, -1.0, 1.0, 1e4, -1e4]], requires_grad=True)
    for tau in (1e-4, 1e-12, 1e-38):
        q = quantize(weight, Gumbel(16).centers, tau, "gumbel")
        q.weight.sum().backward()
        assert q.weight.isfinite().all()
        assert weight.grad.isfinite().all()
        hard = quantize(weight, Gumbel(16).centers, tau, "ste").weight
        # At midpoints between levels, the first three, both count half.
        assert torch.allclose(q.weight[0, 3:], hard[0, 3:])
        weight.grad = None


def test_seq_has_the_levels_of_the_paper():
    # round(clip(u, -1, 1) * k / 2 - shift) + shift, over k / 2; shift is 1/2 for k = 4, else 0.
    u = torch.linspace(-1.6, 1.6, 401)[None]
    for k, shift in ((4, 0.5), (3, 0.0)):
        want = ((u.clamp(-0.99, 0.99) * k / 2 - shift).round() + shift) / (k / 2)
        got = quantize(u, SEQ(k).centers, 1.0, "ste").weight
        away = ((u * k / 2 - shift) % 1 - 0.5).abs() > 1e-3  # from ties, which round to even there
        assert torch.allclose(got[away], want[away])


def test_ste_has_the_integers_of_lsq_or_halves():
    assert STE(16).centers.tolist() == list(range(-8, 8))
    assert STE(3).centers.tolist() == [-1, 0, 1]
    assert STE(4, zero=False).centers.tolist() == [-1.5, -0.5, 0.5, 1.5]


@EVERY
def test_a_measured_scale_is_better_than_reaching_for_the_largest_weight(make):
    weight = walk.gaussian(8, 512)
    quantizer = make(per_row=False).eval()
    fitted = quantizer(weight).loss
    quantizer._set_scale(weight.abs().max().view(1) / quantizer.centers.abs().max())
    assert fitted < quantizer(weight).loss
    assert make().fit(torch.zeros(3, 4)).eval()(torch.zeros(3, 4)).weight.isfinite().all()


@EVERY
def test_large_weights_go_in_pieces_with_the_same_result(make, monkeypatch):
    weight = walk.gaussian(37, 20).requires_grad_()
    quantizer = make(per_row=True).fit(weight)

    def run():
        q, codes, loss = quantizer(weight)
        leaves = [weight, *quantizer.parameters()]
        total = (q * torch.linspace(-1, 1, 20)).sum() + 5 * loss
        return q, codes, *torch.autograd.grad(total, leaves, allow_unused=True)

    whole = run()
    monkeypatch.setattr(formulas, "CHUNK", 20 * 16 * 5)
    # Noise is drawn piece by piece, so only what has none is the same for any size of pieces.
    again = run()
    for a, b in zip(again, run(), strict=True):
        assert torch.equal(a, b)
    if quantizer.seed() is None:
        for a, b in zip(whole, again, strict=True):
            assert torch.allclose(a.float(), b.float(), atol=1e-5)  # sums in another order


# --- derivatives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_gumbel_passes_gradcheck_in_weight_and_centres(noise, per_row):
    quantizer = Gumbel(5, tau=0.3, noise=noise, per_row=per_row).double()
    weight = double(3, 4).requires_grad_()
    quantizer.fit(weight)

    def run(weight, centers):
        q, _, loss = torch.func.functional_call(quantizer, {"centers": centers}, (weight,))
        return q, loss

    assert gradcheck(run, (weight, quantizer.centers))


def test_the_scale_of_a_gumbel_formula_passes_gradcheck():
    scale, c = torch.tensor([0.7, 1.3, 0.5]).double().requires_grad_(), Gumbel(5).double().centers
    run = lambda s: quantize(double(3, 4), c.detach(), 0.3, "gumbel", s)[::2]  # noqa: E731
    assert gradcheck(run, (scale,))


@pytest.mark.parametrize("attenuated", [False, True])
@pytest.mark.parametrize("levels", [3, 4, 16])
def test_ste_has_the_gradient_it_is_defined_by(attenuated, levels):
    quantizer = STE(levels, attenuated=attenuated, per_row=True).double()
    weight = 2 * double(5, 40)
    with torch.no_grad():
        quantizer.fit(weight).scale.mul_(0.6)  # so that weights lie outside
    weight.requires_grad_()
    grad = double(5, 40, seed=1)
    quantizer(weight).weight.backward(grad)

    s, c = quantizer.scale.detach()[:, None], quantizer.centers
    u = weight.detach() / s
    f = u.round().clamp(c[0], c[-1])
    beyond = torch.maximum(c[0] - 0.5 - u, u - c[-1] - 0.5).clamp_min(0)
    slope = torch.exp(-10 * beyond) if attenuated else (beyond == 0).double()
    assert 0 < (beyond > 0).double().mean() < 1
    assert torch.allclose(weight.grad, grad * slope, rtol=1e-9)
    factor = (40 * c.abs().min(0).values.new_tensor(max(c[-1].item(), 0.5))) ** -0.5
    want = (grad * (f - u * slope)).sum(1) * factor
    assert torch.allclose(quantizer.scale.grad, want, rtol=1e-9)


def test_the_step_has_the_derivative_of_its_surrogate():
    # With the rounding errors held, f(u) = u + (round(u) - u).detach() inside the range, and that
    # is a function whose finite differences exist.
    quantizer = STE(8, per_row=True).double()
    weight = double(3, 6)
    quantizer.fit(weight)
    scale = quantizer.scale.detach().clone().requires_grad_()
    u = weight / scale.detach()[:, None]
    f = u.round().clamp(-4, 3)
    inside = (u > -4.5) & (u < 3.5)
    held = torch.where(inside, f - u, f)

    def surrogate(s):
        return torch.where(inside, weight + s[:, None] * held, s[:, None] * held)

    assert gradcheck(surrogate, (scale,))
    grad = double(3, 6, seed=1)
    surrogate(scale).backward(grad)
    got = torch.autograd.grad(
        quantize(weight, quantizer.centers, 1.0, "ste", scale)[0], scale, grad
    )
    assert torch.allclose(got[0], scale.grad)


def test_seq_clips_its_gradient_at_the_scale():
    quantizer = SEQ(4, per_row=False).double()
    weight = torch.linspace(-2, 2, 101, dtype=torch.double)[None].requires_grad_()
    quantizer._set_scale(torch.ones(1).double())
    quantizer.fitted = True
    quantizer(weight).weight.sum().backward()
    assert torch.equal(weight.grad[0], (weight[0].abs() <= 1).double())


def test_codebook_gives_levels_the_task_and_the_loss_and_weights_their_commitment():
    quantizer = Codebook(4, commitment=0.3).double()
    weight = double(6, 20).requires_grad_()
    quantizer.fit(weight)
    grad = double(6, 20, seed=1)
    q, codes, loss = quantizer(weight)
    s, n = quantizer.scale, weight.numel()
    error = (weight - q).detach()
    one = torch.nn.functional.one_hot(codes.long(), 4).double()
    dw, dc = torch.autograd.grad(loss, [weight, quantizer.centers], retain_graph=True)
    assert torch.allclose(dw, 0.3 * 2 * error / n)
    assert torch.allclose(dc, -(one * (2 * error / n * s)[..., None]).sum((0, 1)))
    dw, dc = torch.autograd.grad(q, [weight, quantizer.centers], grad)
    slope = formulas.slope(weight.detach() / s, quantizer.centers, "codebook")
    assert torch.allclose(dw, grad * slope)
    assert torch.allclose(dc, (one * (grad * s)[..., None]).sum((0, 1)))


@EVERY
def test_the_loss_pulls_weights_to_their_levels(make):
    quantizer = make()
    weight = walk.gaussian(8, 32).requires_grad_()
    quantizer.fit(weight)
    optimiser = torch.optim.SGD([weight], lr=20.0)
    first = quantizer(weight).loss.item()
    for _ in range(20):
        optimiser.zero_grad()
        quantizer(weight).loss.backward()
        optimiser.step()
    assert quantizer(weight).loss.item() < 0.8 * first


# --- schedules, noise, state ----------------------------------------------------------------------


@pytest.mark.parametrize("law", ["exponential", "linear", "cosine"])
def test_a_schedule_falls_from_start_to_end_and_stays(law):
    schedule = TauSchedule(1.0, 0.01, 100, law)
    taus = [schedule(i) for i in range(120)]
    assert taus[0] == 1
    assert taus[100:] == [pytest.approx(0.01)] * 20
    assert all(a > b for a, b in itertools.pairwise(taus[:101]))
    assert TauSchedule(1.0, 0.01, 100)(50) == pytest.approx(0.1)


def test_noise_is_that_of_its_generator_and_new_at_each_step():
    weight = walk.gaussian(4, 8)

    def run(seed):
        quantizer = Gumbel(4, generator=torch.Generator().manual_seed(seed)).fit(weight)
        found = []
        for _ in range(3):
            found += [quantizer(weight).weight, quantizer(weight).weight]
            quantizer.step()
        return torch.stack(found)

    a = run(1)
    assert torch.equal(a, run(1))
    assert not torch.equal(a, run(2))
    assert torch.equal(a[::2], a[1::2])  # within a step, as a recomputed forward needs it
    assert not torch.equal(a[0], a[2])
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    hits = (p.log() + formulas.gumbel_noise(torch.empty(20_000, 4), 7, 0)).argmax(-1)
    # The Gumbel-max law; four standard deviations of a frequency are at most 0.015.
    assert torch.allclose(hits.bincount() / 20_000, p, atol=0.015)


@EVERY
def test_a_state_dict_carries_scale_levels_schedule_and_noise(make):
    weight = walk.gaussian(6, 10)
    quantizer = make(per_row=True)
    if isinstance(quantizer, Gumbel):
        quantizer.schedule = TauSchedule(0.2, 0.01, 10)
    for _ in range(3):
        quantizer(weight)
        quantizer.step()
    file = io.BytesIO()
    torch.save(quantizer.state_dict(), file)
    file.seek(0)
    other = make(per_row=True)
    if isinstance(other, Gumbel):
        other.schedule = TauSchedule(0.2, 0.01, 10)
    other.load_state_dict(torch.load(file))
    twin = copy.deepcopy(quantizer)
    for _ in range(2):
        want = quantizer(weight).weight
        assert torch.equal(other(weight).weight, want)
        assert torch.equal(twin(weight).weight, want)
        for q in (quantizer, other, twin):
            q.step()
    broken = quantizer.state_dict()
    del broken["state"]
    with pytest.raises(RuntimeError, match="state"):
        make(per_row=True).load_state_dict(broken)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Gumbel(16, tau=0), "tau must be positive and finite, got 0"),
        (lambda: Gumbel(16, tau=-1.0), "tau must be positive and finite, got -1.0"),
        (lambda: Gumbel(16, tau=float("nan")), "tau must be positive"),
        (lambda: Gumbel(1), "levels must be a whole number from 2 to 256, got 1"),
        (lambda: STE(257), "levels must be a whole number from 2 to 256, got 257"),
        (lambda: STE(2.5), "levels must be a whole number"),
        (lambda: Codebook(0), "levels must be a whole number"),
        (lambda: SEQ(16), "levels of SEQ must be 3 or 4, got 16"),
        (lambda: Codebook(4, commitment=0), "commitment must be positive"),
        (lambda: Gumbel(4, room=0), "room must be positive"),
        (lambda: STE(4, per_row=3), "per_row must be True or False"),
        (lambda: TauSchedule(1.0, 0.0, 5), "tau must be positive"),
        (lambda: TauSchedule(1.0, 0.1, 0), "steps of a schedule must be 1 or more"),
        (lambda: TauSchedule(1.0, 0.1, 5, "square"), "law must be"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_in_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@EVERY
def test_weights_that_are_not_finite_or_of_another_shape_are_refused(make):
    bad = walk.gaussian(4, 6)
    bad[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"the weight is not finite at \(2, 3\): nan"):
        make()(bad)
    quantizer = make(per_row=True)
    quantizer(walk.gaussian(4, 6))
    with pytest.raises(ValueError, match=r"the weight is not finite at \(2, 3\): nan"):
        quantizer(bad)
    with pytest.raises(ValueError, match=r"takes a weight \(4, in\), got shape \(5, 6\)"):
        quantizer(walk.gaussian(5, 6))
    for shape in [(3,), (2, 3, 4)]:
        with pytest.raises(ValueError, match="weight must have two dimensions"):
            make()(torch.zeros(shape))


def test_the_formulas_refuse_wrong_arguments():
    w, c = torch.zeros(2, 3), torch.tensor([-1.0, 1.0])
    for arguments, sentence in [
        ((w, c, 1.0, "soft"), "mode must be ste, attenuated, codebook or gumbel, got 'soft'"),
        ((w, c, 0.0, "gumbel"), "tau must be positive and finite, got 0.0"),
        ((w, c[:1], 1.0, "ste"), "centers must be"),
        ((w, c, 1.0, "ste", torch.ones(3)), r"scale must be \(1,\) or \(2,\)"),
        ((w, c, 1.0, "ste", torch.zeros(1)), "the scale holds a value that is zero"),
        ((w, c * float("inf"), 1.0, "ste"), "the centers hold a value that is not finite"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            quantize(*arguments)


@EVERY
def test_empty_weights_are_quantized_to_empty_ones(make):
    for shape in [(0, 4), (4, 0), (0, 0)]:
        q, codes, loss = make()(torch.zeros(shape))
        assert (q.shape, codes.shape) == (shape, shape)
        assert loss == 0
