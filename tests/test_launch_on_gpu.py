"""Attempts to provoke a wrong launch, on a GPU: every way of launching against Triton's own.

`plan` launches by plans, `python` and `native` replay recorded calls, `native` in C.  Each call's
results have to be, bit for bit, those of the ordinary launch; counters prove which way a call went.
"""

import contextlib
import inspect
import os
import subprocess
import sys
import threading
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

if not torch.cuda.is_available():
    pytest.skip("launches need a GPU", allow_module_level=True)

import triton
import triton.language as tl

import hwfuse
from hwfuse import _spec, _state
from hwfuse.ops import fused_qkvzba as spec
from hwfuse_triton import _launch, _native, _plan, _private, _replay
from hwfuse_triton import fused_qkvzba as shared

WAYS = ["plan", "python"] if torch.version.hip else ["plan", "python", "native"]
SMALL = {"num_k_heads": 2, "num_v_heads": 4, "head_k_dim": 64, "head_v_dim": 64}


@contextlib.contextmanager
def ordinary():
    """Launch as Triton does, whatever is planned."""

    def launch(self, programs, *arguments):
        self.ordinary(programs, arguments)

    with mock.patch.object(_launch.Launch, "__call__", launch):
        yield


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """One way of launching: the op, and how many of its launches were ordinary ones."""
    counted = SimpleNamespace(name=request.param, ordinary=0, python=0, blocked=False)
    launch = _launch.Launch.ordinary

    def ordinary_launch(self, programs, arguments):
        counted.ordinary += 1
        return launch(self, programs, arguments)

    def function(qkvz, ba, *, head_k_dim, head_v_dim, layout="interleaved"):
        counted.python += 1
        if counted.blocked:  # what would be launched here could end CUDA
            return None
        return shared.fused_qkvzba(
            qkvz, ba, head_k_dim=head_k_dim, head_v_dim=head_v_dim, layout=layout
        )

    monkeypatch.setattr(_launch.Launch, "ordinary", ordinary_launch)
    monkeypatch.setattr(_replay, "_all", [])
    monkeypatch.setattr(_replay, "refusals", {})
    counted.op = function
    if request.param == "native":
        assert _native.load() is not None, _native.problem()
    if request.param != "plan":
        module = _native.load() if request.param == "native" else None
        counted.op = _replay.wrapped(module, function)
    _launch.forget_all()
    return counted


def inputs(**keywords):
    """Random bits on the GPU: a wrong element cannot look right."""
    made = spec.make_inputs(device="cuda", **{**SMALL, **keywords})
    return spec_split(made)


def spec_split(made):
    """Tensors by position, options by keyword."""
    return hwfuse.op("fused_qkvzba").spec.split(made)


def same(found, wanted):
    """Compare all results, NaN and -0.0 included."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        assert torch.equal(_launch.bits_of(one), _launch.bits_of(other))


def agrees(op, args, kwargs):
    """Call in every state from cold to warm; all of it has to be what Triton computes."""
    with ordinary():
        wanted = shared.fused_qkvzba(*args, **kwargs)
    for _ in range(4):
        same(op(*args, **kwargs), wanted)


def fast(way, args, kwargs):
    """Say whether one more such call goes the fast way."""
    before = way.ordinary, way.python
    way.op(*args, **kwargs)
    if way.name == "plan":
        return way.ordinary == before[0]
    return way.python == before[1]


def shifted(tensor):
    """The same numbers at an address that is no multiple of 16."""
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    moved = storage[1:].view(tensor.shape)
    return moved.copy_(tensor)


def adversarial(op):
    """Sizes, strides, addresses and dtypes in an order that punishes every stale assumption."""
    for m in (16, 1, 2, 15, 17, 0, 1022, 1, 16):
        agrees(op, *inputs(m=m, seed=m))
    width = inputs(m=1)[0][0].shape[1]
    for row_pad in (8, 16, width, 1, 3, 0):
        for m in (1, 2, 17):
            agrees(op, *inputs(m=m, row_pad=row_pad, seed=row_pad))
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        for layout in spec.LAYOUTS:
            agrees(op, *inputs(m=4, dtype=dtype, layout=layout))
    agrees(op, *inputs(m=4, ba_dtype=torch.float32))
    agrees(op, *inputs(m=4, num_v_heads=6))
    (qkvz, ba), options = inputs(m=4)
    agrees(op, (torch.nn.Parameter(qkvz), ba), options)
    agrees(op, (shifted(qkvz), ba), options)
    agrees(op, (qkvz, shifted(ba)), options)
    agrees(op, (qkvz, ba), options)


def test_adversarial_sequence_is_bit_equal(way):
    """One binary and one recipe each for exactly the calls that they hold for."""
    with torch.no_grad():
        adversarial(way.op)
        assert fast(way, *inputs(m=16))


def test_repeated_call_goes_the_fast_way(way):
    """Without this, all other tests could pass on the slow path alone."""
    args, kwargs = inputs(m=5)
    for _ in range(3):
        way.op(*args, **kwargs)
    assert all(fast(way, args, kwargs) for _ in range(10))
    assert fast(way, *inputs(m=5, seed=9))


@pytest.mark.parametrize("place", range(2))
def test_misaligned_tensor_never_goes_the_fast_way(way, place):
    """A binary that assumes 16-byte addresses would fault and end the process's CUDA."""
    args, kwargs = inputs(m=5)
    for _ in range(3):
        way.op(*args, **kwargs)
    args = [shifted(a) if i == place else a for i, a in enumerate(args)]
    assert not fast(way, args, kwargs)
    agrees(way.op, args, kwargs)


def test_hook_of_a_profiler_sees_every_launch_until_it_is_removed(way):
    """A launch that a profiler does not see would be missing in its report."""
    args, kwargs = inputs(m=5)
    for _ in range(3):
        way.op(*args, **kwargs)
    seen = []
    hook = seen.append
    for chain in (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook):
        chain.add(hook)
        seen.clear()
        try:
            assert not fast(way, args, kwargs)
            assert len(seen) == 1
        finally:
            chain.remove(hook)
    assert fast(way, args, kwargs)


def test_function_assigned_as_hook_sees_every_launch(way):
    """The knob may be replaced as a whole, not only added to."""
    args, kwargs = inputs(m=5)
    for _ in range(3):
        way.op(*args, **kwargs)
    seen = []
    with mock.patch.object(triton.knobs.runtime, "launch_enter_hook", seen.append):
        assert not fast(way, args, kwargs)
    assert len(seen) == 1
    assert fast(way, args, kwargs)


def test_capture_and_replay_of_the_graph_compute_on_new_data(way):
    """The launch is captured, and the graph's replay reads what lies in the inputs by then."""
    args, kwargs = inputs(m=7)
    for _ in range(3):
        way.op(*args, **kwargs)
    graph = torch.cuda.CUDAGraph()
    before = way.python
    with torch.cuda.graph(graph):
        found = way.op(*args, **kwargs)
    assert way.name == "plan" or way.python == before
    for old, new in zip(args, inputs(m=7, seed=3)[0], strict=True):
        old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    with ordinary():
        same(found, shared.fused_qkvzba(*args, **kwargs))


def test_call_first_seen_inside_a_capture_is_captured_right(way):
    """Another M inside the capture: no recording, no compiling there."""
    agrees(way.op, *inputs(m=7))
    args, kwargs = inputs(m=9)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [way.op(*args, **kwargs) for _ in range(4)]
    graph.replay()
    torch.cuda.synchronize()
    with ordinary():
        wanted = shared.fused_qkvzba(*args, **kwargs)
    for one in found:
        same(one, wanted)


def test_side_stream_gets_the_launch(way):
    """Launched on another stream, the kernel would read before the input is written."""
    args, kwargs = inputs(m=1022, num_k_heads=16, num_v_heads=32)
    for _ in range(3):
        way.op(*args, **kwargs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for turn in range(20):
            torch.cuda._sleep(200_000)
            for a in args:
                a.fill_(turn)
            found = way.op(*args, **kwargs)
            assert all(bool((t == turn).all()) for t in found)
    torch.cuda.current_stream().wait_stream(stream)


def test_fresh_thread_without_a_context_is_right(way):
    """A new thread has no current CUDA context; the first call there makes one."""
    args, kwargs = inputs(m=5)
    for _ in range(3):
        wanted = way.op(*args, **kwargs)
    found = []

    def work():
        found.extend(way.op(*args, **kwargs) for _ in range(3))
        torch.cuda.synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(found) == 3
    for one in found:
        same(one, wanted)


def test_four_threads_on_their_own_streams_do_not_mix(way):
    """Each sees its own data, whatever the others record or replace meanwhile."""
    wrong = []

    def work(number):
        stream = torch.cuda.Stream()
        try:
            with torch.no_grad(), torch.cuda.stream(stream):
                for turn in range(150):
                    m = 1 + (turn * (number + 1)) % 7
                    args, kwargs = inputs(m=m, seed=number)
                    for a in args:
                        a.fill_(number)
                    found = way.op(*args, **kwargs)
                    if not all(bool((t == number).all()) for t in found):
                        wrong.append((number, turn))
        except BaseException as error:  # noqa: BLE001 - a thread's error is this test's
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inference_mode_gives_inference_tensors(way):
    """What the private allocation makes is what torch.empty makes there."""
    args, kwargs = inputs(m=5)
    for _ in range(3):
        way.op(*args, **kwargs)
    with torch.inference_mode():
        assert all(t.is_inference() for t in way.op(*args, **kwargs))
        agrees(way.op, *inputs(m=6))
    assert not any(t.is_inference() for t in way.op(*args, **kwargs))


def test_result_is_an_ordinary_tensor_of_the_caching_allocator(way):
    """It can be resized and recorded on a stream, as nothing from another allocator can."""
    args, kwargs = inputs(m=5)
    for _ in range(4):
        found = way.op(*args, **kwargs)
    assert not found[0].requires_grad
    found[0].record_stream(torch.cuda.Stream())
    found[0].resize_(0)
    before = torch.cuda.memory_allocated()
    more = way.op(*args, **kwargs)
    assert torch.cuda.memory_allocated() > before
    del more
    assert torch.cuda.memory_allocated() == before


def test_dispatch_mode_sees_the_allocations(way):
    """Under a mode the fast way, invisible to it, is not taken."""
    args, kwargs = inputs(m=5)
    for _ in range(3):
        way.op(*args, **kwargs)
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Watch.seen += 1
            return func(*args, **(kwargs or {}))

    with Watch():
        way.op(*args, **kwargs)
    assert Watch.seen == 4


def test_number_beyond_32_bits_never_goes_the_fast_way():
    """A row stride of 2**31 elements is Triton's to launch, with another binary."""
    kernel_launch = _launch.Launch(copy_kernel, num_warps=1, BLOCK=16)
    x, y = (torch.arange(16.0, device="cuda") for _ in range(2))
    for n in (16, 8):
        kernel_launch(1, x, y, n)
    plan = next(iter(kernel_launch.plans.values()))
    for n in (2**31, -1, True, 3.0):
        assert not plan.launch(1, (x, y, n))
    assert plan.launch(1, (x, y, 2**31 - 1))


def test_plan_refuses_what_it_was_not_made_for():
    """Every check by itself; nothing is launched."""
    kernel_launch = _launch.Launch(copy_kernel, num_warps=1, BLOCK=16)
    x, y = (torch.arange(16.0, device="cuda") for _ in range(2))
    kernel_launch(1, x, y, 16)
    plan = next(iter(kernel_launch.plans.values()))
    bad = [x.cpu(), x.half(), shifted(x), torch.empty(0, device="cuda"), None, x.data_ptr()]
    for one in bad:
        assert not plan.launch(1, (one, y, 16))
        assert not plan.launch(1, (x, one, 16))
    assert not plan.launch(0, (x, y, 16))
    with pytest.raises(ValueError, match="unpack"):
        plan.launch(1, (x, y))


def test_plans_do_not_survive_a_fork(way):
    """A child's CUDA is another; what the parent learned says nothing there."""
    args, kwargs = inputs(m=5)
    for _ in range(3):
        way.op(*args, **kwargs)
    assert any(launch.plans for launch in _launch._all)
    child = os.fork()
    if child == 0:
        kept = any(launch.plans for launch in _launch._all)
        kept = kept or (way.name != "plan" and way.op.replays.size)
        os._exit(int(bool(kept)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_check_of_launches_passes_and_finds_a_wrong_one(way, monkeypatch):
    """HWFUSE_CHECK_LAUNCH=1 makes both launches and compares."""
    monkeypatch.setenv("HWFUSE_CHECK_LAUNCH", "1")
    shared._plan.cache_clear()
    op = way.op
    if way.name != "plan":
        module = _native.load() if way.name == "native" else None
        op = _replay.wrapped(module, shared.fused_qkvzba)
    try:
        for m in (5, 5, 5, 6, 1):
            agrees(op, *inputs(m=m))
        launch = _launch.Launch(trap_kernel, num_warps=1, BLOCK=128)
        with mock.patch.object(_plan, "breach", return_value=None):
            x, y = (torch.rand(256, device="cuda") for _ in range(2))
            launch(1, x, y, 128, 1)
            with pytest.raises(hwfuse.HwfuseError, match="HWFUSE_CHECK_LAUNCH"):
                launch(1, x, y, 128, 2)
    finally:
        shared._plan.cache_clear()


def test_op_chooses_and_launches_on_the_tensors_device():
    """The whole way: the op's own call, on every GPU whatever the current one is."""
    op = hwfuse.op("fused_qkvzba")
    for index in range(torch.cuda.device_count()):
        made = spec.make_inputs(m=3, device=f"cuda:{index}", **SMALL)
        args, kwargs = spec_split(made)
        with ordinary(), torch.cuda.device(index):
            wanted = shared.fused_qkvzba(*args, **kwargs)
        for _ in range(4):
            found = op(*args, **kwargs)
            assert {t.device for t in found} == {args[0].device}
            same(found, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_plan_of_one_gpu_never_serves_the_other(way):
    """Neither tensors of the other GPU nor the other GPU as the current one."""
    calls = {i: spec_split(spec.make_inputs(m=3, device=f"cuda:{i}", **SMALL)) for i in (0, 1)}
    for _ in range(4):
        for index in (0, 1):
            with torch.cuda.device(index):
                agrees(way.op, *calls[index])
                assert fast(way, *calls[index])
    launch = _launch.Launch(copy_kernel, num_warps=1, BLOCK=16)
    x, y = (torch.arange(16.0, device="cuda:0") for _ in range(2))
    launch(1, x, y, 16)
    (plan,) = launch.plans.values()
    assert plan.launch(1, (x, y, 16))
    assert not plan.launch(1, (x.to("cuda:1"), y, 16))
    with torch.cuda.device(1):
        assert not plan.launch(1, (x, y, 16))
        way.blocked = way.name != "plan"
        assert not way.blocked or way.op(*calls[0][0], **calls[0][1]) is None


def registered():
    """Every implementation in Triton that this GPU's backend has, by op."""
    backend = "rocm" if torch.version.hip else "cuda"
    found = {}
    for op in _spec.names():
        one = _state.registry().implementations(op).get(f"{backend}/triton")
        if one is not None and one.problem is None:
            found[op] = inspect.unwrap(one.load())
    return found


def outcome(function, args, kwargs):
    """The bytes of a call's results, and of the copies of its tensors that it was given."""
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    result = function(*copies, **kwargs)
    results = [] if result is None else [result] if torch.is_tensor(result) else list(result)
    return [_launch.bits_of(t) for t in (*copies, *results) if isinstance(t, torch.Tensor)]


def specified(function, args, kwargs):
    """What an ordinary call gives, and where: bytes that no kernel writes keep the filling."""
    found = []
    for byte in (0x00, 0xFF):
        with ordinary(), _launch.filling(byte):
            found.append(outcome(function, args, kwargs))
    return [(one, one == other) for one, other in zip(*found, strict=True)]


SMALL_OPS = {
    "w4a8_grouped_gemm": {"n": 512, "k": 2048, "num_experts": 8},
    "w4a8_moe": {"n": 256, "k": 2048, "num_experts": 8},
}


@pytest.mark.parametrize("replays", [way for way in WAYS if way != "plan"])
@pytest.mark.parametrize("op", _spec.names())
def test_every_op_replayed_is_bit_equal(op, replays):
    """Whatever a wrapper does: either it is repeated exactly, or not at all."""
    function = registered().get(op)
    if function is None:
        pytest.skip("no implementation in Triton here")
    replayed = _replay.wrapped(_native.load() if replays == "native" else None, function)
    spec_ = hwfuse.op(op).spec
    with torch.no_grad():
        for m in (1, 2, 1, 16, 1):
            for seed in range(4):
                made = spec_.make_inputs(m=m, seed=seed, device="cuda", **SMALL_OPS.get(op, {}))
                if made.get("dtype", 0) is None:
                    made["dtype"] = hwfuse.fp8_dtype("cuda")
                args, kwargs = spec_.split(made)
                wanted = specified(function, args, kwargs)
                found = outcome(replayed, args, kwargs)
                for one, (other, is_specified) in zip(found, wanted, strict=True):
                    assert torch.equal(one[is_specified], other[is_specified])


@triton.jit(do_not_specialize=["n"])
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """Copy n elements: obeys the launch contract."""
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def trap_kernel(x_ptr, y_ptr, n, stride, BLOCK: tl.constexpr):
    """Copy every stride-th element: Triton compiles the values of n and stride in."""
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i * stride, mask=i < n, other=0.0), mask=i < n)


def trapped(launch):
    """Strides and sizes that punish a binary with a stride of 1 or n % 16 == 0 compiled in."""
    for n, stride in [(128, 1), (128, 1), (128, 2), (126, 1), (17, 3)]:
        x, y = torch.rand(512, device="cuda"), torch.zeros(128, device="cuda")
        launch(1, x, y, n, stride)
        wanted = torch.zeros(128, device="cuda")
        wanted[:n] = x[: n * stride : stride]
        assert torch.equal(y, wanted), (n, stride)


def test_kernel_that_breaks_the_contract_is_refused_and_right():
    """It is launched by Triton for ever, and a warning says why."""
    launch = _launch.Launch(trap_kernel, num_warps=1, BLOCK=128)
    with pytest.warns(hwfuse.HwfuseWarning, match="trap_kernel is launched by Triton"):
        trapped(launch)
    assert not launch.plans
    assert launch.refusals


def test_forced_plan_of_such_a_kernel_fails_these_tests(monkeypatch):
    """The mutation that proves that a wrong binary would be noticed here."""
    monkeypatch.setattr(_plan, "breach", lambda *_: None)
    with pytest.raises(AssertionError):
        trapped(_launch.Launch(trap_kernel, num_warps=1, BLOCK=128))


MISALIGNED = """
import torch, hwfuse
from hwfuse.ops import fused_qkvzba as spec
op = hwfuse.op("fused_qkvzba")
args, kwargs = op.spec.split(spec.make_inputs(m=5, device="cuda"))
for _ in range(4):
    wanted = op(*args, **kwargs)
for step in (1, 2, 4, 7):
    moved = []
    for a in args:
        storage = torch.empty(a.numel() + step, dtype=a.dtype, device="cuda")
        moved.append(storage[step:].view(a.shape).copy_(a))
    for _ in range(4):
        found = op(*moved, **kwargs)
        torch.cuda.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(found, wanted))
print("fine")
"""


def test_misaligned_inputs_of_the_whole_op_leave_cuda_alive():
    """In a process of its own: a misaligned 16-byte access would end CUDA for all tests."""
    done = subprocess.run(
        [sys.executable, "-c", MISALIGNED], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "fine", done.stderr


def test_private_names_are_all_there():
    """A rename in torch or Triton shows here, and as slower calls, never as a wrong result."""
    assert _private.missing() == []
