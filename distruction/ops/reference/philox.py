"""Counter-based normal draws: Philox4x32-10 and Box-Muller, the contract that every backend keeps.

One call of Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011) serves four consecutive elements of a tensor:

    key     = 64-bit seed                                  (low word, high word)
    counter = (block low, block high, draw, stream)        block = element index // 4
    w0..w3  = Philox4x32-10(key, counter)

    u_j = float32((w_j + 0.5) * 2**-32)                    rounded once, j in {0, 2}
    t_j = float32(int32(w_j)) * 2**-32                     signed fraction of a half turn, j in {1, 3}
    r_j = sqrt(-2 log u_j)
    element 4b   : r_0 * cos(pi t_1) * (-1)**(w_1 & 1)     element 4b+1 : r_0 * sin(pi t_1)
    element 4b+2 : r_2 * cos(pi t_3) * (-1)**(w_3 & 1)     element 4b+3 : r_2 * sin(pi t_3)

The half turn covers the right half plane; the word's lowest bit mirrors it. Words, ``u`` and ``t`` are
bit-identical in every backend; the normals agree to 4e-6 * max(1, |eps|).

With ``antithetic`` draws, draw number d uses the counter's draw d // 2 and the sign (-1)**d, so that draws
2i and 2i + 1 are eps and -eps.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox(counter: Sequence[Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words for each counter: Philox4x32-10.

    Args:
        counter: four int64 tensors of one shape (or broadcastable), each word in [0, 2**32).
        seed: 64-bit key; a negative number stands for its two's complement.

    Returns:
        Four int64 tensors with words in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # The 64-bit product wraps in int64 but keeps its bits; the mask undoes the arithmetic shift.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent float64 standard normals (cosine, sine) from two 32-bit words held in int64."""
    uniform = ((radius_word.double() + 0.5) * 2.0**-32).float().double()
    radius = torch.sqrt(-2.0 * torch.log(uniform))
    signed = torch.where(angle_word >= 2**31, angle_word - 2**32, angle_word)
    angle = signed.float().double() * (math.pi * 2.0**-32)
    mirror = 1.0 - 2.0 * (angle_word & 1).double()
    return radius * torch.cos(angle) * mirror, radius * torch.sin(angle)


def words_and_normals(
    numel: int, *, offset: int, stream: int, seed: int, draw: int | Tensor, antithetic: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The words (int64) and normals (float64) of elements ``offset .. offset + numel`` of one tensor.

    The words are those of each element's own position (w0 for element 4b, w1 for 4b+1, ...); their low 16
    bits drive stochastic rounding.
    """
    draw = torch.as_tensor(draw, dtype=torch.int64, device=device)
    first, last = offset // 4, (offset + numel + 3) // 4
    block = torch.arange(first, last, dtype=torch.int64, device=device)
    number = (draw >> 1 if antithetic else draw) & _WORD
    counter = (block & _WORD, (block >> 32) & _WORD, number, torch.full_like(block, stream & _WORD))
    words = philox(counter, seed)
    normals = torch.stack([*box_muller(words[0], words[1]), *box_muller(words[2], words[3])], dim=-1)
    if antithetic:
        normals = normals * (1 - 2 * (draw & 1))
    lanes = slice(offset - 4 * first, offset - 4 * first + numel)
    return torch.stack(words, dim=-1).reshape(-1)[lanes], normals.reshape(-1)[lanes]
