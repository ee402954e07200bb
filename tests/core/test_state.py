"""Shared state: who sees which policy, what is kept of decisions, threads, tasks and forks."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import hwfuse
from hwfuse import _op, _state

QUANT = hwfuse.op("fp8_group_quant")
X = torch.zeros(2, 128)


def test_using_in_threads_each_sees_its_own(fakes):
    """Eight threads, eight blocks, one op object."""
    names = [f"acme/{index}" for index in range(8)]
    for name in names:
        implementation = fakes.add(name)
        implementation.function = lambda *_, name=name, **__: name
    together = threading.Barrier(8)

    def work(name):
        with hwfuse.using(fp8_group_quant=name):
            together.wait()
            return {QUANT(X) for _ in range(50)}

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, names)) == [{name} for name in names]


def test_using_in_tasks_each_sees_its_own_and_children_inherit(fakes):
    """A block belongs to the task that entered it; tasks started inside it are in it."""
    for name in ("a", "b"):
        fakes.add(f"acme/{name}").function = lambda *_, name=name, **__: name

    async def child():
        await asyncio.sleep(0)
        return QUANT(X)

    async def work(name):
        found = []
        with hwfuse.using(fp8_group_quant=f"acme/{name}"):
            for _ in range(3):
                found.append(QUANT(X))
                await asyncio.sleep(0)
            found.append(await asyncio.create_task(child()))
        return found

    async def main():
        return await asyncio.gather(work("a"), work("b"))

    assert asyncio.run(main()) == [["a"] * 4, ["b"] * 4]


def test_using_object_may_decorate_and_be_entered_in_turn(fakes):
    """It is an ordinary context manager."""
    fakes.add("acme/a")
    fakes.add("acme/b")

    @hwfuse.using("acme/b")
    def work():
        QUANT(X)

    work()
    QUANT(X)
    work()
    assert fakes.ran == ["acme/b", "acme/a", "acme/b"]


def test_decisions_one_per_op_and_kind_at_first_use(fakes):
    """A changed policy is a new kind; a repeated call or another size is not."""
    fakes.add("acme/fast", facts=("m <= 64",))
    for m in (1, 2, 64, 65, 100, 1):
        QUANT(torch.zeros(m, 128))
    hwfuse.configure({"ops": {"fp8_group_quant": "reference/torch"}})
    QUANT(X)
    QUANT(X)
    found = [(d.chosen, d.origin, d.facts["m"]) for d in hwfuse.decisions()]
    assert found == [
        ("acme/fast", "built-in", 1),
        ("reference/torch", "built-in", 65),
        ("reference/torch", "hwfuse.configure", 2),
    ]


def test_trace_writes_one_json_line_per_decision(fakes, tmp_path, monkeypatch):
    """$HWFUSE_TRACE is appended to; each line is the decision as JSON."""
    fakes.add("acme/fast", facts=("m <= 64",))
    path = tmp_path / "trace.jsonl"
    path.write_text("earlier\n")
    monkeypatch.setenv("HWFUSE_TRACE", str(path))
    for m in (1, 65, 2, 66):
        QUANT(torch.zeros(m, 128))
    first, *lines = path.read_text().splitlines()
    assert first == "earlier"
    assert [json.loads(line) for line in lines] == [d.to_dict() for d in hwfuse.decisions()]
    assert [json.loads(line)["chosen"] for line in lines] == ["acme/fast", "reference/torch"]


def test_trace_that_cannot_be_written_names_the_variable(tmp_path, monkeypatch):
    """A wrong setting is an error that says where it was set."""
    monkeypatch.setenv("HWFUSE_TRACE", str(tmp_path / "none" / "trace.jsonl"))
    with pytest.raises(hwfuse.ConfigError, match=r"^HWFUSE_TRACE: .*trace.jsonl: cannot be writ"):
        QUANT(X)


def test_plugins_are_loaded_once_when_threads_ask_together(monkeypatch):
    """The first calls of many threads wait for one load."""
    calls = []
    load = _state._plugins.load
    monkeypatch.setattr(_state._plugins, "load", lambda *a: calls.append(1) or load(*a))
    monkeypatch.setattr(_state, "_registries", {})
    _state.forget()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: _state.registry(), range(8)))
    assert calls == [1]
    assert len(set(map(id, found))) == 1


def test_op_is_one_object_when_threads_ask_together(monkeypatch):
    """Creation is locked."""
    monkeypatch.setattr(_op, "_ops", {})
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(hwfuse.op, ["w4a8_moe_prep"] * 8))
    assert len(set(map(id, found))) == 1
    _state.listeners.remove(found[0]._reset)


FORK = """
import os, threading, traceback, torch, hwfuse
from hwfuse import _state
op, x = hwfuse.op("fp8_group_quant"), torch.zeros(2, 128)
op(x)
held, release = threading.Event(), threading.Event()
def hold():
    with _state.lock:
        held.set()
        release.wait()
threading.Thread(target=hold).start()
held.wait()
child = os.fork()
if child == 0:
    try:
        before = len(hwfuse.decisions())
        hwfuse.configure({"ops": {"fp8_group_quant": "reference/torch"}})
        op(x)
        hwfuse.op("w4a8_moe_prep")
        print("child", before, [d.origin for d in hwfuse.decisions()], flush=True)
    except Exception:
        traceback.print_exc()
    os._exit(0)
os.waitpid(child, 0)
release.set()
print("parent", [d.origin for d in hwfuse.decisions()])
"""


def test_fork_child_decides_anew_even_if_another_thread_held_the_lock():
    """Data loaders fork; a lock of a thread that is not there must not be waited for."""
    done = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60, check=True
    )
    expected = ["child 0 ['hwfuse.configure']", "parent ['built-in']"]
    assert done.stdout.splitlines() == expected, done.stderr


def test_node_is_registered_once_when_threads_ask_together():
    """Torch refuses a second definition; a fresh process has not registered this op yet."""
    code = """
from concurrent.futures import ThreadPoolExecutor
import torch, hwfuse
with ThreadPoolExecutor(8) as pool:
    nodes = list(pool.map(lambda _: hwfuse.op("q_rms_norm").node, range(32)))
assert set(nodes) == {torch.ops.hwfuse.q_rms_norm.default}
"""
    subprocess.run([sys.executable, "-c", code], check=True)
