"""w4a8_grouped_gemm in CUDA C++ on a Hopper GPU: every variant, and what once went wrong.

The cases marked *small* are also for NVIDIA's checkers, which must report nothing::

    compute-sanitizer --tool memcheck python -m pytest tests/cuda/test_w4a8_on_gpu.py -k small
    compute-sanitizer --tool racecheck python -m pytest tests/cuda/test_w4a8_on_gpu.py -k small
"""

from __future__ import annotations

import itertools

import pytest
import torch

from hwfuse import packing
from hwfuse.ops.w4a8_grouped_gemm import make_inputs
from hwfuse_cuda.cpp_ops import w4a8_grouped_gemm as implementation

HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not HAS_HOPPER, reason="needs an NVIDIA GPU of arch sm90")

DEVICE, BOUND = "cuda", 2e-3
# m, n, k, experts: one block of everything, N an odd multiple of 64, odd K/128, empty experts, ...
SMALL = [
    (1, 64, 128, 1),
    (37, 192, 384, 5),
    (300, 128, 256, 3),
    (9, 64, 1024, 2),
    (130, 320, 256, 9),
]


@pytest.fixture
def use(monkeypatch):
    """Return a function that makes all calls run one variant."""

    def force(chosen):
        monkeypatch.setattr(implementation, "variant", lambda *_sizes: chosen)
        implementation._plan.cache_clear()

    yield force
    implementation._plan.cache_clear()


def check(inputs, rows, experts=None):
    """Assert that rows of experts, all or some, are near to those in float64.

    2e-3 for all together; a few numbers alone may happen to round to bfloat16 worse than that.
    """
    bounds = list(itertools.pairwise(inputs["expert_offsets"].tolist()))
    errors, norms, count = 0.0, 0.0, 0
    for e in range(len(bounds)) if experts is None else experts:
        start, end = bounds[e]
        (packed,), (scale,) = packing.unpack_w4a8(inputs["b"][e : e + 1])
        factors = packing.deinterleave_scales(scale, num_rows=len(packed)).double()
        weight = packing.unpack_int4(packed).double() * factors.repeat_interleave(128, 1)
        expected = inputs["a"][start:end].double() @ weight.t() * inputs["a_scale"].double()
        error, norm = (rows[start:end].double() - expected).norm(), expected.norm()
        assert error <= 2 * BOUND * norm, e
        errors, norms, count = errors + error**2, norms + norm**2, count + expected.numel()
    assert count < 10_000 or errors**0.5 <= BOUND * norms**0.5


def call(inputs):
    """Run the implementation, its result most likely in memory full of NaN; return all rows."""
    shape = len(inputs["a"]), inputs["b"].shape[1] * 64
    torch.full(shape, float("nan"), dtype=torch.bfloat16, device=DEVICE)
    return implementation.w4a8_grouped_gemm(**inputs)


def build(m, n, k, num_experts, seed=0):
    """Return a call with a repacked weight."""
    return make_inputs(
        m=m, n=n, k=k, num_experts=num_experts, is_repacked=True, device=DEVICE, seed=seed
    )


def routed(inputs, counts, seed=0):
    """Give each expert this many rows, all of them in use and finite."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    shape = (sum(counts), inputs["a"].shape[1])
    rows = torch.randn(shape, device=DEVICE, generator=generator)
    bounds = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=DEVICE)
    return inputs | {"a": rows.to(torch.float8_e4m3fn), "expert_offsets": bounds}


@pytest.mark.parametrize("chosen", implementation.KERNELS)
@pytest.mark.parametrize(("m", "n", "k", "num_experts"), SMALL)
def test_small_call_is_right_in_every_variant(use, chosen, m, n, k, num_experts):
    """Rows of no expert are NaN here, and those of empty experts are none."""
    if chosen.short_k and k != 256:
        pytest.skip("this variant is for K = 256")
    use(chosen)
    inputs = build(m, n, k, num_experts)
    check(inputs, call(inputs))


@pytest.mark.parametrize("k", [256, 640])
@pytest.mark.parametrize("m", [1, 40, 300])
def test_small_call_takes_the_variant_of_its_sizes(m, k):
    """As declared, without force; strided rows."""
    inputs = make_inputs(
        m=m, n=192, k=k, num_experts=3, row_pad=16, is_repacked=True, device=DEVICE
    )
    check(inputs, call(inputs))


@pytest.mark.parametrize("num_experts", [1, 33, 1000, 1024])
def test_offsets_of_many_experts_are_added_up(num_experts):
    """One warp does it, each lane for a run of experts."""
    for k in (128, 256):
        inputs = build(3 * num_experts + 5, 64, k, num_experts)
        check(inputs, call(inputs))


@pytest.mark.parametrize("k", [256, 384])
@pytest.mark.parametrize(
    "counts",
    [(0, 0, 0, 7), (7, 0, 0, 0), (0, 500, 0, 1), (161, 160, 1, 0), (2000, 3, 4, 5), (1, 1, 1, 1)],
)
def test_empty_and_hot_experts_have_their_own_rows(counts, k):
    """Several tiles of one expert, of sizes that are no multiple of 8."""
    inputs = routed(build(1, 192, k, 4), counts)
    check(inputs, call(inputs))


def test_call_without_any_row_in_use_ends():
    """All routes are another rank's."""
    for k in (256, 512):
        inputs = build(64, 128, k, 4)
        inputs["expert_offsets"] = torch.zeros(5, dtype=torch.int32, device=DEVICE)
        call(inputs)
        torch.cuda.synchronize()


@pytest.mark.parametrize("k", [256, 384])
@pytest.mark.parametrize("rows", [3, 20, 100])
def test_nan_rows_stay_in_their_rows(rows, k):
    """In use or not, and beside the rows of another expert within one tile."""
    inputs = routed(build(1, 128, k, 3), (rows, rows, rows))
    clean = call(inputs)
    dirty = inputs | {"a": inputs["a"].clone()}
    dirty["a"][rows - 1] = float("nan")
    found = call(dirty)
    assert found[rows - 1].isnan().all()
    found[rows - 1] = clean[rows - 1]
    assert torch.equal(found, clean)


@pytest.mark.parametrize("m", [64, 512, 4096])
@pytest.mark.parametrize("k", [256, 2048])
def test_spare_rows_change_nothing(k, m):
    """One rank of eight has room for all routes, and uses an eighth: NaN behind."""
    inputs = build(8 * m, 256, k, 8)
    counts = torch.multinomial(torch.ones(8), m, replacement=True).bincount(minlength=8).tolist()
    tight = routed(inputs, counts)
    spare = tight | {"a": inputs["a"].clone().view(torch.uint8).fill_(0x7F)}
    spare["a"] = spare["a"].view(torch.float8_e4m3fn)
    spare["a"][:m] = tight["a"]
    rows = call(spare)
    assert rows[:m].isfinite().all()
    check(tight, rows[:m])


SIZES = {
    "TP8 gate and up": (256, 512, 7168),
    "TP8 down": (256, 7168, 256),
    "EP8 gate and up": (32, 4096, 7168),
    "EP8 down": (32, 7168, 2048),
}


@pytest.mark.parametrize("tokens", [1, 64, 512, 4096])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_result_at_full_size_is_right_and_the_same_a_hundred_times(sizes, tokens):
    """A stage that is released too early shows in some runs only, as whole lines of 128 bytes."""
    num_experts, n, k = sizes
    inputs = build(1, n, k, num_experts)
    share = torch.rand(num_experts).add(0.5)
    total = tokens * 8 if num_experts == 256 else tokens
    counts = torch.multinomial(share, total, replacement=True).bincount(minlength=num_experts)
    inputs = routed(inputs, counts.tolist())
    first = call(inputs)
    used = counts.nonzero().flatten().tolist()
    check(inputs, first, experts=used[:: max(1, len(used) // 4)])
    differing = sum(not torch.equal(call(inputs), first) for _ in range(100))
    assert differing == 0


@pytest.mark.parametrize(("k", "rows"), [(7168, 310_000), (256, 310_000)])
def test_rows_beyond_two_to_the_31_are_addressed(k, rows):
    """Of a in bytes (first case), of the result in elements (second, N 7168)."""
    n = 64 if k == 7168 else 7168
    inputs = routed(build(1, n, k, 3), (rows // 2, 3, rows - rows // 2 - 3))
    found = call(inputs)
    start = rows - 200
    last = {"a": inputs["a"][start:], "b": inputs["b"][2:]}
    offsets = torch.tensor([0, 200], dtype=torch.int32, device=DEVICE)
    check(inputs | last | {"expert_offsets": offsets}, found[start:])


def test_weights_beyond_two_to_the_31_bytes_are_addressed():
    """The last experts of 700 lie beyond 2 GiB."""
    num_experts, n, k = 700, 2048, 4096
    blocks, no_scale = build(1, n, k, 1)["b"], torch.empty(0, dtype=torch.bfloat16, device=DEVICE)
    inputs = build(1, n, k, 1)
    inputs["b"] = blocks.expand(num_experts, -1, -1, -1).clone()
    inputs["b"][-1] = build(1, n, k, 1, seed=1)["b"][0]
    inputs = routed(inputs | {"b_scale": no_scale}, (2,) * num_experts)
    assert inputs["b"].numel() > 2**31
    check(inputs, call(inputs), experts=[0, num_experts - 2, num_experts - 1])


@pytest.mark.parametrize("k", [256, 1024])
def test_replayed_graph_reads_the_new_routing(k):
    """Nothing of the first call's routing is kept on the host."""
    inputs = routed(build(1, 128, k, 4), (30, 0, 2, 8))
    call(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = implementation.w4a8_grouped_gemm(**inputs)
    inputs["expert_offsets"].copy_(torch.tensor([0, 1, 9, 9, 40]))
    graph.replay()
    check(inputs, rows)
