"""The op qat_linear, a product with a weight quantized on the way, against float64."""

import pytest
import torch
import walk
from torch.library import opcheck

from reality_stone import ops, reference
from reality_stone.quantizers import MODES, quantize
from reality_stone.quantizers.base import cells

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Smaller than a block of lanes, one off, several panels.
SHAPES = [(1, 1), (3, 5), (17, 64), (9, 65), (33, 200), (1040, 1031)]
EVERY_MODE = pytest.mark.parametrize("mode", MODES)
EPS = 2.0**-24
_ops = torch.ops.reality_stone


def arguments(shape, levels, per_row, seed=0):
    """weight, centers and scale with weights inside and outside the levels."""
    weight = walk.gaussian(*shape, seed=seed)
    centers = cells(levels) + 0.2 / levels * walk.gaussian(levels, seed=seed + 1)
    scale = 0.5 + torch.rand(shape[0] if per_row else 1)
    return weight, centers, scale


def tau_of(mode, levels):
    return 0.3 * (2 / levels) ** 2 if mode == "gumbel" else 0.4


def judged(x, weight, centers, scale, tau, mode, grad, grad_loss):
    """[y, loss, dx, dweight, dcenters, dscale] in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, centers, scale)]
    y, loss = reference.qat_linear(*leaves[:3], tau, mode, leaves[3])
    grads = torch.autograd.grad((y, loss), leaves, (grad.double(), grad_loss.double()))
    return [y.detach(), loss.detach(), *grads]


def got(x, weight, centers, scale, tau, mode, grad, grad_loss):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, centers, scale)]
    y, loss = ops.qat_linear(*leaves[:3], tau, mode, leaves[3])
    return [y, loss, *torch.autograd.grad((y, loss), leaves, (grad, grad_loss))]


@EVERY_MODE
@pytest.mark.parametrize("levels", [2, 3, 4, 16, 37])
def test_values_and_gradients_are_those_of_the_reference(mode, levels):
    for shape in SHAPES if levels in (4, 16) else SHAPES[:-1]:
        weight, centers, scale = arguments(shape, levels, per_row=shape[0] % 2 == 1)
        # Nearer to a tie, float32 may choose the other level; nearer to the range's end as well.
        weight = off_edges(weight, centers, scale)
        x, grad = walk.gaussian(7, shape[1], seed=3), walk.gaussian(7, shape[0], seed=4)
        call = x, weight, centers, scale, tau_of(mode, levels), mode, grad, torch.tensor(20.0)
        # Logits of some 100 carry roundings of 100 * EPS into the softmax, and a spacing's square
        # divides them; sums over a panel add their own.
        bound = 3e-4 if mode == "gumbel" else 1e-5
        for name, a, b in zip(
            ("y", "loss", "x", "weight", "centers", "scale"), got(*call), judged(*call), strict=True
        ):
            assert a.shape == b.shape
            assert walk.relative(a, b) <= bound, (shape, name, walk.relative(a, b))


def off_edges(weight, centers, scale):
    """The weight with values near the middles of levels and the ends of the range moved away."""
    c = centers.double().sort().values
    edges = torch.cat(
        (c[:1] - (c[1] - c[0]) / 2, (c[1:] + c[:-1]) / 2, c[-1:] + (c[-1] - c[-2]) / 2)
    )
    u = weight.double() / scale.double()[:, None]
    near = (u[..., None] - edges).abs().amin(-1) < 1e-4
    return torch.where(near, (u + 3e-4) * scale[:, None], weight.double()).float()


@EVERY_MODE
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype_leading_sizes_strides_and_empty_batches(mode, dtype):
    weight, centers, scale = arguments((33, 50), 16, True)
    call = weight, centers, tau_of(mode, 16), mode, scale
    x = walk.gaussian(2, 3, 50).to(dtype)
    y, loss = ops.qat_linear(x, *call)
    q = quantize(weight, *call[1:4], scale)
    assert (y.dtype, y.shape) == (dtype, (2, 3, 33))
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, q.loss, rtol=1e-5)
    # Both operands and the result rounded to bfloat16 at worst.
    assert walk.relative(y, x.double() @ q.weight.double().t()) <= (
        1e-5 if dtype == torch.float32 else 3 * 2.0**-9
    )
    for other in (x.transpose(0, 1).contiguous().transpose(0, 1), walk.spread(x)):
        assert torch.equal(ops.qat_linear(other, *call)[0], y)
    turned = weight.t().contiguous().t()
    assert torch.equal(ops.qat_linear(x, turned, *call[1:])[0], y)
    assert ops.qat_linear(x[0, 0], *call)[0].shape == (33,)
    empty, loss_too = ops.qat_linear(x[:, :0], *call)
    assert empty.shape == (2, 0, 33)
    assert torch.equal(loss_too, loss)


@EVERY_MODE
def test_empty_weights_and_batches_have_gradients_of_zero(mode):
    for shape, batch in [((0, 4), 2), ((4, 0), 2), ((4, 6), 0)]:
        weight, centers, scale = arguments(shape, 4, False)
        leaves = [torch.ones(batch, shape[1]), weight, centers, scale]
        leaves = [t.requires_grad_() for t in leaves]
        y, _ = ops.qat_linear(*leaves[:3], 0.4, mode, leaves[3])
        assert y.shape == (batch, shape[0])
        for g in torch.autograd.grad(y.sum(), leaves):
            assert not g.any()


@EVERY_MODE
def test_only_wanted_gradients_come(mode):
    weight, centers, scale = arguments((9, 20), 4, True)
    x, grad = walk.gaussian(5, 20), walk.gaussian(5, 9)
    call = grad, torch.tensor(1.0), x, weight, centers, 0.4, mode, scale
    every = ops.qat_linear_backward(*call, [True] * 4)
    for i in range(4):
        some = ops.qat_linear_backward(*call, [i == k for k in range(4)])
        for k in range(4):
            assert torch.equal(some[k], every[k]) if i == k else some[k].numel() == 0


@EVERY_MODE
@pytest.mark.parametrize("isa", walk.isas())
def test_sums_have_the_same_bits_on_any_number_of_threads(mode, isa):
    weight, centers, scale = arguments((300, 200), 16, False)
    # Whole numbers: torch's products are exact, in whatever order its threads add.
    x, grad = walk.gaussian(6, 200).round(), walk.gaussian(6, 300).round()

    def run():
        call = x, weight, centers, tau_of(mode, 16), mode, scale
        loss = ops.qat_linear(*call)[1]
        back = ops.qat_linear_backward(grad, torch.tensor(3.0), *call, [False, True, True, True])
        return [loss, *back[1:]]

    with ops.use_isa(isa):
        with walk.threads(1):
            one = run()
        for n in (2, 3):
            with walk.threads(n):
                assert all(walk.same_bits(a, b) for a, b in zip(one, run(), strict=True))


def test_the_softmax_is_finite_and_hard_at_the_lowest_temperatures():
    weight = torch.tensor([[0.0, 0.125, 1e-30, 0.06, -1.0, 1.0, 1e4, -1e4]])
    x, centers = torch.eye(8), cells(16)
    for tau in (1e-4, 1e-12, 1e-38):
        y, _ = ops.qat_linear(x, weight, centers, tau, "gumbel")
        hard, _ = ops.qat_linear(x, weight, centers, 1.0, "ste")
        assert y.isfinite().all()
        assert torch.allclose(y[3:], hard[3:])
        back = ops.qat_linear_backward(
            torch.ones(8, 1), torch.tensor(0.0), x, weight, centers, tau, "gumbel", None, [True] * 4
        )
        assert all(g.isfinite().all() for g in back)


@EVERY_MODE
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_op_and_its_backward_pass_opcheck(mode, dtype):
    weight, centers, scale = arguments((8, 20), 4, True)
    x, grad = walk.gaussian(2, 3, 20).to(dtype), walk.gaussian(2, 3, 8).to(dtype)
    how = {} if dtype == torch.float32 else {"test_utils": ("test_schema", "test_faketensor")}
    leaves = [t.requires_grad_() for t in (x, weight, centers)]
    opcheck(_ops.qat_linear, (*leaves, 0.4, mode, scale.requires_grad_()), **how)
    opcheck(_ops.qat_linear, (x.detach(), *leaves[1:], 0.4, mode), **how)
    plain = [t.detach() for t in (*leaves, scale)]
    back = grad, torch.tensor(1.0), *plain[:3], 0.4, mode, plain[3]
    opcheck(_ops.qat_linear_backward, (*back, [True, False, True, False]), **how)


def test_the_reference_passes_gradcheck():
    x, c = walk.gaussian(2, 4).double().requires_grad_(), cells(5).double().requires_grad_()
    w = walk.gaussian(3, 4).double().requires_grad_()
    s = (0.5 + torch.rand(3)).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *a: reference.qat_linear(*a[:3], 0.3, "gumbel", a[3]), (x, w, c, s)
    )


@pytest.mark.parametrize("op", [ops.qat_linear, reference.qat_linear], ids=["kernel", "reference"])
def test_wrong_arguments_are_refused_in_a_sentence(op):
    x, w, c = torch.ones(2, 3), torch.ones(4, 3), cells(4)
    nan = w.clone()
    nan[1, 2] = float("nan")
    for arguments, sentence in [
        ((x, w, c, 1.0, "soft"), "mode must be ste, attenuated, codebook or gumbel, got 'soft'"),
        ((x, w, c, 0.0, "gumbel"), "tau must be positive and finite, got 0"),
        ((x, w, c, -1.0, "ste"), "tau must be positive and finite, got -1"),
        ((x, w, c, float("inf"), "ste"), "tau must be positive and finite, got inf"),
        ((x, w, c[:1], 1.0, "ste"), "centers must be"),
        ((x, w, c.repeat(65), 1.0, "ste"), "centers must be"),
        ((x, w[0], c, 1.0, "ste"), "weight must have two dimensions"),
        ((x[:, :2], w, c, 1.0, "ste"), "x must end in 3 features"),
        ((x, w, c, 1.0, "ste", torch.ones(3)), "scale must be"),
        ((x, w, c, 1.0, "ste", torch.zeros(1)), "the scale holds a value that is zero"),
        ((x, w, c / 0, 1.0, "ste"), "the centers hold a value that is not finite"),
        ((x, nan, c, 1.0, "gumbel"), r"the weight is not finite at \(1, 2\): nan"),
        ((x, w / 0, c, 1.0, "ste"), r"the weight is not finite at \(0, 0\): inf"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            op(*arguments)


def test_wrong_dtypes_and_gradients_are_refused_in_a_sentence():
    x, w, c = torch.ones(2, 3), torch.ones(4, 3), cells(4)
    with pytest.raises(TypeError, match="weight, centers and scale must be float32"):
        ops.qat_linear(x, w.double(), c, 1.0, "ste")
    with pytest.raises(TypeError, match="x must be float32, float16 or bfloat16"):
        ops.qat_linear(x.double(), w, c, 1.0, "ste")
    with pytest.raises(ValueError, match="the gradient of y must be y's shape"):
        ops.qat_linear_backward(
            torch.ones(2, 3), torch.tensor(1.0), x, w, c, 1.0, "ste", None, [True] * 4
        )


def test_the_quantized_weight_is_never_whole_in_memory():
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts anew
    except OSError:
        pytest.skip("the kernel does not count the memory in use")

    def most():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024

    weight, x = torch.randn(4096, 4096), torch.randn(4, 4096)  # 64 MB
    ops.qat_linear(x[:, :64], weight[:64, :64], cells(16), 0.01, "gumbel")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = most()
    ops.qat_linear(x, weight, cells(16), 0.01, "gumbel")
    assert most() - before < 16  # a panel of 4 MB, and what the allocator keeps
