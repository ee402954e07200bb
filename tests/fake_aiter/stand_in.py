"""A stand-in for AMD's aiter: its signatures, its reading of memory, its numbers, in plain torch.

Written from the contracts alone.  Bodies read memory as AMD's kernels do, whatever shape and
strides say; where AMD would be silently wrong, the stand-in is wrong in the same way or raises.
Only `modules` is public; tests put what it returns into ``sys.modules`` for as long as they run.
"""

from __future__ import annotations

import inspect
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import torch

from hwfuse_rocm import _aiter

VERSIONS = ("0.1.7", "head")
FP8 = {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn}
FLOOR = 1e-10


def modules(version, arch, calls=None):
    """Return name to module of an aiter of this version on this arch; calls are noted in a list."""
    bodies = {name: getattr(_Bodies(version, arch), name) for name in _aiter.FUNCTIONS}
    found = {"aiter": _module("aiter")}
    for label, entry in _aiter.FUNCTIONS.items():
        if version == "0.1.7" and entry.is_newer:
            continue
        name = entry.modules[0 if version == "head" else -1]
        module = found.setdefault(name, _module(name))
        setattr(
            module,
            entry.name,
            _wrapped(label, bodies[label], signature(label, version, arch), calls),
        )
    return found


def _module(name):
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)  # without a folder: nothing else is found in it
    return module


def signature(label, version, arch="gfx950"):
    """Return the signature that a function of the table has in one version."""
    dtypes = SimpleNamespace(i8=torch.int8, fp8=FP8[arch], bf16=torch.bfloat16, fp32=torch.float32)
    names = {"dtypes": dtypes, "fp8_dtype": FP8[arch], "torch": torch}
    entry = _aiter.FUNCTIONS[label]
    whole = inspect.signature(eval(f"lambda {entry.parameters}: None", names))  # noqa: S307 - ours
    kept = [p for p in whole.parameters.values() if version == "head" or p.name not in entry.newer]
    return whole.replace(parameters=kept)


def _wrapped(label, body, signature, calls):
    def function(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        if calls is not None:
            calls.append((label, args, kwargs))
        bound.apply_defaults()
        return body(**bound.arguments)

    function.__signature__ = signature
    return function


def memory_as(tensor, shape):
    """Read a tensor's memory from its first element on as a matrix without gaps."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return tensor.as_strided(shape, strides)


def drop_nan(x, low, high):
    """Clamp as max and min of AMD's hardware do: NaN becomes the lower bound."""
    return torch.fmin(torch.fmax(x, torch.tensor(low)), torch.tensor(high))


class _Bodies:
    def __init__(self, version, arch):
        self.version, self.fp8 = version, FP8[arch]

    def per_group_quant_hip(
        self, x, scale, quant_dtype, group_size, transpose_scale, num_rows, num_rows_factor, **_
    ):
        """HIP: multiplies by 1/MAX, drops NaN in the maximum, keeps it in its own code."""
        assert scale is None
        assert (num_rows, num_rows_factor) == (None, 1)
        assert group_size in (32, 64, 128)
        self._check_rows(x)
        assert x.dtype in (torch.bfloat16, torch.float16), f"not dispatched: {x.dtype}"
        assert x.is_contiguous(), "view size is not compatible"
        m, k = x.shape
        groups = x.float().view(m, k // group_size, group_size)
        limits = torch.iinfo if quant_dtype == torch.int8 else torch.finfo
        assert quant_dtype in (self.fp8, torch.int8), f"not support output type: {quant_dtype}"
        inverse = torch.tensor(1.0 / limits(quant_dtype).max, dtype=torch.float32)
        amax = groups.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=2).clamp(min=FLOOR)
        s = amax * inverse
        q = (groups * (1.0 / s)[:, :, None]).to(quant_dtype).view(m, k)
        written = s.t().contiguous().view(s.shape) if transpose_scale else s
        return q, written

    def fused_rms_fp8_group_quant(
        self,
        inp1,
        inp1_weight,
        inp1_epsilon,
        group_size,
        dtype_quant,
        res1,
        transpose_scale,
        **more,
    ):
        """Triton: all in float32, NaN dropped by maximum and by clamp."""
        assert more.pop("inp2") is more.pop("inp2_weight") is more.pop("inp2_epsilon") is None
        assert not more.pop("output_unquantized_inp1")
        strided = more.pop("is_x_scale_strided", False)
        assert not more
        self._check_rows(inp1)
        t = inp1.float()
        if res1 is not None:
            t = t + res1.float()
        y = t * torch.rsqrt(t.square().sum(1, keepdim=True) / t.shape[1] + inp1_epsilon)
        q, s = self._quant(y * inp1_weight.float(), group_size, dtype_quant)
        if transpose_scale:
            s = s.t().contiguous().t() if strided else s.t().contiguous().view(s.shape)
        return (q, s), None, None, None if res1 is None else t.to(inp1.dtype)

    def fused_flatten_fp8_group_quant(
        self,
        x,
        group_size,
        dtype_quant,
        transpose_scale=False,  # noqa: FBT002 - AMD's
    ):
        """Triton: the floor in x's dtype; 0.1.7 needs heads that are a power of two."""
        self._check_rows(x)
        width = x.shape[2]
        if self.version == "0.1.7" and width & (width - 1):
            raise MemoryError(f"writes past the row: {width} is no power of two")
        q, s = self._quant(x.flatten(1), group_size, dtype_quant)
        return q, s.t().contiguous().t() if transpose_scale else s

    def triton_gemm_a8w8_blockscale(self, x, w, x_scale, w_scale, dtype, y, config, **more):
        """Triton: honours all strides."""
        assert y is config is None
        assert not any(more.pop(name, None) for name in ("skip_reduce", "backend"))
        return self._gemm(x, w, x_scale, w_scale).to(dtype)

    def gemm_a8w8_blockscale_bpreshuffle(self, XQ, WQ, x_scale, w_scale, dtype, out=None):
        """As AMD's assembly: scale and weight by their bytes, bfloat16 by truncation."""
        assert out is None
        assert XQ.is_contiguous()
        (m, k), n = XQ.shape, WQ.shape[0]
        assert x_scale.is_contiguous() or x_scale.stride() == (1, m)
        scale = memory_as(x_scale, (k // 128, m)).t()
        total = self._gemm(XQ, _unshuffled(memory_as(WQ, (n, k))), scale, w_scale)
        if dtype == torch.float16:
            return total.to(dtype)
        return (total.view(torch.int32) & -65536).view(torch.float32).to(dtype)

    def gemm_a8w8_blockscale_ck(self, XQ, WQ, x_scale, w_scale, Out, splitK=0, kernelName=""):
        """CK: the scale by its bytes, row by row."""
        assert (splitK, kernelName) == (0, "")
        (m, k), n = XQ.shape, WQ.shape[0]
        assert Out.shape == (m, n)
        scale = memory_as(x_scale, (m, k // 128))
        return Out.copy_(self._gemm(memory_as(XQ, (m, k)), memory_as(WQ, (n, k)), scale, w_scale))

    def triton_batched_gemm_bf16(self, XQ, WQ, bias, dtype, splitK, YQ, config, **more):
        """Triton: honours all strides."""
        assert bias is splitK is YQ is config is more.get("backend") is None
        assert XQ.shape[1], "an empty grid"
        return (XQ.float() @ WQ.float().mT).to(dtype)

    def batched_gemm_bf16_CK(self, XQ, WQ, bias, dtype, splitK):  # noqa: N802 - AMD's name
        """CK: both by their bytes; rounds to nearest."""
        assert bias is splitK is None
        assert XQ.dtype == WQ.dtype == torch.bfloat16
        return self.triton_batched_gemm_bf16(
            memory_as(XQ, XQ.shape), memory_as(WQ, WQ.shape), None, dtype, None, None, None
        )

    def fused_qkvzba_split_reshape_cat_decode(
        self, mixed_qkvz, mixed_ba, num_heads_qk, num_heads_v, head_qk, head_v
    ):
        """Triton: rows without gaps; each range a power of two."""
        m, r = mixed_qkvz.shape[0], num_heads_v // num_heads_qk
        assert m, "an empty grid"
        assert not any(size & (size - 1) for size in (head_qk, r * head_v)), "not a power of two"
        record = 2 * head_qk + 2 * r * head_v
        heads = memory_as(mixed_qkvz, (m, num_heads_qk, record))
        q, k, v, z = heads.split([head_qk, head_qk, r * head_v, r * head_v], dim=2)
        b, a = memory_as(mixed_ba, (m, num_heads_qk, 2 * r)).split(r, dim=2)
        mixed = torch.cat([part.reshape(m, -1) for part in (q, k, v)], dim=1)
        z = z.reshape(m, num_heads_v, head_v).clone()
        return mixed, z, b.reshape(m, num_heads_v).clone(), a.reshape(m, num_heads_v).clone()

    def _check_rows(self, x):
        if not x.shape[0]:
            raise ZeroDivisionError("an empty grid")

    def _quant(self, x, group_size, dtype):
        assert dtype == self.fp8, f"{dtype} compiles to another number on this arch"
        assert group_size & (group_size - 1) == 0, "reshape needs powers of two"
        limit = torch.finfo(dtype).max
        groups = x.unflatten(1, (-1, group_size))
        amax = groups.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=2)
        amax = amax.clamp(min=torch.tensor(FLOOR, dtype=x.dtype))
        s = amax.float() / torch.tensor(limit)
        codes = drop_nan(groups.float() * (1.0 / s)[:, :, None], -limit, limit)
        return codes.to(dtype).flatten(1), s

    def _gemm(self, x, w, x_scale, w_scale):
        assert x.dtype == w.dtype == self.fp8, f"{x.dtype}: bytes mean other numbers on this arch"
        assert x.shape[0], "CK fails on no rows"
        assert x.shape[1] % 128 == 0
        n = w.shape[0]
        total = torch.zeros(x.shape[0], n)
        for g in range(x.shape[1] // 128):
            part = slice(128 * g, 128 * (g + 1))
            columns = w_scale[:, g].repeat_interleave(128)[:n]
            block = x[:, part].float() @ w[:, part].float().t()
            total += block * x_scale[:, g, None] * columns
        return total


def _unshuffled(w):
    """Pick each element of a 16x16-shuffled matrix by the index formula."""
    n, k = w.shape
    row, column = torch.arange(n)[:, None], torch.arange(k)
    at = (row // 16) * (16 * k) + (column // 16) * 256 + (row % 16) * 16 + column % 16
    return w.flatten().view(torch.uint8)[at].view(w.dtype)
