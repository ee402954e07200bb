"""Runs every code block of README, CONTRIBUTING and docs as a test."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import yaml
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

import hwfuse
from hwfuse import _cli, _policy_file

_FENCE = re.compile(r"^ *```(\S*)", re.MULTILINE)
_KNOWN = {"python", "yaml", "console", "text", "make", ""}  # "": a closing fence


def run_console(example: Example) -> None:
    """Run each ``$ hwfuse …`` line; the lines below it must stand in its output, in order."""
    for chunk in re.split(r"^\$ ", str(example.parsed), flags=re.MULTILINE)[1:]:
        command, _, expected = chunk.partition("\n")
        words = shlex.split(command)
        assert words[0] == "hwfuse", f"not ours to run: {command}"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            status = _cli.main(words[1:])
        assert status == 0, f"{command} exited with {status}:\n{printed.getvalue()}"
        position = 0
        for line in filter(None, (line.strip() for line in expected.splitlines())):
            if line == "…":
                continue
            position = printed.getvalue().find(line, position)
            assert position >= 0, f"{command} printed no {line!r}:\n{printed.getvalue()}"


def read_policy(example: Example) -> None:
    """Read a YAML block as a policy; ids of plugins that are not installed are allowed."""
    assert yaml.safe_load(example.parsed) is not None
    _policy_file.from_yaml(example.parsed, str(example.path))


def check_targets(example: Example) -> None:
    """Check that each ``make word`` names a target of the Makefile."""
    makefile = Path(__file__).with_name("Makefile").read_text(encoding="utf-8")
    for word in re.findall(r"^make (\w+)", example.parsed, re.MULTILINE):
        assert f"\n{word}:" in makefile, f"the Makefile has no {word}"


def setup(namespace: dict[str, object]) -> None:
    """Start from the built-in policy."""
    hwfuse.configure()


def teardown(namespace: dict[str, object]) -> None:
    """Drop what the document configured."""
    hwfuse.configure()


class Checked(Document):
    """A document all of whose code blocks are of a language that is run here."""

    def __init__(self, text: str, path: str) -> None:
        unknown = set(_FENCE.findall(text)) - _KNOWN
        assert not unknown, f"{path}: blocks in {unknown} are not run by the tests"
        super().__init__(text, path)


pytest_collect_file = Sybil(
    parsers=[
        PythonCodeBlockParser(),
        CodeBlockParser("console", run_console),
        CodeBlockParser("yaml", read_policy),
        CodeBlockParser("make", check_targets),
    ],
    patterns=["*.md"],
    document_types={".md": Checked},
    setup=setup,
    teardown=teardown,
).pytest()
