"""Words that name nothing: a reader who knows the field would not guess what they stand for."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from service.observability.metrics import TABLE
from service.settings import setting_docs

ROOT: Final = Path(__file__).parents[1]
WORDS: Final = "found asked said told held here plain finished knob lab bench crowd patient holder front gate crew feed"
BANNED: Final = frozenset(WORDS.split())
PYTHON: Final = ("model_store", "training", "service", "tombola", "tests", "tools", "benchmarks")
CONSOLE: Final = ROOT / "service" / "admin" / "console"
VENDORED: Final = "uPlot.esm.js"
# Compounds that the field, a protocol or another package has.
ALLOWED: Final = {
    "not_found": "404, and gRPC's status",
    "held_out": "images that no search saw",
    "finished_at": "a time that audits on disk have",
    "gate": "the command `tombola gate`",
    "get_finished_spans": "OpenTelemetry",
    "feed_data": "httptools",
}
DECLARED: Final = re.compile(r"\b(?:const|let|var|function|class)\s+(\w+)|(\w+)\s*=>")
PARAMETERS: Final = re.compile(r"function\s*\w*\(([^()]*)\)|\(([^()]*)\)\s*=>|\b(?:const|let|var)\s+([\[{][^=]*)=")


@cache
def banned(name: str) -> bool:
    """Whether one of a name's words is banned, in snake_case or CamelCase, and the whole is no allowed compound."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_")
    if snake in BANNED:
        return True
    for compound in ALLOWED:
        snake = re.sub(rf"(?<![a-z]){compound}(?![a-z])", "", snake)
    return not BANNED.isdisjoint(snake.split("_"))


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Each identifier that a file uses, with its line. Tests' own names are sentences, and left out."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                if not name.startswith("test_"):
                    yield node.lineno, name
            case ast.keyword(arg=str(name)):
                yield node.value.lineno, name
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield node.lineno, name
            case ast.Global(names=several) | ast.Nonlocal(names=several):
                yield from ((node.lineno, name) for name in several)
            case ast.alias():
                yield node.lineno, node.asname or node.name.rpartition(".")[2]


def declared(script: str) -> set[str]:
    """The variables, functions and parameters of JavaScript; of `{a: b}` the b, since a is the server's."""
    code = re.sub(r"^\s*//.*|\s//.*", "", script, flags=re.MULTILINE)
    simple = {name for pair in DECLARED.findall(code) for name in pair if name}
    lists = [part for parts in PARAMETERS.findall(code) for part in parts if part]
    return simple | {name for part in lists for name in re.findall(r"\b[A-Za-z_]\w*\b(?!\s*:)", part)}


def test_no_identifier_of_the_project_is_a_banned_word() -> None:
    files = [path for folder in PYTHON for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 300
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in files
        for line, name in names(ast.parse(path.read_text("utf-8")))
        if banned(name)
    ]
    assert not wrong


def test_no_name_of_the_console_is_a_banned_word() -> None:
    scripts = {path.name: declared(path.read_text("utf-8")) for path in sorted(CONSOLE.glob("*.js"))}
    del scripts[VENDORED]
    assert {"Refused", "post"} <= scripts["api.js"]
    assert not [f"{script}: {name}" for script, there in scripts.items() for name in there if banned(name)]


def test_no_setting_metric_or_label_is_a_banned_word() -> None:
    public = [row.name for row in setting_docs()]
    for row in TABLE:
        public += [row.name, *(word for label, values in row.labels for word in (label, *(values or ())))]
    assert len(public) > 100
    assert not [name for name in public if banned(name)]


# The rule's own tests: it must see every kind of identifier


@pytest.mark.parametrize(
    "source",
    [
        "held = 1",
        "def f(told): ...",
        "def finished(): ...",
        "class Holder: ...",
        "class OldHolder: ...",
        "self.asked",
        "f(here=1)",
        "import a as plain",
        "from a import front",
        "try: ...\nexcept OSError as found: ...",
        "match x:\n    case [*said]: ...",
        "def f():\n    nonlocal lab",
        "f'{crew}'",
        "plain_loop = 1",
    ],
)
def test_every_kind_of_python_identifier_is_seen(source: str) -> None:
    assert any(banned(name) for _, name in names(ast.parse(source)))


@pytest.mark.parametrize("name", ["NotFound", "held_out_places", "HELD_OUT_SHARE", "run_gate", "labels", "explain"])
def test_compounds_of_the_field_are_no_banned_words(name: str) -> None:
    assert not banned(name)


@pytest.mark.parametrize(
    "source",
    [
        "const told = (error) => error;",
        "function offer(found) {}",
        "rows.map(([name, found]) => name)",
        "rows.map(said => said.length)",
        "const { datasets: found } = await get();",
        "let a = 1;\nlet asked = 0; // one",
    ],
)
def test_every_kind_of_javascript_declaration_is_seen(source: str) -> None:
    assert any(banned(name) for name in declared(source))


def test_fields_of_the_server_s_answers_keep_their_names() -> None:
    assert not any(banned(name) for name in declared("const { started, finished: end } = await get(); // found"))
