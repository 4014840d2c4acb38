"""`python -m tools.document_tree`: writes docs/ARCHITECTURE.md's tree of modules, from their docstrings."""

import ast
from pathlib import Path
from typing import Final

from model_store.pages import replace_section, with_section

ROOT: Final = Path(__file__).parent.parent
PAGE: Final = ROOT / "docs" / "ARCHITECTURE.md"
MARKS: Final = ("<!-- tree: python -m tools.document_tree -->", "<!-- end of tree -->")
PACKAGES: Final = ("tombola", "model_store", "training", "service")
WIDTH: Final = 116


def tree() -> str:
    """Every package with its modules, folders after files, each with the first sentence of its docstring."""
    return "\n\n".join(section(ROOT / package) for package in PACKAGES if (ROOT / package).is_dir())


def section(package: Path) -> str:
    return "\n".join(["```", *lines(package, 0), "```"])


def lines(folder: Path, depth: int) -> list[str]:
    files = sorted(path for path in folder.glob("*.py") if path.name not in ("__init__.py", "__main__.py"))
    folders = sorted(path.parent for path in folder.glob("*/__init__.py"))
    rows = [row(f"{folder.name}/", folder / "__init__.py", depth)]
    rows += [row(path.name, path, depth + 1) for path in files]
    return rows + [line for path in folders for line in lines(path, depth + 1)]


def row(name: str, module: Path, depth: int) -> str:
    text = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    sentence = " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".")
    start = "  " * depth + name
    full = f"{start:<28} {sentence}".rstrip()
    return full if len(full) <= WIDTH else full[: WIDTH - 1].rsplit(" ", 1)[0] + " …"


def with_tree(page: str) -> str:
    return with_section(page, MARKS, f"\n{tree()}\n")


if __name__ == "__main__":
    replace_section(PAGE, MARKS, f"\n{tree()}\n")
