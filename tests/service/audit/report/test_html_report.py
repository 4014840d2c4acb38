"""The page: two verdicts kept apart, figures first, everything reachable by a link."""

import re

import pytest

from service.audit.report.html_report import anchor, group_by_system, render
from service.audit.report.model import Report
from service.audit.report.plots import all_figures, spread_apart
from service.audit.report.verdicts import judge_measurement, judge_result
from tests.service.audit.report.conftest import changed, with_robust


@pytest.fixture(scope="module")
def page(published: Report) -> str:
    return render(published, all_figures(published), [], 0.2)


def test_three_numbers_and_two_verdicts_come_first(published: Report, page: str) -> None:
    head = page[: page.index("<nav")]
    figures = [f"{100 * each.value:.1f}" for each in (published.clean, published.robust, published.ten_tries)]
    places = [head.index(text) for text in (*figures, "Measurement: valid", "Result: above the floor")]
    assert places == sorted(places)


def test_every_link_of_the_contents_leads_somewhere(page: str) -> None:
    targets = set(re.findall(r' id="([^"]+)"', page))
    links = re.findall(r'href="#([^"]+)"', page)
    assert set(links) <= targets
    contents = re.findall(r'href="#([^"]+)"', page[page.index("<nav") :])
    assert anchor("What randomness is worth") == contents[0]
    assert contents.count(contents[0]) == 2  # from the contents, and from its heading


def test_every_table_scrolls_for_itself(page: str) -> None:
    assert page.count("<table>") == page.count('class="scroll') > 10
    assert 'name="viewport" content="width=device-width' in page


def test_figures_take_the_page_s_colour(page: str) -> None:
    assert "currentColor" in page
    assert "#1b2126" not in page


def test_a_figure_on_its_own_has_a_ground(published: Report) -> None:
    """A README shows it on any colour."""
    figure = all_figures(published, themed=False)["Accuracy against epsilon"]
    assert "currentColor" not in figure
    assert "#ffffff" in figure


def test_attacks_are_grouped_by_what_they_attack(published: Report) -> None:
    groups = group_by_system(published.attacks)
    assert groups[0].system == "tombola"
    assert sum(len(group.attacks) for group in groups) == len(published.attacks)
    assert len({group.system for group in groups}) == len(groups)


def test_the_two_verdicts_do_not_depend_on_each_other() -> None:
    valid, doubtful = with_robust(0.3, 0.26, 0.34), with_robust(0.3, 0.26, 0.34, verdict="warnings", warned=[3])
    words = {floor: judge_result(valid, floor).word for floor in (None, 0.25, 0.3, 0.4)}
    assert words == {
        None: "no floor set",
        0.25: "above the floor",
        0.3: "not shown to reach the floor",
        0.4: "below the floor",
    }
    assert {floor: judge_result(doubtful, floor).word for floor in words} == words
    assert judge_measurement(valid).word == "valid"
    assert judge_measurement(doubtful).word == "valid with warnings"


def test_an_invalid_audit_shows_no_figure(published: Report) -> None:
    invalid = render(changed(verdict="invalid", failed=[5]), {}, [], 0.2)
    head = invalid[: invalid.index("<nav")]
    assert "Not a measurement" in head
    assert f"{100 * published.robust.value:.1f}" not in invalid
    assert "Hard checks failed: 5" in head


def test_the_worth_of_secrecy_is_shown_where_it_was_measured(published: Report) -> None:
    difference = {"difference": {"value": 0.013, "low": 0.005, "high": 0.022}}
    measured, unmeasured = ({**published.as_json(), "secrecy": each} for each in (difference, None))
    assert "+1.3 <small>[+0.5, +2.2]" in render(Report.model_validate(measured), {}, [])
    assert "with theta secret less with theta known" not in render(Report.model_validate(unmeasured), {}, [])


def test_labels_are_moved_apart_and_no_further() -> None:
    assert spread_apart([1.0, 5.0], 1.0, 0.0) == [1.0, 5.0]
    assert spread_apart([5.0, 5.0, 5.0], 1.0, 0.0) == [4.0, 5.0, 6.0]
    assert spread_apart([0.0, 0.0], 2.0, 0.0) == [0.0, 2.0]
    assert spread_apart([], 1.0, 0.0) == []
