from pathlib import Path

import pytest

from model_store.errors import PageRejected
from model_store.pages import END, replace_section, with_section

MARKS = ("<!-- a -->", END)


def test_only_what_stands_between_the_marks_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n<!-- a -->\nold\n{END}\nafter {END}\n")
    replace_section(page, MARKS, "new\n\\1")
    assert page.read_text("utf-8") == f"before\n<!-- a -->\nnew\n\\1\n{END}\nafter {END}\n"


@pytest.mark.parametrize("text", ["nothing\n", "<!-- a -->\n", f"{END}\n", f"{END}\n<!-- a -->\n"])
def test_a_page_without_the_section_s_place_is_refused_and_stays(text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(PageRejected, match=r"page\.md: no section to replace; expected <!-- a -->"):
        replace_section(page, MARKS, "table")
    assert page.read_text("utf-8") == text


def test_a_section_can_be_replaced_again() -> None:
    once = with_section(f"<!-- a -->\n{END}", MARKS, "text")
    assert with_section(once, MARKS, "text") == once
