"""The memo guard: whatever changes between two calls, the right implementation runs each time."""

from __future__ import annotations

import random
import threading

import pytest
import torch

import hwfuse
from hwfuse import _guard, _op, _state
from hwfuse.testing._pretend import pretend

QUANT = hwfuse.op("fp8_group_quant")
SPLIT = hwfuse.op("fused_qkvzba")


def quant_calls():
    """Yield calls that differ in everything a fact can look at."""
    generator = random.Random(0)  # noqa: S311 - no secret
    base = torch.zeros(20, 1000)
    for _ in range(150):
        m, k = generator.choice([0, 1, 3, 8, 16]), generator.choice([128, 256, 384])
        start, stride = generator.choice([0, 1, 4]), generator.choice([1000, 400, k])
        dtype = generator.choice([torch.float32, torch.bfloat16, torch.float16])
        x = base.to(dtype).as_strided((m, k), (stride, 1), start)
        yield (
            (x.requires_grad_(generator.random() < 0.2),),
            {
                "group_size": generator.choice([64, 128]),
                "scale_layout": generator.choice(["row", "column"]),
                "dtype": generator.choice([None, torch.float8_e4m3fn, torch.float8_e4m3fnuz]),
            },
        )


def split_calls():
    """Yield calls with two tensors whose sizes follow from each other."""
    generator = random.Random(1)  # noqa: S311 - no secret
    for _ in range(100):
        pad, heads = generator.choice([0, 8]), generator.choice([1, 2])
        arguments = SPLIT.spec.make_inputs(
            m=generator.choice([1, 2, 8]),
            num_k_heads=heads,
            num_v_heads=heads * generator.choice([1, 2, 3]),
            head_k_dim=generator.choice([8, 16]),
            head_v_dim=generator.choice([8, 16]),
            layout=generator.choice(["interleaved", "contiguous"]),
            row_pad=pad,
            ba_dtype=generator.choice([torch.float32, torch.bfloat16]),
        )
        if generator.random() < 0.3:
            ba = arguments["ba"]
            arguments["ba"] = torch.cat([ba, ba], dim=1)[:, 1 : 1 + ba.shape[1]]
        yield SPLIT.spec.split(arguments)


FACTS = {
    "fp8_group_quant": (
        "m <= 8",
        "m in (1, 16)",
        "not m == 3",
        "k % 256 == 0",
        "m * k <= 1000",
        "x.dtype == bfloat16",
        "x.dtype in (float16, float32)",
        "x.requires_grad == False",
        "x.is_contiguous()",
        "not x.is_contiguous()",
        "x.shape == (8, 256)",
        "x.stride(0) % 16 == 0",
        "x.stride() == (400, 1)",
        "x.numel() == 2048",
        "x.ndim == 2",
        "aligned(x, 16)",
        "not aligned(x, 16)",
        "matches(x, 'row')",
        "group_size == 128",
        "scale_layout == 'row'",
        "dtype == float8_e4m3fn",
        "num_groups == 4",
        "num_groups * m <= 8",
        "num_groups * group_size == 256",
        "x.stride(0) == num_groups * group_size",
        "x.numel() == num_groups * 1024",
        "x.requires_grad == (num_groups == 4)",
        "(x.dtype == float32) == (num_groups == 4)",
        "(x.is_contiguous()) == (num_groups == 4)",
        "aligned(x, 16) == (num_groups == 4)",
        "(scale_layout == 'row') == (vendor == 'cpu')",
        "(x.dtype == float32) == (arch == cpu)",
    ),
    "fused_qkvzba": (
        "r == 2",
        "num_k_heads * r == 2",
        "m * r <= 4",
        "qkvz.dtype == ba.dtype",
        "qkvz.stride(0) > ba.stride(0) * 20",
        "ba.stride(0) == num_v_heads * 2",
        "qkvz.shape[1] == 128",
        "aligned(ba, 16)",
        "head_k_dim == head_v_dim",
        "layout == 'contiguous'",
        "layout in ('interleaved', 'other')",
    ),
}
CALLS = {"fp8_group_quant": list(quant_calls()), "fused_qkvzba": list(split_calls())}


@pytest.mark.parametrize(("name", "fact"), [(op, fact) for op in FACTS for fact in FACTS[op]])
def test_choice_after_any_sequence_of_calls_is_that_of_a_fresh_decision(name, fact, fakes):
    """`explain` decides anew, so it tells a stale choice; each fact is seen to hold and not to."""
    fakes.add("acme/fast", name, facts=(fact,), differentiable=True)
    fakes.add("acme/slow", name, differentiable=True)
    op, seen = hwfuse.op(name), set()
    hwfuse.configure({"on_miss": "silent", "ops": {name: ["acme/fast", "acme/slow"]}})
    for args, kwargs in CALLS[name]:
        expected = hwfuse.explain(name, *args, **kwargs).chosen
        op(*args, **kwargs)
        seen.add(fakes.ran[-1])
        assert fakes.ran[-1] == expected, (fact, args[0].shape, args[0].stride(), kwargs)
    assert seen == {"acme/fast", "acme/slow"} or fact in ("x.ndim == 2", "x.requires_grad == False")


def test_all_facts_together_never_give_a_stale_choice(fakes):
    """One guard serves the facts of many candidates."""
    for index, fact in enumerate(FACTS["fp8_group_quant"]):
        fakes.add(f"acme/f{index}", facts=(fact, "m == 1", f"k == {128 + 128 * (index % 3)}"))
    for args, kwargs in CALLS["fp8_group_quant"]:
        x = args[0].detach()
        expected = hwfuse.explain("fp8_group_quant", x, **kwargs).chosen
        with hwfuse.record() if len(fakes.ran) % 40 == 0 else torch.no_grad():
            QUANT(x, **kwargs)
            assert (fakes.ran or [expected])[-1] == expected or expected == "reference/torch"


def test_sizes_do_not_fill_the_table(fakes):
    """However many token counts arrive, only the truth of the facts is kept."""
    fakes.add("acme/fast", facts=("m <= 64",))
    for m in range(1, 200):
        QUANT(torch.zeros(m, 128))
    assert len(QUANT._memo[1]) <= 2


def test_derived_sizes_fill_the_table_to_its_limit_only(fakes, monkeypatch):
    """Facts about them put raw shapes into the key; the table is dropped when it is full."""
    monkeypatch.setattr(_guard, "TABLE_LIMIT", 16)
    fakes.add("acme/fast", facts=("num_groups == 2",))
    for m in range(100):
        QUANT(torch.zeros(m, 128 + 128 * (m % 2)))
        assert len(QUANT._memo[1]) <= 16
    assert fakes.ran == ["acme/fast"] * 50
    assert len(hwfuse.decisions()) == 2


def test_dtype_none_follows_the_pretended_arch(fakes):
    """The same call on one op object: the flavour of the device in force, each time."""
    fakes.add("acme/fast")
    x, found = torch.zeros(2, 128), []
    for _ in range(2):
        for target in ("rocm:gfx942", "rocm:gfx950", "cuda:sm90"):
            with pretend(target):
                found.append(QUANT(x)[0].dtype)
        found.append(QUANT(x)[0].dtype)
        found.append(QUANT(x, dtype=torch.float8_e4m3fnuz)[0].dtype)
    fn, fnuz = torch.float8_e4m3fn, torch.float8_e4m3fnuz
    assert found == [fnuz, fn, fn, fn, fnuz] * 2


def test_pretended_arch_changes_the_choice_each_time(fakes):
    """Arch and vendor are part of every choice, though no fact names them."""
    hwfuse.configure({"block": ["cuda", "rocm"]})  # theirs would come first
    fakes.add("acme/hopper", arch=("sm90",))
    fakes.add("acme/cdna", arch=("gfx942", "gfx950"))
    x = torch.zeros(2, 128)
    for target in ("cuda:sm90", "rocm:gfx942", "cuda:sm90", "rocm:gfx950"):
        with pretend(target):
            QUANT(x)
    QUANT(x)
    assert fakes.ran == ["acme/hopper", "acme/cdna", "acme/hopper", "acme/cdna"]


def test_configure_acts_on_a_warm_op_at_once(fakes):
    """Policy changes drop every table."""
    fakes.add("acme/a")
    fakes.add("acme/b")
    x = torch.zeros(2, 128)
    for name in "abba":
        hwfuse.configure({"ops": {"fp8_group_quant": f"acme/{name}"}})
        QUANT(x)
    assert fakes.ran == ["acme/a", "acme/b", "acme/b", "acme/a"]


def test_fresh_thread_uses_the_process_policy_and_its_own_blocks(fakes):
    """A `using` block of one thread does not reach another."""
    fakes.add("acme/a")
    fakes.add("acme/b")
    x = torch.zeros(2, 128)
    with hwfuse.using(fp8_group_quant="acme/b"):
        QUANT(x)
        thread = threading.Thread(target=QUANT, args=(x,))
        thread.start()
        thread.join()
        QUANT(x)
    assert fakes.ran == ["acme/b", "acme/a", "acme/b"]


def test_added_implementation_takes_part_and_a_removed_one_does_not(fakes):
    """The registry may change between two calls."""
    x = torch.zeros(2, 128)
    QUANT(x)
    fakes.add("acme/fast")
    QUANT(x)
    fakes.remove_all()
    fakes._added.clear()
    QUANT(x)
    assert fakes.ran == ["acme/fast"]


def test_using_blocks_repeat_without_filling_the_table(fakes):
    """One policy object per content: entering a block a thousand times is one key."""
    fakes.add("acme/a")
    x = torch.zeros(2, 128)
    for _ in range(50):
        with hwfuse.using(fp8_group_quant="acme/a"), hwfuse.using(fused_qkvzba="reference/torch"):
            QUANT(x)
        QUANT.using("acme/a")(x)
    assert len(QUANT._memo[1]) == 2


def test_cpu_call_on_a_machine_with_several_gpus_does_not_touch_cuda(fakes, monkeypatch):
    """Asking CUDA anything makes a context, and raises in a forked data loader."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(_guard, "_current_device", lambda: 1 // 0)
    fakes.add("acme/fast", facts=("m <= 64",))
    QUANT(torch.zeros(2, 128))
    QUANT(torch.zeros(2, 128))
    assert fakes.ran == ["acme/fast", "acme/fast"]


def test_choice_made_before_a_change_is_not_kept_after_it(fakes, monkeypatch):
    """A thread that decides while another configures must not put the old choice into the table."""
    fakes.add("acme/old")
    fakes.add("acme/new")
    hwfuse.configure({"ops": {"fp8_group_quant": "acme/old"}})
    remember, changed = _op.Op._remember, []

    def late(self, *args):
        if not changed:
            changed.append(hwfuse.configure({"ops": {"fp8_group_quant": "acme/new"}}))
        return remember(self, *args)

    monkeypatch.setattr(_op.Op, "_remember", late)
    x = torch.zeros(2, 128)
    QUANT(x)
    QUANT(x)
    QUANT(x)
    assert fakes.ran == ["acme/old", "acme/new", "acme/new"]


def test_many_threads_and_a_changing_policy_never_mix(fakes):
    """Each call runs what its own block pins, while facts and process policy keep changing."""
    for name in "abc":
        fakes.add(f"acme/{name}", facts=("m <= 64", "k % 128 == 0"))
        implementation = _state.registry().implementations("fp8_group_quant")[f"acme/{name}"]
        implementation.function = lambda *_, name=name, **__: name
    x, wrong = torch.zeros(2, 128), []

    def work(name):
        for _ in range(300):
            with hwfuse.using(fp8_group_quant=f"acme/{name}"):
                found = QUANT(x)
            if found != name:
                wrong.append((name, found))

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        hwfuse.configure({"ops": {"fp8_group_quant": "acme/a"}})
        hwfuse.configure({"block": ["nobody"]})
    for thread in threads:
        thread.join()
    assert wrong == []
