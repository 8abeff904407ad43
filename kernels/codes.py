"""Standard deviations from 8-bit codes, bit for bit as `distruction.ops.reference.codes` restores them.

Nothing here is fused (`tables.LAUNCH`), as no `tl.fma` is named.
"""

import triton
import triton.language as tl

from distruction.ops.reference import codes as reference

_RATE = tl.constexpr(reference.LOG2_E)
_C1, _C2, _C3, _C4, _C5 = (tl.constexpr(c) for c in reference.COEFFICIENTS)
_GROUPS = tl.constexpr(reference.BLOCK // 4)


@triton.jit
def decode(code, low, rate):
    """low * 2**(code * rate); code is a float32."""
    t = code * rate
    exponent = t.to(tl.int32)
    f = t - exponent.to(tl.float32)
    p = (((f * _C5 + _C4) * f + _C3) * f + _C2) * f + _C1
    bits = ((p * f + 1.0) * low).to(tl.int32, bitcast=True) + (exponent << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def ranges(low_p, step_p, group, group_high, first, end, BLOCK: tl.constexpr):
    """``low`` and the rate of ``BLOCK`` elements of a chunk, from ``first`` on; those outside the tensor are arbitrary.

    Chunks of a tensor with codes begin at multiples of ``BLOCK`` in the whole parameter (`tables`), so that on a GPU
    the elements share one block of codes; more than one is the interpreter's.

    Args:
        low_p, step_p: of the parameter's first block of codes.
        group, group_high: the two words of the chunk's first group of four (element index // 4).
    """
    groups = ((group_high.to(tl.int64) << 32) | group.to(tl.int64)) + first // 4
    if BLOCK > 4 * _GROUPS:
        groups += tl.minimum(tl.arange(0, BLOCK), end - 1 - first) // 4
    block = groups // _GROUPS
    return tl.load(low_p + block), tl.load(step_p + block) * _RATE
