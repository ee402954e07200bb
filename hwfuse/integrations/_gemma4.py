"""Gemma4's attention: the norms of q, k and v in one op, behind one projection.

Which of them a layer has depends on the layer, see `QKVNormMode`: q alone where keys and values are
those of an earlier layer; q and k = v, where v is the raw key; q, k and v.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hwfuse
from hwfuse.integrations import _view_packing
from hwfuse.integrations._rewrite import Edit, Rule, Use
from hwfuse.packing import QKVNormMode

# q is normalised and rotated before k exists, so the projections of k and v move up.
QUERY = """
query_states = self.q_proj(hidden_states).view(hidden_shape)
query_states = self.q_norm(query_states)
"""

FUSED_QUERY = """
query_states, normed_key, normed_value = self.hwfuse_project_and_norm(hidden_states)
"""

KEY = """
key_states = self.k_proj(hidden_states).view(hidden_shape)
value_states = (
    self.v_proj(hidden_states).view(hidden_shape) if self.v_proj is not None else key_states
)
key_states = self.k_norm(key_states)
"""

FUSED_KEY = """
key_states, value_states = normed_key, normed_value
"""

VALUE = """
value_states = self.v_norm(value_states)
value_states = value_states.transpose(1, 2)
"""

FUSED_VALUE = """
value_states = value_states.transpose(1, 2)
"""

_PROJECTIONS = {
    QKVNormMode.Q: ("q_proj",),
    QKVNormMode.Q_KEQV: ("q_proj", "k_proj"),
    QKVNormMode.QKV: ("q_proj", "k_proj", "v_proj"),
}
_WORDS = {
    QKVNormMode.Q: "norm of q; k and v are another layer's",
    QKVNormMode.Q_KEQV: "norms of q and k = v",
    QKVNormMode.QKV: "norms of q, k and v",
}
_PACK = "hwfuse_qkv"
# Tensor parallelism puts this around the norms: it adds up gradients and does nothing else.
_ADDS_GRADIENTS = "ReplicatedWithGradAllReduce.install_forward.<locals>.tp_forward"


def hwfuse_project_and_norm(self: Any, hidden_states: Tensor) -> list[Tensor | None]:
    """Return q, k and v ``[batch, tokens, heads, head_dim]``; None for what another layer has.

    Head counts follow from the projections: a tensor parallel rank has some of the heads.
    """
    projected, norms = _project(self, hidden_states), _norms(self)
    if all(_is_own_code(self, norm) for norm in norms):
        normed = hwfuse.op(_mode(self).value)(
            *(part.flatten(0, -2) for part in projected),
            *(norm.weight for norm in norms if norm.with_scale),
            head_dim=self.head_dim,
            eps=self.q_norm.eps,
        )
        normed = [normed] if isinstance(normed, Tensor) else normed
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        heads = [part.view(shape) for part in normed]
    else:
        raw = [part.unflatten(-1, (-1, self.head_dim)) for part in projected]
        raw += raw[-1:] * (len(norms) - len(raw))  # k = v
        heads = [norm(part) for norm, part in zip(norms, raw, strict=True)]
    return [*heads, None, None][:3]


def _project(module: Any, hidden_states: Tensor) -> list[Tensor]:
    """Return what the layer projects: q; q and k = v; or q, k and v."""
    linears = _linears(module)
    if len(linears) > 1:
        weights = _view_packing.packed_weights(module, {_PACK: linears}, hidden_states)
        if weights:
            widths = [linear.out_features for linear in linears]
            return [*F.linear(hidden_states, weights[0]).split(widths, dim=-1)]
    return [linear(hidden_states) for linear in linears]


def packs(module: Any) -> dict[str, Sequence[nn.Linear]]:
    """Return the projections in the order of `pack_gemma4`; one alone needs no packing."""
    linears = _linears(module)
    return {_PACK: linears} if len(linears) > 1 else {}


def _linears(module: Any) -> list[Any]:
    return [getattr(module, name) for name in _PROJECTIONS[_mode(module)]]


def _norms(module: Any) -> list[Any]:
    if module.is_kv_shared_layer:
        return [module.q_norm]
    return [module.q_norm, module.k_norm, module.v_norm]


def _mode(module: Any) -> QKVNormMode:
    is_shared = module.is_kv_shared_layer  # such a layer has no v_proj, not even None
    return QKVNormMode.of(is_kv_shared=is_shared, is_k_eq_v=not is_shared and module.v_proj is None)


def _is_own_code(module: Any, norm: nn.Module) -> bool:
    """Tell whether a call of the norm would run the model's own norm and nothing else."""
    forward = getattr(norm.__dict__.get("forward"), "__qualname__", None)
    if norm._forward_hooks or norm._forward_pre_hooks or forward not in (None, _ADDS_GRADIENTS):
        return False
    for_gradients = forward or norm._backward_hooks or norm._backward_pre_hooks
    if for_gradients and torch.is_grad_enabled():
        return False
    return type(norm).__module__ == type(module).__module__


def _objection(module: Any) -> str | None:
    """Check the norms, which `forward` only calls: they must still compute what the op does."""
    x = torch.linspace(-2, 3, 12, device="cpu") * torch.tensor([[1.0], [1e-3]], device="cpu")
    weight = torch.linspace(0.5, 1.5, 12, device="cpu")
    for norm, has_weight in zip(_norms(module), (True, True, False), strict=False):
        expected = x * (x.square().mean(-1, keepdim=True) + module.q_norm.eps).rsqrt()
        probe = object.__new__(type(norm))
        vars(probe).update(vars(norm), _parameters={"weight": weight} if has_weight else {})
        found = type(norm).forward(probe, x)
        expected = expected * weight if has_weight else expected
        if norm.with_scale != has_weight or not torch.allclose(found, expected, rtol=1e-5, atol=0):
            return f"{type(norm).__name__} computes other norms than the op"
    return None


def _use(module: Any, pack: str) -> Use:
    mode, linears = _mode(module), _linears(module)
    heads = [linear.out_features // module.head_dim for linear in linears]
    dtype = module.q_norm.weight.dtype
    sizes = {"num_q_heads": heads[0], "head_dim": module.head_dim, "dtype": dtype}
    if mode is not QKVNormMode.Q:
        sizes["num_kv_heads"] = heads[1]
    is_packed = packs(module) and pack != "never" and not _view_packing.obstacle(packs(module))
    gemms = f"one GEMM instead of {len(linears)}" if is_packed else "the model's own linears"
    with torch.no_grad():
        if not all(_is_own_code(module, norm) for norm in _norms(module)):
            return Use(f"the model's own norms, as one is hooked or replaced; {gemms}")
    return Use(f"{_WORDS[mode]}; {gemms}", ((mode.value, sizes),))


RULE = Rule(
    name="gemma4",
    version=1,
    classes=("Gemma4TextAttention",),
    ops=tuple(mode.value for mode in QKVNormMode),
    edits=(Edit(QUERY, FUSED_QUERY), Edit(KEY, FUSED_KEY), Edit(VALUE, FUSED_VALUE)),
    methods=(hwfuse_project_and_norm, *_view_packing.METHODS),
    use=_use,
    objection=_objection,
    packs=packs,
)
