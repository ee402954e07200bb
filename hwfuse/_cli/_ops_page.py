"""``hwfuse ops --docs``: a page that says of each op what its spec and implementations declare."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hwfuse import _facts, _spec
from hwfuse._implementation import Implementation
from hwfuse._spec import Spec

_OPENING = """\
# Ops

<!-- Generated from hwfuse/ops and backends/: hwfuse ops --docs docs/ops.md -->

Each op's contract, as its spec in [hwfuse/ops](../hwfuse/ops) declares it. Letters such as M are
explained under *Shapes*. Below each contract:

- **Sizes**: the words that facts, rules in YAML and [`hwfuse explain`](first-ten-minutes.md) know
  for this op, besides its arguments;
- **Inputs**: the keywords of the spec's `make_inputs` and their defaults; `hwfuse explain OP` takes
  them as options, and a parity matrix as axes. There is also `device`;
- **Compared**: how near to the reference each result must be, by which function of
  [hwfuse/testing/compare.py](../hwfuse/testing/compare.py); a share is of the elements;
- **Implementations**: on which devices, what each needs, and the traits that it declares.

Any op can be tried like this:

```python
import hwfuse

op = hwfuse.op("rms_norm_fp8_group_quant")
args, kwargs = op.spec.split(op.spec.make_inputs(m=2, k=256))
q, scale = op(*args, **kwargs)
assert q.shape == (2, 256) and scale.shape == (2, 2)
```
"""
_CODE = re.compile(r"(``.+?``|`[^`]+`)")
_PART = re.compile(r"^[A-Z][a-z]+(?: [a-z]+)?:")  # "Formula:", "Empty input:"
_TRAITS = ("differentiable", "deterministic", "batch_invariant", "experimental")


def page(found: Mapping[str, Sequence[Implementation]]) -> str:
    """Return the page for these ops."""
    specs = [_spec.load(op) for op in found]
    links = [f"- [`{spec.name}`](#{spec.name}): {_text(_paragraphs(spec)[0])}" for spec in specs]
    parts = [_OPENING, "\n".join(map(_wrapped, links)) + "\n"]
    parts += [_section(spec, found[spec.name]) for spec in specs]
    return "\n".join(parts)


def _section(spec: Spec, implementations: Sequence[Implementation]) -> str:
    contract = [block for paragraph in _paragraphs(spec) for block in _blocks(paragraph)]
    opening = [f"## {spec.name}", f"```text\n{_signature(spec)}\n```"]
    declared = "\n".join(map(_wrapped, _declared(spec, implementations)))
    return "\n\n".join([*opening, *contract, declared]) + "\n"


def _paragraphs(spec: Spec) -> list[str]:
    return re.split(r"\n\s*\n", inspect.getdoc(spec.function) or "")


def _signature(spec: Spec) -> str:
    """Write the signature, an argument a line where one line would be too long."""
    arguments: list[str] = []
    for name, parameter in spec.signature.parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in arguments:
            arguments.append("*")
        default = "" if parameter.default is parameter.empty else f" = {_value(parameter.default)}"
        arguments.append(f"{name}: {parameter.annotation}{default}")
    returns = spec.signature.return_annotation
    line = f"{spec.name}({', '.join(arguments)}) -> {returns}"
    if len(line) <= 100:
        return line
    lines = "".join(f"    {argument},\n" for argument in arguments)
    return f"{spec.name}(\n{lines}) -> {returns}"


def _blocks(paragraph: str) -> Iterator[str]:
    """Yield the Markdown of one paragraph of a docstring."""
    title, _, rest = paragraph.partition("\n")
    if title.endswith(":") and rest.startswith("    "):
        yield f"**{title.removesuffix(':')}**"
        yield "\n".join(map(_wrapped, _items(textwrap.dedent(rest))))
    elif part := _PART.match(paragraph):
        text = _text(paragraph[part.end() :])
        yield _wrapped(f"**{part[0].removesuffix(':')}**: {text}")
    else:
        yield _wrapped(_text(paragraph))


def _items(text: str) -> Iterator[str]:
    """Yield ``name: text`` entries as a list's items, and sentences that stand alone as such."""
    for entry in re.split(r"\n(?! )", text):
        name, colon, rest = entry.partition(": ")
        is_named = bool(colon) and name.isidentifier()
        yield f"- `{name}`: {_text(rest)}" if is_named else f"- {_text(entry)}"


def _declared(spec: Spec, implementations: Sequence[Implementation]) -> Iterator[str]:
    yield f"- **Sizes**: {_words(spec.size_names)}"
    defaults = inspect.signature(spec.make_inputs).parameters.values()
    inputs = [f"{p.name}={_value(p.default)}" for p in defaults if p.name != "device"]
    yield f"- **Inputs**: {_words(inputs)}"
    if spec.mutates:
        yield f"- **Written in place**: {_words(spec.mutates)}"
    compared = (f"`{name}` by `{_call(*how)}`" for name, how in spec.compare.items())
    yield f"- **Compared**: {', '.join(compared)}"
    yield f"- **Implementations**: {'; '.join(map(_implementation, implementations))}"


def _implementation(one: Implementation) -> str:
    needs = [*one.requires.packages, *(fact.source for fact in one.requires.facts)]
    traits = [trait for trait in _TRAITS if getattr(one.requires, trait)]
    texts = [", ".join(one.requires.arch) or one.vendor or "every device"]
    texts += [f"needs {_words(needs)}"] if needs else []
    return f"`{one.id}` ({', '.join([*texts, *traits])})"


def _call(name: str, numbers: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value}' for key, value in numbers.items())})"


def _value(default: Any) -> str:
    shown = _facts.show(default)  # a dtype is shown as a bare word
    return shown if shown != default else repr(default)


def _words(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _text(text: str) -> str:
    """Turn a docstring's text into one line of Markdown; names of ops become links."""
    pieces = _CODE.split(" ".join(text.split()))
    for i, piece in enumerate(pieces):
        code = piece.strip("`")
        if not i % 2:
            pieces[i] = re.sub(r"(?<=\w)\*(?=\w)", r"\*", piece)  # a product, not emphasis
        elif not piece.startswith("``") and code in _spec.names():
            pieces[i] = f"[`{code}`](#{code})"
        else:
            pieces[i] = f"`{code}`"
    return "".join(pieces)


def _wrapped(line: str) -> str:
    """Break a line at 100; never in code, and never so that the next starts like a list."""
    kept = _CODE.sub(lambda code: code[0].replace(" ", "\0"), line)
    kept = re.sub(r" (?=[-+*=>#]|\d+[.)] )", "\0", kept)
    indent = "  " if line.startswith("- ") else ""
    lines = textwrap.wrap(
        kept, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines).replace("\0", " ")
