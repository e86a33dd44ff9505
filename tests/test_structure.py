"""The project's own rules: import direction, private names in their modules, lengths of files, nothing swallowed."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import networkx

ROOT = Path(__file__).parent.parent
PRIVATE_NAMES = sorted((ROOT / "lowering").rglob("torch_private*.py"))
#: The rooms, each of which imports what stands before it, and nothing behind it.
ROOMS = (
    "lncompile.lowering",
    "lncompile.lowering.inspect",
    "lncompile.passes.switches",
    "lncompile.options",
    "lncompile.passes.decisions",
    "lncompile.passes.graph",
    "lncompile.passes.norms",
    "lncompile.passes.rules",
    "lncompile.passes.placement",
    "lncompile.passes.rewrites",
    "lncompile.passes.verdicts",
    "lncompile.passes.pipeline",
    "lncompile.reporting",
    "lncompile.runtime",
    "lncompile",
    "lncompile.engines",
)


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


def module_name(path: Path) -> str:
    """The name that a file is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts if parts[0] == "lncompile" else ("lncompile", *parts))
    return name.removesuffix(".__init__")


def room_of(module: str) -> int:
    """Where the room of a module stands among the rooms: the last name that fits is the longest."""
    rooms = [room for room in ROOMS if f"{module}.".startswith(f"{room}.")]
    return ROOMS.index(max(rooms, key=len))


class _WithoutWhatRunsLater(ast.NodeTransformer):
    """Takes out what an import does not run: the bodies of functions, and what is for type checkers."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        return None

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        return None

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if "TYPE_CHECKING" in ast.dump(node.test) else self.generic_visit(node)


MODULES = {module_name(path): path for path in modules("lncompile", "passes", "lowering")}


def modules_imported(module: str, when_imported: bool = False) -> set[str]:
    """The modules of the project that a module imports: anywhere, or while it is itself imported."""
    tree = ast.parse(MODULES[module].read_text())
    if when_imported:
        _WithoutWhatRunsLater().visit(tree)
    names = {name for name in imports(tree) if name in MODULES}
    # ``from package import module`` names the package too, which is there already.
    return {name for name in names if not any(other.startswith(f"{name}.") for other in names)}


def test_rooms_import_in_one_direction() -> None:
    for module in MODULES:
        for name in modules_imported(module):
            assert room_of(name) <= room_of(module), f"{module} imports {name}, which stands behind it"


def test_no_room_is_empty() -> None:
    assert {room_of(module) for module in MODULES} == set(range(len(ROOMS)))


def test_no_circles() -> None:
    graph = networkx.DiGraph(
        (module, name) for module in MODULES for name in modules_imported(module, when_imported=True)
    )
    assert graph.number_of_edges() > 500
    circles = [sorted(group) for group in networkx.strongly_connected_components(graph) if len(group) > 1]
    assert not circles


def test_passes_know_lowering_by_its_face() -> None:
    for module in MODULES:
        if module.startswith("lncompile.passes"):
            for name in imports(ast.parse(MODULES[module].read_text())):
                face = name.removeprefix("lncompile.lowering").strip(".")
                assert not name.startswith("lncompile.lowering") or "." not in face, f"{module} imports {name}"


def test_every_package_is_installed() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {module_name(path) for path in MODULES.values() if path.name == "__init__.py"}
    assert set(packages) == folders


def test_private_torch_names_stand_in_their_modules() -> None:
    paths = [path for path in modules("lncompile", "passes", "lowering") if path not in PRIVATE_NAMES]
    assert not {path.name: names for path in paths if (names := _private_torch_names(path))}
    # The control: the modules that may have them have them.
    assert all(_private_torch_names(path) for path in PRIVATE_NAMES)


def _private_torch_names(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    private = [name for name in imports(tree) if name.startswith("torch") and "._" in name]
    for node in ast.walk(tree):
        name = dotted(node) if isinstance(node, ast.Attribute) else ""
        if name.split(".")[0] in ("torch", "aten", "functional") and "._" in name.replace(".__", "."):
            private.append(name)
    return private


def test_modules_can_be_read_in_a_sitting() -> None:
    assert not _longer_than(400, modules("lncompile", "passes", "lowering", "benchmarks", "examples"))
    assert not _longer_than(400, modules("tests"))


def _longer_than(limit: int, paths: list[Path]) -> dict[str, int]:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    return {name: length for name, length in lengths.items() if length > limit}


def test_every_module_says_what_it_is_for() -> None:
    paths = modules("lncompile", "passes", "lowering", "examples", "tests")
    assert not [path for path in paths if not ast.get_docstring(ast.parse(path.read_text()))]


def test_no_silent_except() -> None:
    for path in modules("lncompile", "passes", "lowering", "examples"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                broad = node.type is None or dotted(node.type) in ("Exception", "BaseException")
                empty = all(isinstance(statement, ast.Pass) for statement in node.body)
                named = any(isinstance(n, ast.Name) and n.id == node.name for s in node.body for n in ast.walk(s))
                raised = any(isinstance(n, ast.Raise) for s in node.body for n in ast.walk(s))
                assert not empty, f"{path.name}:{node.lineno} catches and does nothing"
                assert not broad or named or raised, f"{path.name}:{node.lineno} swallows what it catches"
