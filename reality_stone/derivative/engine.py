"""Derivatives of codes by their phase, by table lookup alone, and rotation of int8 phases.

Source: the documents' bit-derivative engine, with tables whose rows are derivatives of each other
(theirs are not). The layouts are drawn in csrc/derivative.h.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..codecs.cyclic_tables import cyclic, cyclic16, cyclic256, cyclic_scalar

_NONE = (0, 0)


@dataclass(frozen=True)
class Layout:
    """Where a code has what: fields are (lowest bit, mask); see csrc/derivative.h."""

    table: str  # of codecs.cyclic_tables
    phase: tuple[int, int]
    diff: tuple[int, int] = _NONE
    amp: tuple[int, int] = _NONE
    family: tuple[int, int] = _NONE
    step: int = 1  # columns of the table per phase
    plus: int = 0  # to the amplitude
    shift: int = 0


TABLES = {
    "cyclic": cyclic,
    "cyclic16": cyclic16,
    "cyclic256": cyclic256,
    "cyclic_scalar": cyclic_scalar,
}
LAYOUTS = {
    "documents": Layout("cyclic", (28, 15), (22, 3), (0, 255), shift=7),
    "documents_fine": Layout("cyclic16", (26, 63), (22, 3), (0, 255), shift=8),
    "cyclic_32": Layout("cyclic", (28, 15), (26, 3), (8, 255)),
    "cyclic_32_fine": Layout("cyclic16", (28, 15), (26, 3), (8, 255), step=4, shift=8),
    "cyclic_16": Layout("cyclic", (12, 15), _NONE, (0, 15)),
    "cyclic_16_fine": Layout("cyclic16", (12, 15), _NONE, (0, 15), step=4, shift=4),
    "cyclic_compound": Layout("cyclic", (12, 15), (10, 3), (4, 63)),
    "cyclic_compound_fine": Layout("cyclic16", (12, 15), (10, 3), (4, 63), step=4, shift=6),
    "cyclic_scalar_8": Layout("cyclic_scalar", (0, 15), (4, 3), family=(6, 3), plus=1),
    "cyclic_scalar_16": Layout("cyclic256", (0, 255), (8, 3), (10, 63), plus=1, shift=6),
}


def bit_derivative(codes: Tensor, order: int, layout: str = "documents") -> Tensor:
    """The `order`-th derivative of codes (int32, any shape) by their phase, int16.

    (T[(diff + order) & 3][phase] * amp) >> shift, T's rows being a function and its derivatives.
    `documents`: their 32-bit code, shifted by 7. cyclic_32, cyclic_16, cyclic_compound: the words
    of the codec `cyclic`, not shifted: order 0 is the exact integer a basis vector is multiplied
    with. With _fine the int16 table of 64 phases, shifted by the bits of the amplitude, which so is
    a share of full scale, 32767. cyclic_scalar_8 (no amplitude) and cyclic_scalar_16 (256 phases,
    full scale 32767): the codes of `cyclic_scalar`.

    Order and order + 4 give equal integers. Where T is the cosine, which is everywhere but in
    families 1 to 3 of cyclic_scalar_8, the next derivative is the function a quarter period later.
    Those: 1, sinh and cosh, has a period of 2 orders; 2, exp, one of 1; 3, tanh, has its three
    derivatives each to its own scale, so that only a period of 4 orders, by convention, is left.

    ValueError for an unknown layout or a negative order, TypeError unless codes are int32.

    >>> bit_derivative(torch.tensor([0x000000FF], dtype=torch.int32), 2)  # -cos(0) * 255 in int8
    tensor([-254], dtype=torch.int16)
    """
    return ops.bit_derivative(codes, order, layout)


def bit_derivative_reference(codes: Tensor, order: int, layout: str) -> Tensor:
    """The op in plain torch."""
    if layout not in LAYOUTS:
        raise ValueError(
            f"bit_derivative: layout must be one of {', '.join(LAYOUTS)}, got '{layout}'"
        )
    if codes.dtype != torch.int32:
        raise TypeError(f"bit_derivative: codes must be int32, got {codes.dtype}")
    if order < 0:
        raise ValueError(f"bit_derivative: order must be 0 or more, got {order}")
    row = LAYOUTS[layout]
    table = TABLES[row.table]().to(codes.device, torch.int32)
    table = table.reshape(-1, 4, table.shape[-1])

    def bits(field: tuple[int, int]) -> Tensor:
        return codes >> field[0] & field[1]

    value = table[bits(row.family), bits(row.diff) + order & 3, row.step * bits(row.phase)]
    return (value * (bits(row.amp) + row.plus) >> row.shift).to(torch.int16)


def chain(
    code1: Tensor, code2: Tensor, grad: Tensor, layout: str = "documents"
) -> tuple[Tensor, Tensor]:
    """Gradients (int16, int16) of two codes for the gradient `grad` (int16) of what they make:
    each grad times the code's first derivative in int32, shifted right by 15, held to int16.

    As in the documents: the shift takes a derivative for a fraction of 2^15 and rounds down.
    """
    if grad.dtype != torch.int16:
        raise TypeError(f"chain: grad must be int16, got {grad.dtype}")

    def through(code: Tensor) -> Tensor:
        product = grad.int() * bit_derivative(code, 1, layout).int() >> 15
        return product.clamp(-32768, 32767).to(torch.int16)

    return through(code1), through(code2)


def euler(phase: Tensor) -> Tensor:
    """(..., 2) int8: cosine and sine, times 127, of phases (integers of any sign) in 16ths of a
    turn."""
    if phase.is_floating_point() or phase.is_complex():
        raise TypeError(f"euler: phase must be integers, got {phase.dtype}")
    table = cyclic().to(phase.device)
    at = phase.long() & 15
    return torch.stack((table[0, at], table[3, at]), -1)  # the third derivative of cos is sin


def rotate(z: Tensor, delta: Tensor) -> Tensor:
    """z (..., 2) int8, real and imaginary part, turned by `delta` 16ths of a turn: the product
    with `euler(delta)` shifted right by 7 and held to int8.

    A unit is 127 and the shift divides by 128 and rounds down: each rotation shortens by up to a
    hundredth, a full turn included.
    """
    if z.dtype != torch.int8 or z.shape[-1:] != (2,):
        raise TypeError(f"rotate: z must be int8 (..., 2), got {z.dtype} {tuple(z.shape)}")
    (a, b), (c, d) = (x.int().unbind(-1) for x in (z, euler(delta)))
    turned = torch.stack((a * c - b * d, a * d + b * c), -1) >> 7
    return turned.clamp(-128, 127).to(torch.int8)
