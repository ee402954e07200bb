"""Recorded calls and their replay, in C and in Python, on a driver whose device is the CPU."""

import ctypes
import os
import shutil
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from hwfuse import HwfuseError
from hwfuse_triton import _again, _native, _private, _record, _replay

pytestmark = [
    pytest.mark.skipif(not shutil.which("gcc"), reason="no C compiler"),
    pytest.mark.skipif(_private.exchange_api is None, reason="this torch has no DLPack table"),
]
CPU = 1  # kDLCPU
allocate = torch._C._dynamo.guards._empty_strided_cpu


class Chain:
    """A launch hook that is not set."""

    def __init__(self):
        self.calls = []


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """The fake driver, and the C half set up for it."""
    return built(tmp_path_factory, shutil.which("gcc"))


@pytest.fixture(scope="module")
def colliding(tmp_path_factory):
    """The same, but all calls have one hash."""
    return built(tmp_path_factory, f"{shutil.which('gcc')} -DHWFUSE_ONE_HASH")


def built(tmp_path_factory, compiler):
    """Compile and set up both."""
    folder = tmp_path_factory.mktemp("native")
    library = folder / "libfake.so"
    source = Path(__file__).with_name("fake_cuda.c")
    subprocess.run(
        [shutil.which("gcc"), "-shared", "-fPIC", "-Wall", "-Werror", source, "-o", library],
        check=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("CC", compiler)
        module = _native.build()
    knobs = SimpleNamespace(launch_enter_hook=Chain(), launch_exit_hook=Chain())
    hooks = _private.Hooks(knobs, knobs.launch_enter_hook, knobs.launch_exit_hook)
    module.setup(
        str(library), CPU, _private.exchange_api, torch.Tensor, torch.nn.Parameter, allocate,
        _private.mode_depth, knobs, hooks.enter, hooks.exit,
    )  # fmt: skip
    return SimpleNamespace(module=module, driver=ctypes.CDLL(str(library)), hooks=hooks)


def variable(machine, name):
    """A variable of the fake driver."""
    return ctypes.c_int.in_dll(machine.driver, name)


def run(machine, rows, x, y, n, factor, offset):
    """Launch the fake driver's kernel: y = x * factor + offset; x and y are addresses."""
    values = [ctypes.c_void_p(x), ctypes.c_void_p(y), ctypes.c_int(n), ctypes.c_float(factor),
              ctypes.c_longlong(offset)]  # fmt: skip
    pointers = (ctypes.c_void_p * 5)(*(ctypes.addressof(v) for v in values))
    config = (ctypes.c_uint * 18)(rows, 1, 1, 128)
    function = ctypes.byref(ctypes.c_char.in_dll(machine.driver, "scale_kernel"))
    machine.driver.cuLaunchKernelEx(config, function, pointers, None)


def kernel(machine, **changes):
    """What a launcher tells the recording of the fake driver's kernel."""
    name = changes.pop("name", "scale_kernel")
    compiled = SimpleNamespace(
        run=lambda rows, *rest: run(machine, rows, *rest[8:]), function=0, packed_metadata=()
    )
    plan = SimpleNamespace(compiled=compiled, kinds="PPifq", near=(), constants=0)
    address = ctypes.addressof(ctypes.c_char.in_dll(machine.driver, name))
    fields = {"function": address, "block": 128, "shared": 0, "kinds": "PPifq", "keep": plan}
    return _record.Kernel(**{**fields, **changes})


@pytest.fixture(params=["python", "plain", "native"])
def op(machine, monkeypatch, request):
    """An op of two outputs, y = x * factor + offset and z = y + 1; `calls` counts its Python.

    Replayed in C, in Python, or in plain Python: without torch's private check of formats.
    """
    monkeypatch.setattr(_again, "_check_is_strict", lambda: request.param == "python")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_replay, "_all", [])
    monkeypatch.setattr(_replay, "refusals", {})
    monkeypatch.setattr(_private, "hooks", lambda: machine.hooks)
    monkeypatch.setattr(_private, "current_device", lambda: -1)
    monkeypatch.setattr(_private, "raw_stream", lambda _device: 0)
    monkeypatch.setattr(_private, "empty_strided_cuda", allocate)
    calls = []

    def function(x, *, factor=1.0, offset=0, does=None):
        calls.append(x.shape)
        m, n = x.shape
        if x.stride(1) != 1:
            raise ValueError("stride")
        if does == "addition":
            x.add_(0)
        used = x[:] if does == "view" else x
        outputs = []
        for more in range(2):
            y = torch.empty_strided((m, n), (n, 1))
            run(machine, m, x.data_ptr(), y.data_ptr(), n, factor, offset + more)
            if recording := _record.mine():
                recording.tensors.append((y, ((m, n), (n, 1), torch.float32)))
                recording.launched(kernel(machine), (m, 1, 1), (used, y, n, factor, offset + more))
            outputs.append(y)
        return x.shape if does == "shape" else tuple(outputs)

    module = machine.module if request.param == "native" else None
    made = _replay.wrapped(module, function)
    return SimpleNamespace(call=made, calls=calls, replays=made.replays, name=request.param,
                           function=function, module=module,
                           machine=machine)  # fmt: skip


def matrix(m, n, *, first=0):
    """Random numbers at a multiple of 256 bytes, or `first` elements behind one."""
    storage = torch.empty(m * n + 128)
    start = -storage.data_ptr() % 256 // 4 + first
    return storage[start : start + m * n].view(m, n).normal_()


def is_replayed(op, *args, **kwargs):
    """Call, and say whether no Python of the op ran."""
    before = len(op.calls)
    x = args[0]
    y, z = op.call(*args, **kwargs)
    wanted = x * kwargs.get("factor", 1.0) + kwargs.get("offset", 0)
    torch.testing.assert_close(y, wanted.detach())
    torch.testing.assert_close(z, wanted.detach() + 1)
    return len(op.calls) == before


def taught(op, *args, **kwargs):
    """Make the calls after which such a call is replayed."""
    assert not is_replayed(op, *args, **kwargs)
    assert not is_replayed(op, *args, **kwargs)
    assert is_replayed(op, *args, **kwargs)


def test_third_call_of_a_kind_is_replayed_on_new_data(op):
    """The second call records; from the third on no Python of the op runs."""
    taught(op, matrix(3, 8), factor=2.0, offset=5)
    assert all(is_replayed(op, matrix(3, 8), factor=2.0, offset=5) for _ in range(5))


OTHER_KINDS = pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda: matrix(4, 8), {}),
        (lambda: matrix(3, 16), {}),
        (lambda: matrix(3, 16)[:, :8], {}),
        (lambda: matrix(3, 8, first=4), {}),
        (lambda: matrix(3, 8).view(torch.int32), {}),
        (lambda: matrix(3, 8), {"factor": 3.0}),
        (lambda: matrix(3, 8), {"offset": 6}),
        (lambda: matrix(3, 8), {"offset": True}),
        (lambda: matrix(3, 8), {"does": "nothing"}),
    ],
)


@OTHER_KINDS
def test_call_of_another_kind_is_not_replayed(op, change, options):
    """Rows, width, stride, low bits of the address, any option: each alone is another kind."""
    known = {"factor": 2.0, "offset": 1}
    taught(op, matrix(3, 8), **known)
    before = len(op.calls)
    op.call(change(), **{**known, **options})
    assert len(op.calls) == before + 1


@OTHER_KINDS
def test_call_of_another_kind_with_the_same_hash_is_not_replayed(
    colliding, monkeypatch, change, options
):
    """The hash only says where to look; then everything is compared."""
    calls = []

    def function(x, *, factor=1.0, offset=0, does=None):
        calls.append(x)
        y = torch.empty_strided((3, 8), (8, 1))
        if recording := _record.mine():
            recording.tensors.append((y, ((3, 8), (8, 1), torch.float32)))
            recording.launched(kernel(colliding), (3, 1, 1), (x, y, 8, factor, offset))
        return y

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_private, "hooks", lambda: colliding.hooks)
    call = _replay.wrapped(colliding.module, function)
    known = {"factor": 2.0, "offset": 1}
    for _ in range(3):
        call(matrix(3, 8), **known)
    before = len(calls)
    call(matrix(3, 8), **known)
    assert len(calls) == before
    call(change(), **{**known, **options})
    assert len(calls) == before + 1


@pytest.mark.parametrize(("first", "then"), [(0.0, -0.0), (-0.0, 0.0)])
def test_zero_of_the_other_sign_is_another_option(op, first, then):
    """Equal for Python, not for a kernel."""
    for _ in range(3):
        op.call(matrix(3, 8), factor=first)
    before = len(op.calls)
    op.call(matrix(3, 8), factor=then)
    assert len(op.calls) == before + 1


def test_misaligned_and_empty_tensors_are_never_replayed(op):
    """An address that is no multiple of 16, and none at all."""
    for x in (matrix(3, 8, first=1), matrix(0, 8)):
        assert not any(is_replayed(op, x) for _ in range(5))
    assert op.replays.size == 0


class Subclass(torch.Tensor):
    """A tensor that may mean anything."""


def test_subclass_is_not_replayed_and_a_parameter_is(op):
    """Exactly torch.Tensor and Parameter are known to be what they look like."""
    taught(op, matrix(3, 8))
    before = len(op.calls)
    op.call(matrix(3, 8).as_subclass(Subclass))
    assert len(op.calls) == before + 1
    parameter = torch.nn.Parameter(matrix(3, 8))
    assert is_replayed(op, parameter)


@pytest.mark.parametrize("chain", ["enter", "exit"])
def test_hook_takes_calls_off_the_fast_way_until_it_is_removed(op, machine, chain):
    """Whether it is added to the chain or put in its place."""
    taught(op, matrix(3, 8))
    calls = getattr(machine.hooks, chain).calls
    calls.append(print)
    assert not is_replayed(op, matrix(3, 8))
    calls.clear()
    assert is_replayed(op, matrix(3, 8))
    with mock.patch.object(machine.hooks.knobs, f"launch_{chain}_hook", print):
        assert not is_replayed(op, matrix(3, 8))
    assert is_replayed(op, matrix(3, 8))


def test_dispatch_mode_takes_calls_off_the_fast_way(op):
    """The fast allocation would be invisible to it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    taught(op, matrix(3, 8))
    with Watch():
        assert not is_replayed(op, matrix(3, 8))


def test_nothing_is_recorded_inside_a_capture(op, monkeypatch):
    """A graph must get what the call does, and no time is to be lost there."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not any(is_replayed(op, matrix(3, 8)) for _ in range(4))
    assert op.replays.size == 0


def test_another_current_device_is_not_replayed(op, machine):
    """In C the context is asked, of another device or none in a fresh thread; in Python torch."""
    taught(op, matrix(3, 8))
    if op.name != "native":
        op.replays.forget()
        with mock.patch.object(_private, "current_device", return_value=-1) as current:
            taught(op, matrix(3, 8))
            current.return_value = 1
            assert not is_replayed(op, matrix(3, 8))
        return
    for context in (2, 0):
        variable(machine, "context").value = context
        try:
            assert not is_replayed(op, matrix(3, 8))
        finally:
            variable(machine, "context").value = 1


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ("addition", "calls aten.add_"),
        ("view", "calls aten"),
        ("shape", "returns something"),
    ],
)
def test_call_that_does_more_is_refused_for_good_and_others_are_not(op, does, reason):
    """What was not recorded could not be repeated."""
    x = matrix(3, 8)
    with mock.patch.object(_record, "record", wraps=_record.record) as record:
        for _ in range(5):
            op.call(x, does=does)
    assert record.call_count == 1
    assert op.replays.size == 0
    assert reason in _replay.refusals["function"]
    taught(op, x)


def test_same_tensor_twice_is_neither_recorded_nor_replayed(op):
    """Which of the two arguments a kernel gets would be a guess."""
    calls = []

    def second(x, y):
        calls.append(x is y)
        z = torch.empty_strided((3, 8), (8, 1))
        run(op.machine, 3, y.data_ptr(), z.data_ptr(), 8, 1.0, 0)
        if recording := _record.mine():
            recording.tensors.append((z, ((3, 8), (8, 1), torch.float32)))
            recording.launched(kernel(op.machine), (3, 1, 1), (y, z, 8, 1.0, 0))
        return z

    call = _replay.wrapped(op.module, second)
    x, y = matrix(3, 8), matrix(3, 8)
    for _ in range(3):
        assert torch.equal(call(x, x), x)
    assert calls == [True] * 3
    for _ in range(3):
        assert torch.equal(call(x, y), y)
    assert calls == [True] * 3 + [False] * 2
    assert torch.equal(call(x, x), x)
    assert calls[-1]


def test_recipes_stay_bounded_and_right_with_many_kinds(op):
    """400 numbers of rows: old recipes give way."""
    for m in range(1, 401):
        x = matrix(m, 4)
        for _ in range(3):
            is_replayed(op, x)
    assert 0 < op.replays.size <= 256


def test_forgotten_recipes_are_made_anew(op):
    """After a fork, for instance."""
    taught(op, matrix(3, 8))
    _replay.forget_all()
    assert op.replays.size == 0
    taught(op, matrix(3, 8))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_child_of_a_fork_has_no_recipes(op):
    """Its CUDA is another."""
    taught(op, matrix(3, 8))
    child = os.fork()
    if child == 0:
        os._exit(op.replays.size)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert op.replays.size == 1


def test_threads_that_record_and_replace_recipes_do_not_mix(op):
    """Every result is that of the thread's own call."""
    wrong = []

    def work(number):
        for turn in range(300):
            x = matrix(1 + (turn * number) % 5, 8)
            y, z = op.call(x, offset=number)
            if not (torch.equal(y, x + number) and torch.equal(z, x + (number + 1))):
                wrong.append((number, turn))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_check_of_launches_finds_a_wrong_recipe(op, monkeypatch):
    """HWFUSE_CHECK_LAUNCH=1 makes each call both ways, on the same memory."""
    monkeypatch.setenv("HWFUSE_CHECK_LAUNCH", "1")
    lies = []

    def function(x):
        y = torch.empty_strided((3, 8), (8, 1))
        run(op.machine, 3, x.data_ptr(), y.data_ptr(), 8, 1.0, 0)
        if recording := _record.mine():
            recording.tensors.append((y, ((3, 8), (8, 1), torch.float32)))
            recording.launched(kernel(op.machine), (3, 1, 1), (x, y, 8, 1.0, len(lies)))
        return y

    right = _replay.wrapped(op.module, function)
    for _ in range(4):
        right(matrix(3, 8))
    lies.append("an offset of 1 instead of 0")
    wrong = _replay.wrapped(op.module, function)
    for _ in range(2):  # the second records
        wrong(matrix(3, 8))
    with pytest.raises(HwfuseError, match="function gives other bits when it is replayed"):
        wrong(matrix(3, 8))


@pytest.fixture
def recipe(machine):
    """What a replay is made from, to be spoilt."""
    x = matrix(3, 8)
    form = ((3, 8), (8, 1), torch.float32)
    good = {"function": kernel(machine).function, "kinds": "PPifq", "scratch": 0,
            "values": (0, 1, 8, 1.0, 0), "result": (1,)}  # fmt: skip

    def add(**changes):
        k = {**good, **changes}
        replays = machine.module.Replays(print)
        kernels = (
            (k["function"], (3, 1, 1), 128, 0, False, 1, k["kinds"], k["scratch"], k["values"]),
        )
        replays.add((x,), {}, (form,), kernels, k["result"], None)
        return replays, x

    return add


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"values": (0, 1, 2**31, 1.0, 0)}, OverflowError, "32-bit"),
        ({"values": (0, 1, -1, 1.0, 0), "kinds": "PPIfq"}, OverflowError, "32-bit"),
        ({"values": (0, 2, 8, 1.0, 0)}, ValueError, "no such tensor"),
        ({"values": (0, 1, 8, 1.0), "kinds": "PPif"}, ValueError, "parameter 4"),
        ({"values": (0, 1, 8, 1.0, 0, 0), "kinds": "PPifqi"}, ValueError, "parameter 5"),
        ({"kinds": "PPqfq"}, ValueError, "parameter 2"),
        ({"kinds": "PPif"}, ValueError, "kind for each"),
        ({"scratch": 2}, ValueError, "parameter 5"),
        ({"result": (5,)}, ValueError, "no such tensor"),
        ({"result": "y"}, ValueError, "too many results"),
    ],
)
def test_recipe_that_does_not_fit_the_binary_is_refused(recipe, changes, error, text):
    """The binary itself says how many parameters of which size it takes."""
    recipe()
    with pytest.raises(error, match=text):
        recipe(**changes)


def test_recipe_with_unused_scratch_pointers_runs(machine, recipe):
    """Triton's binaries have two more parameters than the kernel."""
    address = kernel(machine, name="scale_with_scratch").function
    replays, x = recipe(function=address, scratch=2)
    assert torch.equal(replays(x)[0], x)


def test_error_of_the_driver_is_raised_with_its_name(machine, recipe):
    """Not swallowed, and not tried again by another way: the launch may have begun."""
    replays, x = recipe()
    variable(machine, "status").value = 700
    try:
        with pytest.raises(RuntimeError, match=r"cuLaunchKernelEx.*CUDA_ERROR_FAKE \(700\)"):
            replays(x)
    finally:
        variable(machine, "status").value = 0


def test_private_check_of_formats_is_strict_in_the_installed_torch():
    """Were it not, it would not be used: slower, and as right."""
    assert _again._check_is_strict()


@pytest.mark.parametrize("answer", [True, False])
def test_private_check_that_is_not_strict_is_not_used(monkeypatch, answer):
    """Such as one that takes no notice of the stride of a dimension of size 1."""
    monkeypatch.setattr(_again, "_check", lambda _: lambda *_: answer)
    _again._check_is_strict.cache_clear()
    try:
        assert not _again._check_is_strict()
    finally:
        _again._check_is_strict.cache_clear()


def fails(monkeypatch, tmp_path):
    """What doctor says of a failure to compile; the machine has a driver for once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_native, "_DRIVER", None)
    _native._ready.cache_clear()
    try:
        assert _native.load() is None
        return _native.problem()
    finally:
        _native._ready.cache_clear()


def test_missing_compiler_is_a_reason_and_no_error(monkeypatch, tmp_path):
    """Everything works without the C half; doctor says why it is not used."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert fails(monkeypatch, tmp_path) == (
        "FileNotFoundError: no C compiler: neither $CC nor gcc nor clang"
    )


def test_compiler_error_is_a_reason_and_no_error(monkeypatch, tmp_path):
    """A compiler without Python's headers, for instance."""
    monkeypatch.setenv("CC", "false")
    assert fails(monkeypatch, tmp_path).startswith("CalledProcessError: ")


def test_nothing_is_compiled_inside_a_capture(monkeypatch, tmp_path):
    """It would take the time of a graph; a later process or op tries again."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert fails(monkeypatch, tmp_path) == (
        "RuntimeError: not compiled inside a CUDA graph capture"
    )
    assert not list(tmp_path.rglob("*.so"))
