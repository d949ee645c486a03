"""The notebooks as they are stored; `make examples` executes them."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

nbformat = pytest.importorskip("nbformat")

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def code(path: Path) -> list[str]:
    return [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def chain(node: ast.Attribute) -> list[str]:
    """a.b.c -> ["a", "b", "c"]; nothing where it does not begin with a name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id, *parts] if isinstance(node, ast.Name) else []


def test_there_are_two_notebooks():
    assert [p.name for p in NOTEBOOKS] == ["compress_checkpoint.ipynb", "finetune_2bit.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebooks_are_valid_explained_and_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[0] == kinds[-1] == "markdown"
    assert kinds.count("markdown") >= 5
    tagged = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert "QUICK" in tagged[0].source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebooks_compile_and_use_public_names_that_exist(path):
    tree = ast.parse("\n".join(code(path)))
    compile(tree, path.name, "exec")
    known: dict[str, ModuleType] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "reality_stone":
                    known[alias.asname or alias.name] = importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("reality_stone"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert not alias.name.startswith("_"), alias.name
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                known[alias.asname or alias.name] = getattr(module, alias.name)
        elif isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_"), node.attr
    assert known
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (parts := chain(node)) and parts[0] in known:
            found = known[parts[0]]
            for name in parts[1:]:
                if not isinstance(found, ModuleType):
                    break
                assert hasattr(found, name), ".".join(parts)
                found = getattr(found, name)


@pytest.mark.parametrize(("source", "verdict"), [("2 + 2", "ok"), ("1 / 0", "FAILED")])
def test_the_runner_fails_on_any_error(source, verdict, tmp_path):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    path = tmp_path / "one.ipynb"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbformat.write(notebook, path)
    done = subprocess.run(
        [sys.executable, EXAMPLES / "run_notebooks.py", path],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.startswith(f"one.ipynb: {verdict} in "), done.stderr
    assert done.returncode == (verdict == "FAILED")
    assert ("ZeroDivisionError" in done.stderr) == (verdict == "FAILED")
