"""A program's way into a model: all tensors of a type are in one launch, with one program per chunk of a tensor.

What the programs read to find their tensor, its addresses and their place in it is built by `tables`. Chunks of
unaligned tensors begin where the element index in the whole parameter is a multiple of the chunk, so that a group of
four that shares a call of the generator lies in one program.
"""

import triton
import triton.language as tl

# The cells of a tensor's record: int64 each.
NUMEL = tl.constexpr(0)
SHIFT = tl.constexpr(1)  # elements between the first chunk's start and the tensor's
GROUP = tl.constexpr(2)  # group of four that the first chunk starts with
STREAM = tl.constexpr(3)
FIRST_CHUNK = tl.constexpr(4)
PARAM = tl.constexpr(5)
MEAN = tl.constexpr(6)
STD = tl.constexpr(7)
M1 = tl.constexpr(8)
M2 = tl.constexpr(9)
PRIOR_MEAN = tl.constexpr(10)
PRIOR_STD = tl.constexpr(11)
PRIOR_CODES = tl.constexpr(12)
PRIOR_LOW = tl.constexpr(13)
PRIOR_STEP = tl.constexpr(14)
WIDTH = tl.constexpr(15)


@triton.jit
def locate(records, tensor_of_chunk, chunk, ALIGNED: tl.constexpr):
    """This program's place: its tensor, the tensor's record, the chunk's start in it, and the groups' two words.

    Elements ``begin <= i < end`` of the chunk lie inside the tensor, at ``start + i``; ``begin`` is zero but for the
    first chunk of an unaligned shard.

    Returns:
        (tensor, record, start, begin, end, group, group_high)
    """
    program = tl.program_id(0)
    tensor = tl.load(tensor_of_chunk + program).to(tl.int64)
    record = records + tensor * WIDTH
    start = (program - tl.load(record + FIRST_CHUNK)) * chunk
    group = tl.load(record + GROUP) + start // 4
    if ALIGNED:
        begin = 0
        start = tl.multiple_of(start, 4)
        end = tl.multiple_of(tl.minimum(tl.load(record + NUMEL) - start, chunk).to(tl.int32), 4)
    else:
        start -= tl.load(record + SHIFT)
        begin = tl.maximum(-start, 0).to(tl.int32)
        end = tl.minimum(tl.load(record + NUMEL) - start, chunk).to(tl.int32)
    return tensor, record, start, begin, end, group.to(tl.uint32), (group >> 32).to(tl.uint32)


@triton.jit
def pointer(cell, start, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer in a cell of a table, moved to the chunk's start."""
    p = tl.load(cell).to(tl.pointer_type(TYPE))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p + start


@triton.jit
def block_of(first, begin, end, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """The block that starts at ``first``: indices that may be accessed, and which of them are the tensor's.

    Of aligned tensors, arrays that a kernel only reads are loaded without a mask, since a mask costs the initialisation
    of the registers: the last four elements stand in for those beyond the end. A stand-in has normals of its own, and
    whatever comes of it must go nowhere.
    """
    i = first + tl.arange(0, BLOCK)
    if ALIGNED:
        within = tl.minimum(i & -4, end - 4) + (i & 3)
        return tl.max_contiguous(tl.multiple_of(within, 4), 4), i < end
    else:
        return i, (i >= begin) & (i < end)


@triton.jit
def load(p, inside, ALIGNED: tl.constexpr):
    """Elements, as float32, of an array that the kernel does not store; those outside the tensor are arbitrary."""
    if ALIGNED:
        return tl.load(p).to(tl.float32)
    else:
        return tl.load(p, inside).to(tl.float32)


@triton.jit
def sum_of_groups(x, first, inside, end, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Sums over groups of four, which one thread holds, in float64; elements outside the tensor do not count."""
    if ALIGNED:
        of_group = tl.sum(tl.reshape(x, [BLOCK // 4, 4]), 1)
        of_group = tl.where(first + 4 * tl.arange(0, BLOCK // 4) < end, of_group, 0.0)
    else:
        of_group = tl.sum(tl.reshape(tl.where(inside, x, 0.0), [BLOCK // 4, 4]), 1)
    return of_group.to(tl.float64)


@triton.jit(do_not_specialize=["counters", "found_inf", "partial", "total", "partials"])
def finish_kernel(
    counters, found_inf, partial, total, partials, ADVANCE: tl.constexpr, UPDATED: tl.constexpr, BLOCK: tl.constexpr
):
    """One program, after the others: the sum of the partial sums in a fixed order, and the counters."""
    if total is not None:
        sums = tl.zeros([BLOCK], tl.float64)
        if partial is not None:
            for first in range(0, partials, BLOCK):
                i = first + tl.arange(0, BLOCK)
                sums += tl.load(partial + i, i < partials, 0.0)
        tl.store(total, tl.sum(sums, 0))
    if ADVANCE:
        draw = tl.load(counters)
        accumulated = tl.load(counters + 1)
        tl.debug_barrier()  # every thread loads them, and the first one stores
        next_draw = draw + 1
        next_accumulated = accumulated * 0 if UPDATED else accumulated + 1
        if found_inf is not None:
            proceed = tl.load(found_inf) == 0.0
            next_draw = tl.where(proceed, next_draw, draw)
            next_accumulated = tl.where(proceed, next_accumulated, accumulated)
        tl.store(counters, next_draw)
        tl.store(counters + 1, next_accumulated)
