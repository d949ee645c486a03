"""What the pages say exists: messages, files, commands, names."""

import ast
import re
from pathlib import Path

import pytest

import reality_stone as rs
from reality_stone.cli import _parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOREIGN = {"Some weights of … were newly initialized"}  # messages of other libraries


def texts() -> list[str]:
    """Every string in the package, what is filled in at run time as …, and those of the C++."""
    found = []
    for path in Path(rs.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    for path in (ROOT / "csrc").rglob("*.[ch]*"):
        code = re.sub(r'"\s*\n?\s*"', "", path.read_text())
        found += [re.sub(r'"\s*(?:\+|<<)[^"]*(?:\+|<<)?\s*"', "…", line) for line in [code]]
    return found


def messages() -> list[str]:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    rows = [line for line in page.split("\n") if line.startswith("| `")]
    return [re.match(r"\| `([^`]*)`", row).group(1) for row in rows]


ALL = texts()


@pytest.mark.parametrize("message", messages())
def test_every_message_that_the_page_explains_is_one_of_ours(message):
    if message in FOREIGN:
        return
    parts = [re.escape(part.strip()) for part in message.split("…") if part.strip(" .:;,")]
    assert parts
    pattern = re.compile(".*?".join(parts), re.DOTALL)
    assert any(pattern.search(text) for text in ALL), message


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page):
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_in_the_pages_are_ones_the_program_has(page):
    verbs = next(a for a in _parser()._actions if a.dest == "verb").choices
    for verb, rest in re.findall(r"^ {4}reality-stone ([a-z]+)(.*)$", page.read_text(), re.M):
        assert verb in verbs
        known = {option for action in verbs[verb]._actions for option in action.option_strings}
        assert set(re.findall(r"(?<!\S)--[a-z-]+", rest.split("#")[0])) <= known, (verb, rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_names_of_the_package_in_the_pages_exist(page):
    for name in re.findall(r"\brs\.([A-Za-z_.]+[A-Za-z_])", page.read_text()):
        value = rs
        for part in name.split("."):
            assert hasattr(value, part), f"rs.{name}"
            value = getattr(value, part)
