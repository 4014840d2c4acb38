"""What `import tombola` gives: named, typed, explained, and quick."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import tombola

FUNCTIONS = [name for name in tombola.__all__ if inspect.isfunction(getattr(tombola, name))]


def test_all_is_what_is_exported_and_what_type_checkers_see() -> None:
    tree = ast.parse(Path(str(tombola.__file__)).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    checked = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    lazy = [name for names in tombola.MODULES.values() for name in names]
    assert tombola.__all__ == sorted(lazy) == sorted(checked) == dir(tombola)
    assert not hasattr(tombola, "torch")


@pytest.mark.parametrize("name", tombola.__all__)
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
