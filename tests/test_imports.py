"""Who may import whom, what an import must not do, and life without the compiled library."""

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import reality_stone
from reality_stone import ops

PACKAGE = Path(reality_stone.__file__).parent
# Bottom first. Modules that are not here stand on all of these.
FLOORS = [
    "ops", "packed", "metrics", "feedback", "fitting", "codecs", "derivative", "quantizers",
    "reference", "tensorfile", "nn", "optim",
]  # fmt: skip
# Imported only when asked: nothing of the library stands on them.
OUTER = {
    "hf", "hf_quantizer", "registration", "peft", "report", "compare", "bench", "doctor", "cli",
    "__main__", "parallel",
}  # fmt: skip
LIBRARY = {*FLOORS, "metrics", "blocks", "evaluate", "compress", "checkpoint", "training"}


def room(path: Path) -> str:
    """ops, codecs, nn, ...: the first part of a module's name inside the package."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def is_type_checking(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def statements(node: ast.AST):
    """Import statements, inside functions too, but not those for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif not is_type_checking(child):
            yield from statements(child)


def imports(path: Path) -> set[str]:
    """Rooms of the package that a file imports."""
    here = ["reality_stone", *path.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            top, _, rest = name.partition(".")
            if top == "reality_stone" and rest:
                found.add(rest.split(".")[0])
    return found & rooms()


def rooms() -> set[str]:
    return {room(p) for p in PACKAGE.rglob("*.py")} - {"__init__"}


def graph() -> dict[str, set[str]]:
    edges = {name: set() for name in rooms()}
    for path in PACKAGE.rglob("*.py"):
        if room(path) != "__init__":
            edges[room(path)] |= imports(path) - {room(path)}
    return edges


def test_the_reader_of_imports_sees_the_imports_there_are():
    edges = graph()
    assert edges["packed"] == {"ops"}
    assert {"ops", "packed", "feedback"} <= edges["codecs"]
    assert "codecs" in edges["nn"]


def test_rooms_import_downward_only():
    edges = graph()
    for i, name in enumerate(FLOORS):
        above = edges[name] - set(FLOORS[:i])
        assert not above, f"{name} must not import {sorted(above)}"


def test_nothing_of_the_library_stands_on_what_is_imported_only_when_asked():
    edges = graph()
    for name in LIBRARY & set(edges):
        assert not edges[name] & OUTER, f"{name} must not import {sorted(edges[name] & OUTER)}"
    for name, used in edges.items():
        assert "cli" not in used or name == "__main__", f"{name} must not import the command line"


def test_no_rooms_import_each_other_in_a_circle():
    edges = graph()
    while edges:
        free = [name for name, used in edges.items() if not used & set(edges)]
        assert free, f"a circle among {sorted(edges)}"
        for name in free:
            del edges[name]


def test_only_ops_says_torch_ops():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "ops.py":
            assert "torch.ops" not in path.read_text(), path.name


def run(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_import_loads_no_optional_package_and_starts_no_thread():
    out = run("""
        import os, sys, threading, torch
        before = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else None
        import reality_stone
        heavy = {"transformers", "peft", "matplotlib", "accelerate", "PIL"}
        print(sorted(heavy & set(sys.modules)))
        print(threading.active_count())
        print(before is None or len(os.listdir("/proc/self/task")) - before)
    """)
    loaded, python_threads, threads = out.split("\n")[:3]
    assert loaded == "[]"
    assert python_threads == "1"
    assert threads in ("0", "True")


def test_the_compiled_library_is_there():
    # Otherwise most tests would compare the reference with itself.
    assert ops.compiled(), ops.MISSING


@pytest.mark.parametrize("name", ["generic", "avx2", "avx512", "nonsense"])
def test_the_instruction_set_can_be_lowered_from_the_environment(name):
    order = ["generic", "avx2", "avx512"]
    best = ops._C.best_isa()
    reachable = name in order[: order.index(best) + 1]
    got = run("from reality_stone import ops; print(ops.isa())", REALITY_STONE_ISA=name).strip()
    assert got == (name if reachable else best)


def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="isa must be generic, avx2 or avx512"), ops.use_isa("mmx"):
        pass
    with (
        pytest.raises(ValueError, match="accuracy must be 'auto', 'exact' or 'int8'"),
        ops.accuracy("best"),
    ):
        pass


def test_settings_of_the_library_come_back_after_an_error():
    before = ops.isa()
    with pytest.raises(KeyError), ops.use_isa("generic"), ops.accuracy("exact"):
        raise KeyError
    assert ops.isa() == before
    assert ops._C.accuracy() == "auto"


def test_accuracies_nest_and_each_comes_back():
    for outer in ops.ACCURACIES:
        with ops.accuracy(outer):
            for inner in ops.ACCURACIES:
                with ops.accuracy(inner):
                    assert ops._C.accuracy() == inner
                assert ops._C.accuracy() == outer
    assert ops._C.accuracy() == "auto"


def test_every_codec_works_without_the_compiled_library_after_one_notice():
    out = run("""
        import sys, warnings
        sys.modules["reality_stone._C"] = None
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            import reality_stone as rs
        print("notices", [str(w.message)[:50] for w in seen if "reality_stone" in str(w.message)])
        import torch
        from reality_stone import ops
        from reality_stone.nn import RBELinear
        assert not ops.compiled() and ops.isa() == "reference" and ops.build_info() == {}
        torch.manual_seed(0)
        for name in rs.codecs():
            codec = rs.codec(name)
            weight = torch.randn(16, 16)
            packed = codec.encode(weight)
            packed.check()
            w = packed.decode()
            assert (w - weight).norm() < weight.norm(), name
            layer = RBELinear.from_packed(packed, torch.zeros(16))
            x = torch.randn(2, 3, 16, requires_grad=True)
            y = layer(x)
            assert torch.allclose(y, x @ w.t(), atol=1e-4), name
            y.sum().backward()
            assert torch.allclose(x.grad, torch.ones(2, 3, 16) @ w, atol=1e-4), name
            for p in layer.parameters():
                assert p.grad is not None and p.grad.isfinite().all(), name
            with ops.accuracy("exact"), ops.progress(print):
                assert layer(torch.zeros(0, 16)).shape == (0, 16)
            for shape in [(0, 16), (16, 0)]:
                empty = RBELinear.from_packed(codec.encode(torch.zeros(shape)))
                x = torch.ones(2, shape[1], requires_grad=True)
                y = empty(x)
                assert y.shape == (2, shape[0]) and not y.any()
                y.sum().backward()
            for bad in (torch.zeros(2, 3, 4), torch.full((16, 16), float("nan"))):
                try:
                    codec.encode(bad)
                except ValueError:
                    continue
                raise AssertionError(name)
            try:
                packed.linear(torch.zeros(2, 15))
            except ValueError:
                pass
            else:
                raise AssertionError(name)
            print("works", name)
    """)
    lines = out.splitlines()
    assert lines[0].startswith("notices ['reality_stone: the compiled library is not there")
    assert lines[0].count("reality_stone") == 1
    assert [
        line.split()[1] for line in lines[1:] if line.startswith("works")
    ] == reality_stone.codecs()
