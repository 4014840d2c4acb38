"""No program knows the size of a picture: it reads it from the library. CIFAR-10's stands in one place."""

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
PACKAGES: Final = ("model_store", "training", "service", "tombola", "tools", "benchmarks")
SIDE: Final = 32
NUMEL: Final = 3072
SIZED: Final = re.compile(r"size|side|shape|height|width|pixels", re.IGNORECASE)
ALLOWED: Final = {  # file: why each of its sizes may be a number
    "model_store/input_spec.py": {"CIFAR10_INPUT": "the input of libraries of format 1 and of CIFAR-10"},
    "tools/wild/data_sets.py": {"SIDE": "arrays for tests of the readers, made like CIFAR's"},
    "training/recipes.py": {"widths": "channels of a network's first stage"},
    "service/settings.py": {"max_batch_size": "a number of images"},
    "service/observability/metrics.py": {"SIZES": "numbers of images of a batch"},
}


def number(node: ast.AST) -> object:
    return node.value if isinstance(node, ast.Constant) else None


def sizes(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Where a number is a picture's size by its form, with the name that it is given to."""
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=int(whole)) if whole == NUMEL:
                yield node.lineno, "numel"
            case ast.Tuple(elts=several) | ast.List(elts=several) | ast.Call(args=several):
                values = [number(each) for each in several]
                if any(pair == (SIDE, SIDE) for pair in itertools.pairwise(values)):
                    yield node.lineno, "pair"
            case ast.BinOp(op=ast.Mult()) if [number(each) for each in ast.walk(node)].count(SIDE) > 1:
                yield node.lineno, "product"
    for name, value in assignments(tree):
        if SIZED.search(name) and any(number(each) == SIDE for each in ast.walk(value)):
            yield value.lineno, name


def assignments(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Names with the values that they are given: variables, defaults, arguments, and what they are compared with."""
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[target], value=value) | ast.AnnAssign(target=target, value=ast.expr() as value):
                yield ast.unparse(target), value
            case ast.keyword(arg=str(name), value=value):
                yield name, value
            case ast.arguments():
                positional = [*node.posonlyargs, *node.args]
                yield from zip([a.arg for a in positional[::-1]], node.defaults[::-1], strict=False)
                yield from ((a.arg, d) for a, d in zip(node.kwonlyargs, node.kw_defaults, strict=True) if d)
            case ast.Compare(left=left, comparators=[right]):
                yield from ((ast.unparse(left), right), (ast.unparse(right), left))
            case ast.Dict(keys=keys, values=values):
                yield from ((str(number(key)), value) for key, value in zip(keys, values, strict=True) if key)


def owners(tree: ast.Module) -> dict[int, str]:
    """Of each line the module-level name whose value it is part of."""
    return {
        line: ast.unparse(target)
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }


def unexplained(path: str, text: str) -> list[str]:
    if str(SIDE) not in text and str(NUMEL) not in text:
        return []
    tree = ast.parse(text)
    owner, allowed = owners(tree), ALLOWED.get(path, {})
    return sorted({f"{path}:{line}" for line, name in sizes(tree) if not {owner.get(line), name} & set(allowed)})


def test_no_program_writes_the_size_of_a_picture_as_a_number() -> None:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 200
    texts = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in files}
    assert [line for path, text in texts.items() for line in unexplained(path, text)] == []
    assert set(ALLOWED) <= set(texts)


@pytest.mark.parametrize(
    "line",
    [
        "shape = (3, 32, 32)",
        "def f(size: tuple[int, int] = (32, 32)) -> None: ...",
        "x.reshape(-1, 3, 32, 32)",
        "n = 3 * 32 * 32",
        "pixels = data[:3072]",
        "height = 32",
        "open_it(width=32)",
        "if image.shape[2] != 32: ...",
        "small = image.resize((32, 32))",
        "spec = InputSpec(32, 32, MEAN, STD)",
        "tensor = {'shape': [1, 3, 32, 64]}",
    ],
)
def test_the_rule_sees_each_form(line: str) -> None:
    assert unexplained("service/anything.py", line) == ["service/anything.py:1"]
    assert unexplained("service/anything.py", line.replace("3072", "3000").replace("32", "side")) == []
