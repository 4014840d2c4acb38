"""What `import tombola` gives: named, typed, explained, and quick."""

import ast
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import tombola

EXPORTS = dir(tombola)
FUNCTIONS = [name for name in EXPORTS if inspect.isfunction(getattr(tombola, name))]


def test_all_is_what_is_exported_and_what_type_checkers_see() -> None:
    tree = ast.parse(Path(str(tombola.__file__)).with_suffix(".pyi").read_text(encoding="utf-8"))
    aliases = [alias for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert [alias.asname for alias in aliases] == [alias.name for alias in aliases]  # else checkers see no export
    assert EXPORTS == sorted(alias.name for alias in aliases) == import_module("tombola").__all__
    assert {"Client", "Library", "Ticket", "audit", "open_library"} <= {*EXPORTS}
    assert not hasattr(tombola, "torch")


@pytest.mark.parametrize("name", EXPORTS)
def test_every_export_is_there_and_explains_itself(name: str) -> None:
    assert inspect.getdoc(getattr(tombola, name))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_exported_function_has_types_arguments_and_result_explained(name: str) -> None:
    function = getattr(tombola, name)
    text, signature = inspect.getdoc(function), inspect.signature(function)
    assert text is not None
    assert "\n\nReturns:\n" in text
    explained = text.split("\n\nArgs:\n")[1].split("\n\n")[0]
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty
        assert f"  {parameter.name}: " in f"\n{explained}", parameter.name


def test_importing_tombola_imports_nothing_heavy() -> None:
    script = "import sys, tombola; print(*{'torch', 'numpy', 'pydantic', 'fastapi'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout == "\n"


@pytest.mark.parametrize("package", ["model_store", "service", "tombola", "training"])
def test_every_package_says_that_it_is_typed(package: str) -> None:
    assert (Path(str(tombola.__file__)).parents[1] / package / "py.typed").exists()
