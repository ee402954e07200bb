"""Policy: YAML, HWFUSE_USE, mappings; precedence, origins, and what each mistake says."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch

import hwfuse
from hwfuse import _policy, _policy_file, _state

OP = "fp8_group_quant"
X = torch.zeros(8, 256)


def decide(**sizes):
    """Return the decision for a call on this CPU."""
    return hwfuse.explain(OP, device="cpu", **{"m": 8, "k": 256, **sizes})


def test_precedence_of_the_six_layers(fakes, tmp_path, monkeypatch):
    """op.using, hwfuse.using, configure, HWFUSE_USE, the file, built-in: the highest decides."""
    for name in ("built_in", "file", "variable", "configured", "block", "call"):
        fakes.add(f"acme/{name}", facts=() if name == "built_in" else ("m == 8",))
    path = tmp_path / "h200.yaml"
    path.write_text(f"version: 1\nops:\n  {OP}: acme/file\n")
    found = [decide()]
    monkeypatch.setenv("HWFUSE_CONFIG", str(path))
    hwfuse.configure()
    found.append(decide())
    monkeypatch.setenv("HWFUSE_USE", f"{OP}=acme/variable")
    hwfuse.configure()
    found.append(decide())
    hwfuse.configure({"ops": {OP: "acme/configured"}})
    found.append(decide())
    with hwfuse.using(**{OP: "acme/block"}):
        found.append(decide())
        hwfuse.op(OP).using("acme/call")(X)
    assert [(d.chosen, d.origin) for d in (*found, hwfuse.decisions()[-1])] == [
        ("acme/built_in", "built-in"),
        ("acme/file", f"{path}:3"),
        ("acme/variable", "HWFUSE_USE"),
        ("acme/configured", "hwfuse.configure"),
        ("acme/block", "hwfuse.using"),
        ("acme/call", "op.using"),
    ]


def test_layers_merge_key_by_key(fakes, tmp_path, monkeypatch):
    """A higher layer hides only what it speaks of."""
    fakes.add("acme/fast")
    path = tmp_path / "site.yaml"
    path.write_text("on_miss: silent\nblock: [rocm]\nops:\n  fused_qkvzba: reference/torch\n")
    monkeypatch.setenv("HWFUSE_CONFIG", str(path))
    monkeypatch.setenv("HWFUSE_BLOCK", "nobody, none")
    hwfuse.configure({"on_miss": "error", "ops": {OP: "reference/torch"}})
    policy = _state.policy()
    assert policy.on_miss == ("error", "hwfuse.configure")
    assert policy.block == {
        "rocm": f"{path}:2", "nobody": "HWFUSE_BLOCK", "none": "HWFUSE_BLOCK",
    }  # fmt: skip
    assert policy.order(OP, {}).origin == "hwfuse.configure"
    assert policy.order("fused_qkvzba", {}).origin == f"{path}:4"
    assert policy.order("qkv_rms_norm", {}).origin == "built-in"


def test_op_by_name_stands_above_star_in_one_layer_but_not_across(fakes):
    """Inside a layer the name wins; between layers the higher one."""
    text = f"ops:\n  '*': reference/torch\n  {OP}: [acme/a]\n"
    lower = _policy_file.from_yaml(text, "low.yaml")
    higher = _policy_file.from_yaml("ops: {'*': acme/b}", "high.yaml")
    policy = _policy.Policy((lower, _policy.BUILT_IN))
    assert policy.order(OP, {}).origin == "low.yaml:3"
    assert policy.order("fused_qkvzba", {}).origin == "low.yaml:2"
    policy = _policy.Policy((higher, lower, _policy.BUILT_IN))
    assert policy.order(OP, {}).origin == "high.yaml:1"


def test_rules_first_that_matches_wins_and_the_order_comes_after_them():
    """Each rule has its line; a rule needs all its facts."""
    text = f"""\
version: 1
ops:
  {OP}:
    order: [cuda/cublas, cuda/triton]
    rules:
      - when: [arch == sm90, m <= 64]
        order: [cuda/triton]
      - when: m <= 64
        order: cuda/cublas
"""
    policy = _policy.Policy((_policy_file.from_yaml(text, "h200.yaml"), _policy.BUILT_IN))
    assert policy.order(OP, {"arch": "sm90", "m": 64}).origin == "h200.yaml:7"
    order = policy.order(OP, {"arch": "sm100", "m": 64})
    assert (order.origin, order.pin) == ("h200.yaml:9", True)
    assert policy.order(OP, {"arch": "sm90", "m": 65}).origin == "h200.yaml:4"
    assert [f.source for f in policy.facts(OP)] == ["arch == sm90", "m <= 64", "m <= 64"]


def test_rules_without_order_fall_to_star_of_the_same_layer():
    """A named op with rules only says nothing of other calls; the layer's ``*`` does."""
    text = f"ops:\n  '*': [cuda/triton]\n  {OP}: {{rules: [{{when: m == 1, order: [acme/a]}}]}}\n"
    policy = _policy.Policy((_policy_file.from_yaml(text, "x.yaml"), _policy.BUILT_IN))
    assert policy.order(OP, {"m": 1}).ids == ("acme/a",)
    assert policy.order(OP, {"m": 2}).ids == ("cuda/triton",)


def test_rules_act_on_calls(fakes):
    """The same op chooses by size, as the rule says, also after it has run."""
    fakes.add("acme/small")
    fakes.add("acme/large")
    rule = {"when": ["m <= 64"], "order": ["acme/small"]}
    hwfuse.configure({"ops": {OP: {"order": ["acme/large"], "rules": [rule]}}})
    for m in (64, 65, 1, 64, 100):
        hwfuse.op(OP)(torch.zeros(m, 128))
    small, large = "acme/small", "acme/large"
    assert fakes.ran == [small, large, small, small, large]


def test_empty_file_says_nothing():
    """An empty file is no mistake."""
    assert _policy_file.from_yaml("# later\n", "x.yaml") == _policy.Layer()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("on_mis: warn", "x.yaml:1: unknown key 'on_mis' (did you mean 'on_miss'?)"),
        (
            "version: 1\nops:\n  fused_qkvzb: [cuda/triton]",
            "x.yaml:3: no op is called 'fused_qkvzb' (did you mean 'fused_qkvzba'?)",
        ),
        (
            "ops:\n  fp8_group_quant:\n    ordr: [cuda/triton]",
            "x.yaml:3: unknown key 'ordr' (did you mean 'order'?)",
        ),
        (
            "ops:\n  fp8_group_quant:\n    rules:\n      - {when: m == 1, odrer: [cuda/triton]}",
            "x.yaml:4: unknown key 'odrer' (did you mean 'order'?)",
        ),
        ("on_miss: warn\n\non_miss: error", "x.yaml:3: 'on_miss' is already set at x.yaml:1"),
        (
            "ops:\n  '*': cuda/triton\n  '*': rocm/triton",
            "x.yaml:3: '*' is already set at x.yaml:2",
        ),
        ("\nversion: 2", "x.yaml:2: version is 2, needs 1"),
        ("version: '1'", "x.yaml:1: version is '1', needs 1"),
        (
            "on_miss: ignore",
            "x.yaml:1: on_miss is 'ignore', needs one of ('error', 'warn', 'silent')",
        ),
        ("block: cuda", "x.yaml:1: block is 'cuda', needs a list of plugins"),
        ("- cuda/triton", "x.yaml: found ['cuda/triton'], needs a mapping"),
        ("ops: cuda/triton", "x.yaml:1: found 'cuda/triton', needs a mapping"),
        (
            "ops: {fp8_group_quant: {rules: {when: m == 1}}}",
            "x.yaml:1: rules is {'when': 'm == 1'}, needs a list of mappings",
        ),
        (
            "ops:\n  fp8_group_quant:\n    rules:\n      - when: m == 1",
            "x.yaml:4: a rule needs both when and order",
        ),
        (
            "ops:\n  fp8_group_quant:\n    rules:\n      - order: [a/b]\n        when: m ==",
            "x.yaml:5: 'm ==' is not a fact: invalid syntax",
        ),
        (
            "ops: {fp8_group_quant: {rules: [{when: num_group == 1, order: [cuda/triton]}]}}",
            "x.yaml:1: 'num_group == 1': unknown name 'num_group' (did you mean 'num_groups'?)",
        ),
        (
            "ops: {'*': {rules: [{when: m == 1, order: [cuda/triton]}]}}",
            "x.yaml:1: 'm == 1': unknown name 'm'",
        ),
        ("ops: {'*': }", "x.yaml:1: found None, needs an id or a list of ids"),
        ("ops: {'*': []}", "x.yaml:1: found [], needs an id or a list of ids"),
        ("ops: {'*': 5}", "x.yaml:1: found 5, needs an id or a list of ids"),
        (
            "ops: {'*': triton}",
            "x.yaml:1: 'triton' is not an id; needs backend/provider: reference/torch",
        ),
        (
            "ops: {'*': [a/b/c]}",
            "x.yaml:1: 'a/b/c' is not an id; needs backend/provider: reference/torch",
        ),
        (
            "ops: {'*': [my.module:function]}",
            "x.yaml:1: 'my.module:function' is not an id; needs backend/provider: reference/torch",
        ),
        (
            "ops: {'*': [..., cuda/triton]}",
            "x.yaml:1: '...' can only be the last item of ['...', 'cuda/triton']",
        ),
        (
            "ops: {'*': [cuda/triton, cuda/triton]}",
            "x.yaml:1: an id is listed twice in ['cuda/triton', 'cuda/triton']",
        ),
    ],
)
def test_mistake_in_a_file_names_line_found_and_needed(text, message):
    """A wrong setting is an error where it is set; the words are pinned."""
    with pytest.raises(hwfuse.ConfigError) as error:
        _policy_file.from_yaml(text, "x.yaml")
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("ops: [", "x.yaml: not YAML: "),
        ("a: 1\n--- \nb: 1", "x.yaml: not YAML: "),
        ("version: !!python/name:os.system x", "x.yaml:1: could not determine a constructor"),
        ("\nversion: 2001-02-31", "x.yaml:2: day is out of range"),
    ],
)
def test_text_that_is_no_policy_names_the_file(text, start):
    """Whatever a file holds, the error says which file; no tag constructs anything."""
    with pytest.raises(hwfuse.ConfigError) as error:
        _policy_file.from_yaml(text, "x.yaml")
    assert str(error.value).startswith(start)


def test_tag_on_a_list_constructs_nothing():
    """Only nodes are read: a python tag is not obeyed."""
    text = "ops: !!python/object/apply:os.system [exit 1]"
    with pytest.raises(hwfuse.ConfigError, match="needs a mapping"):
        _policy_file.from_yaml(text, "x.yaml")


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_file_that_cannot_be_read_is_named(content, tmp_path):
    """Absent, or not text."""
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(hwfuse.ConfigError, match=f"^{re.escape(str(path))}: cannot be read: "):
        hwfuse.configure(path)


def test_nothing_is_read_from_the_working_directory(tmp_path, monkeypatch):
    """Only $HWFUSE_CONFIG names a file."""
    for name in ("hwfuse.yaml", "default.yaml"):
        (tmp_path / name).write_text("on_miss: error")
    monkeypatch.chdir(tmp_path)
    _state.forget()
    assert _state.policy().on_miss == ("warn", "built-in")


def test_use_variable_pins_ops_and_star():
    """``op=id,*=id``, spaces and empty items do not matter."""
    layer = _policy_file.from_use(f" {OP} = cuda/triton ,, *=reference/torch,", "HWFUSE_USE")
    assert layer.ops[OP].order == _policy.Order(
        ("cuda/triton",), pin=True, origin="HWFUSE_USE", op=OP
    )
    assert layer.ops["*"].order.ids == ("reference/torch",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuda/triton", "HWFUSE_USE: found 'cuda/triton', needs op=id once per op, or *=id"),
        (
            "*=a/b,*=c/d",
            "HWFUSE_USE: found '*=c/d', needs op=id once per op, or *=id",
        ),
        (
            "fused_qkvz=a/b",
            "HWFUSE_USE: no op is called 'fused_qkvz' (did you mean 'fused_qkvzba'?)",
        ),
        ("*=a", "HWFUSE_USE: 'a' is not an id; needs backend/provider: reference/torch"),
        (
            "*=cuda/tritn",
            "HWFUSE_USE: *: no provider is called 'cuda/tritn' (did you mean 'cuda/triton'?)",
        ),
    ],
)
def test_mistake_in_use_variable_says_what_is_needed(text, message, monkeypatch):
    """The first op that asks raises, and names the variable."""
    monkeypatch.setenv("HWFUSE_USE", text)
    _state.forget()
    with pytest.raises(hwfuse.ConfigError) as error:
        hwfuse.op(OP)(X)
    assert str(error.value) == message


def test_unknown_variable_warns_once_with_a_suggestion(monkeypatch):
    """A typo in the environment must not go unseen, nor be repeated."""
    monkeypatch.setenv("HWFUSE_TRACES", "x")
    _state.forget()
    text = r"^HWFUSE_TRACES is not a variable of hwfuse \(did you mean 'HWFUSE_TRACE'\?\)$"
    with pytest.warns(hwfuse.HwfuseWarning, match=text):
        hwfuse.op(OP)(X)
    _state.forget()
    hwfuse.op(OP)(X)  # warnings are errors in these tests


@pytest.mark.parametrize("ids", ["cuda/trition", ["reference/numpy", "..."]])
def test_unknown_id_is_an_error_only_when_its_backend_is_loaded(ids):
    """The error suggests; an absent backend is a reason instead."""
    with pytest.raises(hwfuse.UnknownImplementation, match=r"no provider is called '(cuda|refer)"):
        hwfuse.configure({"ops": {OP: ids}})
    hwfuse.configure({"ops": {OP: ["acme/anything"]}})
    assert decide().rejected["acme/anything"] == ("backend acme is not installed",)


def test_unknown_id_in_a_rule_or_a_using_block_is_an_error():
    """Every place that names ids is checked."""
    rule = {"when": "m == 1", "order": ["cuda/nothing"]}
    with pytest.raises(hwfuse.UnknownImplementation, match=r"^hwfuse.configure: fp8_group_quant: "):
        hwfuse.configure({"ops": {OP: {"rules": [rule]}}})
    with pytest.raises(hwfuse.UnknownImplementation, match=r"^hwfuse.using: \*: no provider"):
        hwfuse.using("cuda/nothing").__enter__()
    with pytest.raises(hwfuse.ConfigError, match=r"^hwfuse.using: no op is called 'fp8_quant'"):
        hwfuse.using(fp8_quant="cuda/triton").__enter__()


@pytest.mark.parametrize(
    "wrong", [{"onmiss": 1}, {"ops": {OP: "cuda/nothing"}}, "no-such-file.yaml"]
)
def test_configure_with_a_mistake_leaves_the_old_settings(wrong, fakes):
    """It is atomic: nothing changes unless all is right, and warm calls go on."""
    fakes.add("acme/a")
    hwfuse.configure({"on_miss": "silent", "ops": {OP: "acme/a"}})
    hwfuse.op(OP)(X)
    with pytest.raises(hwfuse.ConfigError):
        hwfuse.configure(wrong)
    hwfuse.op(OP)(X)
    assert fakes.ran == ["acme/a", "acme/a"]
    assert _state.policy().on_miss == ("silent", "hwfuse.configure")


def test_configure_replaces_reads_the_environment_again_and_none_drops(monkeypatch, tmp_path):
    """Each call sets the whole of this layer; the variables are read anew."""
    hwfuse.configure({"on_miss": "silent"})
    monkeypatch.setenv("HWFUSE_USE", f"{OP}=reference/torch")
    assert decide().origin == "built-in"
    path = tmp_path / "h200.yaml"
    path.write_text("ops:\n  '*': [reference/torch]")
    hwfuse.configure(str(path))
    assert decide().origin == f"{path}:2"
    assert _state.policy().on_miss == ("warn", "built-in")
    hwfuse.configure(None)
    assert decide().origin == "HWFUSE_USE"


def test_using_several_ids_is_an_order_and_names_win_over_all(fakes):
    """One id pins; several are an order; an op's own stands above those for all."""
    fakes.add("acme/a", facts=("m > 64",))
    fakes.add("acme/b")
    with hwfuse.using("acme/a", "acme/b"):
        assert decide().chosen == "acme/b"
    with hwfuse.using("reference/torch", **{OP: ["acme/b"]}):
        assert decide().chosen == "acme/b"
    with hwfuse.using("acme/a"), pytest.raises(hwfuse.PinnedUnavailable):
        hwfuse.op(OP)(X)


def test_using_nested_the_inner_wins_and_the_outer_comes_back(fakes):
    """Blocks stack; an inner one hides only what it speaks of."""
    fakes.add("acme/a")
    fakes.add("acme/b")
    seen = []
    with hwfuse.using(**{OP: "acme/a"}):
        with hwfuse.using(fused_qkvzba="reference/torch"):
            seen.append(decide().chosen)
        with hwfuse.using(**{OP: "acme/b"}):
            seen.append(decide().chosen)
        with contextlib.suppress(ZeroDivisionError), hwfuse.using("reference/torch"):
            seen.append(decide().chosen)
            raise ZeroDivisionError
        seen.append(decide().chosen)
    assert seen == ["acme/a", "acme/b", "reference/torch", "acme/a"]


def test_order_when_written_with_an_ellipsis_has_the_rest():
    """In Python ``...`` is an object, in YAML a word; both mean then the rest."""
    order = _policy_file.make_order(["cuda/triton", ...], "here", OP)
    assert order.ids == ("cuda/triton", "...")
