"""The import rules: tombola -> training | service -> model_store, one way only; and a ladder inside each package."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
PACKAGES: Final = ("model_store", "training", "service", "tombola")
ALLOWED: Final = {
    "model_store": set(),
    "training": {"model_store"},
    "service": {"model_store"},
    "tombola": {"model_store", "training", "service"},
}
# The service's folders and single modules, floor by floor: each may import its own floor and those below it.
FLOORS: Final = (
    ("settings", "errors", "cpu", "outbound"),
    ("registry_auth",),
    ("oci_registry",),
    ("observability", "library_source"),
    ("engine",),
    ("scheduling",),
    ("library_manager",),
    ("web",),
    ("grpc", "http_processes"),
    ("audit",),
    ("admin",),
    ("benchmarks",),
    ("app", "lifecycle", "ray_serve"),
)
# model_store's files from the top of the ladder down: each may import only files before it.
LADDER: Final = (
    "errors",
    "json_object",
    "input_spec",
    "png",
    "colour",
    "images",
    "files",
    "pages",
    "code_version",
    "quiet_imports",
    "arithmetic",
    "processor",
    "data_layout",
    "data_files",
    "labelled_images",
    "held_out",
    "image_sample",
    "structures",
    "ticket",
    "manifest",
    "policy",
    "library",
    "library_diff",
    "ensemble",
    "attacks",
)


@cache
def modules(package: str) -> dict[str, ast.Module]:
    """Every Python file of a package by its dotted name, parsed but not run."""
    files = sorted((ROOT / package).rglob("*.py"))
    return {dotted(file): ast.parse(file.read_text(encoding="utf-8"), str(file)) for file in files}


def dotted(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(module: str, tree: ast.Module, names: frozenset[str]) -> set[str]:
    """The modules of `names` that a file imports anywhere in it, in functions and behind TYPE_CHECKING too."""
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {nearest(alias.name, names) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*anchor(module, node.level), *filter(None, [node.module])])
            imported |= {nearest(f"{base}.{alias.name}", names) for alias in node.names}
    return imported - {"", module}


def anchor(module: str, level: int) -> list[str]:
    """Where a relative import starts: `level` dots up from the file."""
    if level == 0:
        return []
    file = ROOT / Path(*module.split("."))
    parts = module.split(".") if file.is_dir() else module.split(".")[:-1]
    return parts[: len(parts) - level + 1]


def nearest(name: str, names: frozenset[str]) -> str:
    """`a.b.c` -> the longest of a.b.c, a.b, a that is a module here, or its package's name, or nothing."""
    parts = name.split(".")
    candidates = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((candidate for candidate in candidates if candidate in names or candidate in PACKAGES), "")


def graph(package: str) -> dict[str, set[str]]:
    """Each file of a package with the files of the three packages that it imports."""
    trees = modules(package)
    names = frozenset(name for other in PACKAGES for name in modules(other))
    return {module: imports(module, tree, names) for module, tree in trees.items()}


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_in_one_direction_only(package: str) -> None:
    forbidden = set(PACKAGES) - ALLOWED[package] - {package}
    wrong = [
        f"{module} imports {other}"
        for module, others in graph(package).items()
        for other in others
        if other.split(".")[0] in forbidden
    ]
    assert not wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_inside_a_package_imports_form_a_ladder(package: str) -> None:
    inside = {module: {o for o in others if o.split(".")[0] == package} for module, others in graph(package).items()}
    try:
        order = tuple(TopologicalSorter(inside).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))
    assert set(order) >= set(inside)


def test_model_store_s_ladder_is_the_declared_one() -> None:
    inside = graph("model_store")
    assert set(inside) == {"model_store", *(f"model_store.{name}" for name in LADDER)}
    for place, name in enumerate(LADDER):
        assert inside[f"model_store.{name}"] <= {f"model_store.{above}" for above in LADDER[:place]}, name


def test_no_folder_of_the_service_imports_from_one_above_it() -> None:
    """FLOORS from the ground up; a module may import its own floor and those below."""
    floors = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    wrong = {
        (module, other)
        for module, others in graph("service").items()
        for other in others
        if floor_of(other, floors) > floor_of(module, floors)
    }
    assert not wrong


def test_every_module_of_the_service_has_a_floor() -> None:
    named = {name for names in FLOORS for name in names}
    assert {module.split(".")[1] for module in modules("service") if module != "service"} <= named


def floor_of(module: str, floors: dict[str, int]) -> int:
    """Of a module of the service; -1 for the package itself and for the other packages."""
    parts = module.split(".")
    return floors[parts[1]] if parts[0] == "service" and len(parts) > 1 else -1


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_unpickles(package: str) -> None:
    """No pickle, no torch.load, no allow_pickle: nothing that a file holds is ever run."""
    unsafe = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
    for module, tree in modules(package).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                roots = {alias.name.split(".")[0] for alias in node.names} | {
                    (getattr(node, "module", "") or "").split(".")[0]
                }
                assert not roots & unsafe, f"{module}:{node.lineno}"
            if isinstance(node, ast.Attribute) and node.attr == "load" and isinstance(node.value, ast.Name):
                assert node.value.id != "torch", f"{module}:{node.lineno}: torch.load"
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant), module
                assert node.value.value is False, module


# The rule's own tests: it must see every form of import


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import model_store.ticket", {"model_store.ticket"}),
        ("import model_store.ticket as t, os", {"model_store.ticket"}),
        ("from model_store import ticket, library", {"model_store.ticket", "model_store.library"}),
        ("from model_store.ticket import Ticket", {"model_store.ticket"}),
        ("from . import ticket", {"model_store.ticket"}),
        ("from .ticket import Ticket", {"model_store.ticket"}),
        ("def f():\n    from model_store.policy import Policy", {"model_store.policy"}),
        ("if TYPE_CHECKING:\n    from model_store.policy import Policy", {"model_store.policy"}),
        ("import training", {"training"}),
        ("from service.engine import torch", None),
        ("import torch, json\nfrom pathlib import Path", set()),
    ],
)
def test_every_form_of_import_is_seen(source: str, expected: set[str] | None) -> None:
    names = frozenset(f"model_store.{name}" for name in LADDER)
    imported = imports("model_store.attacks", ast.parse(source), names)
    assert imported == ({"service"} if expected is None else expected)
