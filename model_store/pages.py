"""Marked sections of Markdown pages: what a command writes between two HTML comments."""

from pathlib import Path
from typing import Final

from model_store.errors import PageRejected
from model_store.files import write_atomically

END: Final = "<!-- end -->"
Marks = tuple[str, str]
"""The lines before and after a section. The first names the command that writes it."""


def replace_section(page: Path, marks: Marks, text: str) -> None:
    """Puts text between the marks of a page. Raises PageRejected if they are not there."""
    try:
        write_atomically(page, with_section(page.read_text(encoding="utf-8"), marks, text))
    except PageRejected as error:
        raise PageRejected(f"{page}: {error}") from None


def with_section(whole: str, marks: Marks, text: str) -> str:
    """A page's text with another section. Raises PageRejected if the marks are not there."""
    before, begin, rest = whole.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise PageRejected(f"no section to replace; expected {marks[0]} and after it {marks[1]}")
    return f"{before}{begin}\n{text}\n{end}{after}"
