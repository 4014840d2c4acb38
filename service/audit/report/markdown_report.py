"""A committed report as a document shows it: a table in Markdown, two figures as SVG files."""

from pathlib import Path
from typing import Final

from model_store.files import write_atomically
from service.audit.report.model import REPORT, Interval, Report

FIGURES: Final = {"Transfer between tickets": "transfer.svg", "Accuracy against epsilon": "accuracy.svg"}
END: Final = "<!-- end of audit -->"
MARKS: Final = ("<!-- audit: tombola audit --tables -->", END)  # of the embedded library's report
PAPER: Final = {"clean": "87.01", "robust": "67.7", "r2s": "57.6 to 64.7", "tickets": "46.3 to 49.1"}


def marks_of(page: str, path: Path) -> tuple[str, str]:
    """The marks that a page has for one report of several, else those of the embedded library's.

    page: its text.  path: the report, as the command was given it.
    """
    own = f"<!-- audit: tombola audit --tables {path.as_posix()} -->"
    return (own, END) if own in page else MARKS


def document_section(report: Report, figures: str, *, paper: bool = True) -> str:
    """All that a document shows of a report.

    figures: the folder of its figures, seen from the document.  paper: also what the paper's own figures are.
    """
    pictures = [f"![{title}]({figures}/{name})" for title, name in FIGURES.items()]
    texts = [secrecy_sentence, contribution_sentences, conditions, *([beside_the_paper] if paper else [])]
    parts = [systems_table(report), *(text(report) for text in texts)]
    return "\n\n".join([*filter(None, parts), *pictures])


def secrecy_sentence(report: Report) -> str:
    """What a secret theta buys; empty where it was not measured."""
    meter = report.secrecy
    if meter is None:
        return ""
    text = f"A secret θ is worth **{points(meter.difference, sign='+')}** points of robust accuracy."
    if meter.secret is None or meter.known is None:
        return text
    return (
        f"{text} Secret: {points(meter.secret)} %. Known to the attacker: {points(meter.known)} %, the mean over "
        f"{meter.thetas} drawn θ. Same law, images and attacks."
    )


def contribution_sentences(report: Report) -> str:
    """By how much some attacks lower the figure beyond all others; empty in reports that do not say so."""
    return " ".join(
        f"{row.name[0].upper()}{row.name[1:]} ({', '.join(row.attacks)}): the figure is {points(row.lowers)} points "
        "lower with them than without."
        for row in report.contributions
    )


def systems_table(report: Report) -> str:
    """Every system, clean and under the worst of the attacks that all faced, with 95 % intervals."""
    rows = ["| System | Clean, % | Robust, % [95 %] | 10 tries, % | Difference [95 %] | In words |"]
    rows += ["|---|---|---|---|---|---|"]
    against = {row.against: row for row in report.comparisons}
    for name, system in report.systems.items():
        clean, robust = points(system.clean.expected), points(system.shared.expected)
        tries, other = f"{100 * system.shared.tries['k10'].value:.1f}", against.get(name)
        difference = points(other.robust, sign="+") if other else ""
        rows.append(f"| {name} | {clean} | {robust} | {tries} | {difference} | {other.words if other else ''} |")
    everything = report.ours.robust
    tries = f"{100 * everything.tries['k10'].value:.1f}"
    rows.append(f"| **tombola, all attacks** | | **{points(everything.expected)}** | {tries} | | |")
    return "\n".join(rows)


def beside_the_paper(report: Report) -> str:
    """What the paper says of full-width networks, and why ours is another figure."""
    transfer = report.transfer
    naive = f"{100 * transfer.naive_random_against_random:.1f} %" if transfer else "not measured"
    own = next((row for row in report.attacks if row.name == "paper-eot" and row.system == "tombola"), None)
    theirs = f"{100 * own.expected.value:.1f} %" if own else "not run"
    clean, robust = 100 * report.ours.clean.expected.value, 100 * report.ours.robust.expected.value
    return (
        f"The paper reports {PAPER['clean']} % clean and {PAPER['robust']} % robust for its ensemble. It has "
        f"{PAPER['r2s']} % for R2S, and at most {PAPER['tickets']} % for single tickets. Two things separate those "
        f"figures from {clean:.1f} % and {robust:.1f} % here. The first is the networks. They have a sixteenth to a "
        "hundredth of the weights and were searched on two cores for minutes to hours. So every accuracy is lower, "
        "with an attack and without. The second is the attacker. The paper states neither the draws nor the loss nor "
        "the restarts of its EOT. An attacker with the wrong ticket leaves far more than one with the right ticket: "
        f"here, one ticket against another leaves {naive}. The paper's attack as it is worded is the mean of all "
        f"candidates' gradients, 20 steps. Scored exactly, it leaves {theirs}; the worst of all attacks run is the "
        "figure to quote. The worth of randomness itself is the difference from `mean-of-all` and from "
        "`fixed-equal-cost`. The paper compares with neither."
    )


def points(interval: Interval, sign: str = "") -> str:
    value, low, high = (f"{100 * each:{sign}.1f}" for each in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]"


def conditions(report: Report) -> str:
    """What the figures hold for; without it they mean nothing."""
    audit, library = report.audit, report.library
    return (
        f"{audit.norm}, epsilon {audit.headline:g}/255, n = {report.data.images} images of {report.data.name}, profile "
        f"{audit.profile}, {len(report.attacks)} attacks. They are scored on {report.ours.scored_on} and the 8-bit "
        "grid: an upper bound. Difference: tombola less the system, on the same images, by paired bootstrap. It is "
        "under the attacks that all systems faced, as is the column Robust. The last row adds the attacks aimed at "
        f"tombola alone. Library `{library.digest[:12]}` of {len(library.tickets)} tickets, report "
        f"`{report.digest[:12]}` ({report.verdict}), commit `{report.versions['commit'][:12]}`, seeds {audit.seed} and "
        f"{audit.defender_seed}."
    )


def write_figures(report: Report, folder: Path) -> list[Path]:
    """The report itself, and those of the two figures that it has data for."""
    from service.audit.report.plots import all_figures

    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / REPORT]
    write_atomically(written[0], report.as_bytes())
    for title, picture in all_figures(report, themed=False).items():
        if title in FIGURES:
            write_atomically(folder / FIGURES[title], picture.encode())
            written.append(folder / FIGURES[title])
    return written
