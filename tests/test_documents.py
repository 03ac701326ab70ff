"""What the documents promise is there: files they link to, commands they show, modules they name."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
from pathlib import Path

import pytest

from nirvana.cli import COMMANDS, build_parser

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for folder in ("", "benchmarks", "csrc", "kernels", "nirvana")
    for path in (ROOT / folder).glob("**/*.md" if folder else "*.md")
    if not path.is_relative_to(ROOT / "nirvana" / "benchmarks")
    and not path.is_relative_to(ROOT / "nirvana" / "kernels")
)
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


def slugs(text: str) -> set[str]:
    """Anchors of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> list[str]:
    """Command lines that begin with ``nirvana``, whole."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip().startswith("nirvana ")]


def parses(line: str) -> str:
    """Why the command line is not one of ours; empty if it is."""
    words = shlex.split(line, comments=True)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            build_parser().parse_args(words[1:])
    except SystemExit:
        return said.getvalue()
    return ""


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_links_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for link in LINK.findall(text):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = document.parent / file if file else document
        assert target.exists(), link
        if anchor:
            assert anchor in slugs(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_commands_are_understood(document):
    for block in BLOCK.findall(document.read_text(encoding="utf-8")):
        for line in commands(block):
            assert parses(line) == "", line


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_the_help_are_understood(name):
    examples = commands(COMMANDS[name].EPILOG)
    assert examples
    for line in examples:
        assert parses(line) == "", line


def test_a_wrong_command_would_be_found():
    assert "unrecognized arguments: --sparsty" in parses("nirvana prune demo --sparsity 0.2 --sparsty 0.3 --out x  # y")


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_modules_are_there(document):
    for module in re.findall(r"python -m (nirvana[\w.]*\w)", document.read_text(encoding="utf-8")):
        assert importlib.util.find_spec(module), module
