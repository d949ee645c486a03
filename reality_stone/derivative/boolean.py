"""Kronecker deltas and derivatives of functions of bits.

Source: the documents' bit calculus. What it says of itself holds: Boolean derivatives are sparse
and discontinuous and do not train networks (its own figures: XOR is at 75 percent after more than
5000 epochs). Here they serve as discrete coordinate moves: a bit is turned over where that lowers
a loss, which is what code updates do (`derivative.moves`).

For functions f, g of codes to integers of any width, D_k f = boolean_derivative(f, ., k):
  D_k D_k f = 0,  D_j D_k f = D_k D_j f
  sum      D_k (f ^ g) = D_k f ^ D_k g
  product  D_k (f & g) = (D_k f & g) ^ (f & D_k g) ^ (D_k f & D_k g)
  chain    D_k f(g)    = D_b f(g) & D_k g          for f of the single bit b of g
           D_k f(g)    = f(g ^ D_k g) ^ f(g)       for any f
The documents leave out the third term of the product rule and state the chain rule as if it held
for any f; both are wrong for AND of a bit with itself already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]
Integers = TypeVar("Integers", int, Tensor)


def delta(i: Integers, j: Integers) -> Integers:
    """1 where i and j are equal, else 0, by XOR; integers or integer tensors, int32 at least."""
    apart = i ^ j
    if isinstance(apart, Tensor):
        return (apart == 0).to(torch.promote_types(apart.dtype, torch.int32))
    return int(apart == 0)


def bit_partial(f: Function, code: Tensor, k: int) -> Tensor:
    """f(code ^ 2^k) - f(code): the finite difference of f, of any type of values, along bit k."""
    return f(_turned(code, k)) - f(code)


def boolean_derivative(f: Function, code: Tensor, k: int) -> Tensor:
    """f(code ^ 2^k) ^ f(code) for f with integer or bool values: which of its bits follow bit k."""
    return f(_turned(code, k)) ^ f(code)


def _turned(code: Tensor, k: int) -> Tensor:
    """`code` with bit k turned over. ValueError where its type has no such bit."""
    if code.is_floating_point() or code.is_complex() or code.dtype == torch.bool:
        raise TypeError(f"a code must be integers, got {code.dtype}")
    bits = torch.iinfo(code.dtype).bits
    if not 0 <= k < bits:
        raise ValueError(f"bit must be from 0 to {bits - 1} for {code.dtype}, got {k}")
    # As a number of the code's own type: the top bit of a signed one is negative.
    signed = code.dtype.is_signed and k == bits - 1
    return code ^ torch.tensor(
        -(1 << k) if signed else 1 << k, dtype=code.dtype, device=code.device
    )
