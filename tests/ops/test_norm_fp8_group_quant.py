"""The four RMSNorms that end in fp8_group_quant: against float64, rounded nowhere in between."""

import importlib
import math

import pytest
import torch

from hwfuse import InputError, layouts
from hwfuse.testing.compare import compare
from hwfuse_reference.torch_ops.fp8_group_quant import fp8_group_quant

FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
PLAIN, ADD = "rms_norm_fp8_group_quant", "add_rms_norm_fp8_group_quant"
PLAIN_AND, ADD_AND = "rms_norm_and_fp8_group_quant", "add_rms_norm_and_fp8_group_quant"
OPS = (PLAIN, ADD, PLAIN_AND, ADD_AND)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
PAIRS = [(f, y) for f in ("fp32", "ue8m0") for y in ("row", "column", "column_tma")]
PAIRS.append(("ue8m0_packed", "column_tma"))


def spec_of(name):
    """Return the module of one op's spec."""
    return importlib.import_module(f"hwfuse.ops.{name}")


def run(name, arguments):
    """Call the reference; return its results by name."""
    function = getattr(importlib.import_module(f"hwfuse_reference.torch_ops.{name}"), name)
    return dict(zip(spec_of(name).COMPARE, function(**arguments), strict=True))


def call(name, x, residual, weight, **options):
    """Run an op, with the residual if it takes one; without it x is the sum."""
    tensors = {"x": x, "residual": residual} if name.startswith("add") else {"x": x + residual}
    return run(name, {**tensors, "weight": weight, **options})


def norm(inputs):
    """Return y of the formula, in float64."""
    x = inputs["x"].double()
    t = x + inputs["residual"].double() if "residual" in inputs else x
    y = t / (t.square().mean(dim=1, keepdim=True) + inputs["eps"]).sqrt()
    return y * inputs["weight"].double()


@pytest.mark.parametrize("fp8", [FN, FNUZ])
@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", OPS)
def test_results_are_those_of_the_exact_norm_rounded_once(name, dtype, scale_format, fp8):
    """The weight's dtype is its own; rows with NaN and infinity have a test of their own."""
    spec = spec_of(name)
    options = {"group_size": 64, "scale_format": scale_format}
    inputs = spec.make_inputs(
        m=16, k=320, dtype=dtype, weight_dtype=torch.float32, fp8=fp8, row_pad=24, **options
    )
    inputs["x"][[2, 3]] = 1.0
    y = norm(inputs)
    found = run(name, inputs)
    q, scale = fp8_group_quant(y.float(), dtype=fp8, **options)
    expected = {"q": q, "scale": scale}
    if "residual" in inputs:
        expected["residual_out"] = inputs["x"] + inputs["residual"]
    if "and" in name and dtype == torch.float32:  # whose last bits the order of a sum decides
        torch.testing.assert_close(found["norm"].double(), y, rtol=2e-6, atol=0)
    elif "and" in name:
        expected["norm"] = y.to(dtype)
    for output, wanted in expected.items():
        assert compare(spec.COMPARE[output], found[output], wanted, {}) is None


@pytest.mark.parametrize("name", OPS)
def test_norm_is_quantised_before_it_is_rounded(name):
    """Groups of 1 and of 1 + 2**-7: bfloat16 norms stand in another ratio."""
    x = torch.ones(1, 256, dtype=torch.bfloat16)
    x[0, :128] += 2.0**-7
    scale = call(name, x, torch.zeros_like(x), torch.ones(256, dtype=torch.bfloat16))["scale"]
    assert (scale[0, 0] / scale[0, 1]).item() == pytest.approx(1 + 2**-7, rel=1e-6)


@pytest.mark.parametrize("name", [ADD, ADD_AND])
def test_sum_is_normed_before_it_is_rounded(name):
    """256 + 1 is 256 in bfloat16, which is what residual_out says; the norm sees 257."""
    x = torch.full((1, 256), 256.0, dtype=torch.bfloat16)
    residual = torch.zeros_like(x)
    residual[0, :128] = 1.0
    results = call(name, x, residual, torch.ones(256))
    assert (results["residual_out"] == 256).all()
    scale = results["scale"]
    assert (scale[0, 0] / scale[0, 1]).item() == pytest.approx(257 / 256, rel=1e-6)


@pytest.mark.parametrize("rounded", ["sum", "norm"])
def test_chain_that_rounds_in_between_is_one_code_off_and_refused(rounded):
    """The unfused chain is near, as the contract says, and the comparators tell it apart."""
    spec = spec_of(ADD)
    inputs = spec.make_inputs(m=16, k=512)
    inputs["x"][[2, 3]] = 1.0
    found = run(ADD, inputs)
    if rounded == "sum":
        x = inputs["x"] + inputs["residual"]
        y = norm({"x": x, "weight": inputs["weight"], "eps": inputs["eps"]}).float()
    else:
        y = norm(inputs).to(torch.bfloat16)
    q, scale = fp8_group_quant(y)
    assert compare(("fp8_codes", {"max_codes": 1, "share": 0.2}), q, found["q"], {}) is None
    assert ((scale / found["scale"] - 1).abs() <= 2**-8).all()
    assert compare(spec.COMPARE["q"], q, found["q"], {})
    assert compare(spec.COMPARE["scale"], scale, found["scale"], {})


@pytest.mark.parametrize(("longer", "shorter"), [(PLAIN_AND, PLAIN), (ADD_AND, ADD)])
def test_norm_as_last_result_changes_no_other_result(longer, shorter):
    """The forms with "and" give one result more."""
    inputs = spec_of(shorter).make_inputs(m=8, k=256)
    longer_results = run(longer, inputs)
    assert list(longer_results)[-1] == "norm"
    del longer_results["norm"]
    shorter_results = run(shorter, inputs)
    assert list(longer_results) == list(shorter_results)
    for name, result in shorter_results.items():
        assert (
            compare(("ulps", {"max_ulps": 0, "share": 0.0}), longer_results[name], result, {})
            is None
        )


@pytest.mark.parametrize("name", OPS)
def test_adding_nothing_changes_no_bit(name):
    """With a residual of 0 all four ops agree."""
    x = spec_of(PLAIN).make_inputs(m=8, k=256)["x"]
    results = call(name, x, torch.zeros_like(x), torch.ones(256))
    expected = run(PLAIN, {"x": x, "weight": torch.ones(256)})
    for output, result in expected.items():
        assert torch.equal(results[output].float().nan_to_num(-1), result.float().nan_to_num(-1))


@pytest.mark.parametrize(("scale_format", "scale_layout"), PAIRS)
@pytest.mark.parametrize("m", [0, 1, 5])
@pytest.mark.parametrize("name", OPS)
def test_layout_and_format_of_the_scale_reach_the_quantisation(name, m, scale_format, scale_layout):
    """As fp8_group_quant of the norm, which float32 rows return exactly."""
    spec = spec_of(name)
    options = {"scale_format": scale_format, "scale_layout": scale_layout, "group_size": 64}
    inputs = spec.make_inputs(m=m, k=192, dtype=torch.float32, fp8=FNUZ, **options)
    results = run(name, inputs)
    if name in (PLAIN, ADD):
        y = run(name.replace("norm_fp8", "norm_and_fp8"), inputs)["norm"]
    else:
        y = results["norm"]
    q, scale = fp8_group_quant(y, dtype=FNUZ, **options)
    assert results["q"].dtype == FNUZ
    assert torch.equal(results["q"].view(torch.uint8), q.view(torch.uint8))
    assert layouts.matches(results["scale"], scale_layout)
    assert torch.equal(results["scale"].view(torch.int32), scale.view(torch.int32))


@pytest.mark.parametrize("name", OPS)
def test_special_numbers_stay_in_their_row(name):
    """A NaN takes the whole row; an infinity takes its group, and the rest of the row becomes 0."""
    x = torch.ones(4, 256, dtype=torch.bfloat16)
    x[0, 5], x[1, 5], x[2] = math.nan, math.inf, 0.0
    results = call(name, x, torch.zeros_like(x), torch.ones(256))
    q, scale = results["q"].float(), results["scale"]
    assert q[0].isnan().all()
    assert q[1].isnan().nonzero().flatten().tolist() == list(range(128))
    assert (q[1, 128:] == 0).all()
    floor = pytest.approx(1e-10 / 448)
    assert (scale[1, 1].item(), scale[2, 0].item(), scale[2, 1].item()) == (floor, floor, floor)
    assert (q[2] == 0).all()
    assert (q[3] == 448).all()


GOOD = {"x": torch.ones(3, 256), "residual": torch.ones(3, 256), "weight": torch.ones(256)}
BAD = {
    "k": ({"x": GOOD["x"][:, :200]}, r"x.shape\[1\]: found 200, needed a positive multiple of gro"),
    "dtype": ({"x": GOOD["x"].double()}, "x.dtype: found torch.float64, needed torch.bfloat16 or"),
    "stride": ({"x": torch.ones(256, 3).t()}, r"x.stride\(-1\): found 3 .*, needed 1"),
    "weight": ({"weight": torch.ones(3)}, r"weight.shape\[0\]: found 3, needed 256, the width of"),
    "weight rank": ({"weight": torch.ones(1, 256)}, "weight.shape: .* needed 1 dimensions"),
    "weight device": (
        {"weight": torch.ones(256, device="meta")},
        "weight.device: found meta, needed cpu, as x",
    ),
    "layout": ({"scale_layout": "col"}, "scale_layout: found 'col', needed 'row' or 'column' or"),
    "pair": ({"scale_format": "ue8m0_packed"}, "scale_layout: found 'row', needed 'column_tma'"),
    "fp8": ({"dtype": torch.float8_e5m2}, "dtype: found torch.float8_e5m2, needed torch.float8_e4"),
    "group_size": ({"group_size": 0}, "group_size: found 0, needed a positive number"),
    "residual": (
        {"residual": torch.ones(2, 256)},
        r"residual.shape: found \(2, 256\), needed \(3, 256\), as x",
    ),
    "residual dtype": (
        {"residual": GOOD["residual"].half()},
        "residual.dtype: found torch.float16, needed torch.float32",
    ),
    "residual device": (
        {"residual": GOOD["residual"].to("meta")},
        "residual.device: found meta, needed cpu, as x",
    ),
}


CASES = [
    pytest.param(name, *case, id=f"{name}-{what}")
    for name in OPS
    for what, case in BAD.items()
    if name in (ADD, ADD_AND) or "residual" not in what
]


@pytest.mark.parametrize(("name", "change", "message"), CASES)
def test_bad_argument_is_refused_with_what_was_found_and_needed(name, change, message):
    """Nothing is cast, cut or copied to make a wrong call fit."""
    arguments = {**GOOD, **change}
    if name in (PLAIN, PLAIN_AND):
        del arguments["residual"]
    with pytest.raises(InputError, match=message):
        run(name, arguments)
