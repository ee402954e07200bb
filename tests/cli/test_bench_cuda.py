"""``hwfuse bench --device cuda``: what needs no GPU, from the bytes of a call to the picture."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys

import pytest
import torch

from hwfuse import _spec, _state, testing
from hwfuse._bench import about, inputs, measure, peers, report, shapes, timing, work
from hwfuse._bench import run as leader
from hwfuse._bench.peers import Missing
from hwfuse._bench.report import Report
from hwfuse._bench.shapes import Task
from hwfuse._cli import _bench_cuda
from hwfuse._errors import ConfigError, InputError
from hwfuse.testing import _cases

SMALL = {"total_experts": 16, "topk": 2, "n": 128, "k": 256}


@pytest.fixture
def small(monkeypatch):
    """Give the ops of a mixture of experts a shape that a CPU makes at once."""

    def small(op: str, num_experts: int = 16) -> Task:
        shape = shapes.Shape("small", {**SMALL, "num_experts": num_experts}, (4,))
        monkeypatch.setitem(shapes.SHAPES, op, (shape,))
        return Task(op, "small", 4)

    return small


def row(implementation="cuda/triton", kind="hwfuse", us=2.0, m=1, **changes):
    """Return a measured row."""
    fields = {
        "op": "fused_qkvzba", "shape": "qwen3-next", "m": m, "implementation": implementation,
        "kind": kind, "us": us, "least_us": us, "most_us": us, "how": "graph", "launches": 1,
        "host_us": 9.5, "bytes": 8000, "floor_us": 1.6, "floor": "copy", "variant": "", "note": "",
        "problem": "", "is_wrong": False, "seconds": 0.1,
    }  # fmt: skip
    return {**fields, **changes}


@pytest.fixture
def measured():
    """A report of one op beside two libraries, one of which failed."""
    result = Report({"device": "a card", "command": "hwfuse bench"}, missing={"deepgemm": "none"})
    for m in (1, 512):
        result.add(row("sglang: triton", "peer", 4.0, m=m))
        result.add(row(m=m, variant="small: m <= 64"))
        result.add(row("compile", "peer", None, m=m, problem="TypeError: no"))
    result.derive({("fused_qkvzba", "qwen3-next", 1): 1.9})
    return result


@pytest.mark.parametrize(
    ("goal", "us"),
    [
        (1.9, 1.9),
        ("1.5 floor", 2.4),
        ("1.1 sglang: triton", 4.4),
        (["1.001 sglang: triton", "+0.25 sglang: triton"], 4.25),
        ("1 compile", None),
    ],
)
def test_a_goal_is_a_time_or_relative_to_what_was_measured_beside_it(measured, goal, us):
    """The easiest of several; none if what it names has no time."""
    measured.derive({("fused_qkvzba", "qwen3-next", "all"): goal})
    for found in (measured.rows[0], measured.rows[3]):
        assert found["goal_us"] == (pytest.approx(us) if us else None)
        assert found["goal"] == ("" if us is None else "met" if us >= 2.0 else "missed")


def test_shapes_cover_every_op():
    """Every op can be asked for."""
    assert set(shapes.SHAPES) == set(_spec.names())


def test_select_without_a_choice_gives_all_of_an_op():
    """Each of its shapes at each M."""
    found = shapes.select(["fused_qkvzba"])
    assert len(found) == 15
    assert found[0] == ("fused_qkvzba", "qwen3-next", 1)


def test_select_of_a_shape_and_an_m_takes_those_ops_that_have_the_shape():
    """An M that no list has is measured, too."""
    found = shapes.select([], ["gemma4-31b"], [7])
    assert {task.op for task in found} == {"qkv_rms_norm", "qkv_rms_norm_", "q_keqv_rms_norm"}
    assert {task.m for task in found} == {7}


def test_num_bytes_counts_inputs_and_outputs_once():
    """Of fused_qkvzba each element is read and written."""
    task = Task("fused_qkvzba", "qwen3-next", 8)
    arguments = inputs.first_set(task, "cpu")
    spec = _spec.load(task.op)
    outputs = spec.outputs(**arguments)
    assert work.num_bytes(spec, arguments, outputs) == 2 * 8 * (12288 + 64) * 2


def test_num_bytes_of_an_op_in_place_counts_what_it_writes():
    """Read, written, and the weight."""
    task = Task("q_rms_norm_", "gemma4-e4b", 3)
    arguments = inputs.first_set(task, "cpu")
    count = work.num_bytes(_spec.load(task.op), arguments, ())
    assert count == 2 * 3 * 2048 * 2 + 256 * 2


def test_num_bytes_of_a_grouped_gemm_counts_the_experts_that_are_hit(small):
    """With their rows; four tokens to two experts each cannot hit all of 16."""
    task = small("w4a8_grouped_gemm")
    arguments = inputs.first_set(task, "cpu")
    spec = _spec.load(task.op)
    outputs = (spec.outputs(**arguments),)
    hit = int((arguments["expert_offsets"].diff() > 0).sum())
    assert 2 <= hit <= 8
    per_expert = 128 * 128 + 128 * 2 * 2
    fixed = 4 + 17 * 4
    rows = 8 * (256 + 128 * 2)
    assert work.num_bytes(spec, arguments, outputs) == hit * per_expert + fixed + rows
    assert work.num_flops(task.op, arguments) == 2 * 8 * 128 * 256


@pytest.mark.parametrize(
    ("op", "per_valid", "per_token"),
    [
        ("moe_permute_fp8_quant", 256, 256 * 2),
        ("silu_mul_fp8_quant", 3 * 128 * 0 + 2 * 128 * 2 + 128, 0),
        ("moe_unpermute_reduce", 256 * 2, 0),
    ],
)
def test_num_bytes_of_rows_of_other_ranks_does_not_count(small, op, per_valid, per_token):
    """One valid route more costs its row."""
    task = small(op, num_experts=2)
    spec = _spec.load(op)
    counts = {}
    for seed in range(12):
        keywords = dict(shapes.shape(op, "small").keywords)
        arguments = inputs._mixture(task, keywords, seed=seed, device="cpu")
        if "route_to_row" in arguments:
            valid = arguments["route_to_row"] >= 0
            num_valid, num_tokens = int(valid.sum()), int(valid.any(1).sum())
        else:
            num_valid, num_tokens = int(arguments["expert_offsets"][-1]), 0
        count = work.num_bytes(spec, arguments, (spec.outputs(**arguments),))
        counts[num_valid] = count - num_tokens * per_token
    assert len(counts) > 1
    assert len({count - valid * per_valid for valid, count in counts.items()}) == 1


def test_routes_of_other_ranks_are_negative_and_one_is_here():
    """Of 32 experts 4 are here; each token's experts differ."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        ids = inputs.routes(1, 2, 4, total=32, hot=0.0, generator=generator)
        assert (ids >= 0).any()
        assert ids.max() < 4


def test_routes_to_a_hot_expert_are_half_of_the_tokens():
    """Expert 0 is the first choice of as many tokens as were asked for."""
    generator = torch.Generator().manual_seed(0)
    ids = inputs.routes(64, 2, 256, total=256, hot=0.5, generator=generator)
    assert 32 <= int((ids == 0).sum()) <= 36
    assert all(len(set(each.tolist())) == 2 for each in ids)


def test_next_set_is_other_memory_with_equal_numbers():
    """Strides and shared storage stay."""
    task = Task("qkv_rms_norm", "gemma4-31b", 2)
    first = inputs.first_set(task, "cpu")
    second = inputs.next_set(task, first, 1)
    assert torch.equal(first["k"], second["k"])
    assert second["k"].stride() == first["k"].stride()
    assert second["k"].data_ptr() != first["k"].data_ptr()
    assert second["q"].untyped_storage().data_ptr() == second["k"].untyped_storage().data_ptr()


def test_next_set_of_a_mixture_has_other_routes(small):
    """A model's calls do not repeat their routes."""
    task = small("w4a8_grouped_gemm")
    first = inputs.first_set(task, "cpu")
    sets = [first, *(inputs.next_set(task, first, i) for i in range(1, 4))]
    assert len({tuple(each["expert_offsets"].tolist()) for each in sets}) > 1
    assert all(torch.equal(each["b"], first["b"]) for each in sets)
    assert len({each["b"].data_ptr() for each in sets}) == 4


def test_first_set_leaves_the_draws_of_specs_alone():
    """Drawing on the device is for this block only."""
    spec = _spec.load("q_rms_norm")
    before = spec.make_inputs(m=2)["q"]
    inputs.first_set(Task("q_rms_norm", "gemma4-e4b", 2), "cpu")
    assert torch.equal(spec.make_inputs(m=2)["q"], before)


@pytest.mark.parametrize(("num_bytes", "count"), [(1, 32), (16 << 20, 16), (1 << 30, 2)])
def test_num_sets_fill_more_than_the_cache(num_bytes, count):
    """Together 256 MiB, within limits."""
    assert timing.num_sets(num_bytes) == count


def test_packed_repacks_a_weight_once(small):
    """Sets that share a weight share the packed one."""
    arguments = inputs.first_set(small("w4a8_grouped_gemm"), "cpu")
    known = {}
    first, second = (inputs.packed(arguments, known) for _ in range(2))
    assert first["b"].ndim == 4
    assert first["b"] is second["b"]
    assert inputs.packed({"x": arguments["a"]}, known) is None


def test_peers_of_an_op_are_found_without_their_libraries():
    """Nothing is imported before a peer is prepared."""
    found = peers.of("fused_qkvzba", ("torch", "compile", "sglang", "flashinfer"))
    assert [peer.name for peer in found] == ["compile", "sglang: triton"]


def test_a_peer_whose_library_is_missing_says_so(monkeypatch):
    """The reason is for the table's foot."""
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    peers.load.cache_clear()
    (peer,) = peers.of("add_rms_norm_fp8_group_quant", ("flashinfer",))
    with pytest.raises(Missing, match=r"flashinfer\.norm cannot be imported: ModuleNotFoundError"):
        peer.prepare(inputs.first_set(Task(peer.op, "deepseek-v3", 1), "cpu"))
    assert set(about.missing(("torch", "flashinfer"))) == {"flashinfer"}
    peers.load.cache_clear()


def test_derive_compares_with_the_floor_the_best_peer_and_the_goal(measured):
    """Ours is first; a peer that failed is none."""
    ours, peer, failed = measured.rows[:3]
    assert [each["kind"] for each in (ours, peer, failed)] == ["hwfuse", "peer", "peer"]
    assert ours["gb_per_s"] == pytest.approx(4.0)
    assert ours["over_floor"] == pytest.approx(1.25)
    assert ours["over_best_peer"] == pytest.approx(0.5)
    assert (ours["goal"], peer["goal"]) == ("missed", "")
    assert measured.rows[3]["goal"] == ""


def test_add_of_a_contestant_again_replaces_its_row(measured):
    """A worker that was started again measures the rest of its task once more."""
    measured.add(row(us=1.0))
    assert [each["us"] for each in measured.rows if each["kind"] == "hwfuse"] == [2.0, 1.0]


def test_csv_keeps_everything_that_the_page_and_the_table_show(measured, tmp_path):
    """A picture can be drawn again without measuring."""
    report.write_csv(measured, tmp_path / "bench.csv")
    again = report.read_csv(tmp_path / "bench.csv")
    again.derive()
    assert again.about == measured.about
    assert again.missing == measured.missing
    assert [each["us"] for each in again.rows] == [each["us"] for each in measured.rows]
    assert again.problems() == measured.problems()
    measured.derive()
    assert again.cells() == measured.cells()


def test_markdown_has_the_machine_the_command_the_table_and_what_is_missing(measured):
    """A page that stands alone."""
    page = report.to_markdown(measured)
    assert page.startswith("# Benchmark on a card\n")
    assert "```text\nhwfuse bench\n```" in page
    assert "| qwen3-next | 1 | cuda/triton | 2.00 | 4 | 1.25 | 0.50 | 1 | 9.5 |" in page
    assert "| qwen3-next | 1 | floor: copy | 1.60 | 5 |" in page
    assert "- deepgemm: none" in page
    assert "- fused_qkvzba, compile (qwen3-next m=1 and 1 more): TypeError: no" in page


def test_redraw_writes_the_page_of_a_csv_again(run, measured, tmp_path):
    """From numbers that were measured elsewhere; goals may be new."""
    report.write_csv(measured, tmp_path / "bench.csv")
    goals = tmp_path / "goals.yaml"
    goals.write_text("fused_qkvzba: {qwen3-next: {1: 1.9, 512: 3}}\n")
    result = run("bench", "--redraw", str(tmp_path), "--goals", str(goals))
    page = (tmp_path / "bench.md").read_text()
    assert result.code == 0
    assert "missed (1.90)" in page
    assert "met (3.00)" in page


def test_draw_writes_a_picture(measured, tmp_path):
    """One line for each op and shape."""
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib, extra cli")
    from hwfuse._bench import plot

    plot.draw(measured, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_save_without_matplotlib_says_that_the_picture_is_missing(
    measured, tmp_path, capsys, monkeypatch
):
    """The numbers are saved all the same."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _bench_cuda.save(measured, tmp_path)
    assert (tmp_path / "bench.csv").exists()
    assert "the plot needs matplotlib: pip install 'hwfuse[cli]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["fused_qkvzba: 3", "- 1", "a: {b: {1: c d}}", "a: {b: {m: 1}}", "a: ["]
)
def test_read_goals_of_another_form_says_what_it_needs(tmp_path, text):
    """A goal that is not read is not met."""
    path = tmp_path / "goals.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"needs op: \{shape: \{m: goal\}\}"):
        report.read_goals(path)


@pytest.fixture
def without_a_gpu(monkeypatch):
    """Measure on the CPU: every call is made, no time is taken."""
    first_set = functools.partial(inputs.first_set, device="cpu")

    def device_time(calls, _):
        for call in calls:
            call()
        return timing.Time(2.0, 1.0, 3.0, "graph")

    monkeypatch.setattr(measure.inputs, "first_set", first_set)
    monkeypatch.setattr(measure.timing, "device_time", device_time)
    monkeypatch.setattr(measure.timing, "num_launches", lambda _: 1)
    monkeypatch.setattr(measure.timing, "host_us", lambda _: 5.0)
    monkeypatch.setattr(measure, "floor", lambda *_: (1.6, "copy"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(_cases, "places", lambda *_: [_cases.Place("cpu", "cuda")])


def rows_of(op, shape, *, implementation=None, libraries=()):
    """Measure an op with another implementation beside its reference."""

    def starting(who):
        return who in ("inputs", "reference/torch", "test/other") or ":" in who

    with testing.implementation(op, "test/other", implementation or _reference(op)):
        return list(measure.rows(Task(op, shape, 3), libraries, 1, starting))


def _reference(op):
    return _state.registry().implementations(op)["reference/torch"].load()


@pytest.mark.parametrize("op", ["q_rms_norm", "q_rms_norm_"])
def test_rows_of_each_contestant_start_from_the_same_numbers(without_a_gpu, op):
    """Also of an op that writes into its inputs."""
    reference, other = rows_of(op, "gemma4-e4b")
    assert (reference.kind, other.kind) == ("reference", "hwfuse")
    assert reference.problem == other.problem == ""
    assert other.us == 2.0
    assert other.host_us == 5.0


def test_rows_of_wrong_results_have_no_time(without_a_gpu):
    """Correctness comes first."""

    def q_rms_norm(
        q: torch.Tensor, q_weight: torch.Tensor, *, head_dim: int, eps: float = 1e-6
    ) -> torch.Tensor:
        return q.clone()

    _, other = rows_of("q_rms_norm", "gemma4-e4b", implementation=q_rms_norm)
    assert other.is_wrong
    assert other.us is None
    assert other.problem.startswith("output q: worst")


def test_rows_of_an_error_go_on_with_the_next(without_a_gpu):
    """It is the problem of one contestant."""

    def fused_qkvbfg(
        x: torch.Tensor, w_qkvbfg: torch.Tensor, w_fg: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("no such kernel")

    _, other, peer = rows_of(
        "fused_qkvbfg", "kimi-linear-tp4", implementation=fused_qkvbfg, libraries=("torch",)
    )
    assert other.problem == "RuntimeError: no such kernel"
    assert (peer.implementation, peer.problem) == ("torch: linear + bmm", "")


class FakeWorker:
    """Says what the test wrote down; the first one dies."""

    scripts: list

    def __init__(self, *_):
        self._events = self.scripts.pop(0)

    def events(self, _):
        """Yield the script."""
        yield from self._events

    def why(self):
        """Return what it died of."""
        return "an illegal memory access"

    def kill(self):
        """Do nothing."""


def test_measured_goes_on_after_a_crash_without_the_culprit(monkeypatch):
    """Rows that were measured are kept, and the crash is one."""
    task = ["fused_qkvzba", "qwen3-next", 1]
    FakeWorker.scripts = [
        [{"start": [*task, "a/b"]}, {"row": 1}, {"start": [*task, "cuda/bad"]}],
        [{"start": [*task, "a/b"]}, {"row": 2}, {"done": task}],
    ]
    monkeypatch.setattr(leader, "Worker", FakeWorker)
    job = leader.Job([Task(*task)])
    events = list(leader.measured(job, lambda *_: None))
    assert events[0] == {"row": 1}
    assert events[1] == {"crash": [*task, "cuda/bad"], "why": "an illegal memory access"}
    assert events[2] == {"row": 2}
    assert job.skip == [[*task, "cuda/bad"]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a worker that finds no GPU")
def test_measured_in_a_process_that_cannot_work_says_why():
    """The last line that it wrote, and no row."""
    job = leader.Job(shapes.select(["q_rms_norm"], [], [1]), patience=60)
    events = list(leader.measured(job, lambda *_: None))
    assert len(events) == 1
    assert events[0]["problem"].startswith("q_rms_norm gemma4-e4b m=1: ")
    assert "CUDA" in events[0]["problem"] or "NVIDIA" in events[0]["problem"]


def test_measured_of_a_worker_that_hangs_blames_who_was_next(monkeypatch):
    """A kernel that never ends costs the patience, once."""
    task = ["fused_qkvzba", "qwen3-next", 1]
    FakeWorker.scripts = [[{"start": [*task, "cuda/bad"]}, {"silent": 60.0}], [{"done": task}]]
    monkeypatch.setattr(leader, "Worker", FakeWorker)
    events = list(leader.measured(leader.Job([Task(*task)]), lambda *_: None))
    assert events == [{"crash": [*task, "cuda/bad"], "why": "it said nothing for 60 s"}]


def test_measured_of_a_worker_that_dies_between_contestants_blames_none(monkeypatch):
    """The rest of the task is left out, the rows before stay."""
    task = ["fused_qkvzba", "qwen3-next", 1]
    FakeWorker.scripts = [[{"start": [*task, "a/b"]}, {"row": 1}]]
    monkeypatch.setattr(leader, "Worker", FakeWorker)
    events = list(leader.measured(leader.Job([Task(*task)]), lambda *_: None))
    assert events[0] == {"row": 1}
    assert events[1]["problem"] == "fused_qkvzba qwen3-next m=1: an illegal memory access"


def test_a_crash_of_ours_is_wrong_and_one_of_a_peer_is_not():
    """Only our own errors are the exit code."""
    result = Report()
    for who in ("cuda/triton", "sglang: triton"):
        event = {"crash": ["fused_qkvzba", "qwen3-next", 1, who], "why": "it hung"}
        _bench_cuda._take(event, result)
    result.derive()
    assert [each["implementation"] for each in result.wrong] == ["cuda/triton"]
    assert "the process ended: it hung" in "\n".join(result.problems())


def test_bench_on_a_gpu_measures_in_other_processes_and_saves(run, measured, monkeypatch, tmp_path):
    """Table on the screen, files in the folder, 0 if nothing is wrong."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    events = [{"about": {"device": "a card"}, "missing": {}}, *({"row": r} for r in measured.rows)]
    monkeypatch.setattr(_bench_cuda, "measured", lambda *_: iter(events))
    words = ["bench", "fused_qkvzba", "--device", "cuda", "--jobs", "0", "--out", str(tmp_path)]
    result = run(*words)
    assert result.code == 0
    assert "qwen3-next  1    cuda/triton     2.00  4     1.25" in result.out
    names = {path.name for path in tmp_path.iterdir()}
    has_plot = importlib.util.find_spec("matplotlib") is not None
    assert names == {"bench.csv", "bench.md", *(["bench.png"] if has_plot else [])}


def test_bench_that_adds_keeps_the_rows_of_the_folder(run, measured, monkeypatch, tmp_path):
    """A long sweep may be made in parts."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    report.write_csv(measured, tmp_path / "bench.csv")
    new = row(us=1.0, m=64)
    monkeypatch.setattr(_bench_cuda, "measured", lambda *_: iter([{"row": new}]))
    words = ["bench", "fused_qkvzba", "--device", "cuda", "--jobs", "0", "--add"]
    run(*words, "--out", str(tmp_path))
    again = report.read_csv(tmp_path / "bench.csv")
    assert [each["m"] for each in again.rows] == [1, 1, 1, 64, 512, 512, 512]


def test_bench_on_a_gpu_as_json_has_the_rows(run, measured, monkeypatch):
    """And fails if one of ours is wrong."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    wrong = row(us=None, problem="output z: every bit must arrive", is_wrong=True)
    monkeypatch.setattr(_bench_cuda, "measured", lambda *_: iter([{"row": wrong}]))
    result = run("bench", "fused_qkvzba", "--device", "cuda", "--jobs", "0", "--json")
    assert result.code == 1
    assert json.loads(result.out)["rows"][0]["problem"] == "output z: every bit must arrive"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shape", "qwen3-nex"], "'qwen3-nex' (did you mean 'qwen3-next'?)"),
        (["--against", "sglan"], "'sglan' (did you mean 'sglang'?)"),
        (["--m", "0"], "--m: found 0, needed a positive number"),
        (["--m", "1,x"], "found '1,x', needed numbers"),
        (["--jobs", "-1"], "--jobs: found -1, needed 0 or more"),
        (["--patience", "0"], "--patience: found 0.0, needed more than 0 seconds"),
        (["--add"], "--add: found no --out, needed --out with the folder to add to"),
        (["--goals", "/nowhere"], "/nowhere: cannot be read"),
    ],
)
def test_bench_on_a_gpu_of_nonsense_is_refused(run, words, message):
    """Before any GPU is asked for."""
    result = run("bench", "--device", "cuda", *words)
    assert result.code == 2
    assert message in result.err


@pytest.mark.parametrize(
    "words", [["--shape", "qwen3-next"], ["--against", "none"], ["--jobs", "2"]]
)
def test_bench_on_a_cpu_refuses_what_only_a_gpu_has(run, words):
    """No option is ignored."""
    result = run("bench", "fused_qkvzba", *words)
    assert result.code == 2
    assert f"{words[0]}: found --device cpu, needed --device cuda" in result.err


def test_redraw_of_a_folder_without_a_csv_says_so(run, tmp_path):
    """Exit code 2: it was asked for wrongly."""
    result = run("bench", "--redraw", str(tmp_path))
    assert result.code == 2
    assert "--redraw: found" in result.err


def test_select_of_a_negative_m_is_an_input_error():
    """As everywhere: what was found, what is needed."""
    with pytest.raises(InputError, match="positive"):
        shapes.select(["q_rms_norm"], [], [-1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="times kernels on a GPU")
def test_bench_on_this_gpu_times_every_implementation(run):
    """Checked, timed in a graph, beside its floor."""
    words = ["--shape", "qwen3-next", "--m", "2", "--jobs", "0", "--against", "none", "--json"]
    result = run("bench", "fused_qkvzba", "--device", "cuda", *words)
    rows = json.loads(result.out)["rows"]
    assert result.code == 0
    assert {each["kind"] for each in rows} == {"hwfuse", "reference"}
    assert all(each["how"] == "graph" and each["us"] > 0 < each["floor_us"] for each in rows)
