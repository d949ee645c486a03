"""The CUDA kernels against the reference: on a GPU, or as the emulation runs them."""

import cuda_device as cuda
import pytest
import test_cyclic
import torch
import walk

import reality_stone as rs
from reality_stone import ops, reference
from reality_stone.codecs import REGISTRY

Uniform, Palette, Hierarchical = (REGISTRY[name] for name in ("uniform", "palette", "hierarchical"))

SHAPES = [(1, 17), (33, 50), (48, 136), (128, 256)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Activations and decoded weights are rounded to bfloat16, 2^-9 of each, before they are multiplied,
# and so is the result.
PRODUCT = 5e-3
# In int8, a scale for a row of x and one for the basis: 1/127 of the largest, over the root of 12.
INT8_PRODUCT = 3e-2


def arguments(packed):
    """What decode and the products take after their input: on the device, and for the reference."""
    codes, params = cuda.tensors(packed.codes, list(packed.params.values()))
    rest = packed.codec.spec, packed.shape
    return (codes, params, *rest), (packed.codes, list(packed.params.values()), *rest)


def error(found, wanted, size=0.0):
    wanted = wanted.double()
    return float((found.cpu().double() - wanted).norm() / max(wanted.norm(), size))


def product_size(x, w):
    """What the roundings in x @ w.T are in proportion to: its norm, unless terms cancel."""
    return (x.double() ** 2 @ w.double().T ** 2).sqrt().norm()


def enumerate_types(*batches):
    """Each batch with bfloat16 or float16, in turn."""
    return [(b, (torch.bfloat16, torch.float16)[i % 2]) for i, b in enumerate(batches)]


@pytest.mark.parametrize("codec", walk.ALL, ids=walk.spec)
def test_decode_gives_the_same_bits(codec, monkeypatch):
    for shape in SHAPES + walk.EMPTY_SHAPES:
        packed = walk.random_layer(codec, shape)
        mine, theirs = arguments(packed)
        wanted = reference.decode(*theirs)
        for order in cuda.orders(monkeypatch):
            found = cuda.ops.decode(*mine).cpu()
            assert torch.equal(found, wanted), (shape, order)


def tolerance(codec):
    (term, *_) = ops.describe(codec.spec, (16, 32))
    return INT8_PRODUCT if term["linear"].startswith("int8") else PRODUCT


# Batches on either side of what a kernel takes at once; orders of threads at the cheaper ones.
@pytest.mark.parametrize("batch", [1, 9, 64, 70])
@pytest.mark.parametrize("codec", walk.FEW, ids=walk.spec)
def test_products_and_input_gradients_agree(codec, batch, monkeypatch):
    for shape, dtype in [
        ((33, 50), torch.float32),
        ((48, 136), torch.float16),
        ((128, 256), torch.bfloat16),
    ]:
        mine, theirs = arguments(walk.encoded(codec, shape))
        w = reference.decode(*theirs)
        x, dy = walk.gaussian(batch, shape[1]).to(dtype), walk.gaussian(batch, shape[0]).to(dtype)
        for order in cuda.orders(monkeypatch) if batch < 10 else [None]:
            y = cuda.ops.linear(*cuda.tensors(x), *mine)
            dx = cuda.ops.linear_grad_input(*cuda.tensors(dy), *mine)
            assert y.dtype == dx.dtype == dtype
            wanted = reference.linear(x.float(), *theirs)
            assert error(y, wanted, product_size(x, w)) < tolerance(codec), (shape, order)
            wanted = reference.linear_grad_input(dy.float(), *theirs)
            assert error(dx, wanted, product_size(dy, w.T)) < tolerance(codec), (shape, order)


def test_int8_products_have_the_bits_of_the_host(monkeypatch):
    for packed in test_cyclic.int8_layers():
        mine, _ = arguments(packed)
        out, features = packed.shape
        for batch, dtype in [(1, torch.float32), (8, torch.bfloat16), (70, torch.float16)]:
            x = walk.gaussian(batch, features).to(dtype)
            dy = walk.gaussian(batch, out).to(dtype)
            x[batch // 2, 5:] *= 100
            dy[0, 2] = 0
            wanted = ops.linear(x, *walk.arguments(packed))
            wanted_back = ops.linear_grad_input(dy, *walk.arguments(packed))
            for order in cuda.orders(monkeypatch):
                found = cuda.ops.linear(*cuda.tensors(x), *mine).cpu()
                assert torch.equal(found, wanted), (packed.codec.spec, batch, order)
                found = cuda.ops.linear_grad_input(*cuda.tensors(dy), *mine).cpu()
                assert torch.equal(found, wanted_back), (packed.codec.spec, batch, order)


def test_int8_products_of_what_is_not_finite_are_nan():
    packed = walk.random_layer(rs.codec("cyclic", activation="int8"), (33, 50))
    mine, _ = arguments(packed)
    x = walk.gaussian(2, 50)
    x[1, 3] = float("inf")
    y = cuda.ops.linear(*cuda.tensors(x), *mine).cpu()
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


def test_codes_are_checked_where_they_lie():
    codec = rs.codec("sparse")
    packed = walk.encoded(codec, (33, 50))
    mine, _ = arguments(packed)
    cuda.ops.check_codes(*mine)
    codes = packed.codes.clone()
    codes[3, 0, 1] = 255  # more entries than a row holds
    with pytest.raises(ValueError, match=r"codes tile \(3, 0\) is no valid code"):
        cuda.ops.check_codes(*cuda.tensors(codes), *mine[1:])


# Groups that are a part, several or no whole number of what a warp takes at a time; rows of codes
# and of activations that start at any byte; columns in several parts.
@pytest.mark.parametrize(
    ("codec", "shape"),
    [
        (Uniform(bits=4, group=32, symmetric=True), (70, 350)),
        (Uniform(bits=4, group=1024), (17, 3000)),
        (Uniform(bits=8, group=96), (70, 500)),
        (Uniform(bits=8, group=128, symmetric=True), (17, 600)),
        (Palette(layout="dense", bits=3), (17, 1032)),
        (Palette(layout="dense", bits=4), (17, 522)),
        (Palette(layout="words"), (33, 563)),
        (Palette(layout="words"), (17, 1000)),
        (Hierarchical(mode="mul"), (33, 1044)),
        (Hierarchical(mode="xor"), (24, 531)),
    ],
    ids=str,
)
def test_products_straight_from_runs_of_codes_are_exact_but_for_rounding(codec, shape, monkeypatch):
    mine, theirs = arguments(walk.random_layer(codec, shape))
    dense = reference.decode(*theirs).double()
    for batch, dtype in enumerate_types(1, 3, 16, 31, 64):
        x = walk.gaussian(batch, shape[1]).to(dtype)
        for order in cuda.orders(monkeypatch) if batch < 31 else [None]:
            y = cuda.ops.linear(*cuda.tensors(x), *mine)
            # The result is rounded to its dtype and so are weights that are no integers, by eps / 4
            # at most each.
            assert error(y, x.double() @ dense.T) < torch.finfo(dtype).eps / 2, (batch, order)


# Rows of T in several parts, no whole number of sixteens or fours; rows of codes that start at any
# byte and end within a run.
@pytest.mark.parametrize(
    ("codec", "shape"),
    [
        (Uniform(bits=4, group=32, symmetric=True), (350, 96)),
        (Uniform(bits=4, group=8), (1041, 280)),
        (Uniform(bits=8, group=96), (502, 500)),
        (Palette(layout="dense", bits=3), (1030, 17)),
        (Palette(layout="dense", bits=4), (521, 522)),
        (Palette(layout="dense", bits=4), (300, 264)),
        (Hierarchical(mode="mul"), (1044, 33)),
        (Hierarchical(mode="xor"), (531, 24)),
    ],
    ids=str,
)
def test_input_gradients_straight_from_runs_of_codes_are_exact_but_for_rounding(
    codec, shape, monkeypatch
):
    mine, theirs = arguments(walk.random_layer(codec, shape))
    dense = reference.decode(*theirs).double()
    for batch, dtype in enumerate_types(1, 9, 31, 64):
        dy = walk.gaussian(batch, shape[0]).to(dtype)
        first = None
        for order in cuda.orders(monkeypatch) if batch < 31 else [None]:
            dx = cuda.ops.linear_grad_input(*cuda.tensors(dy), *mine)
            # As above; where the frame has scales, dy times them is rounded too.
            assert error(dx, dy.double() @ dense) < 0.6 * torch.finfo(dtype).eps, (batch, order)
            first = dx if first is None else first
            assert torch.equal(dx, first)


def test_what_is_not_finite_in_one_row_reaches_no_gradient_of_others():
    codec = Uniform(bits=4, group=32)
    packed = walk.random_layer(codec, (19, 64))
    packed.params["scale"][18, 1] = float("inf")
    mine, _ = arguments(packed)
    dy = walk.gaussian(2, 19)
    dy[0, 3] = float("inf")
    dx = cuda.ops.linear_grad_input(*cuda.tensors(dy), *mine).cpu()
    assert not dx[0].isfinite().any()
    assert dx[1, :32].isfinite().all()
    assert not dx[1, 32:].isfinite().any()


@pytest.mark.parametrize("codec", walk.FEW, ids=walk.spec)
def test_gradients_of_params_agree_and_repeat(codec, monkeypatch):
    for shape in [(33, 50), (128, 256)]:
        packed = walk.trained(walk.encoded(codec, shape))
        mine, theirs = arguments(packed)
        dw = walk.gaussian(*shape, seed=3)
        wanted = reference.decode_grad_params(dw, *theirs)
        first = None
        for order in cuda.orders(monkeypatch):
            found = [g.cpu() for g in cuda.ops.decode_grad_params(*cuda.tensors(dw), *mine)]
            for f, w in zip(found, wanted, strict=True):
                assert f.shape == w.shape
                if w.numel():  # sums in float32, in another order
                    assert torch.allclose(f, w, rtol=1e-4, atol=1e-5 * float(w.abs().max() + 1))
            first = first or found
            assert all(map(torch.equal, found, first)), order


@pytest.mark.parametrize("codec", walk.DEFAULTS, ids=walk.spec)
def test_gradients_of_params_through_a_product_agree(codec):
    shape, _batch = (48, 136), 12
    mine, theirs = arguments(walk.trained(walk.encoded(codec, shape)))
    x, dy = walk.gaussian(3, 4, shape[1]), walk.gaussian(3, 4, shape[0], seed=1)
    found = cuda.ops.linear_grad_params(*cuda.tensors(dy, x), *mine)
    wanted = reference.linear_grad_params(dy, x, *theirs)
    for f, w in zip(found, wanted, strict=True):
        if w.numel() and float(w.norm()):
            # dW is a product of rounded factors, of which the params' gradients are sums.
            assert error(f, w) < 4 * PRODUCT


@pytest.mark.parametrize("block", [2, 4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hadamard_gives_the_same_bits(block, dtype, monkeypatch):
    x = walk.gaussian(3, 2, 5 * block).to(dtype)
    wanted = ops.hadamard(x, block)
    for _ in cuda.orders(monkeypatch):
        assert torch.equal(cuda.ops.hadamard(*cuda.tensors(x), block).cpu(), wanted)


@pytest.mark.parametrize("codec", walk.DEFAULTS, ids=walk.spec)
def test_codes_at_any_address_decode_alike(codec):
    packed = walk.random_layer(codec, (33, 50))
    (codes, *rest), theirs = arguments(packed)
    moved = torch.cat((codes.new_zeros(1), codes.flatten()))[1:].view(codes.shape)
    assert torch.equal(cuda.ops.decode(moved, *rest).cpu(), reference.decode(*theirs))


@pytest.mark.parametrize("codec", walk.DEFAULTS, ids=walk.spec)
def test_activations_at_any_address_multiply_alike(codec):
    mine, _ = arguments(walk.encoded(codec, (48, 136)))
    for batch in (1, 70):
        x, dy = cuda.tensors(*(walk.gaussian(batch, n).bfloat16() for n in (136, 48)))
        x_moved, dy_moved = (
            torch.cat((v.new_zeros(1), v.flatten()))[1:].view(v.shape) for v in (x, dy)
        )
        wanted = cuda.ops.linear(x, *mine), cuda.ops.linear_grad_input(dy, *mine)
        found = cuda.ops.linear(x_moved, *mine), cuda.ops.linear_grad_input(dy_moved, *mine)
        for f, w in zip(found, wanted, strict=True):
            torch.testing.assert_close(f, w)


# Sums so long that several blocks share each, which an emulated device of three processors does
# from 32 steps of a warp on; odd numbers of tiles, of which the last steps hold but a few.
@pytest.mark.parametrize("bits", [1.5, 2, 2.5, 3, 3.5, 4])
def test_trellis_products_shared_by_blocks_agree_and_repeat(bits, monkeypatch):
    codec = REGISTRY["trellis"](bits=bits)
    for shape, batch, dtype in [((80, 2128), 3, torch.bfloat16), ((560, 48), 17, torch.float16)]:
        mine, theirs = arguments(walk.random_layer(codec, shape))
        x, dy = walk.gaussian(batch, shape[1]).to(dtype), walk.gaussian(batch, shape[0]).to(dtype)
        first = None
        for _ in cuda.orders(monkeypatch):
            y = cuda.ops.linear(*cuda.tensors(x), *mine)
            dx = cuda.ops.linear_grad_input(*cuda.tensors(dy), *mine)
            first = first or (y, dx)
            assert torch.equal(y, first[0])
            assert torch.equal(dx, first[1])
        assert error(y, reference.linear(x.float(), *theirs)) < PRODUCT
        assert error(dx, reference.linear_grad_input(dy.float(), *theirs)) < PRODUCT


needs_gpu = pytest.mark.skipif(not cuda.on_gpu, reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("batch", [1, 70])
@pytest.mark.parametrize("codec", walk.DEFAULTS, ids=walk.spec)
def test_a_captured_graph_computes_what_it_is_given_later(codec, batch):
    mine, _ = arguments(walk.trained(walk.encoded(codec, (48, 136))))
    x, dy = (walk.gaussian(batch, n).to(torch.bfloat16).cuda() for n in (136, 48))

    def run():
        y, dx = cuda.ops.linear(x, *mine), cuda.ops.linear_grad_input(dy, *mine)
        return [y, dx, *cuda.ops.linear_grad_params(dy, x, *mine)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    x.copy_(-x.roll(1, 0))
    dy.copy_(2 * dy.roll(1, 0))
    for params in mine[1]:
        if params.is_floating_point():
            params.mul_(1.25)
    graph.replay()
    for f, w in zip(found, run(), strict=True):
        torch.testing.assert_close(f, w)


# More than 2^31 weights, and bytes of codes at 8 bits: the same 128 rows over and over.
@needs_gpu
@pytest.mark.parametrize("codec", ["uniform(bits=8)", "trellis(bits=4)", "palette(bits=4)"])
def test_layers_of_more_than_two_thousand_million_weights(codec):
    if torch.cuda.mem_get_info()[0] < 32 << 30:
        pytest.skip("needs 32 GiB of GPU memory")
    part, times = walk.random_layer(rs.codec(codec), (128, 32768)), 520
    axes = {p.name: p.axis for p in part.codec.params(part.shape)}
    codes, small = cuda.tensors(part.codes, list(part.params.values()))
    params = [
        p.repeat(times, *[1] * (p.dim() - 1)) if axes[name] in ("out", "both") else p
        for name, p in zip(part.params, small, strict=True)
    ]
    shape = 128 * times, 32768
    whole = codes.repeat(times, 1, 1), params, part.codec.spec, shape
    w = cuda.ops.decode(codes, small, part.codec.spec, part.shape)
    assert torch.equal(cuda.ops.decode(*whole)[-128:], w)
    for batch in (1, 64, 80):
        y = cuda.ops.linear(walk.gaussian(batch, 32768).cuda(), *whole)
        if batch > 64:  # a product of torch's, which may add up in any order
            torch.testing.assert_close(
                y[:, :128], y[:, -128:], rtol=1e-2, atol=float(y.std()) / 100
            )
        else:
            assert torch.equal(y[:, :128], y[:, -128:])
        dy = torch.zeros(batch, shape[0], device="cuda")
        dy[-1, -5] = 1
        dx = cuda.ops.linear_grad_input(dy, *whole)
        assert error(dx[-1], w[-5].cpu()) < 2 * PRODUCT


def test_empty_batches_give_empty_products():
    codec = walk.DEFAULTS[0]
    mine, _ = arguments(walk.encoded(codec, (48, 136)))
    x = torch.zeros(0, 136)
    assert cuda.ops.linear(*cuda.tensors(x), *mine).shape == (0, 48)
    assert cuda.ops.linear_grad_input(*cuda.tensors(x.new_zeros(0, 48)), *mine).shape == (0, 136)


def test_gradients_that_are_not_finite_make_nan_and_nothing_else():
    codec = next(c for c in walk.DEFAULTS if c.name == "palette")
    mine, _ = arguments(walk.encoded(codec, (33, 50)))
    dw = walk.gaussian(33, 50)
    dw[3, 4] = float("inf")
    found = cuda.ops.decode_grad_params(*cuda.tensors(dw), *mine)
    assert all(not bool(g.isfinite().all()) for g in found if g.numel())
