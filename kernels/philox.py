"""Philox4x32-10 and Box-Muller; the contract is in `distruction.ops.reference.philox`.

One call of the generator makes four words for four consecutive elements: a program that handles ``BLOCK``
elements makes ``BLOCK // 4`` calls, and joining the results puts each element where its thread reads and writes.
"""

import triton
import triton.language as tl

from .approximate import log2, opaque, square_root

KEYS = tuple(f"k{i}" for i in range(20))
"""The names under which a kernel takes its round keys: one by one, since Triton specialises the elements of a tuple,
and would compile anew for a seed with a key that is 1 or divisible by 16, whatever ``do_not_specialize`` says."""


@triton.jit
def philox(c0, c1, c2, c3, keys):
    """Ten rounds on the counter (c0, c1, c2, c3) with the key (k0, k1), all uint32."""
    for r in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ keys[2 * r].to(tl.uint32, bitcast=True)
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ keys[2 * r + 1].to(tl.uint32, bitcast=True)
        c3 = p0.to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def uniform(word):
    """float32((word + 1/2) * 2**-32), rounded once: the terms are exact until they meet.

    The word's bits become mantissas of 1 + high * 2**-23 and 2**-9 + low * 2**-32, which needs no conversion.
    """
    high = ((word >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    low = ((word & 0x1FF) | 0x3B000000).to(tl.float32, bitcast=True) - 0.00195312488358467817306518555  # 2**-9 - 2**-33
    return high + low


@triton.jit
def box_muller(radius_word, angle_word, sign_bit, TARGET: tl.constexpr):
    """Two standard normals, cosine and sine, negated where ``sign_bit`` is 2**31.

    The error against the float64 formula is at most 2e-6 * max(1, |eps|).
    """
    u = uniform(radius_word)
    # -log2(u); the hardware's logarithm has an absolute error of 2**-22 near u = 1, where the radius is a square root
    # of it: two terms of the series, refitted for v < 2**-8 (relative error 7e-7), take over there.
    v = 1.0 - u
    series = v * tl.fma(v, 0.7232315540313721, 1.442694067955017)
    radius = square_root(tl.where(v < 0.00390625, series, -log2(u, TARGET)), TARGET)
    # The polynomials contain the radius' factor sqrt(2 log 2): sin(pi x) for |x| <= 1/2 has a relative error of 5e-9,
    # cos(pi x) an absolute one of 6e-8, before rounding.
    half_turn = angle_word.to(tl.int32, bitcast=True).to(tl.float32) * (0x2F800000 ^ sign_bit).to(
        tl.float32, bitcast=True
    )
    x2 = half_turn * half_turn
    sine = tl.fma(x2, 0.09132038801908493, -0.7043762803077698)
    sine = tl.fma(x2, sine, 3.0024776458740234)
    sine = tl.fma(x2, sine, -6.084513187408447)
    sine = tl.fma(x2, sine, 3.6989426612854004)
    cosine = tl.fma(x2, 0.2586732506752014, -1.568169116973877)
    cosine = tl.fma(x2, cosine, 4.778414726257324)
    cosine = tl.fma(x2, cosine, -5.810274600982666)
    cosine = tl.fma(x2, cosine, 1.1774100065231323)
    mirrored = (radius * cosine).to(tl.uint32, bitcast=True) ^ (angle_word << 31) ^ sign_bit
    return mirrored.to(tl.float32, bitcast=True), (radius * half_turn) * sine


@triton.jit
def interleave(x0, x1, x2, x3, BLOCK: tl.constexpr):
    """The elements x0[0], x1[0], x2[0], x3[0], x0[1], ... without moving any between threads."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [BLOCK])


@triton.jit
def words_and_normals(
    group,
    group_high,
    first,
    stream,
    draw,
    keys,
    ANTITHETIC: tl.constexpr,
    BLOCK: tl.constexpr,
    TARGET: tl.constexpr,
):
    """The words and normals of ``BLOCK`` elements of a chunk.

    Args:
        group, group_high: the two words of the chunk's first group (element index // 4).
        first: the block's first element in the chunk.
        draw: draw number, int64.
        keys: the generator's round keys, a tuple of what a kernel takes as `KEYS`.
    """
    groups = group + (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    if ANTITHETIC:
        number = draw >> 1
        # Opaque, or the compiler would add the draw's parity to each angle word before its shift.
        sign_bit = opaque((draw & 1).to(tl.uint32) << 31, TARGET)
    else:
        number = draw
        sign_bit = (draw * 0).to(tl.uint32)
    w0, w1, w2, w3 = philox(groups, group_high, number.to(tl.uint32), stream, keys)
    n0, n1 = box_muller(w0, w1, sign_bit, TARGET)
    n2, n3 = box_muller(w2, w3, sign_bit, TARGET)
    return interleave(w0, w1, w2, w3, BLOCK), interleave(n0, n1, n2, n3, BLOCK)
