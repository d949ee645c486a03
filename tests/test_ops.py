"""Products from the codes and their gradients, against float64, on every instruction set."""

import math

import pytest
import torch
import walk
from torch.library import opcheck

from reality_stone import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BATCHES = [0, 1, 2, 3, 7, 8, 9, 16, 65, 130]
SHAPES = [(33, 50), (48, 1000), (128, 256), (1, 17), (1000, 48)]
# The promise of accuracy("auto"): one product is off by at most this, relative (Frobenius).
AUTO = 3e-3
EPS = 2.0**-24

EVERY = pytest.mark.parametrize("codec", walk.FEW, ids=walk.spec)
DEFAULTS = pytest.mark.parametrize("codec", walk.DEFAULTS, ids=walk.spec)
ON_ISAS = pytest.mark.parametrize("isa", walk.isas())


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype).double()


def size_of(x, w) -> float:
    """Norm a product of these sizes has when nothing cancels: what an error is measured against."""
    return (x.double().norm() * w.double().norm() / math.sqrt(max(1, w.shape[1]))).item()


def slack(want) -> float:
    """Twice the noise of a dense product; more where few numbers carry the norm and say little."""
    want = want.double()
    carriers = (want**2).sum() ** 2 / (want**4).sum().clamp_min(1e-300)
    return 2 + 4 / carriers.clamp_min(1).sqrt().item()


def in_int8(packed) -> bool:
    """Whether the codec's settings ask for products in int8, which its kernels then declare."""
    terms = ops.describe(packed.codec.spec, packed.shape)
    return any(term["linear"].startswith("int8") for term in terms)


def dense_error(x, w, want, int8: bool) -> float:
    """Norm of the error of a dense product of this compute type. Of int8, a scale for each row of x
    and one for w, the expected one: few numbers may be hit by luck."""
    if not int8:
        x, w = rounded(x, torch.bfloat16), rounded(w, torch.bfloat16)
        return (rounded(x @ w.t(), torch.bfloat16) - want).norm().item()
    x, w = x.double(), w.double()
    x_step, w_step = x.abs().amax(-1) / 127, w.abs().max() / 127
    square = x_step.pow(2).sum() * w.pow(2).sum() + w_step**2 * len(w) * x.pow(2).sum()
    return (square / 12).sqrt().item()  # a step's square over 12 is its rounding's variance


def assert_kept(got, x, w, want, note, int8=False):
    """got against want = x @ w.T in float64: the promise of accuracy("auto"), or twice the error of
    a dense bfloat16 product (int8 where the codec declares it) where that is the larger."""
    scale = size_of(x, w)
    error = walk.relative(got, want, scale)
    # A result in half precision is rounded once more at the end.
    bound = AUTO + walk.relative(rounded(want, got.dtype), want, scale)
    if error > bound:
        size = max(want.norm().item(), scale, 1e-300)
        bound += slack(want) * dense_error(x, w, want, int8) / size - AUTO
    assert error <= bound, (note, error, bound)


def float32_noise(x, w) -> float:
    """Error of torch's float32 product; at least one rounding, which a short sum may lack."""
    want = x.double() @ w.t()
    return max(EPS, walk.relative(x.float() @ w.float().t(), want, size_of(x, w)))


def frame_noise(codec, shape) -> float:
    """Error that Hadamard transforms in float32 add: one rounding a stage, and the scales."""
    stages = sum(math.log2(block) for block in codec.blocks(shape))
    return EPS * math.sqrt(stages + 4)


def layers(codec, shape):
    """Any bytes, with weights far from zero mean; at one shape also as encoded and trained."""
    found = [walk.random_layer(codec, shape)]
    if shape == (33, 50):
        found += [walk.encoded(codec, shape), walk.trained(walk.encoded(codec, shape))]
    return found


@EVERY
def test_linear_is_within_its_promise_for_every_dtype_and_batch(codec):
    for shape in SHAPES:
        for packed in layers(codec, shape):
            w = packed.decode().double()
            for batch in BATCHES:
                for dtype in DTYPES:
                    x = walk.gaussian(batch, shape[1], seed=batch).to(dtype)
                    want = x.double() @ w.t()
                    for isa in walk.isas():
                        with ops.use_isa(isa):
                            y = packed.linear(x)
                        assert y.shape == (batch, shape[0])
                        assert y.dtype == dtype
                        note = (isa, shape, batch, dtype)
                        assert_kept(y, x, w, want, note, in_int8(packed))


@EVERY
def test_exact_linear_is_as_good_as_dense_float32(codec):
    for shape in SHAPES:
        for packed in layers(codec, shape):
            w = packed.decode().double()
            for batch in (1, 3, 9, 130):
                x = walk.gaussian(batch, shape[1], seed=batch)
                bound = 2 * float32_noise(x, w) + 2 * frame_noise(codec, shape)
                for isa in walk.isas():
                    with ops.use_isa(isa), ops.accuracy("exact"):
                        y = packed.linear(x)
                    error = walk.relative(y, x.double() @ w.t(), size_of(x, w))
                    assert error <= bound, (isa, shape, batch, error, bound)


@DEFAULTS
@ON_ISAS
def test_linear_takes_any_leading_sizes_and_strides(codec, isa):
    packed = walk.random_layer(codec, (33, 50))
    x = walk.gaussian(2, 3, 50)
    with ops.use_isa(isa):
        want = packed.linear(x.reshape(6, 50))
        assert walk.same_bits(packed.linear(x), want.view(2, 3, 33))
        assert walk.same_bits(packed.linear(x[0, 0]), packed.linear(x[0, :1])[0])
        assert packed.linear(x[:, :0]).shape == (2, 0, 33)
        assert packed.linear(x[None, :, None]).shape == (1, 2, 1, 3, 33)
        turned = x.reshape(6, 50).t().contiguous().t()
        for moved in (turned, walk.spread(x.reshape(6, 50)), walk.misaligned(x.reshape(6, 50))):
            assert walk.same_bits(packed.linear(moved), want)
        repeated = x[0, :1].expand(4, 50)
        assert walk.same_bits(packed.linear(repeated), packed.linear(repeated.contiguous()))


@EVERY
@ON_ISAS
def test_large_small_zero_and_outlying_activations_are_multiplied_well(codec, isa):
    shape = (128, 256)
    packed = walk.random_layer(codec, shape)
    w = packed.decode().double()
    for batch in (1, 4, 70):
        base = walk.gaussian(batch, shape[1])
        outlier = base.clone()
        outlier[batch // 2, 7] = 1e4
        mixed = base * torch.logspace(-6, 6, batch)[:, None]
        for x in (base * 1e12, base * 1e-20, outlier, mixed):
            with ops.use_isa(isa):
                y = packed.linear(x)
            want = x.double() @ w.t()
            # Row by row: a large row must not drown a small one.
            for i in range(batch):
                row = slice(i, i + 1)
                assert_kept(y[row], x[row], w, want[row], (batch, i), in_int8(packed))
        base[batch - 1] = 0
        with ops.use_isa(isa):
            y = packed.linear(base)
            assert not y[batch - 1].any()
            assert not packed.linear(torch.zeros_like(base)).any()


@DEFAULTS
@ON_ISAS
def test_a_nan_or_infinity_in_x_stays_in_its_row(codec, isa):
    packed = walk.random_layer(codec, (33, 50))
    for bad in (math.nan, math.inf, -math.inf):
        for batch in (3, 20):
            x = walk.gaussian(batch, 50)
            x[1, 5] = bad
            with ops.use_isa(isa):
                y = packed.linear(x)
            others = [i for i in range(batch) if i != 1]
            assert y[others].isfinite().all()
            # A column that a codec leaves at zero in every row cannot carry it on.
            if packed.decode()[:, 5].any():
                assert not y[1].isfinite().all()


@DEFAULTS
@ON_ISAS
def test_products_straight_from_the_codes_have_the_same_bits_on_one_thread_and_two(codec, isa):
    packed = walk.random_layer(codec, (1000, 256))
    for batch in (1, 5, 64):
        x, grad = walk.gaussian(batch, 256), walk.gaussian(batch, 1000)

        def run(x=x, grad=grad):
            found = [packed.linear(x), ops.linear_grad_input(grad, *walk.arguments(packed))]
            return found + ops.linear_grad_params(grad, x, *walk.arguments(packed))

        with ops.use_isa(isa):
            with walk.threads(1):
                one = run()
            with walk.threads(2):
                two = run()
            terms = ops.describe(codec.spec, packed.shape)
        if all(batch <= term["linear_max_batch"] for term in terms):
            assert walk.same_bits(one[0], two[0]), batch
        for a, b in zip(one, two, strict=True):
            # Panels go through torch's matrix product, which sums in another order on more threads.
            assert not a.numel() or walk.relative(a, b) <= 64 * EPS, batch


# --- gradients ------------------------------------------------------------------------------------


class Judge:
    """Gradients by autograd through the reference decode in float64."""

    def __init__(self, packed):
        self.leaves = [
            p.double().requires_grad_() if p.is_floating_point() else p for p in walk.values(packed)
        ]
        self.w = reference.decode(packed.codes, self.leaves, packed.codec.spec, packed.shape)

    def param_grads(self, dw):
        """dLoss/dparam for dLoss/dW, None for codes."""
        wanted = [p for p in self.leaves if p.requires_grad]
        found = iter(torch.autograd.grad(self.w, wanted, dw, retain_graph=True))
        return [next(found) if p.requires_grad else None for p in self.leaves]

    def grads(self, x, grad):
        """[dLoss/dx, *dLoss/dparams] of y = x @ W.T, both (batch, features)."""
        x, grad = x.double(), grad.double()
        return [(grad @ self.w).detach(), *self.param_grads(grad.t() @ x)]

    def dw_noise(self, dw, size):
        """How far each param's gradient moves when dLoss/dW is off by up to `size` of itself."""
        off = dw * (1 + size * (2 * torch.rand(dw.shape, dtype=torch.float64) - 1))
        pairs = zip(self.param_grads(off), self.param_grads(dw), strict=True)
        return [None if a is None else (a - b).norm() for a, b in pairs]

    def noise(self, x, grad, size):
        """How far each gradient moves (root mean square of twelve trials, absolute) when operands
        and dLoss/dW are off by up to `size` of themselves, as rounding does. One trial says too
        little where few numbers carry the norm. Where equal weights are rounded alike, errors do
        not cancel: then a trial with operands in bfloat16 says more, and counts."""

        def off(t):
            return t * (1 + size * (2 * torch.rand(t.shape, dtype=torch.float64) - 1))

        x, grad, w = x.double(), grad.double(), self.w.detach()
        want = self.grads(x, grad)

        def squares(near):
            near_x, near_grad = near(x), near(grad)
            moved = [near(near_grad @ near(w)), *self.param_grads(near(near_grad.t() @ near_x))]
            pairs = zip(moved, want, strict=True)
            return [0.0 if a is None else ((a - b) ** 2).sum().item() for a, b in pairs]

        trials = [squares(off) for _ in range(12)]
        found = [(sum(s) / 12) ** 0.5 for s in zip(*trials, strict=True)]
        if size < 2.0**-8:
            return found
        rounding = squares(lambda t: rounded(t, torch.bfloat16))
        return [max(a, b**0.5) for a, b in zip(found, rounding, strict=True)]


@EVERY
def test_the_gradient_of_decode_is_that_of_autograd_through_the_reference(codec):
    for shape in [(33, 50), (128, 256), (1, 17), (0, 16), (16, 0)]:
        packed = walk.random_layer(codec, shape)
        grad = walk.gaussian(*shape)
        if not grad.numel():
            got = ops.decode_grad_params(grad, *walk.arguments(packed))
            assert not any(g.any() for g in got)
            continue
        judge = Judge(packed)
        noise = judge.dw_noise(grad.double(), 8 * EPS)
        want = judge.param_grads(grad.double())
        for isa in walk.isas():
            with ops.use_isa(isa):
                got = ops.decode_grad_params(grad, *walk.arguments(packed))
            for a, b, n in zip(got, want, noise, strict=True):
                assert b is not None or a.numel() == 0
                assert b is None or (a - b).norm() <= 16 * EPS * b.norm() + 2 * n


def kernel_grads(packed, x, grad):
    dx = ops.linear_grad_input(grad, *walk.arguments(packed))
    return [dx, *ops.linear_grad_params(grad, x, *walk.arguments(packed))]


@EVERY
@pytest.mark.parametrize("mode", ["auto", "exact"])
def test_gradients_agree_with_autograd_through_decode(codec, mode):
    # Half an ulp of bfloat16, whose mantissa has 8 bits. In float32, sums of a few thousand terms
    # drift by some 8 roundings.
    size = 2.0**-8 if mode == "auto" else 8 * EPS
    for shape in [(33, 50), (128, 256), (1, 17)]:
        for packed in layers(codec, shape):
            judge = Judge(packed)
            for batch in (1, 70):
                x, grad = (
                    walk.gaussian(batch, shape[1], seed=1),
                    walk.gaussian(batch, shape[0], seed=2),
                )
                want, noise = judge.grads(x, grad), judge.noise(x, grad, size)
                if mode == "auto" and in_int8(packed):
                    noise[0] = max(noise[0], dense_error(grad, judge.w.detach().t(), None, True))
                for isa in walk.isas():
                    with ops.use_isa(isa), ops.accuracy(mode):
                        got = kernel_grads(packed, x, grad)
                    for name, g, t, moved in zip(
                        ["x", *packed.params], got, want, noise, strict=True
                    ):
                        assert_near(g, t, moved, (isa, shape, batch, name))


def assert_near(got, want, noise, note):
    if want is None:
        assert got.numel() == 0
        return
    assert got.shape == want.shape
    error = (got.double() - want).norm().item()
    assert error <= slack(want) * noise + EPS * want.norm().item(), (note, error, noise)


@DEFAULTS
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_come_in_the_dtype_of_the_activation_and_params_in_float32(codec, dtype):
    packed = walk.random_layer(codec, (33, 50))
    x = walk.gaussian(2, 4, 50).to(dtype)
    grad = walk.gaussian(2, 4, 33).to(dtype)
    dx, *dparams = kernel_grads(packed, x, grad)
    assert dx.dtype == dtype
    assert dx.shape == x.shape
    want = Judge(packed).grads(x.reshape(8, 50), grad.reshape(8, 33))
    for g, t in zip(dparams, want[1:], strict=True):
        if t is not None:
            assert g.dtype == torch.float32
            # Operands are exact in bfloat16 and at worst rounded to it from the others.
            assert walk.relative(g, t) <= 4 * AUTO
    assert (
        walk.relative(dx.reshape(8, 50), want[0]) <= 2 * AUTO
    )  # the product's promise, and rounding to dtype


@EVERY
def test_the_reference_has_the_derivative_of_its_own_decode(codec):
    # Small enough for finite differences of every param: float64, where the kernels do not go.
    packed = walk.random_layer(codec, (3, 6))
    params = [
        p.double().requires_grad_() if p.is_floating_point() else p for p in walk.values(packed)
    ]
    x = walk.gaussian(2, 6).double().requires_grad_()

    def product(x, *params):
        w = reference.decode(packed.codes, params, packed.codec.spec, packed.shape)
        return x @ w.t()

    # Along random directions: some tables have thousands of entries.
    assert torch.autograd.gradcheck(product, (x, *params), fast_mode=True)


@DEFAULTS
def test_autograd_reaches_x_and_every_param_through_linear_and_decode(codec):
    packed = walk.random_layer(codec, (33, 50))
    leaves = [
        p.clone().requires_grad_() if p.is_floating_point() else p for p in walk.values(packed)
    ]
    x = walk.gaussian(2, 5, 50).requires_grad_()
    grad = walk.gaussian(2, 5, 33)
    judge = Judge(packed)
    want = judge.grads(x.detach().reshape(10, 50), grad.reshape(10, 33))
    ops.linear(x, packed.codes, leaves, codec.spec, packed.shape).backward(grad)
    noise = judge.noise(x.detach().reshape(10, 50), grad.reshape(10, 33), 2.0**-8)
    assert walk.relative(x.grad.reshape(10, 50), want[0]) <= 2 * AUTO
    for p, t, n in zip(leaves, want[1:], noise[1:], strict=True):
        if t is not None:
            # A sum over the whole layer may cancel to less than its terms' roundings.
            assert walk.relative(p.grad, t) <= 2 * AUTO or (p.grad - t).norm() <= slack(t) * n
            p.grad = None
    dw = walk.gaussian(33, 50)
    ops.decode(packed.codes, leaves, codec.spec, packed.shape).backward(dw)
    for p, t in zip(leaves, judge.param_grads(dw.double()), strict=True):
        if t is not None:
            assert walk.relative(p.grad, t) <= 2 * AUTO


@DEFAULTS
def test_only_the_wanted_gradients_are_computed(codec):
    packed = walk.random_layer(codec, (33, 50))
    leaves = [
        p.clone().requires_grad_() if p.is_floating_point() else p for p in walk.values(packed)
    ]
    first = next(p for p in leaves if p.requires_grad)
    y = ops.linear(walk.gaussian(2, 50), packed.codes, leaves, codec.spec, packed.shape)
    (found,) = torch.autograd.grad(y.sum(), [first])
    assert found.shape == first.shape
    x = walk.gaussian(2, 50).requires_grad_()
    packed.linear(x).sum().backward()
    assert x.grad.shape == x.shape


@DEFAULTS
def test_gradients_of_empty_batches_and_empty_weights_are_zero(codec):
    for shape, batch in [((33, 50), 0), *((shape, 2) for shape in walk.EMPTY_SHAPES)]:
        packed = walk.random_layer(codec, shape)
        x, grad = torch.ones(batch, shape[1]), torch.ones(batch, shape[0])
        assert packed.linear(x).shape == (batch, shape[0])
        assert not packed.linear(x).any()
        dx, *dparams = kernel_grads(packed, x, grad)
        assert dx.shape == x.shape
        assert not dx.any()
        for p, g in zip(walk.values(packed), dparams, strict=True):
            if p.is_floating_point():
                assert g.shape == p.shape
                assert not g.any()


# --- the rules of torch ops -----------------------------------------------------------------------

_ops = torch.ops.reality_stone


@DEFAULTS
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_pass_opcheck(codec, dtype):
    packed = walk.random_layer(codec, (16, 32))
    codes, params, name, shape = walk.arguments(packed)
    leaves = [p.requires_grad_() if p.is_floating_point() else p for p in params]
    x = walk.gaussian(2, 3, 32).to(dtype)
    grad = walk.gaussian(2, 3, 16).to(dtype)
    plain = [p.detach() for p in leaves]
    # The rules but for the fake kernels' dtypes do not depend on the dtype.
    how = {} if dtype == torch.float32 else {"test_utils": ("test_schema", "test_faketensor")}
    opcheck(_ops.linear, (x.clone().requires_grad_(), codes, leaves, name, shape), **how)
    opcheck(_ops.linear_grad_input, (grad, codes, plain, name, shape), **how)
    opcheck(_ops.linear_grad_params, (grad, x, codes, plain, name, shape), **how)
    opcheck(_ops.decode_grad_params, (walk.gaussian(16, 32), codes, plain, name, shape))


@DEFAULTS
def test_decode_and_check_pass_opcheck(codec):
    packed = walk.encoded(codec, (16, 32))
    codes, params, name, shape = walk.arguments(packed)
    leaves = [p.clone().requires_grad_() if p.is_floating_point() else p for p in params]
    opcheck(_ops.decode, (codes, leaves, name, shape))
    opcheck(_ops.check_codes, (codes, params, name, shape))


@pytest.mark.parametrize("codec", [c for c in walk.DEFAULTS if walk.one_term(c)], ids=walk.spec)
def test_encode_passes_opcheck(codec):
    weight = walk.gaussian(16, 32)
    params = list(codec.initial_params(weight, 0).values())
    opcheck(_ops.encode, (weight, None, params, codec.spec))
    opcheck(_ops.encode, (weight, torch.ones(32), params, codec.spec))


def test_hadamard_and_the_tile_search_pass_opcheck():
    for dtype in DTYPES:
        opcheck(_ops.hadamard, (walk.gaussian(3, 64).to(dtype), 32))
    opcheck(_ops.hadamard, (walk.gaussian(3, 64).requires_grad_(), 32))
    radius, angle = torch.rand(64), torch.rand(16)
    opcheck(_ops.trellis_encode, (walk.gaussian(2, 256), radius, angle, 2.0, "exact"))


@pytest.mark.parametrize("layout", ["documents", "cyclic_scalar_16"])
def test_bit_derivative_passes_opcheck(layout):
    codes = torch.arange(-6, 6, dtype=torch.int32).view(3, 4)
    opcheck(_ops.bit_derivative, (codes, 3, layout))
    opcheck(_ops.bit_derivative, (codes.t(), 0, layout))


# --- hadamard -------------------------------------------------------------------------------------


def test_hadamard_has_the_bits_of_the_reference_and_is_its_own_inverse():
    x = walk.gaussian(5, 3, 384)
    for block in (1, 2, 8, 64, 128):
        y = ops.hadamard(x, block)
        assert walk.same_bits(y, reference.hadamard(x, block))
        # Orthonormal and symmetric; two transforms round once a stage.
        assert walk.relative(ops.hadamard(y, block), x) <= 16 * EPS
        assert y.norm().item() == pytest.approx(x.norm().item(), rel=1e-5)  # a float32 norm


def test_hadamard_leaves_its_input_alone_and_takes_any_strides():
    x = walk.gaussian(4, 64)
    before = x.clone()
    want = ops.hadamard(x, 16)
    assert torch.equal(x, before)
    assert walk.same_bits(ops.hadamard(walk.spread(x), 16), want)
    assert walk.same_bits(ops.hadamard(x.t().contiguous().t(), 16), want)
    assert ops.hadamard(torch.zeros(0, 64), 16).shape == (0, 64)


def test_hadamard_refuses_a_block_that_is_no_power_of_two_or_does_not_divide():
    for block in (0, -2, 3, 48, 128):
        with pytest.raises(ValueError, match="block must be a power of two"):
            ops.hadamard(torch.zeros(2, 64), block)
