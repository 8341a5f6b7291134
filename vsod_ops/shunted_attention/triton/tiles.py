"""What the kernels of both directions share: rows of a head, read, multiplied and written in tiles.

Names: p_ pointer, s_ stride, b_ block, o_ offset, m_ mask.  VEC is how many elements (16 bytes at
most) every row is aligned to, 0 if the last dimension is not contiguous: it gives wide and
asynchronous copies without a compilation for each stride.
"""

import inspect
import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...triton_tuning import INTERPRET, number

_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2))
_INTERPRET = tl.constexpr(INTERPRET)


class Strided(NamedTuple):
    """A tensor (B, H, N, D) and its strides; or G tensors, G of each stride, these opaque."""

    p: Any
    b: Any
    h: Any
    row: Any
    col: Any


class Head(NamedTuple):
    """The rows of one head, inside a kernel."""

    p: Any
    row: Any  # stride
    col: Any  # stride
    n: Any  # rows


class Form(NamedTuple):
    """How rows are read and multiplied, all constants."""

    D: Any  # elements of a row
    BD: Any  # D, padded to a power of 2
    VEC: Any
    PRECISION: Any
    SLICE: Any  # columns that _product reads at a time, 0 for whole rows
    INTERPRET: Any


def _jit(kernel):
    """triton.jit without a compilation for each stride and alignment: VEC says all that counts."""
    parameters = inspect.signature(kernel).parameters.values()
    numbers = [p.name for p in parameters if p.annotation is not tl.constexpr]
    return triton.jit(kernel, do_not_specialize=numbers, do_not_specialize_on_alignment=numbers)


@triton.jit
def _pick(values, index, G: tl.constexpr):
    """values[index], a run-time index into a tuple of G scalars."""
    picked = values[0]
    for g in tl.static_range(1, G):
        picked = tl.where(index == g, values[g], picked)
    return picked


@triton.jit
def _pick_number(values, index, G: tl.constexpr):
    """The same for opaque numbers."""
    return number(_pick(values, index, G))


@triton.jit
def _pick_length(lengths, index, G: tl.constexpr):
    """The same for a length, which stays in use through the loops.

    The optimizer would fold the shift into some of its uses and not into others, and keep both
    numbers in registers, which spills; it does not look into an instruction that is spelled out.
    """
    if _INTERPRET:
        length = _pick_number(lengths, index, G)
    else:
        length = tl.inline_asm_elementwise(
            "shr.s32 $0, $1, 2;", "=r,r", [_pick(lengths, index, G)], tl.int32, True, 1
        )
    return length


@triton.jit
def _head(tensors, index, b, h, n, G: tl.constexpr):
    """Head (b, h) of tensor `index` of G, with n rows."""
    o_b = b.to(tl.int64) * _pick_number(tensors.b, index, G).to(tl.int64)
    o_h = h.to(tl.int64) * _pick_number(tensors.h, index, G).to(tl.int64)
    p_head = _pick(tensors.p, index, G) + o_b + o_h
    s_row = _pick_number(tensors.row, index, G).to(tl.int64)
    return Head(p_head, s_row, _pick_number(tensors.col, index, G).to(tl.int64), n)


@triton.jit
def _head_of(tensor, b, h, n):
    """Head (b, h) of a Strided tensor whose strides are plain, with n rows."""
    o_b = b.to(tl.int64) * tensor.b.to(tl.int64)
    o_h = h.to(tl.int64) * tensor.h.to(tl.int64)
    p_head = tensor.p + o_b + o_h
    return Head(p_head, tensor.row.to(tl.int64), tensor.col.to(tl.int64), n)


@triton.jit
def _rows(head, o_first, ROWS: tl.constexpr, COLS: tl.constexpr, FORM: tl.constexpr):
    """Pointers to the first COLS columns of the rows from o_first on."""
    o_row = tl.arange(0, ROWS).to(tl.int64)
    o_col = tl.arange(0, COLS)
    if FORM.VEC == 0:
        p_tile = head.p + (o_first + o_row)[:, None] * head.row
        p_tile = p_tile + o_col.to(tl.int64)[None, :] * head.col
    else:
        p_first = head.p + o_first * head.row
        # Added up in this order it costs the fewest registers.
        p_tile = (p_first + o_col)[None, :] + o_row[:, None] * head.row  # [ROWS, COLS]
        bytes: tl.constexpr = FORM.VEC * (head.p.dtype.element_ty.primitive_bitwidth // 8)
        p_tile = tl.multiple_of(p_tile, [1, bytes])
    return p_tile


@triton.jit
def _columns_from(head, o_first):
    """The head without its columns before o_first."""
    return Head(head.p + o_first * head.col, head.row, head.col, head.n)


@triton.jit
def _load(head, o_first, ROWS: tl.constexpr, MASKED: tl.constexpr, FORM: tl.constexpr):
    """The rows from o_first on, [ROWS, BD]; beyond the last (when MASKED) and from D on 0."""
    n_left = head.n - o_first
    p_tile = _rows(head, o_first, ROWS, FORM.BD, FORM)
    m_col = tl.arange(0, FORM.BD)[None, :] < FORM.D
    m_row = tl.arange(0, ROWS)[:, None] < n_left
    if MASKED and FORM.D < FORM.BD:
        b_tile = tl.load(p_tile, mask=m_row & m_col, other=0.0)
    elif MASKED:
        b_tile = tl.load(p_tile, mask=m_row, other=0.0)
    elif FORM.D < FORM.BD:
        b_tile = tl.load(p_tile, mask=m_col, other=0.0)
    else:
        b_tile = tl.load(p_tile)
    if FORM.INTERPRET:  # the interpreter multiplies bfloat16 as if it were integers
        b_tile = b_tile.to(tl.float32)
    return b_tile


@triton.jit
def _load_slice(head, o_first, o_slice, ROWS: tl.constexpr, FORM: tl.constexpr):
    """Columns o_slice .. o_slice + SLICE of the rows from o_first on, [ROWS, SLICE]."""
    p_tile = _rows(_columns_from(head, o_slice), o_first, ROWS, FORM.SLICE, FORM)
    m_row = tl.arange(0, ROWS)[:, None] < head.n - o_first
    m_col = tl.arange(0, FORM.SLICE)[None, :] < FORM.D - o_slice
    return tl.load(p_tile, mask=m_row & m_col, other=0.0)


@triton.jit
def _product(
    b_acc,
    b_x,
    x,
    o_x,
    b_y,
    y,
    o_y,
    X_ROWS: tl.constexpr,
    Y_ROWS: tl.constexpr,
    X_FORM: tl.constexpr,
    Y_FORM: tl.constexpr,
):
    """b_acc + b_x @ b_y^T, where b_x holds the rows of x from o_x on and b_y those of y from o_y.

    Without tensor cores a product wants whole rows of both factors in registers, which spills.  So
    exact float32 products (SLICE > 0) leave b_x and b_y alone and read slices of columns instead.
    """
    if X_FORM.SLICE > 0:
        for o_slice in tl.range(0, X_FORM.D, X_FORM.SLICE):
            b_x_slice = _load_slice(x, o_x, o_slice, X_ROWS, X_FORM)
            b_y_slice = _load_slice(y, o_y, o_slice, Y_ROWS, Y_FORM)
            b_acc = tl.dot(b_x_slice, b_y_slice.T, b_acc, input_precision=X_FORM.PRECISION)
    else:
        b_acc = tl.dot(b_x, b_y.T, b_acc, input_precision=X_FORM.PRECISION)
    return b_acc


@triton.jit
def _store(head, o_first, b_tile, ROWS: tl.constexpr, FORM: tl.constexpr):
    """Write b_tile to the rows from o_first on, as far as there are rows and columns."""
    b_tile = b_tile.to(head.p.dtype.element_ty)
    m_row = tl.arange(0, ROWS)[:, None] < head.n - o_first
    if FORM.BD >= 128:
        # In halves: whole rows would share addresses with the loads before the loop, which keeps
        # them in registers across it.
        HALF: tl.constexpr = FORM.BD // 2
        b_half = tl.permute(tl.reshape(b_tile, [ROWS, 2, HALF]), [0, 2, 1])
        b_low, b_high = tl.split(b_half)  # [ROWS, HALF] each
        o_col = tl.arange(0, HALF)[None, :]
        p_tile = _rows(head, o_first, ROWS, HALF, FORM)
        tl.store(p_tile, b_low, mask=m_row & (o_col < FORM.D))
        p_tile = _rows(_columns_from(head, HALF), o_first, ROWS, HALF, FORM)
        tl.store(p_tile, b_high, mask=m_row & (o_col + HALF < FORM.D))
    else:
        p_tile = _rows(head, o_first, ROWS, FORM.BD, FORM)
        tl.store(p_tile, b_tile, mask=m_row & (tl.arange(0, FORM.BD)[None, :] < FORM.D))
