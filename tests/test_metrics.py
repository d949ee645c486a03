"""Metrics beside their definitions, written out."""

import math

import numpy as np
import pytest
import torch
import walk
from torch import nn

import reality_stone as rs
from reality_stone import metrics
from reality_stone.nn import RBELinear


def test_error_metrics_are_their_definitions():
    a, b = torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert metrics.nmse(a, b) == pytest.approx(4 / 30)
    assert metrics.rmse(a, b) == pytest.approx(1.0)
    assert metrics.psnr(a, b) == pytest.approx(20 * math.log10(4))
    assert metrics.squared_error(a, b, torch.tensor([7.0, 0.5])) == pytest.approx(2.0)
    assert metrics.psnr(b, b) == math.inf
    assert metrics.psnr(a, torch.zeros(2, 2)) == -math.inf


def ssim_by_loops(a, b):
    """Of every 7 x 7 window by itself, with numpy's own covariance."""
    spread = b.max() - b.min()
    c1, c2, found = (0.01 * spread) ** 2, (0.03 * spread) ** 2, []
    for i in range(a.shape[0] - 6):
        for j in range(a.shape[1] - 6):
            x, y = a[i : i + 7, j : j + 7].ravel(), b[i : i + 7, j : j + 7].ravel()
            (vx, both), (_, vy) = np.cov(x, y)
            mx, my = x.mean(), y.mean()
            top = (2 * mx * my + c1) * (2 * both + c2)
            found.append(top / ((mx * mx + my * my + c1) * (vx + vy + c2)))
    return np.mean(found)


def test_ssim_is_the_mean_over_windows():
    b = walk.gaussian(12, 20)
    for a in (b, b + 0.1 * walk.gaussian(12, 20, seed=1), -b, torch.zeros(12, 20)):
        want = ssim_by_loops(a.double().numpy(), b.double().numpy())
        assert metrics.ssim(a, b) == pytest.approx(want, rel=1e-9, abs=1e-12)
    assert metrics.ssim(b, b) == pytest.approx(1.0)
    assert metrics.ssim(torch.ones(7, 7), torch.ones(7, 7)) == pytest.approx(1.0)
    for bad in ((6, 20), (12, 6)):
        with pytest.raises(ValueError, match="at least 7 x 7"):
            metrics.ssim(torch.zeros(bad), torch.zeros(bad))
    with pytest.raises(ValueError, match="one shape"):
        metrics.ssim(torch.zeros(9, 9), torch.zeros(9, 10))


def test_kl_is_that_of_torch():
    p, q = walk.gaussian(5, 9).log_softmax(-1), walk.gaussian(5, 9, seed=1).log_softmax(-1)
    want = nn.functional.kl_div(p, q, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(metrics.kl_divergence(p, q), want)
    assert metrics.kl_divergence(p, p).abs().max() < 1e-6


def test_sizes_count_everything_and_shared_tables_once():
    packed = rs.codec("uniform(bits=4, group=32)").encode(walk.gaussian(8, 64))
    per_weight = 4 + 2 * 16 / 32
    assert metrics.stored(packed) == (per_weight * 512, 512)
    assert metrics.bits_per_weight(packed) == per_weight
    assert metrics.compression_ratio(packed) == 16 / per_weight
    assert metrics.compression_ratio(packed, 32) == 32 / per_weight

    layer = RBELinear.from_packed(packed)
    twice = nn.Sequential(layer, nn.GELU(), layer, RBELinear.from_packed(packed))
    assert metrics.stored(twice) == (2 * per_weight * 512, 1024)
    shared = RBELinear.from_packed(packed)
    shared.scale = layer.scale
    assert metrics.stored(nn.Sequential(layer, shared))[0] == 2 * per_weight * 512 - 16 * 16
    with pytest.raises(ValueError, match="no compressed layer"):
        metrics.stored(nn.Linear(2, 2))
