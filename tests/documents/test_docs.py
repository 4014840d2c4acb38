"""The documents say what is there: code that runs, commands and flags that exist, files that are listed."""

import argparse
import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from model_store.library import open_library
from model_store.pages import END
from model_store.structures import STRUCTURES, StructureName
from tombola.cli import Parser, parser
from tools.document_tree import PACKAGES, with_tree
from tools.reference import page
from training.cost import GPU_SPEED, cost
from training.export import PRINTED, mark, table
from training.recipes import DENSITIES, PRESETS

ROOT = Path(__file__).parents[2]
PROGRAM = re.compile(r"(?:^|[ /])tombola (?=[a-z-])")
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
TRAINING = (ROOT / "docs" / "TRAINING.md").read_text(encoding="utf-8")
PROSE = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
PAGES = [page for page in ROOT.rglob("*.md") if not {".venv", "node_modules"} & set(page.parts)]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Every command of a shell block of any page that runs one of our programs; a backslash joins two lines to one."""
    lines = [
        line
        for page in PAGES
        for block in blocks(page.read_text(encoding="utf-8"), "sh")
        for line in block.replace("\\\n", " ").split("\n")
    ]
    return [line for line in lines if re.search(PROGRAM, line)]


@pytest.mark.parametrize("code", blocks(README, "python"))
def test_the_readme_s_python_runs(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102


@pytest.mark.parametrize("line", commands())
def test_every_command_in_a_page_is_one_that_its_program_takes(line: str) -> None:
    words = shlex.split(line, comments=True)
    start = next(index for index, word in enumerate(words) if word.split("/")[-1] == "tombola")
    try:
        parser().parse_args(words[start + 1 :])
    except SystemExit as ended:
        pytest.fail(f"{line}: refused with exit code {ended.code}")


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE))))
def test_every_make_target_of_the_readme_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_tree_is_that_of_the_modules() -> None:
    """Rebuilt by `python -m tools.document_tree`."""
    page = ARCHITECTURE
    assert with_tree(page) == page


def test_every_module_says_in_a_docstring_what_it_is() -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if path.read_bytes()]
    silent = [str(path) for path in files if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert not silent


def test_the_files_that_the_architecture_names_exist() -> None:
    page = ARCHITECTURE.split("## The tree")[0]
    names = re.findall(r"`((?:model_store|training|service|tombola|deploy|docs)/[\w./-]+)`", page)
    assert len(names) > 30
    assert not [name for name in names if not (ROOT / name).exists()]


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1400


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_of_documents_are_short(page: Path) -> None:
    """But for tables, code, and sections that a command writes."""
    text = re.sub(r"^<!-- .*?^<!-- end[^\n]*", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    assert not [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]


@pytest.mark.parametrize("library", [None, Path("model_store/library-scratch")])
def test_the_tables_of_claims_are_the_libraries_own(library: Path | None) -> None:
    shown = RESULTS.split(mark(library))[1].split(END)[0].strip()
    assert shown == table(open_library(library and ROOT / library)).strip()


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_cost_of_the_paper_s_preset_is_the_counted_one(name: StructureName) -> None:
    recipes = [PRESETS["paper"].recipe(name, density, 49_000) for density in DENSITIES]
    flops = sum(cost(recipe) for recipe in recipes)
    width = PRESETS["paper"].widths[name]
    assert f"| {PRINTED[name]} | {width} | {flops / 1e15:,.0f} | {flops / GPU_SPEED / 3600:.0f} |" in TRAINING


def every_parser(parser: Parser) -> Iterator[Parser]:
    """The parser and those of its commands, and of theirs, with all their options."""
    yield parser.load()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from every_parser(child)


def test_every_command_and_every_option_explains_itself() -> None:
    for each in every_parser(parser()):
        assert each.description, each.prog
        silent = [a.dest for a in each._actions if not a.help and not isinstance(a, argparse._SubParsersAction)]
        assert not silent, f"{each.prog}: {silent}"


def test_the_reference_is_what_the_code_says() -> None:
    """Every setting, flag, metric and route; rebuilt by `python -m tools.reference > docs/REFERENCE.md`."""
    assert (ROOT / "docs" / "REFERENCE.md").read_text(encoding="utf-8").strip() == page().strip()


def rows_of_places() -> list[str]:
    section = ARCHITECTURE.split("## To change X, edit Y")[1].split("## The tree")[0]
    return [line for line in section.splitlines() if line.startswith("| ") and not line.startswith(("| to", "| ---"))]


@pytest.mark.parametrize("row", rows_of_places(), ids=lambda row: row.split(" | ")[0].removeprefix("| "))
def test_every_place_to_edit_is_there_and_has_the_names_that_are_said(row: str) -> None:
    words = re.findall(r"`([^`]+)`", row.split(" | ", 1)[1])
    places = [ROOT / word for word in words if "/" in word and " " not in word]
    assert places
    assert not [place for place in places if not place.exists()]
    files = [file for place in places for file in ([place] if place.is_file() else place.rglob("*")) if file.is_file()]
    text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    names = [word for word in words if "/" not in word and " " not in word]
    assert not [name for name in names if not re.search(rf"\b{re.escape(name)}\b", text)]
