"""hwfuse.testing as outside backends and the command line use it."""

import subprocess
import sys

import pytest
import torch

import hwfuse
from hwfuse import _state, layouts
from hwfuse.testing import _matrix, implementation, parity_tests, row, run
from hwfuse.testing.parity import checks

OP = "fused_qkvzba"
SMALL = {
    OP: row(m=5, num_k_heads=1, num_v_heads=3, head_k_dim=8, head_v_dim=4, layout="contiguous")
}


def split(qkvz, ba, *, head_k_dim, head_v_dim, layout="interleaved"):
    """Split contiguous rows."""
    heads = ba.shape[1] // 2
    mixed, z = qkvz.split([qkvz.shape[1] - heads * head_v_dim, heads * head_v_dim], dim=1)
    z = z.unflatten(1, (heads, head_v_dim))
    return mixed + 0, z + 0, ba[:, :heads] + 0, ba[:, heads:] + 0


def test_import_of_testing_loads_no_heavy_module():
    """`from hwfuse.testing import pretend` costs nothing that it does not need."""
    code = (
        "import sys, hwfuse.testing; hwfuse.testing.pretend; hwfuse.testing.row;"
        "print([m for m in ('triton', 'pytest', 'torch._dynamo') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_report_counts_by_op_implementation_and_target():
    """A vendor's implementation is tried as each of its stand-ins, the op itself only once."""
    with implementation(OP, "acme/split", split, vendor="amd"):
        report = run([OP], ["acme"], matrix=SMALL)
    assert list(report.lines) == [(OP, "acme/split", f"rocm:gfx9{n}") for n in ("42", "50")]
    assert report.ok
    assert report.to_dict()["lines"][0] == {
        "op": OP,
        "implementation": "acme/split",
        "target": "rocm:gfx942",
        "passed": 3,
        "failed": {},
        "skipped": {},
        "unreached": None,  # that needs Triton, which a machine may lack
    }


def test_unreached_implementation_is_reported_unless_it_is_experimental():
    """One that never wins by itself is noted; an experimental one is not meant to."""
    for requires, note in (({}, "every call gets acme/first"), ({"experimental": True}, None)):
        with (
            implementation(OP, "acme/first", split),
            implementation(OP, "acme/second", split, requires=requires),
        ):
            report = run([OP], ["acme"], matrix=SMALL)
        assert report.lines[OP, "acme/first", "cpu"].unreached is None
        assert report.lines[OP, "acme/second", "cpu"].unreached == note


def test_missing_package_is_a_skip_with_its_reason_and_proves_nothing():
    """What is not installed did not fail, and the report is not ok either."""
    requires = {"packages": ("acme_kernels",)}
    with implementation(OP, "acme/split", split, requires=requires):
        report = run([OP], ["acme"], "cpu", matrix=SMALL)
    line = report.lines[OP, "acme/split", "cpu"]
    assert line.skipped == {"needs acme_kernels; acme_kernels is not installed": 1}
    assert (line.passed, line.failed, report.ok) == (0, {}, False)


def test_other_device_types_are_skipped_with_their_reason():
    """An implementation for hardware that is neither here nor pretended says so."""
    with implementation(OP, "acme/split", split, vendor="xpu"):
        report = run([OP], ["acme"], matrix=SMALL)
    assert report.lines[OP, "acme/split", "xpu"].skipped == {"no xpu device is here": 1}


def test_unusable_file_is_a_failure(monkeypatch):
    """A file that cannot be an implementation, such as one of another signature, is no skip."""
    with implementation(OP, "acme/split", split) as record:
        record.problem = "signatures differ"
        report = run([OP], ["acme"], matrix=SMALL)
    assert "signatures differ" in str(report.lines[OP, "acme/split", "cpu"].failed)


@pytest.mark.parametrize(
    ("arch", "device", "targets"),
    [
        ((), None, ["cuda:sm90"]),
        (("sm100",), None, ["cuda:sm100"]),
        (("sm90", "sm100"), None, ["cuda:sm90"]),
        ((), "cuda:sm80", ["cuda:sm80"]),
        ((), "rocm", []),
    ],
)
def test_targets_follow_arch_and_device(arch, device, targets):
    """An implementation is tried as something it serves, and only where it is asked for."""
    if torch.cuda.is_available():
        pytest.skip("a real accelerator takes the place of the stand-in")
    with implementation(OP, "acme/split", split, vendor="nvidia", requires={"arch": arch}):
        found = checks([OP], ["acme"], device, SMALL)
    assert sorted({check.case.place.target for check in found}) == targets


def test_op_without_a_line_is_tried_with_each_dtype_and_word():
    """An outside backend has no matrix: the spec gives the usual sizes and what options may be."""
    with implementation(OP, "acme/split", split):
        names = [check.name for check in checks([OP], ["acme"])]
    assert "fused_qkvzba-acme/split-cpu-bfloat16-m=37-interleaved" in names
    assert "fused_qkvzba-acme/split-cpu-float32-m=0-contiguous" in names


@pytest.mark.parametrize("option", ["scale_layout", "scale_format"])
def test_words_of_an_option_come_from_the_op_itself(option):
    """Its own error lists them, so that no second list can be forgotten."""
    words = {"scale_layout": layouts.LAYOUTS, "scale_format": layouts.FORMATS}
    assert _matrix.words_of(hwfuse.op("fp8_group_quant").spec, option) == words[option]


def test_progress_names_each_check():
    """The command line shows where it is."""
    seen = []
    with implementation(OP, "acme/split", split):
        run([OP], ["acme"], "cpu", matrix=SMALL, progress=lambda *where: seen.append(where))
    assert [where[:2] for where in seen] == [(0, 3), (1, 3), (2, 3)]
    assert seen[2][2] == "fused_qkvzba-acme/split-cpu-traits"


def test_parity_tests_of_an_absent_backend_is_an_error():
    """A test file that collects nothing would pass for ever."""
    with pytest.raises(ValueError, match="backend acme is not installed"):
        parity_tests("acme")


def test_implementation_is_gone_after_its_block():
    """Neither the registry nor a memo table keeps it."""
    op, requires = hwfuse.op(OP), {"facts": ("layout == 'contiguous'",)}
    args, options = op.spec.split(op.spec.make_inputs(m=2, layout="contiguous"))
    with implementation(OP, "acme/split", split, requires=requires):
        assert hwfuse.explain(op.spec.name, *args, **options).chosen == "acme/split"
        op(*args, **options)
    assert "acme/split" not in _state.registry().implementations(OP)
    with hwfuse.record() as record:
        op(*args, **options)
    assert record.calls == {(OP, "reference/torch"): 1}


def test_wrong_requires_of_an_implementation_is_an_error():
    """As in a file: an unknown key is a typo."""
    with (
        pytest.raises(ValueError, match="REQUIRES has no key 'fact'"),
        implementation(OP, "acme/split", split, requires={"fact": ()}),
    ):
        pass
