"""Cosine and sine of rational turns: the tables of several codecs are made of them."""

import torch

from reality_stone.codecs.trig import turn_cosine, turn_sine


def test_turns_agree_with_the_library_to_the_last_bits():
    for n in (4, 8, 12, 16, 60, 256, 1020, 1 << 32):
        k = torch.arange(-300, 5000) * 1237
        angle = (k % n).double() * (2 * torch.pi / n)
        # The angle itself carries half an ulp of up to 2 pi.
        assert (turn_cosine(k, n) - angle.cos()).abs().max() < 1.1e-15
        assert (turn_sine(k, n) - angle.sin()).abs().max() < 1.1e-15


def test_quarter_turns_are_exact():
    k = torch.arange(8)
    assert turn_cosine(k, 4).tolist() == [1, 0, -1, 0] * 2
    assert turn_sine(k, 4).tolist() == [0, 1, 0, -1] * 2
