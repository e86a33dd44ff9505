"""What `import lncompile` imports, and that every public name is what it says whatever was imported before."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import lncompile

PACKAGE = Path(lncompile.__file__).parent
ELSEWHERE = PACKAGE.parent.parent  # in the clone itself the folder is found in place of the installed package


def python(program: str) -> Any:
    """What a program prints as JSON, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ELSEWHERE)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def imported_by(statement: str, after: str = "pass") -> set[str]:
    """The modules that a statement imports."""
    listed = "sorted(set(sys.modules) - before)"
    program = f"import sys, json\n{after}\nbefore = set(sys.modules)\n{statement}\nprint(json.dumps({listed}))"
    return set(python(program))


def test_importing_the_package_imports_nothing_else() -> None:
    before = time.perf_counter()
    modules = imported_by("import lncompile", after="import torch")
    print(f"import torch, import lncompile: {time.perf_counter() - before:.2f} s")
    assert modules == {"lncompile"}
    assert not {name for name in imported_by("import lncompile") if name.split(".")[0] == "torch"}


def test_asking_what_folds_imports_no_statistics_and_no_command_line() -> None:
    """Of what is heavy only that which reports and graphs need."""
    heavy = {"scipy.stats", "transformers", "typer", "jinja2", "matplotlib", "prometheus_client", "lncompile.abtest"}
    assert not heavy & imported_by("import lncompile; lncompile.explain, lncompile.fold", after="import torch")


def test_the_public_module_is_there_without_an_import_of_its_own() -> None:
    """Asking for its norms imports torch and little else."""
    program = (
        "import torch, time, json, sys\nbefore = time.perf_counter()\nimport lncompile\nassert 'nn' in dir(lncompile)\n"
        "norm = lncompile.nn.RMSNorm(8)\nprint(json.dumps(time.perf_counter() - before))"
    )
    assert min(python(program) for _ in range(3)) < 0.5
    assert imported_by("import lncompile; lncompile.nn.RMSNorm", after="import torch") == {"lncompile", "lncompile.nn"}


def test_public_names_are_no_modules_whatever_is_imported_first() -> None:
    """A module of a package becomes an attribute of it as it is imported, in place of a function of that name."""
    modules = [
        f"lncompile.{'.'.join(path.relative_to(PACKAGE).with_suffix('').parts)}".removesuffix(".__init__")
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "__main__.py" and not path.parent.is_symlink()
        if not path.name.startswith("vllm_")  # these import vLLM, which is not here
    ]
    assert "lncompile.backend" in modules
    kinds = python(
        "import importlib, json, lncompile\n"
        "first = {name: id(getattr(lncompile, name)) for name in lncompile.__all__[::2]}\n"
        f"[importlib.import_module(name) for name in {modules}]\n"
        "assert all(id(getattr(lncompile, name)) == kept for name, kept in first.items())\n"
        "print(json.dumps({name: type(getattr(lncompile, name)).__name__ for name in lncompile.__all__}))"
    )
    assert "module" not in kinds.values()
    assert [name for name, kind in kinds.items() if kind == "function"] == [
        "allow_in_accelerate", "explain", "fold", "generated_code", "load_folded", "plan", "refresh", "reports",
        "verify",
    ]  # fmt: skip


def test_no_module_is_called_as_a_public_name() -> None:
    assert not {path.stem for path in PACKAGE.iterdir()} & set(lncompile.__all__)


def test_type_checkers_see_the_names_where_the_interpreter_finds_them() -> None:
    tree = ast.parse(Path(lncompile.__file__).read_text())
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    )
    seen = {
        str(statement.module): tuple(alias.name for alias in statement.names)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
    }
    assert seen == {f"lncompile.{module}": names for module, names in lncompile._MODULES.items()}
    assert sorted([*(name for names in seen.values() for name in names), "__version__"]) == sorted(lncompile.__all__)


def test_names_that_do_not_exist() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'explian'"):
        lncompile.explian  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError):
        from lncompile import nothing_of_the_kind  # type: ignore[attr-defined]  # noqa: F401
    assert set(lncompile.__all__) <= set(dir(lncompile))


@pytest.mark.parametrize("first", ["pass", "import lncompile; lncompile.explain"])
def test_torch_finds_the_backend_with_and_without_the_import(first: str) -> None:
    assert python(
        f"import json, torch\n{first}\n"
        "compiled = torch.compile(torch.nn.LayerNorm(4), backend='lnfold', options={'lnfold.assist': 'off'})\n"
        "import lncompile.explanation\n"
        "print(json.dumps(lncompile.explanation.settings_of(compiled)))"
    ) == {"options": {"lnfold.assist": "off"}}


@pytest.mark.parametrize("folder", [ELSEWHERE, PACKAGE.parent], ids=["elsewhere", "in the clone"])
def test_the_package_is_found_from_anywhere(folder: Path) -> None:
    """In a clone the folder ``lncompile`` is found before what is installed: the links in it lead to the rest."""
    program = (
        "import json, sys\n"
        "if sys.argv[1:]: sys.meta_path = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]\n"
        "import lncompile, lncompile.passes.rules, lncompile.lowering.inspect.generated_code as code\n"
        "print(json.dumps([lncompile.passes.rules.__name__, code.__name__]))\n"
    )
    in_the_clone = ["as if nothing were installed"] if folder == PACKAGE.parent else []
    done = subprocess.run(
        [sys.executable, "-c", program, *in_the_clone], capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["lncompile.passes.rules", "lncompile.lowering.inspect.generated_code"]
