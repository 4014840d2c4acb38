"""The report as one HTML page that needs nothing else: no script, no font, no request."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from service.audit.report.model import OURS, Attack, Report
from service.audit.report.plots import AMPLIFICATION, Example
from service.audit.report.verdicts import has_figures, headline, judge_measurement, judge_result, percent

CAPTIONS: Final = {
    "Accuracy against epsilon": "Each system under everything tried on it within epsilon. The images are the same all "
    "along, fewer than for the headline. The band is the 95 % interval of tombola's.",
    "Transfer between tickets": "Row: the ticket attacked. Column: the ticket that answers. The darker a square off "
    "the diagonal, the better the attack carries over, and the less a secret theta helps.",
    "Risk by step": "Attacks on tombola at the headline epsilon: the best so far, mean over the images. An attack "
    "whose curve still falls at its end was too short.",
    "Loss by step": "The same attacks' own losses, each on a scale of its own.",
    "Accuracy against queries": "Square sees probabilities, HopSkipJump labels. An attacker who averages q answers "
    "pays q queries for each probe. Every point is scored over theta, not by the answers that the attacker saw.",
}


@dataclass(frozen=True)
class AttackGroup:
    """All attacks on one system by size, the strongest of each size first."""

    system: str
    attacks: list[Attack]

    def lowest(self, epsilon: float) -> float | None:
        """The least accuracy that an attack of this size left; None if there was none."""
        return min((attack.expected.value for attack in self.attacks if attack.epsilon == epsilon), default=None)


def render(report: Report, figures: Mapping[str, str], examples: Sequence[Example], floor: float | None = None) -> str:
    """The page.

    Args:
      report: of a finished audit.
      figures: SVG by title; they take their text colour from the page.
      examples: images before and after the attacks.
      floor: the least lower bound of robust accuracy that is enough, as a fraction.
    """
    return (
        templates()
        .get_template("report.html")
        .render(
            report=report,
            contents=table_of_contents(report, list(figures), examples),
            ours=report.ours,
            measured=has_figures(report),
            measurement=judge_measurement(report),
            result=judge_result(report, floor),
            headline=headline(report),
            figures={title: (CAPTIONS[title], Markup(svg)) for title, svg in figures.items()},  # noqa: S704 -- our own SVG
            examples=examples,
            groups=group_by_system(report.attacks),
            structures=structures_of(report),
            amplification=AMPLIFICATION,
        )
    )


def table_of_contents(report: Report, figures: Sequence[str], examples: Sequence[Example]) -> list[str]:
    """The titles of the sections that the page has. Without a measurement it shows no accuracy."""
    measured = has_figures(report)
    optional = (
        ("What randomness is worth", measured and bool(report.comparisons or report.secrecy)),
        ("Systems compared", measured),
        *((title, measured) for title in figures),
        ("Attacks", bool(report.attacks)),
        ("Tickets alone", measured and bool(report.tickets)),
        ("Transfer in words", measured and report.transfer is not None),
        ("One perturbation for all images", measured and report.universal is not None),
        ("Examples", bool(examples)),
    )
    always = ("Sanity checks", "Threat model", "Not covered", "Left out by this profile", "Where this comes from")
    return [*(title for title, there in optional if there), *always]


@cache
def templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("service.audit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "anchor": anchor}
    return environment


def anchor(title: str) -> str:
    """A fragment identifier."""
    return "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split())


def group_by_system(attacks: Iterable[Attack]) -> list[AttackGroup]:
    """Ours first, then the others in the order of their first attack that all systems faced, single tickets last."""
    groups: dict[str, list[Attack]] = {}
    for attack in attacks:
        groups.setdefault(attack.system, []).append(attack)
    ordered = [
        AttackGroup(system, sorted(rows, key=lambda row: (row.epsilon, row.expected.value)))
        for system, rows in groups.items()
    ]
    return sorted(ordered, key=lambda group: (group.system != OURS, -len(group.attacks)))


def structures_of(report: Report) -> list[str]:
    """The structures of the transfer's blocks, in their order."""
    blocks: Mapping[str, Any] = {} if report.transfer is None else report.transfer.blocks
    return list(dict.fromkeys(name.split(" -> ")[0] for name in blocks))
