"""The project's own rules: import direction, private names in one module, nothing swallowed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRIVATE_NAMES = [
    ROOT / "lowering" / f"torch_private{part}.py" for part in ("", "_breaks", "_caches", "_choices", "_codegen")
]


def modules(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted(node: ast.AST) -> str:
    """``torch.ops.aten`` of an attribute chain; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def test_import_direction() -> None:
    """lncompile → passes → lowering, and passes knows lowering by its face only."""
    for path in modules("passes", "lowering"):
        for name in imports(ast.parse(path.read_text())):
            if not name.startswith("lncompile"):
                continue
            assert name.startswith(("lncompile.passes", "lncompile.lowering")), f"{path.name} imports {name}"
            if path.is_relative_to(ROOT / "lowering"):
                assert not name.startswith("lncompile.passes"), f"{path.name} imports {name}"
            else:
                face = name.removeprefix("lncompile.lowering").strip(".")
                assert name.startswith("lncompile.passes") or "." not in face, f"{path.name} imports {name}"


@pytest.mark.parametrize(
    "path", [p for p in modules("lncompile", "passes", "lowering") if p not in PRIVATE_NAMES], ids=str
)
def test_private_torch_names_stand_in_their_modules(path: Path) -> None:
    tree = ast.parse(path.read_text())
    private = [name for name in imports(tree) if name.startswith("torch") and "._" in name]
    for node in ast.walk(tree):
        name = dotted(node) if isinstance(node, ast.Attribute) else ""
        if name.split(".")[0] in ("torch", "aten", "functional") and "._" in name.replace(".__", "."):
            private.append(name)
    assert not private


@pytest.mark.parametrize("path", modules("lncompile", "passes", "lowering", "examples"), ids=str)
def test_modules_can_be_read_in_a_sitting(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 600
    assert ast.get_docstring(ast.parse(text)), "every module says what it is for"


@pytest.mark.parametrize("path", modules("lncompile", "passes", "lowering", "examples"), ids=str)
def test_no_silent_except(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or dotted(node.type) in ("Exception", "BaseException")
            empty = all(isinstance(statement, ast.Pass) for statement in node.body)
            named = any(isinstance(n, ast.Name) and n.id == node.name for s in node.body for n in ast.walk(s))
            raised = any(isinstance(n, ast.Raise) for s in node.body for n in ast.walk(s))
            assert not empty
            assert not broad or named or raised, f"{path.name}:{node.lineno} swallows what it catches"
