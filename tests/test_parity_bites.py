"""The harness is seen to fail: each fault is caught, and the text says which it is."""

import itertools

import pytest
import torch
from torch.testing._internal.optests.generate_tests import OpCheckError

import hwfuse
from hwfuse import _select
from hwfuse.testing import ParityError, _programs, _values, implementation, row, run
from hwfuse.testing._cases import Case, Place
from hwfuse_reference.torch_ops import fused_qkvzba as reference

OP = "fused_qkvzba"
HEADS = {"num_k_heads": 2, "num_v_heads": 4, "head_k_dim": 8, "head_v_dim": 4}
MATRIX = {OP: row(m=(0, 1, 5), layout="contiguous", heads=(HEADS,))}


def right(qkvz, ba, *, head_k_dim, head_v_dim, layout="interleaved"):
    """Split contiguous rows; not the reference, whose calls are counted."""
    heads = ba.shape[1] // 2
    mixed, z = qkvz.split([qkvz.shape[1] - heads * head_v_dim, heads * head_v_dim], dim=1)
    z = z.unflatten(1, (heads, head_v_dim))
    return mixed + 0, z + 0, ba[:, :heads] + 0, ba[:, heads:] + 0


def changed(change):
    """Return `right` with its results changed by a function of (arguments, results)."""

    def function(qkvz, ba, *, head_k_dim, head_v_dim, layout="interleaved"):
        results = right(qkvz, ba, head_k_dim=head_k_dim, head_v_dim=head_v_dim, layout=layout)
        return change((qkvz, ba), results)

    return function


def failures(function, matrix=MATRIX, vendor=None, **requires):
    """Return what the harness says of an implementation."""
    (op,) = matrix
    with implementation(op, "acme/wrong", function, requires=requires, vendor=vendor):
        report = run([op], ["acme"], None if vendor else "cpu", matrix=matrix)
    texts = [text for line in report.lines.values() for text in line.failed.values()]
    assert bool(texts) != report.ok
    return "\n".join(texts)


def test_right_implementation_passes_everything():
    """The control: without it every other test here would prove nothing."""
    traits = {"deterministic": True, "batch_invariant": True, "differentiable": True}
    facts = ("m <= 4096", "layout == 'contiguous'", "qkvz.dtype == ba.dtype", "head_k_dim % 8 == 0")
    assert failures(right, **traits, facts=facts) == ""


def _set_element(value):
    def change(_, results):
        if len(results[1]) > 1:
            results[1][1, 2, 3] = value
        return results

    return changed(change)


def _swap(_, results):
    mixed, z, b, a = results
    return mixed, z, a, b


def _noncontiguous(_, results):
    mixed, z, b, a = results
    return mixed, z.transpose(0, 1).contiguous().transpose(0, 1), b, a


def _hole(arguments, results):
    mixed = torch.empty_like(results[0])
    mixed[:, 1:] = results[0][:, 1:]
    return (mixed, *results[1:])


def _past_the_rows(arguments, results):
    b = arguments[1]
    longer = b.as_strided((b.shape[0] + 1, b.shape[1]), b.stride(), b.storage_offset())
    return *results[:3], results[3] + 0 * longer[-1, 0]


def _dense_rows(arguments, results):
    b = arguments[1]
    rows = b.as_strided(b.shape, (b.shape[1], 1), b.storage_offset())
    return *results[:2], rows[:, : b.shape[1] // 2] + 0, results[3]


def _writes(arguments, results):
    arguments[1][:1] = 0
    return results


def _writes_beside(arguments, results):
    b = arguments[1]
    if b.stride(0) > b.shape[1]:
        b.as_strided((b.shape[0], b.shape[1] + 1), b.stride(), b.storage_offset())[0, -1] = 0
    return results


def _shares_argument(arguments, results):
    return *results[:2], arguments[1][:, : results[2].shape[1]], results[3]


def _shares_output(arguments, results):
    both = torch.stack([results[2], results[3]])
    return *results[:2], both[0], both[1]


def _refuses_none(_, results):
    if not results[0].numel():
        raise ZeroDivisionError("grid of 0 blocks")
    return results


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (_set_element(0.0), "output z: every bit must arrive; 1 of 80 elements are wrong"),
        (_set_element(torch.nan), "first at (1, 2, 3): found nan"),
        (changed(_swap), "output b: every bit must arrive"),
        (changed(_hole), "first at (0, 0): found nan"),
        (changed(_past_the_rows), "20 of 20 elements are wrong, largest error nan"),
        (changed(_dense_rows), "rows further apart in qkvz, ba"),
        (changed(lambda _, r: (r[0].half(), *r[1:])), "mixed_qkv.dtype is torch.float16, needed"),
        (changed(lambda _, r: (r[0], r[1].flatten(1), *r[2:])), "z.shape is torch.Size([5, 16])"),
        (changed(_noncontiguous), "strides of z (5, 4, 4) are (4, 20, 1), needed (16, 4, 1)"),
        (
            changed(lambda _, r: r[:3]),
            "returned (Tensor, Tensor, Tensor), needed tensors mixed_qkv, z, b, a",
        ),
        (changed(_shares_argument), "output b shares memory with argument ba"),
        (changed(_shares_output), "output a shares memory with output b"),
        (changed(_writes), "writes into ba"),
        (changed(_writes_beside), "writes into the memory around ba"),
        (changed(_refuses_none), "raised ZeroDivisionError: grid of 0 blocks"),
    ],
)
def test_fault_in_a_call_is_caught(function, text):
    """Wrong values, forms, reads, writes and sharing each have their own words."""
    assert text in failures(function)


def _delegating_by_import(*tensors, **options):
    return reference.fused_qkvzba(*tensors, **options)


def _delegating_by_name(*tensors, **options):
    return hwfuse.op(OP).using("reference/torch")(*tensors, **options)


@pytest.mark.parametrize("function", [_delegating_by_import, _delegating_by_name])
def test_implementation_that_calls_another_is_caught(function):
    """Its results are right, and it proves nothing: another implementation made them."""
    assert "reference/torch ran 1 times" in failures(function)


def test_dead_implementation_is_caught(monkeypatch):
    """A pinned implementation that never runs is no proof, whatever the results are."""
    with implementation(OP, "acme/dead", right) as dead:
        monkeypatch.setattr(dead, "load", lambda: reference.fused_qkvzba)
        report = run([OP], ["acme"], "cpu", matrix=MATRIX)
    text = "\n".join(report.lines[OP, "acme/dead", "cpu"].failed.values())
    assert "acme/dead was pinned and must run once, alone; reference/torch ran 1 times" in text


def test_fault_at_a_threshold_is_caught():
    """Thresholds are read from the facts: 1000 rows are in no line of the matrix."""

    def wrong_at_1000(_, results):
        if len(results[0]) == 1000:
            results[0][999, 0] = 7
        return results

    assert "m=1000" in failures(changed(wrong_at_1000), facts=("m <= 1000",))


def test_fact_that_no_input_breaks_is_caught():
    """Such a fact is a mistake or says what the op checks itself."""
    text = failures(right, facts=("qkvz.ndim == 2",))
    assert "no input was found that breaks 'qkvz.ndim == 2'" in text
    lines = {OP: row(m=(0, 5), layout="contiguous", heads=(HEADS,), implied=("qkvz.ndim == 2",))}
    assert failures(right, matrix=lines, facts=("qkvz.ndim == 2",)) == ""


def test_implementation_that_takes_nothing_is_caught():
    """Nothing of it was checked."""
    text = failures(right, facts=("m > 100000000",))
    assert "takes no input of the matrix: needs m > 100000000; found m = " in text


@pytest.mark.parametrize("fact", ["m != 5", "aligned(ba, 8)", "qkvz.stride(0) % 8 == 0"])
def test_fact_is_broken_by_some_input(fact):
    """The search finds sizes, misaligned tensors and odd strides by itself."""
    assert failures(right, facts=(fact,)) == ""


def test_implementation_that_runs_despite_its_facts_is_caught(monkeypatch):
    """The refusal is seen to happen in a real call, not only in the decision."""
    monkeypatch.setattr(type(hwfuse.op(OP)), "_choose", lambda *_: right)
    assert "ran although it needs m <= 3" in failures(right, facts=("m <= 3",))


def gemm(factor):
    """Return a right matrix product, times a factor so near to 1 that its comparator allows it."""

    def function(a, a_scale, b, b_scale, *, out_dtype=torch.bfloat16):
        weight = b.float() * b_scale.repeat_interleave(128, dim=0)[: len(b)]
        out = (a.float() * a_scale) @ weight.t()
        return (out * factor(a)).to(out_dtype)

    return function


GEMM = {"fp8_blockscale_gemm": row(m=5, n=16, k=128)}


def test_false_determinism_is_caught():
    """Three runs must agree bit for bit."""
    count = itertools.count()
    function = gemm(lambda _: 1 + next(count) % 2 / 64)
    assert failures(function, GEMM) == ""
    text = failures(function, GEMM, deterministic=True)
    assert "deterministic is declared; out of two runs: every bit" in text


def test_false_batch_invariance_is_caught():
    """A row alone must give what it gives among others."""
    function = gemm(lambda a: 1 + len(a) / 256)
    assert failures(function, GEMM, deterministic=True) == ""
    text = failures(function, GEMM, batch_invariant=True)
    assert "batch_invariant is declared; out of row 0 alone: every bit" in text


def test_wrong_gradient_is_caught():
    """The values are right and the gradient is not."""

    def change(_, results):
        mixed = results[0]
        return (mixed + 0.5 * (mixed - mixed.detach()), *results[1:])

    assert "gradient of qkvz: relative Frobenius error" in failures(
        changed(change), differentiable=True
    )


def test_gradient_of_an_op_that_declares_none_is_caught():
    """An op without a gradient must say so, not give one."""
    with pytest.raises(ParityError, match="no gradient is declared, and backward gave one"):
        _programs.check_no_gradient(case("reference/torch"))


def case(identifier):
    """Return a case on the CPU."""
    return Case(OP, identifier, Place("cpu", "cpu"), {"layout": "contiguous", **HEADS})


@pytest.mark.parametrize(
    ("check", "text"),
    [(_programs.check_compiled, "compiled, m=5"), (_programs.check_exported, "exported, m=9")],
)
def test_difference_between_eager_and_traced_is_caught(check, text):
    """The same call, another result: here because the implementation counts its calls."""
    count = itertools.count()

    def change(_, results):
        results[2][:] = next(count)
        return results

    with implementation(OP, "acme/wrong", changed(change)), pytest.raises(ParityError, match=text):
        check(case("acme/wrong"))


def test_recompilation_for_another_number_of_rows_is_caught(monkeypatch):
    """A size in a guard would compile again for each batch."""
    monkeypatch.setattr(_programs, "_row_dimensions", lambda _: [])
    static = torch._dynamo.config.patch(automatic_dynamic_shapes=False)
    with static, pytest.raises(ParityError, match="compiled 2 graphs"):
        _programs.check_compiled(case("reference/torch"))


def test_fake_kernel_that_lies_is_caught():
    """What a fake promises, compiled code relies on: here the dtype of the first output."""
    with (
        implementation(OP, "acme/wrong", changed(lambda _, r: (r[0].float(), *r[1:]))),
        pytest.raises(OpCheckError, match="test_faketensor failed"),
    ):
        _programs.check_registration(case("acme/wrong"))


def norm_(q, k, v, q_weight, k_weight, *, head_dim, eps=1e-6):
    """Normalise in place; not with the reference."""
    for x, weight in ((q, q_weight), (k, k_weight), (v, torch.ones(head_dim))):
        heads = x.float().unflatten(1, (-1, head_dim))
        heads = heads * (heads.square().mean(2, keepdim=True) + eps).rsqrt() * weight.float()
        x.copy_(heads.flatten(1))


def _norm_and_neighbours(q, k, v, q_weight, k_weight, **options):
    norm_(q, k, v, q_weight, k_weight, **options)
    gap = torch.empty(0, dtype=q.dtype).set_(q.untyped_storage())
    gap[q.storage_offset() + q.shape[1] :][:1] = 0


def _norm_and_weight(q, k, v, q_weight, k_weight, **options):
    norm_(q, k, v, q_weight, k_weight, **options)
    k_weight.fill_(1.0)


def _norm_of_copies(q, k, v, q_weight, k_weight, **options):
    norm_(q.clone(), k, v, q_weight, k_weight, **options)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (norm_, ""),
        (_norm_and_neighbours, "writes into the memory around q"),
        (_norm_and_weight, "writes into k_weight"),
        (_norm_of_copies, "output q: worst"),
    ],
)
def test_fault_of_an_op_in_place_is_caught(function, text):
    """It writes its own columns and nothing else."""
    heads = {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    found = failures(function, {"qkv_rms_norm_": row(m=(0, 5), h=(heads,))})
    assert text in found
    assert bool(text) == bool(found)


def quant(x, *, group_size=128, scale_layout="row", scale_format="fp32", dtype=None):
    """Quantise with fp32 scales; for one row it forgets the pitch of column_tma."""
    groups = x.float().unflatten(1, (-1, group_size))
    qmax = torch.finfo(dtype).max
    scale = groups.abs().amax(2).clamp(min=1e-10) / qmax
    q = (groups * (1 / scale)[:, :, None]).clamp(-qmax, qmax).flatten(1).to(dtype)
    return q, hwfuse.layouts.convert(scale, scale_layout if len(x) > 1 else "row")


@pytest.mark.parametrize(
    ("k", "layout", "text"),
    [
        (128, "row", ""),
        (256, "column_tma", "strides of scale (1, 2) are (2, 1), needed (1, 4)"),
        (128, "column_tma", "strides of scale (1, 1) are (1, 1): not 'column_tma'"),
    ],
)
def test_wrong_pitch_of_a_single_row_is_caught(k, layout, text):
    """A TMA descriptor is made of it although it addresses nothing."""
    found = failures(quant, {"fp8_group_quant": row(m=(0, 1, 5), k=k, scale_layout=layout)})
    assert text in found
    assert bool(text) == bool(found)


def test_fault_of_one_fp8_flavour_is_caught():
    """448 is right on gfx950 and too much for the fp8 of gfx942; both are tried without either."""

    def function(x, *, group_size=128, scale_layout="row", scale_format="fp32", dtype=None):
        groups = x.float().unflatten(1, (-1, group_size))
        scale = groups.abs().amax(2).clamp(min=1e-10) / 448
        codes = (groups * (1 / scale)[:, :, None]).clamp(-448, 448)
        return codes.flatten(1).to(dtype), scale

    text = failures(function, {"fp8_group_quant": row(m=5, k=256)}, vendor="amd")
    assert "acme/wrong on rocm:gfx942 (pretended)" in text
    assert "gfx950" not in text


def _aligned_start(arguments, results):
    qkvz = arguments[0]
    start = qkvz.storage_offset() // 8 * 8
    return qkvz.as_strided(results[0].shape, qkvz.stride(), start) + 0, *results[1:]


def test_tensor_that_does_not_start_where_its_memory_is_aligned_is_tried():
    """Unless a fact refuses it: a vector load from there is a fault on some hardware."""
    assert "rows further apart in qkvz" in failures(changed(_aligned_start))
    assert failures(changed(_aligned_start), facts=("aligned(qkvz, 16)",)) == ""


def test_implementation_that_runs_on_another_arch_is_caught(monkeypatch):
    """Its arch is a statement to break like any other."""
    options = {"vendor": "nvidia", "arch": ("sm90",)}
    assert failures(right, **options) == ""
    monkeypatch.setattr(_select, "_standing", lambda *_, **__: [])
    assert "ran although it needs arch in sm90" in failures(right, **options)


def test_wrong_gradient_of_the_reference_is_caught():
    """The others are compared with it, so it is compared with differences."""
    of_reference = case("reference/torch")
    arguments = of_reference.arguments(m=5, dtype=torch.float32)
    names = ["qkvz", "ba"]
    gradients = _programs._gradients(of_reference, arguments, names, _values.run_reference)
    _programs._check_slopes(of_reference, arguments, gradients)
    gradients["ba"][2, 1] += 0.5
    with pytest.raises(ParityError, match="gradient of ba: slope"):
        _programs._check_slopes(of_reference, arguments, gradients)
