"""The hardware's approximate instructions, which Triton's own functions wrap in slower, full-range versions.

``TARGET`` is ``"cuda"``, ``"hip"`` or ``"interpreter"``; the interpreter computes correctly rounded values.
Error bounds are those of NVIDIA's PTX ISA and AMD's CDNA 3 ISA.
"""

import triton
import triton.language as tl


@triton.jit
def reciprocal(x, TARGET: tl.constexpr):
    """1 / x within 1 ulp; a denormal x counts as zero."""
    if TARGET == "cuda":
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    elif TARGET == "hip":
        return tl.inline_asm_elementwise("v_rcp_f32 $0, $1", "=v,v", [x], tl.float32, True, 1)
    else:
        return 1.0 / x


@triton.jit
def inverse(x, TARGET: tl.constexpr):
    """1 / x after a step of Newton's: that of a power of two, as a gradient's scale is, is exact."""
    estimate = reciprocal(x, TARGET)
    return tl.fma(estimate, tl.fma(-x, estimate, 1.0), estimate)


@triton.jit
def square_root(x, TARGET: tl.constexpr):
    """sqrt(x) within 1 ulp (CUDA: relative error 2**-22.7); a denormal x counts as zero."""
    if TARGET == "cuda":
        return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    elif TARGET == "hip":
        return tl.inline_asm_elementwise("v_sqrt_f32 $0, $1", "=v,v", [x], tl.float32, True, 1)
    else:
        return tl.sqrt(x)


@triton.jit
def log2(x, TARGET: tl.constexpr):
    """The binary logarithm of a positive x: absolute error 2**-22 for x in (1/2, 2), relative 2**-22 elsewhere."""
    if TARGET == "cuda":
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    elif TARGET == "hip":
        return tl.inline_asm_elementwise("v_log_f32 $0, $1", "=v,v", [x], tl.float32, True, 1)
    else:
        return tl.log2(x)


@triton.jit
def opaque(x, TARGET: tl.constexpr):
    """The 32-bit integer x, of which the compiler must not know where it comes from."""
    if TARGET == "cuda":
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.uint32, True, 1)
    else:
        return x
