"""torch.compile, export and opcheck: one node per call, chosen when it runs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import hwfuse
from hwfuse.testing._pretend import pretend

# Some versions of torch use what they deprecate while they import their compiler.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

QUANT = hwfuse.op("fp8_group_quant")
SPLIT = hwfuse.op("fused_qkvzba")
NORM = hwfuse.op("qkv_rms_norm")
NORM_ = hwfuse.op("qkv_rms_norm_")
HEADS = {"head_k_dim": 8, "head_v_dim": 8}
FAST, REFERENCE = "acme/fast", "reference/torch"


class Counted:
    """A compiled function.  `graphs`: what it was compiled to, one for each compilation."""

    def __init__(self, function):
        self.graphs = []

        def backend(graph, inputs):
            self.graphs.append(graph)
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        self.call = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)

    def __call__(self, *args, **kwargs):
        """Call it."""
        return self.call(*args, **kwargs)

    @property
    def nodes(self):
        """Targets of the last graph's calls."""
        graph = self.graphs[-1].graph
        return [str(n.target) for n in graph.nodes if n.op == "call_function"]


@pytest.fixture(scope="module")
def quant():
    """A compiled function around fp8_group_quant, shared because compiling takes a while."""
    torch._dynamo.reset()
    compiled = Counted(lambda x: QUANT(x + 0, scale_layout="column"))
    compiled(torch.zeros(4, 128))
    return compiled


def split_inputs(m=2, **keywords):
    """Return the tensors of a small fused_qkvzba."""
    inputs = SPLIT.spec.make_inputs(
        m=m, num_k_heads=1, num_v_heads=2, **HEADS, dtype=torch.float32, **keywords
    )
    return inputs["qkvz"], inputs["ba"]


def test_compiled_call_is_one_node_and_equals_eager(quant):
    """No size, dtype or policy of hwfuse is in the graph."""
    assert quant.nodes.count("hwfuse.fp8_group_quant.default") == 1
    for m in (4, 5, 64, 65, 1000):
        x = torch.randn(m, 128)
        for found, expected in zip(quant(x), QUANT(x, scale_layout="column"), strict=True):
            assert torch.equal(found.float(), expected.float())
            assert found.stride() == expected.stride()
    assert len(quant.graphs) == 1


def test_policy_acts_on_compiled_code_at_once_and_never_recompiles(quant, fakes):
    """using, configure, added implementations, other ops: the graph stays, the choice changes."""
    x, ran = torch.zeros(4, 128), []

    def run():
        with hwfuse.record() as record:
            quant(x)
        ran.append(next(iter(record.calls))[1])

    run()
    fakes.add(FAST, facts=("m <= 64",))
    run()
    with hwfuse.using(fp8_group_quant=REFERENCE):
        run()
    run()
    hwfuse.configure({"ops": {"fp8_group_quant": REFERENCE}})
    run()
    hwfuse.configure({"block": ["rocm"]})
    run()
    with pretend("rocm:gfx942"):
        run()
    x = torch.zeros(65, 128)
    run()
    hwfuse.op("w4a8_moe_prep")
    x = torch.zeros(7, 128)
    run()
    fast, slow = FAST, REFERENCE
    assert ran == [slow, fast, slow, fast, slow, fast, fast, slow, fast]
    assert len(quant.graphs) == 1


def test_compiled_code_takes_a_pin_that_cannot_run_as_an_error(quant, fakes):
    """The same code decides, so the same errors come."""
    fakes.add(FAST, facts=("m <= 4",))
    with hwfuse.using(FAST), pytest.raises(hwfuse.PinnedUnavailable):
        quant(torch.zeros(5, 128))


def test_record_counts_compiled_calls(quant, fakes):
    """Counting happens where the implementation is chosen."""
    fakes.add(FAST)
    with hwfuse.record() as record:
        quant(torch.zeros(4, 128))
        quant(torch.zeros(5, 128))
    quant(torch.zeros(4, 128))
    assert record.calls == {("fp8_group_quant", FAST): 2}


def test_compiled_gradient_is_the_references(fakes):
    """Whatever runs forward; eager refuses it, the node recomputes."""
    fakes.add(FAST, "fused_qkvzba")
    compiled = Counted(lambda qkvz, ba: SPLIT(qkvz, ba, **HEADS))
    qkvz, ba = split_inputs()
    qkvz.requires_grad_()
    results = compiled(qkvz, ba)
    assert fakes.ran == [FAST]
    weights = [torch.randn_like(result) for result in results]
    found = torch.autograd.grad(_weighted(results, weights), qkvz)
    expected = torch.autograd.grad(_weighted(SPLIT(qkvz, ba, **HEADS), weights), qkvz)
    assert torch.equal(found[0], expected[0])


def _weighted(results, weights):
    return sum((r * w).sum() for r, w in zip(results, weights, strict=True))


def test_compiled_op_without_gradient_runs_and_raises_in_backward():
    """Not None, which would train in silence; the text names the op."""
    compiled = Counted(lambda x: QUANT(x)[1] * 2)
    x = torch.ones(2, 128, requires_grad=True)
    with pytest.raises(
        Exception, match="fp8_group_quant has no gradient: it is for inference only"
    ):
        compiled(x).sum().backward()
    with torch.no_grad():
        assert compiled(x).shape == (2, 1)


def test_compiled_in_place_op_writes_and_refuses_a_gradient():
    """Mutation survives functionalisation; a gradient is refused by name."""
    compiled = Counted(lambda q, k, v, w: NORM_(q * 1, k, v, w, w, head_dim=8))
    inputs = NORM_.spec.make_inputs(m=3, num_q_heads=2, num_kv_heads=1, head_dim=8)
    q, k, v, w = (inputs[name] for name in ("q", "k", "v", "q_weight"))
    expected = NORM(q, k, v, w, w, head_dim=8)
    with torch.inference_mode():
        compiled(q, k, v, w)
    assert torch.equal(k, expected[1])
    assert torch.equal(v, expected[2])
    with pytest.raises(Exception, match="qkv_rms_norm_ writes into its inputs and has no gradient"):
        compiled(q, k, v, w.clone().requires_grad_())


def test_using_of_an_op_in_traced_code_is_an_error_that_says_what_to_do():
    """A choice written into compiled code would be frozen there."""
    compiled = Counted(lambda x: QUANT.using(REFERENCE)(x)[1])
    with pytest.raises(
        Exception, match=r"cannot be traced; put hwfuse.using\(…\) around the compil"
    ):
        compiled(torch.zeros(2, 128))


def test_dtype_none_in_traced_code_is_resolved_before_the_node(quant):
    """Fakes and graphs see a concrete dtype."""
    node = next(n for n in quant.graphs[0].graph.nodes if "fp8_group_quant" in str(n.target))
    assert node.kwargs["dtype"] is torch.float8_e4m3fn


def test_input_error_in_traced_code_names_the_argument():
    """The fake is `outputs`, which checks like every implementation."""
    compiled = Counted(lambda x: QUANT(x, group_size=100))
    with pytest.raises(Exception, match=r"InputError\('x.shape\[1\]', .*, 'a positive multiple"):
        compiled(torch.zeros(2, 128))


SMALL = {
    "fused_qkvzba": {"num_k_heads": 1, "num_v_heads": 3, **HEADS, "dtype": torch.float32},
    "qkv_rms_norm": {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 8, "dtype": torch.float32},
    "qkv_rms_norm_": {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 8},
    "fp8_group_quant": {"k": 256, "fp8": torch.float8_e4m3fn, "scale_layout": "column_tma"},
    "fp8_blockscale_gemm": {"n": 128, "k": 128},
    "w4a8_moe_prep": {"num_experts": 4},
    "fused_qkvbfg": {"hidden_size": 64, "num_heads": 2, "head_dim": 16},  # has no options
}


@pytest.mark.parametrize("name", SMALL)
def test_opcheck(name):
    """Schema, autograd registration and fake kernel are as torch wants them."""
    op = hwfuse.op(name)
    args, kwargs = op.spec.split(op.spec.make_inputs(m=3, **SMALL[name]))
    if name in ("fused_qkvzba", "qkv_rms_norm", "fused_qkvbfg"):
        args[0].requires_grad_()
    checks = ["test_autograd_registration", "test_faketensor"]
    if name != "fp8_blockscale_gemm":
        checks.append("test_schema")  # which cannot compare fp8 arguments
    torch.library.opcheck(op.node, args, kwargs, test_utils=checks)


class Model(torch.nn.Module):
    """Two ops, one after the other."""

    def forward(self, qkvz, ba):
        """Split, then quantise."""
        mixed_qkv, z, _, _ = SPLIT(qkvz, ba, **HEADS)
        return (*QUANT(mixed_qkv, group_size=16), z)


@pytest.fixture(scope="module", params=[False, True], ids=["default", "strict"])
def exported(request):
    """A program with a free number of rows, exported in both modes."""
    rows = torch.export.Dim("m")
    shapes = {"qkvz": {0: rows}, "ba": {0: rows}}
    return torch.export.export(
        Model(), split_inputs(m=8), dynamic_shapes=shapes, strict=request.param
    )


def test_exported_program_has_one_node_per_call_and_no_limit_on_rows(exported):
    """No guard on m, whatever the implementations' facts say."""
    targets = [str(node.target) for node in exported.graph.nodes]
    assert targets.count("hwfuse.fused_qkvzba.default") == 1
    assert targets.count("hwfuse.fp8_group_quant.default") == 1
    (limit,) = exported.range_constraints.values()
    assert (int(limit.lower), limit.upper > 10**9) == (0, True)


def test_exported_program_runs_at_other_sizes_and_obeys_policy(exported, fakes):
    """Also one row; the choice is made when it runs."""
    for m in (1, 3, 65):
        inputs = split_inputs(m=m)
        for found, expected in zip(exported.module()(*inputs), Model()(*inputs), strict=True):
            assert torch.equal(found.float(), expected.float())
    fakes.add(FAST)
    exported.module()(*split_inputs())
    assert fakes.ran == [FAST]


FRESH = """
import json, sys
import torch
import hwfuse
program = torch.export.load(sys.argv[1])
args = torch.load(sys.argv[2])
results = {"exported": [float(t.float().sum()) for t in program.module()(*args)]}
graphs = []
def backend(graph, inputs):
    graphs.append(graph)
    return graph
@torch.compile(fullgraph=True, dynamic=True, backend=backend)
def first_use(ids):
    return hwfuse.op("w4a8_moe_prep")(ids, num_experts=4, n=128, k=128)
for rows in (3, 5):
    offsets = first_use(torch.full((rows, 2), 1, dtype=torch.int32))[0]
results["first_use"] = offsets.tolist()
hwfuse.op("qkv_rms_norm")
first_use(torch.full((4, 2), 1, dtype=torch.int32))
results["graphs"] = len(graphs)
results["nodes"] = [str(n.target) for n in graphs[0].graph.nodes if n.op == "call_function"]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Another process, which only imports hwfuse: loads a program, and traces an op's first use."""
    folder = tmp_path_factory.mktemp("exported")
    rows, inputs = torch.export.Dim("m"), split_inputs(m=8)
    shapes = {"qkvz": {0: rows}, "ba": {0: rows}}
    program = torch.export.export(Model(), inputs, dynamic_shapes=shapes)
    torch.export.save(program, folder / "model.pt2")
    torch.save(split_inputs(m=5), folder / "inputs.pt")
    command = [sys.executable, "-c", FRESH, folder / "model.pt2", folder / "inputs.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_saved_program_loads_in_a_fresh_process(fresh):
    """Ops are defined when their names are looked up."""
    expected = [float(result.float().sum()) for result in Model()(*split_inputs(m=5))]
    assert fresh["exported"] == expected


def test_first_ever_use_of_an_op_inside_compiled_code(fresh):
    """`hwfuse.op(name)` may be traced; another op's creation later recompiles nothing."""
    assert fresh["first_use"] == [0, 0, 10, 10, 10]
    assert fresh["nodes"].count("hwfuse.w4a8_moe_prep.default") == 1
    assert fresh["graphs"] == 1
