"""The Triton kernels of the w4a8 mixture of experts, in the corrected interpreter."""

import ast
import inspect
from importlib import import_module
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("numpy", reason="Triton's interpreter computes with numpy")

import hwfuse
from hwfuse.testing import pretend
from hwfuse.testing._interpreter import interpreted
from hwfuse.testing._offline import recorded_launches
from hwfuse.testing.compare import compare
from hwfuse_triton import moe_rows, w4a8_grouped_gemm, w4a8_moe_prep

FP8 = torch.float8_e4m3fn
SHARED = {
    "moe_input_scale": moe_rows,
    "moe_permute_fp8_quant": moe_rows,
    "silu_mul_fp8_quant": moe_rows,
    "moe_unpermute_reduce": moe_rows,
    "w4a8_moe_prep": w4a8_moe_prep,
    "w4a8_grouped_gemm": w4a8_grouped_gemm,
}
NO_EXPERT = [-1, -(2**31), 5, 2**31 - 1]  # of five


def run(op, arguments, **keywords):
    """Call the kernel in the interpreter."""
    with interpreted():
        return getattr(SHARED[op], op)(**arguments, **keywords)


def assert_like_reference(op, arguments, **keywords):
    """Compare with the reference as the op's COMPARE says; return what the kernel gave."""
    found = run(op, arguments, **keywords)
    reference = getattr(import_module(f"hwfuse_reference.torch_ops.{op}"), op)
    wanted = reference(**arguments)
    spec = import_module(f"hwfuse.ops.{op}")
    both = (found, wanted) if isinstance(found, tuple) else ((found,), (wanted,))
    others = {**arguments, **dict(zip(spec.COMPARE, both[0], strict=True))}
    for (name, comparator), one, other in zip(spec.COMPARE.items(), *both, strict=True):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert compare(comparator, one, other, others) is None, name
    return found


def inputs(op, **keywords):
    """Make a call's arguments."""
    return import_module(f"hwfuse.ops.{op}").make_inputs(**keywords)


def small(op, **keywords):
    """Make a call's arguments at small sizes, whatever the op calls them."""
    known = inspect.signature(import_module(f"hwfuse.ops.{op}").make_inputs).parameters
    sizes = {"num_experts": 4, "n": 128, "k": 128}
    return inputs(op, **{name: sizes[name] for name in sizes if name in known}, **keywords)


# ---- moe_input_scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("m", "k", "topk"), [(1, 40, 1), (7, 700, 3), (5, 9000, 8)])
def test_input_scale_of_any_width_ignores_tokens_of_other_ranks(m, k, topk, dtype):
    """Every fourth token is NaN and has no route; rows are longer than a program, and odd."""
    assert_like_reference(
        "moe_input_scale", inputs("moe_input_scale", m=m, k=k, topk=topk, row_pad=1, dtype=dtype)
    )


def test_input_scale_of_many_tokens_sees_the_last_element(monkeypatch):
    """More tokens than programs: each takes several, and all of their numbers count."""
    monkeypatch.setattr(moe_rows, "_MAX_PROGRAMS", 4)
    x = torch.ones(11, 64, dtype=torch.bfloat16)
    x[10, 63] = -448 * 2.0**5
    ids = torch.zeros(11, 2, dtype=torch.int32)
    (scale,) = run("moe_input_scale", {"x": x, "topk_ids": ids, "num_experts": 1})
    assert scale == 2.0**5  # exactly: the division is IEEE's


@pytest.mark.parametrize("invalid", NO_EXPERT)
def test_input_scale_without_a_valid_route_is_the_floor(invalid):
    """Ids below 0 and from num_experts on are no route, however far away."""
    ids = torch.full((3, 2), invalid, dtype=torch.int32)
    x = torch.full((3, 16), torch.nan)
    (scale,) = run("moe_input_scale", {"x": x, "topk_ids": ids, "num_experts": 5})
    assert scale == torch.tensor(1e-10) / 448


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_input_scale_of_a_valid_token_that_is_not_finite_shows_it(value):
    """A maximum of floats would drop NaN."""
    x = torch.ones(3, 16)
    x[1, 3] = value
    ids = torch.tensor([[0], [4], [1]], dtype=torch.int32)
    (scale,) = run("moe_input_scale", {"x": x, "topk_ids": ids, "num_experts": 5})
    assert scale.isnan() if value != value else scale == torch.inf  # noqa: PLR0124


# ---- moe_permute_fp8_quant, silu_mul_fp8_quant


@pytest.mark.parametrize("software", [False, True])
@pytest.mark.parametrize(
    ("m", "k", "topk", "row_pad"), [(1, 16, 1, 0), (9, 2100, 3, 1), (4, 48, 11, 8)]
)
def test_permute_for_any_topk_lays_each_token_in_its_rows(
    monkeypatch, m, k, topk, row_pad, software
):
    """Also where no instruction rounds to fp8."""
    monkeypatch.setattr(moe_rows, "rounds", lambda *_: not software)
    arguments = inputs("moe_permute_fp8_quant", m=m, k=k, topk=topk, row_pad=row_pad)
    assert_like_reference("moe_permute_fp8_quant", arguments)


@pytest.mark.parametrize("software", [False, True])
def test_permute_of_numbers_beyond_fp8_clamps_and_keeps_nan(monkeypatch, software):
    """The conversion alone would make NaN of some, and 448 of NaN."""
    monkeypatch.setattr(moe_rows, "rounds", lambda *_: not software)
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1e9, -1e9, 448.0, 2.0**-10, 0.0]])
    route = torch.tensor([[1, -1, 0]], dtype=torch.int32)
    rows = run("moe_permute_fp8_quant", {"x": x, "route_to_row": route, "scale": torch.ones(1)})
    wanted = torch.tensor([torch.nan, 448.0, -448.0, 448.0, -448.0, 448.0, 0.0, 0.0])
    torch.testing.assert_close(rows[:2].float(), wanted.expand(2, 8), equal_nan=True)


@pytest.mark.parametrize("software", [False, True])
@pytest.mark.parametrize(("m", "n", "num_experts"), [(1, 1, 1), (37, 256, 9), (5, 1500, 2)])
def test_silu_for_any_width_leaves_unused_rows_out(monkeypatch, m, n, num_experts, software):
    """Unused rows are NaN: read or not, they must not matter; programs take several tiles."""
    monkeypatch.setattr(moe_rows, "rounds", lambda *_: not software)
    monkeypatch.setattr(moe_rows, "_MAX_PROGRAMS", 3)
    arguments = inputs("silu_mul_fp8_quant", m=m, n=n, num_experts=num_experts, row_pad=m % 3)
    assert_like_reference("silu_mul_fp8_quant", arguments)


def test_silu_past_the_last_row_in_use_writes_nothing(monkeypatch):
    """The kernel asks the offsets on the device how many rows there are."""
    arguments = inputs("silu_mul_fp8_quant", m=40, n=64, num_experts=4)
    arguments["expert_offsets"][:] = torch.tensor([0, 0, 2, 3, 17])
    q = torch.full((40, 64), 7.0).to(FP8)
    monkeypatch.setattr(moe_rows, "empty", lambda *_: q)
    run("silu_mul_fp8_quant", arguments)
    assert (q[17:].float() == 7).all()
    assert not (q[:17].float() == 7).all(dim=1).any()


# ---- moe_unpermute_reduce


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("m", "k", "topk", "row_pad"), [(1, 8, 1, 0), (9, 1100, 3, 1), (6, 40, 11, 8)]
)
def test_reduce_for_any_topk_adds_the_rows_of_valid_routes(m, k, topk, row_pad, dtype):
    """Rows of no route are NaN."""
    arguments = inputs("moe_unpermute_reduce", m=m, k=k, topk=topk, row_pad=row_pad, dtype=dtype)
    assert_like_reference("moe_unpermute_reduce", arguments)


def test_reduce_of_a_token_without_routes_is_exactly_zero():
    """Neither NaN rows nor NaN weights of invalid routes are multiplied by 0."""
    arguments = {
        "rows": torch.full((4, 32), torch.nan, dtype=torch.bfloat16),
        "route_to_row": torch.full((2, 2), -1, dtype=torch.int32),
        "topk_weights": torch.full((2, 2), torch.nan),
    }
    assert not run("moe_unpermute_reduce", arguments).any()


# ---- w4a8_moe_prep


def hot(m, topk):
    """Half of all tokens go to one expert, some experts get none."""
    ids = torch.arange(m * topk, dtype=torch.int32).view(m, topk) % 3 * 2
    ids[::2] = 4
    return ids


@pytest.mark.parametrize("few_routes", [1024, 0])
@pytest.mark.parametrize(
    "topk_ids",
    [
        torch.empty(0, 3, dtype=torch.int32),
        torch.tensor([[3]], dtype=torch.int32),
        torch.tensor([NO_EXPERT, [0, 4, 4, 0], [1, 5, -1, 1]], dtype=torch.int32),
        torch.full((70, 2), -1, dtype=torch.int32),
        torch.full((70, 2), 4, dtype=torch.int32),
        hot(150, 3),
        hot(80, 4)[:, :3],
    ],
    ids=["empty", "one", "mixed", "all remote", "one expert", "hot", "strided"],
)
def test_prep_of_any_routing_sorts_it_stably(monkeypatch, topk_ids, few_routes):
    """One launch and three give the same maps: the rows of an expert are in the routes' order."""
    monkeypatch.setattr(w4a8_moe_prep, "FEW_ROUTES", few_routes)
    arguments = {"topk_ids": topk_ids, "num_experts": 5, "n": 128, "k": 256}
    found = assert_like_reference("w4a8_moe_prep", arguments)
    wanted = import_module("hwfuse_reference.torch_ops.w4a8_moe_prep").w4a8_moe_prep(**arguments)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


# ---- w4a8_grouped_gemm


def experts(*counts, rest=0, n=64, k=256, seed=0):
    """Return a call with so many rows for each expert, and *rest* of none, which are NaN."""
    m = sum(counts) + rest
    arguments = inputs("w4a8_grouped_gemm", m=m, n=n, k=k, num_experts=len(counts), seed=seed)
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    a = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(FP8)
    a[offsets[-1] :] = torch.nan
    return {**arguments, "a": a, "expert_offsets": offsets}


@pytest.mark.parametrize("wave", [32, 64])
@pytest.mark.parametrize(
    "counts",
    [
        (3,),
        (0, 20, 0, 1, *[0] * 40),
        (0, 5, 0, 0, 1),
        (7,) * 20,
        (17, 0, 40),
        (70, 10),
        (0, 200),
        (1030, 1),
    ],
    ids=[
        "one",
        "by row",
        "empty ones",
        "tiles of 16",
        "tiles of 32",
        "hot",
        "tiles of 64",
        "tiles of 128",
    ],
)
def test_gemm_of_any_split_of_the_rows_is_right(counts, wave):
    """Both ways of numbering tiles, all tiles; on AMD (wave 64) in float16."""
    k = 128 if counts == (1030, 1) else 512  # the interpreter is slow
    arguments = experts(*counts, rest=3, k=k)
    assert_like_reference("w4a8_grouped_gemm", arguments, wave=wave)


@pytest.mark.parametrize("wave", [32, 64])
@pytest.mark.parametrize(
    ("n", "k", "interleave"), [(37, 384, 1), (130, 128, 1), (64, 640, 1), (70, 1024, 4)]
)
def test_gemm_of_odd_sizes_masks_the_rest(n, k, interleave, wave):
    """N that is no multiple of a tile, numbers of groups that are none of a step."""
    arguments = inputs(
        "w4a8_grouped_gemm", m=9, n=n, k=k, num_experts=3, interleave=interleave, row_pad=1
    )
    assert_like_reference("w4a8_grouped_gemm", arguments, wave=wave)


@pytest.mark.parametrize("wave", [32, 64])
def test_gemm_of_every_code_and_every_nibble_is_exact(wave):
    """All 256 codes of fp8, subnormal ones and NaN too, times all 16 numbers: no rounding."""
    codes = torch.arange(256).to(torch.uint8)
    a = torch.zeros(256, 128).to(FP8)
    a[:, 0], a[:, 1] = codes.view(FP8), codes.flip(0).view(FP8)  # both nibbles of a byte
    nibbles = torch.arange(16)
    b = torch.zeros(1, 16, 64, dtype=torch.int8)
    b[0, :, 0] = (nibbles | (nibbles.flip(0) << 4)).to(torch.uint8).view(torch.int8)
    rows = run(
        "w4a8_grouped_gemm",
        {
            "a": a,
            "a_scale": torch.ones(1),
            "b": b,
            "b_scale": torch.ones(1, 1, 16, dtype=torch.bfloat16),
            "expert_offsets": torch.tensor([0, 256], dtype=torch.int32),
        },
        wave=wave,
    )
    number = torch.where(nibbles < 8, nibbles, nibbles - 16).float()
    x = a.float()
    wanted = (x[:, :1] * number + x[:, 1:2] * number.flip(0)).bfloat16()
    torch.testing.assert_close(rows, wanted, rtol=0, atol=0, equal_nan=True)


def test_gemm_with_a_nan_row_keeps_it_to_itself():
    """Rows of one tile share nothing."""
    arguments = experts(20, n=64, k=256)
    wanted = run("w4a8_grouped_gemm", arguments)
    arguments["a"][5, 100] = torch.nan
    found = run("w4a8_grouped_gemm", arguments)
    assert found[5].isnan().all()
    others = torch.arange(20) != 5
    assert torch.equal(found[others], wanted[others])


def test_gemm_past_the_last_row_in_use_writes_nothing(monkeypatch):
    """All routes may be of other ranks; the output of the rest is not touched."""
    for counts in ((0, 0), (3, 0)):
        arguments = experts(*counts, rest=9)
        rows = torch.full((sum(counts) + 9, 64), 7.0, dtype=torch.bfloat16)
        monkeypatch.setattr(w4a8_grouped_gemm, "empty", lambda *_, rows=rows: rows)
        run("w4a8_grouped_gemm", arguments)
        assert (rows[sum(counts) :] == 7).all()


def test_gemm_of_an_expert_beyond_two_to_the_31_bytes_reads_that_one():
    """Offsets are computed in 64 bits.  The storage is reserved, its pages are never touched."""
    arguments = experts(1, 2, n=16, k=128)
    stride = 2**31 + 64
    b = torch.empty(stride + 1024, dtype=torch.int8).as_strided((2, 16, 64), (stride, 64, 1))
    arguments["b"] = b.copy_(arguments["b"])
    assert_like_reference("w4a8_grouped_gemm", arguments)


def test_gemm_of_weights_whose_rows_lie_apart_reads_them_there():
    """Strides with and without a factor of 16 bytes; odd bytes cost single loads."""
    arguments = experts(3, 2, n=24, k=256)
    for pad in (16, 3):
        b = torch.full((2, 24, 128 + pad), -1, dtype=torch.int8)[:, :, :128]
        scale = torch.full((2, 2, 24 + pad), torch.nan, dtype=torch.bfloat16)[:, :, :24]
        wide = {"b": b.copy_(arguments["b"]), "b_scale": scale.copy_(arguments["b_scale"])}
        assert_like_reference("w4a8_grouped_gemm", {**arguments, **wide})


# ---- w4a8_moe


PARTS = {
    "w4a8_moe_prep": 1,
    "moe_permute_fp8_quant": 1,
    "w4a8_grouped_gemm": 2,
    "silu_mul_fp8_quant": 1,
    "moe_unpermute_reduce": 1,
}


def layer(target, **keywords):
    """Call the layer on a pretended target; return arguments, result and what ran."""
    arguments = inputs("w4a8_moe", m=5, topk=3, num_experts=3, n=128, k=256, **keywords)
    backend = target.partition(":")[0]
    # Pinned, so that parts in CUDA C++ do not compete.
    with pretend(target), hwfuse.using(f"{backend}/triton"), hwfuse.record() as record:
        return arguments, hwfuse.op("w4a8_moe")(**arguments), record.calls


@pytest.mark.parametrize("is_dynamic", [False, True])
@pytest.mark.parametrize("target", ["cuda:sm90", "rocm:gfx942"])
def test_layer_runs_each_part_as_an_op_and_is_right(target, is_dynamic):
    """What a part runs on is chosen, recorded and configured like that of any other call."""
    arguments, found, calls = layer(target, is_dynamic=is_dynamic)
    parts = {**PARTS, "moe_input_scale": 1} if is_dynamic else PARTS
    identifier = f"{target.partition(':')[0]}/triton"
    assert calls == {(op, identifier): count for op, count in {**parts, "w4a8_moe": 1}.items()}
    reference = import_module("hwfuse_reference.torch_ops.w4a8_moe").w4a8_moe
    spec = hwfuse.op("w4a8_moe").spec
    assert compare(spec.compare["out"], found, reference(**arguments), arguments) is None


def test_layer_lets_a_part_be_configured():
    """A policy for a part holds inside of the layer."""
    arguments = inputs("w4a8_moe", m=3, topk=2, num_experts=2, n=128, k=128)
    with (
        pretend("cuda:sm90"),
        hwfuse.using("cuda/triton"),
        hwfuse.using(w4a8_grouped_gemm="reference/torch"),
        hwfuse.record() as record,
    ):
        hwfuse.op("w4a8_moe")(**arguments)
    assert record.calls["w4a8_grouped_gemm", "reference/torch"] == 2
    assert record.calls["moe_unpermute_reduce", "cuda/triton"] == 1


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_layer_of_tokens_of_other_ranks_is_zero(is_dynamic):
    """No expert has a row; what lies in the buffers is never used."""
    arguments = inputs("w4a8_moe", m=4, topk=2, num_experts=2, n=128, k=128, is_dynamic=is_dynamic)
    arguments["topk_ids"][:] = -1
    with pretend("cuda:sm90"), hwfuse.using("cuda/triton"):
        assert not hwfuse.op("w4a8_moe")(**arguments).any()


def test_layer_compiled_is_one_node_and_equal():
    """The parts are chosen when the node runs, not when it is traced."""
    arguments = inputs("w4a8_moe", m=2, topk=2, num_experts=2, n=128, k=128)
    with pretend("cuda:sm90"), hwfuse.using("cuda/triton"):
        eager = hwfuse.op("w4a8_moe")(**arguments)

        def call(**keywords):
            return hwfuse.op("w4a8_moe")(**keywords)

        compiled = torch.compile(call, fullgraph=True, backend="eager")
        with hwfuse.record() as record:
            assert torch.equal(compiled(**arguments), eager)
    assert record.calls["w4a8_grouped_gemm", "cuda/triton"] == 2


def test_layer_says_that_it_is_made_of_ops():
    """`explain` names the variant."""
    for is_dynamic, words in ((False, "six ops"), (True, "computes a scale")):
        decision = hwfuse.explain("w4a8_moe", device="rocm:gfx942", is_dynamic=is_dynamic)
        assert decision.chosen == "rocm/triton"
        assert words in decision.facts["variant"]


# ---- all


@pytest.mark.parametrize("op", SHARED)
def test_ops_ask_the_device_for_nothing(op):
    """On meta tensors a look at any number raises: so no host synchronisation, capture is safe."""
    arguments = small(op, m=300, device="meta")
    with recorded_launches() as launches:
        getattr(SHARED[op], op)(**arguments)
    assert launches


@pytest.mark.parametrize("op", [op for op in SHARED if op != "w4a8_moe_prep"])
def test_ops_without_rows_launch_no_empty_grid(op):
    """M = 0: an accelerator refuses an empty grid."""
    with recorded_launches() as launches:
        found = getattr(SHARED[op], op)(**small(op, m=0))
    assert all(launch.grid[0] > 0 for launch in launches)
    assert found.shape[0] == (1 if op == "moe_input_scale" else 0)


@pytest.mark.parametrize("backend", ["cuda", "rocm"])
def test_variants_in_the_files_are_those_of_the_kernels(backend):
    """The thresholds that `explain` shows are the ones that the code compares with."""

    def facts(op):
        package = import_module(f"hwfuse_{backend}.triton_ops")
        tree = ast.parse((Path(package.__path__[0]) / f"{op}.py").read_text())
        values = {
            ast.unparse(n.targets[0]): n.value for n in tree.body if isinstance(n, ast.Assign)
        }
        return list(ast.literal_eval(values["VARIANTS"]).values())

    gemm, prep = w4a8_grouped_gemm, w4a8_moe_prep
    assert facts("w4a8_moe_prep") == [
        f"m * topk <= {prep.FEW_ROUTES}",
        f"m * topk > {prep.FEW_ROUTES}",
    ]
    assert facts("w4a8_grouped_gemm") == [
        f"m > {gemm.ROWS_FOR_128} * num_experts",
        f"m > {gemm.ROWS_FOR_64} * num_experts",
        f"m > {gemm.ROWS_FOR_32} * num_experts",
        f"m <= {gemm.FEW_ROWS}",
        f"m > {gemm.FEW_ROWS}",
    ]


@pytest.mark.parametrize("backend", ["cuda", "rocm"])
@pytest.mark.parametrize("op", SHARED)
def test_both_backends_call_the_shared_kernels(op, backend):
    """One kernel file serves both vendors; AMD's wavefronts have 64 threads."""
    implementation = getattr(import_module(f"hwfuse_{backend}.triton_ops.{op}"), op)
    with recorded_launches() as launches:
        implementation(**small(op, m=300, device="meta"))
    with recorded_launches() as same:
        getattr(SHARED[op], op)(**small(op, m=300, device="meta"))
    for one, other in zip(launches, same, strict=True):
        assert one.kernel is other.kernel
        threads = one.kwargs["num_warps"] * (64 if backend == "rocm" else 32)
        wanted = other.kwargs["num_warps"] * 32
        assert wanted <= threads <= 2 * wanted
