"""Plans: which binaries may serve later calls, and which calls they may serve."""

import ast
import functools
import importlib
import pkgutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

import hwfuse_triton
from hwfuse import HwfuseError, HwfuseWarning
from hwfuse.ops import fused_qkvzba as spec
from hwfuse.testing._offline import compile_launch, recorded_launches
from hwfuse_triton import _launch, _plan, _private, _tiers
from hwfuse_triton import fused_qkvzba as shared

NVIDIA = pytest.mark.skipif(
    "nvidia" not in triton.backends.backends, reason="this Triton has no compiler for NVIDIA"
)


def kernel_files():
    """The modules of hwfuse_triton that hold kernels."""
    names = [module.name for module in pkgutil.iter_modules(hwfuse_triton.__path__)]
    return [name for name in names if not name.startswith("_")]


def jitted(module):
    """The Triton functions that a module defines, by name."""
    return {k: v for k, v in vars(module).items()
            if isinstance(v, JITFunction) and v.__module__ == module.__name__}  # fmt: skip


@pytest.mark.parametrize("name", kernel_files())
def test_kernel_takes_nothing_whose_value_triton_would_compile_in(name):
    """Each argument is a pointer, a constant or in do_not_specialize; constants come last."""
    module = importlib.import_module(f"hwfuse_triton.{name}")
    kernels = {k: v for k, v in jitted(module).items() if k.endswith("_kernel")}
    for kernel in kernels.values():
        kinds = [p.is_constexpr for p in kernel.params]
        assert kinds == sorted(kinds), f"{kernel.__name__}: constants follow the other arguments"
        values = [p for p in kernel.params if not p.is_constexpr and not p.name.endswith("_ptr")]
        loose = [p.name for p in values if not p.do_not_specialize]
        assert not loose, f"{kernel.__name__}: {loose} are neither pointers nor unspecialised"


@pytest.mark.parametrize("name", kernel_files())
def test_kernel_reads_no_global_that_could_change(name):
    """Triton looks at globals on every launch; a plan does not, so they are constants."""
    module = importlib.import_module(f"hwfuse_triton.{name}")
    for kernel in jitted(module).values():
        _ = kernel.cache_key  # finds the globals
        found = {n: v for (n, _), (v, _) in kernel.used_global_vals.items()}
        assert not [n for n, v in found.items() if not isinstance(v, tl.constexpr)]


@pytest.mark.parametrize("name", kernel_files())
def test_kernel_is_launched_through_launch_only(name):
    """``kernel[grid](…)`` would be slow, and missing in what is recorded."""
    path = Path(hwfuse_triton.__path__[0], f"{name}.py")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            pytest.fail(f"{path.name}:{node.lineno}: {ast.unparse(node.func)}(…)")


def test_private_names_are_in_the_installed_releases():
    """A rename shows here, and as slower calls, never as a wrong result."""
    missing = _private.missing()
    if not hasattr(torch._C, "_cuda_init"):  # a build for the CPU has none of CUDA's
        missing = [name for name in missing if not name.startswith("torch._C._cuda_")]
    assert missing == []


# ---- the check of a binary ----


def compiled(launch, arch, **changes):
    """What Triton itself makes of a launch for an accelerator that is not here."""
    made = []
    compile_ = triton.compile

    def keep(*args, **kwargs):
        made.append(compile_(*args, **kwargs))
        return made[-1]

    with mock.patch.object(triton, "compile", keep):
        compile_launch(launch, arch, **changes)
    return made[0]


@functools.cache
def split(arch):
    """The launch of one split, and its binary."""
    with recorded_launches() as launches:
        shared.fused_qkvzba(**spec.make_inputs(m=64))
    return launches[0], compiled(launches[0], arch)


@NVIDIA
def test_binary_of_a_kernel_that_obeys_the_contract_has_no_breach():
    """The check looks at the compiled object, not at the author's word."""
    launch, binary = split("sm90")
    assert _plan.breach(launch.kernel, binary, "PPPPPPiii") is None


@pytest.mark.skipif("amd" not in triton.backends.backends, reason="no compiler for AMD")
def test_binary_for_amd_assumes_small_storage_and_the_plan_knows():
    """AMD's compiler assumes offsets of 32 bits where the storage is below 2 GiB."""
    launch, binary = split("gfx942")
    assert _plan.breach(launch.kernel, binary, "PPPPPPiii") is None
    plan = planned(launch, binary)
    assert plan.near == (0, 1, 2, 3, 4, 5)
    assert plan.launch(1, launch.args)
    big = mock.patch.object(torch.UntypedStorage, "nbytes", return_value=2**31)
    with big:
        assert not plan.launch(1, launch.args)


@triton.jit
def trap_kernel(x_ptr, n, stride, BLOCK: tl.constexpr):
    """Multiply by ints that Triton may specialise on."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i * stride, 0.0, mask=i < n)


@triton.jit(do_not_specialize=["n", "factor"])
def fair_kernel(x_ptr, n, factor, BLOCK: tl.constexpr):
    """Obey the contract."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i, factor, mask=i < n)


def trapped(kernel, *args):
    """Record and compile one launch."""
    with recorded_launches() as launches:
        kernel[(1,)](*args, BLOCK=16)
    return _plan.breach(kernel, compiled(launches[0], "sm90"), "P" + "i" * (len(args) - 1))


@NVIDIA
@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ((16, 3), "n is not in do_not_specialize"),
        ((17, 1), "n is not in do_not_specialize"),
    ],
)
def test_binary_of_a_kernel_with_ordinary_ints_is_refused(args, reason):
    """Whatever the first values were: by luck they may be neither 1 nor a multiple of 16."""
    assert trapped(trap_kernel, torch.empty(64), *args) == reason


@NVIDIA
def test_each_assumption_of_a_binary_is_a_breach_by_itself():
    """A spoilt copy of a good binary, one assumption at a time."""
    x = torch.empty(64)
    with recorded_launches() as launches:
        fair_kernel[(1,)](x, 17, 2.0, BLOCK=16)
    good = compiled(launches[0], "sm90")

    def breach(kinds="Pif", *, types=(), hints=(), kernel=fair_kernel, **metadata):
        fields = {**good.metadata._asdict(), **metadata}
        source = SimpleNamespace(
            signature={**good.src.signature, **dict(types)}, attrs={**good.src.attrs, **dict(hints)}
        )
        return _plan.breach(
            kernel, SimpleNamespace(src=source, metadata=SimpleNamespace(**fields)), kinds
        )

    assert breach() is None
    assert breach(types={"n": "constexpr"}) == "n is compiled as constexpr"
    assert breach(types={"n": "i64"}) == "n is compiled as i64"
    assert breach("Pii") == "factor is compiled as fp32"
    assert breach("iif") == "x_ptr is compiled as *fp32"
    assert breach("PPf") == "n is compiled as i32, not as a pointer"
    assert breach("Pi") == "its constants do not follow its other arguments"
    assert breach(hints={(1,): [["tt.divisibility", 16]]}) == (
        "n is assumed to have tt.divisibility"
    )
    assert breach(hints={(0,): []}) == "x_ptr may be at any address: slower than need be"
    assert breach(hints={(0,): [["tt.divisibility", 8]]}).startswith("x_ptr may be at any")
    assert breach(hints={(0,): [["tt.divisibility", 16], ["tt.new", 1]]}) == (
        "x_ptr is assumed to have tt.new"
    )
    assert breach(global_scratch_size=8) == "it needs 8 bytes of scratch memory"
    assert breach(profile_scratch_size=4) == "it needs 4 bytes of scratch memory"
    changing = SimpleNamespace(
        params=fair_kernel.params, used_global_vals={("CHANGEABLE", 0): (1.0, {})}
    )
    assert breach(kernel=changing) == "it reads CHANGEABLE, which could change"
    bare = SimpleNamespace(src=good.src, metadata=SimpleNamespace())
    assert "unknown" in _plan.breach(fair_kernel, bare, "Pif")


# ---- the function that launches by a plan ----


class Chain:
    """A launch hook that is not set."""

    def __init__(self):
        self.calls = []


def planned(launch, binary, **names):
    """A plan whose launches are noted in its `.compiled.launches` instead of made."""
    enter, leave = Chain(), Chain()
    knobs = SimpleNamespace(launch_enter_hook=enter, launch_exit_hook=leave)
    launches = []
    fake = SimpleNamespace(
        src=binary.src, metadata=binary.metadata, function=7, packed_metadata=(4, 1, 0),
        run=lambda *args: launches.append(args), launches=launches, knobs=knobs,
    )  # fmt: skip
    tensors = [a for a in launch.args if isinstance(a, torch.Tensor)]
    current = SimpleNamespace(device=tensors[0].get_device())
    fake.current = current
    with mock.patch.multiple(
        _private,
        hooks=lambda: _private.Hooks(knobs, enter, leave),
        raw_stream=lambda _: 5,
        current_device=lambda: current.device,
    ):
        plan = _plan.make(launch.kernel, fake, launch.args, current.device)
    assert isinstance(plan, _plan.Plan), plan
    return plan


@pytest.fixture
def plan():
    """A plan of the split on the CPU, which is device -1."""
    launch, binary = split("sm90")
    made = planned(launch, binary)
    return SimpleNamespace(launch=made.launch, args=launch.args, fake=made.compiled)


@NVIDIA
def test_plan_passes_grid_stream_function_addresses_and_numbers(plan):
    """As Triton's own run takes them; a None per constant."""
    assert plan.launch(3, plan.args)
    (found,) = plan.fake.launches
    pointers = [a.data_ptr() for a in plan.args[:6]]
    numbers = list(plan.args[6:])
    assert found[:9] == (3, 1, 1, 5, 7, (4, 1, 0), None, None, None)
    assert list(found[9:]) == [*pointers, *numbers, *[None] * 11]


def misaligned(tensor, elements=1):
    """The same shape at an address that is no multiple of 16."""
    storage = torch.empty(tensor.numel() + elements, dtype=tensor.dtype)
    return storage[elements:].view(tensor.shape)


class OnAnother(torch.Tensor):
    """A tensor with an address that says it is on another GPU."""

    def get_device(self):
        """Return another index."""
        return 1


@NVIDIA
@pytest.mark.parametrize("place", [0, 1, 5])
@pytest.mark.parametrize(
    "spoil",
    [
        misaligned,
        lambda t: misaligned(t, 4),
        lambda t: t.float(),
        lambda t: t.view(torch.int16),
        lambda t: t.as_subclass(OnAnother),
        lambda t: t.to("meta"),
        lambda t: torch.empty(0, dtype=t.dtype),
        lambda _: None,
        lambda t: t.data_ptr(),
    ],
    ids=["2 bytes", "8 bytes", "wider", "dtype", "device", "meta", "null", "None", "an int"],
)
def test_plan_refuses_a_tensor_that_is_not_as_compiled(plan, spoil, place):
    """Nothing is launched; the caller launches the ordinary way."""
    args = [spoil(a) if i == place else a for i, a in enumerate(plan.args)]
    assert not plan.launch(3, tuple(args))
    assert plan.fake.launches == []


@NVIDIA
@pytest.mark.parametrize("value", [2**31, -1, 1.0, True, None, "1"])
def test_plan_refuses_a_number_that_is_no_positive_32_bit_integer(plan, value):
    """A larger one would be cut off by some launchers without an error."""
    assert not plan.launch(3, (*plan.args[:6], value, *plan.args[7:]))
    assert plan.launch(3, (*plan.args[:6], 2**31 - 1, *plan.args[7:]))
    assert len(plan.fake.launches) == 1


@NVIDIA
@pytest.mark.parametrize("programs", [0, -1, 2**31])
def test_plan_refuses_a_grid_that_the_driver_would(plan, programs):
    """An empty grid launches nothing, which the ordinary way knows."""
    assert not plan.launch(programs, plan.args)


@NVIDIA
def test_plan_with_too_few_arguments_raises(plan):
    """Some launchers would read past them."""
    with pytest.raises(ValueError, match="not enough values to unpack"):
        plan.launch(3, plan.args[:-1])


@NVIDIA
def test_plan_refuses_another_current_device(plan):
    """The launch would go to that device."""
    plan.fake.current.device = 1
    assert not plan.launch(3, plan.args)


@NVIDIA
@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_plan_refuses_while_a_hook_is_set(plan, hook):
    """Added to the chain, or put in its place."""
    chain = getattr(plan.fake.knobs, hook)
    chain.calls.append(print)
    assert not plan.launch(3, plan.args)
    chain.calls.clear()
    assert plan.launch(3, plan.args)
    setattr(plan.fake.knobs, hook, print)
    assert not plan.launch(3, plan.args)
    setattr(plan.fake.knobs, hook, None)
    assert not plan.launch(3, plan.args)


@NVIDIA
@pytest.mark.parametrize("name", ["run", "function", "packed_metadata"])
def test_binary_without_a_name_gets_no_plan(name):
    """A renamed field is a slower call."""
    launch, binary = split("sm90")
    fields = {"run": print, "function": 7, "packed_metadata": (), name: None}
    fake = SimpleNamespace(src=binary.src, metadata=binary.metadata, **fields)
    with mock.patch.object(_private, "raw_stream", return_value=5):
        found = _plan.make(launch.kernel, fake, launch.args, -1)
    assert found == f"a compiled kernel has no {name}"


# ---- Launch ----


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, so that Launch makes plans."""

    is_cuda = True


@pytest.fixture
def launching(monkeypatch):
    """A Launch of fair_kernel whose ordinary launches are counted, and whose plans are fakes."""
    launch = _launch.Launch(fair_kernel, num_warps=1, BLOCK=16)
    launch.count = 0

    def ordinary(programs, arguments):
        launch.count += 1
        return "binary"

    def make(kernel, binary, arguments, device):
        assert binary == "binary"
        dtype = arguments[0].dtype

        def fits(_programs, given):
            return given[0].dtype is dtype and not given[0].data_ptr() % 16

        return _plan.Plan(binary, "Pif", (dtype,), (), device, fits)

    monkeypatch.setattr(launch, "ordinary", ordinary, raising=False)
    monkeypatch.setattr(_plan, "make", make)
    return launch


def on_gpu(dtype=torch.float32, first=0):
    """A tensor of 16 elements."""
    return torch.empty(32, dtype=dtype)[first : first + 16].as_subclass(OnGpu)


def test_launch_is_ordinary_once_per_dtype_then_planned(launching):
    """Coming back to a dtype finds its plan."""
    for dtype in (torch.float32, torch.float32, torch.float16, torch.float16, torch.float32):
        launching(1, on_gpu(dtype), 16, 1.0)
    assert launching.count == 2
    assert len(launching.plans) == 2


def test_launch_of_a_misaligned_tensor_makes_no_plan(launching):
    """What Triton compiled for it would be right for all and slow for all."""
    launching(1, on_gpu(first=1), 16, 1.0)
    assert not launching.plans
    launching(1, on_gpu(), 16, 1.0)
    assert len(launching.plans) == 1
    launching(1, on_gpu(first=1), 16, 1.0)
    assert launching.count == 3


def test_launch_on_the_cpu_makes_no_plan(launching):
    """There the kernel is interpreted."""
    launching(1, torch.empty(16), 16, 1.0)
    launching(1, torch.empty(16), 16, 1.0)
    assert launching.count == 2


def test_launch_without_plans_by_the_variable(launching, monkeypatch):
    """HWFUSE_LAUNCH=triton is for whoever suspects a plan; another word is an error."""
    monkeypatch.setenv("HWFUSE_LAUNCH", "triton")
    for _ in range(2):
        launching(1, on_gpu(), 16, 1.0)
    assert launching.count == 2
    monkeypatch.setenv("HWFUSE_LAUNCH", "c")
    with pytest.raises(HwfuseError, match="HWFUSE_LAUNCH is 'c', needs one of triton, python"):
        launching(1, on_gpu(), 16, 1.0)


def test_refused_plan_warns_once_and_is_named_by_doctor(launching, monkeypatch):
    """The launch stays the ordinary one."""
    monkeypatch.setenv("HWFUSE_LAUNCH", "python")
    monkeypatch.setattr(_plan, "make", lambda *_: "n is assumed to be even")
    with pytest.warns(HwfuseWarning, match="fair_kernel is launched by Triton.*n is assumed"):
        launching(1, on_gpu(), 16, 1.0)
    launching(1, on_gpu(), 16, 1.0)
    assert launching.count == 2
    assert "fair_kernel is launched by Triton: n is assumed to be even" in _tiers.notes()


@pytest.mark.parametrize(
    ("tier", "text"),
    [
        ("triton", "kernels are launched by Triton: HWFUSE_LAUNCH=triton"),
        ("python", "repeated calls are replayed in Python: HWFUSE_LAUNCH=python"),
    ],
)
def test_doctor_says_which_way_kernels_are_launched(tier, text, monkeypatch):
    """And what stands in the way of a faster one."""
    monkeypatch.setenv("HWFUSE_LAUNCH", tier)
    assert _tiers.notes()[0] == text


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the C half may work")
def test_doctor_says_why_the_c_half_is_not_used():
    """It needs NVIDIA's driver and a compiler."""
    assert _tiers.notes()[0].startswith("repeated calls are replayed in Python: ")


def test_forgotten_plans_are_made_anew(launching):
    """In the child of a fork."""
    launching(1, on_gpu(), 16, 1.0)
    _launch.forget_all()
    launching(1, on_gpu(), 16, 1.0)
    assert launching.count == 2


# ---- empty ----


@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 3), (0, 5), (3, 0), (2, 3, 4), (2, 0, 4)])
def test_empty_is_contiguous_as_torch_has_it(shape):
    """Also without elements."""
    found = _launch.empty(torch.empty(1), shape, torch.float16)
    wanted = torch.empty(shape, dtype=torch.float16)
    assert (found.shape, found.stride(), found.dtype) == (shape, wanted.stride(), wanted.dtype)


def test_empty_takes_strides_and_sizes_of_torch():
    """Scales are column by column; torch.Size is no plain tuple for the private allocation."""
    found = _launch.empty(torch.empty(1), torch.empty(4, 2).shape, torch.float32, (1, 4))
    assert found.stride() == (1, 4)


def test_empty_on_another_than_the_current_device_is_public(monkeypatch):
    """The private allocation knows only the current device."""
    calls = []
    monkeypatch.setattr(_launch, "_allocate", lambda *a: calls.append(a))
    monkeypatch.setattr(_launch, "_current_device", lambda: 0)
    _launch.empty(torch.empty(1).as_subclass(OnGpu), (2,), torch.float32)
    assert not calls
    monkeypatch.setattr(_launch, "_current_device", lambda: -1)
    _launch.empty(torch.empty(1).as_subclass(OnGpu), (2,), torch.float32)
    assert calls == [((2,), (1,), torch.float32)]
    monkeypatch.setattr(_launch, "_mode_depth", lambda: 1)
    _launch.empty(torch.empty(1).as_subclass(OnGpu), (2,), torch.float32)
    assert len(calls) == 1


# ---- what registers a kernel ----

# It chooses the implementations of its parts anew on every call, and they are replayed themselves.
COMPOSED = {"w4a8_moe"}
REGISTERED = sorted(
    path
    for backend in ("cuda", "rocm")
    for path in Path(importlib.import_module(f"hwfuse_{backend}").__path__[0]).glob(
        "triton_ops/[a-z]*.py"
    )
)


@pytest.mark.parametrize("path", REGISTERED, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_implementation_in_triton_is_replayed(path):
    """Forgotten, it would be right and cost the host twice as much."""
    (function,) = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    assert decorators == ([] if path.stem in COMPOSED else ["replayed"])


@pytest.mark.parametrize("name", kernel_files())
def test_wrapper_decides_by_what_a_recipe_depends_on(name):
    """Not by settings, values, addresses or gradients, which may change while formats do not."""
    path = Path(hwfuse_triton.__path__[0], f"{name}.py")
    names = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
    if name not in COMPOSED:
        forbidden = {"op", "environ", "item", "tolist", "data_ptr", "requires_grad", "_base"}
        assert not names & (forbidden | {"is_grad_enabled", "untyped_storage", "storage_offset"})
