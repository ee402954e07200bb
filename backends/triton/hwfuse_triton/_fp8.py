"""What the kernels of the fp8_group_quant family share: scales, codes, layouts."""

import functools

import torch
import triton
import triton.language as tl

from hwfuse_triton._launch import empty

_FLOOR = tl.constexpr(0x2EDBE6FF)  # the bits of 1e-10, the least that counts as amax
_INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def largest_bits(y):
    """Return the bits of amax(abs(y)) over the last dimension of float32 *y*.

    The bits of numbers without sign are in the order of the numbers, infinity above them and NaN
    above all, where a maximum of floats would drop NaN.
    """
    return tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, len(y.shape) - 1)


@triton.jit
def scales(bits, QMAX: tl.constexpr, POWERS_OF_TWO: tl.constexpr, EXACT: tl.constexpr):
    """Return scale = max(amax, 1e-10) / QMAX, amax given in *bits*, and 1 / scale.

    The division is IEEE's: an amax of exactly QMAX * 2**i gives exactly 2**i.  EXACT: so is the
    inverse's; otherwise it may be off by some ulps, and does not wait for the scale.
    """
    amax = tl.maximum(bits & 0x7FFFFFFF, _FLOOR).to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, QMAX)
    if POWERS_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        # The carry rounds up, unless it is a power already.
        bits = tl.where(bits < _INFINITY, (bits + 0x7FFFFF) & _INFINITY, bits)
        opposite = tl.where(bits > _INFINITY, bits, tl.maximum(0x7F000000 - bits, 0))
        scale, inverse = bits.to(tl.float32, bitcast=True), opposite.to(tl.float32, bitcast=True)
    elif EXACT:
        inverse = tl.div_rn(1.0, scale)
    else:
        inverse = QMAX / amax
    return scale, inverse


@triton.jit
def store_codes(q_ptr, at, value, mask, QMAX: tl.constexpr, CLAMP: tl.constexpr):
    """Round float32 *value* to the fp8 type of *q_ptr*; in software if that says uint8.

    CLAMP: the conversion does not saturate by itself.
    """
    if CLAMP:
        value = tl.clamp(value, -QMAX, QMAX, propagate_nan=tl.PropagateNan.ALL)
    if q_ptr.dtype.element_ty == tl.uint8:
        tl.store(q_ptr + at, _round_in_software(value, QMAX == 240.0), mask=mask)
    else:
        tl.store(q_ptr + at, value.to(q_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _round_in_software(value, FNUZ: tl.constexpr):
    """Return the e4m3 codes of float32 numbers within the range, rounded to nearest even."""
    BIAS: tl.constexpr = 8 if FNUZ else 7
    NAN: tl.constexpr = 0x80 if FNUZ else 0x7F
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - BIAS) << 3)
    # The last bit of a float32 near this number is the step between the smallest codes.
    STEP: tl.constexpr = 2.0 ** (23 - BIAS - 2)
    STEP_BITS: tl.constexpr = (127 + 23 - BIAS - 2) << 23
    tiny = (magnitude.to(tl.float32, bitcast=True) + STEP).to(tl.int32, bitcast=True) - STEP_BITS
    code = tl.where(magnitude < ((128 - BIAS) << 23), tiny, normal)
    code = code | ((bits >> 24) & 0x80)
    if FNUZ:
        code = tl.where(code == 0x80, 0, code)  # it has no -0
    return tl.where(magnitude > _INFINITY, NAN, code).to(tl.uint8)


@triton.jit
def store_scales(
    scale_ptr,
    scale,
    row,
    group,
    mask,
    pitch,
    NUM_GROUPS: tl.constexpr,
    BY_ROW: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Store one scale per *row* (64 bits) and *group*; *pitch*: from column to column.

    A packed scale is stored byte by byte, 0 for the groups up to the next multiple of 4.
    """
    if PACKED:
        exponent = (scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8)
        if NUM_GROUPS % 4:
            exponent = tl.where(group < NUM_GROUPS, exponent, 0)
        byte_ptr = scale_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
        word = (group // 4) * pitch.to(tl.int64) + row
        tl.store(byte_ptr + word * 4 + group % 4, exponent, mask=mask)
    elif BY_ROW:
        tl.store(scale_ptr + row * NUM_GROUPS + group, scale, mask=mask)
    else:
        tl.store(scale_ptr + group * pitch.to(tl.int64) + row, scale, mask=mask)


def empty_scale(x, m, num_groups, scale_layout, scale_format):
    """Allocate a scale on x's device; return it and the elements from column to column."""
    is_packed = scale_format == "ue8m0_packed"
    width = (num_groups + 3) // 4 if is_packed else num_groups
    dtype = torch.int32 if is_packed else torch.float32
    if scale_layout == "row":
        return empty(x, (m, width), dtype), 0
    pitch = m if scale_layout == "column" else (m + 3) // 4 * 4
    if pitch == m:
        return empty(x, (m, width), dtype, (1, m)), m
    # Strides alone would leave out the padding behind the last column.
    return empty(x, (width, pitch), dtype).as_strided((m, width), (1, pitch)), pitch


@functools.cache
def rounds(index, dtype, wave):
    """Say whether device *index* rounds to *dtype* itself; if not, the kernels do, in bits.

    NVIDIA has an instruction for e4m3fn from sm89.  On AMD Triton knows a way for both types.
    """
    if wave == 64:
        return True
    return dtype is torch.float8_e4m3fn and (
        index < 0 or torch.cuda.get_device_capability(index) >= (8, 9)
    )
