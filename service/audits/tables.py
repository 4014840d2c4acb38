"""A committed report as the README shows it: Table 2 in Markdown, Fig. 1 and Fig. 2 as SVG files."""

from pathlib import Path
from typing import Any, Final

from model_store.ticket import write_atomically

FIGURES: Final = {"Transfer between tickets": "transfer.svg", "Accuracy against epsilon": "accuracy.svg"}
Json = dict[str, Any]


def table(report: Json) -> str:
    """Table 2: every system, clean and under the worst of all attacks run, with 95 % intervals and its conditions."""
    rows = ["| System | Clean, % | Robust, % [95 %] | 10 tries | Difference [95 %] | In words |"]
    rows += ["|---|---|---|---|---|---|"]
    against = {row["against"]: row for row in report["comparisons"]}
    for name, system in report["systems"].items():
        clean, robust = (points(system[kind]["expected"]) for kind in ("clean", "robust"))
        tries = f"{100 * system['robust']['tries']['k10']['value']:.1f}"
        other = against.get(name)
        difference = points(other["robust"], sign="+") if other else ""
        rows.append(f"| {name} | {clean} | {robust} | {tries} | {difference} | {other['words'] if other else ''} |")
    return "\n".join([*rows, "", conditions(report)])


def points(found: Json, sign: str = "") -> str:
    value, low, high = (f"{100 * found[name]:{sign}.1f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def conditions(report: Json) -> str:
    """What the figures hold for; without it they mean nothing."""
    audit, library = report["audit"], report["library"]
    return (
        f"{audit['norm']}, epsilon {audit['headline']:g}/255, n = {report['data']['images']} images of "
        f"{report['data']['name']}, profile {audit['profile']}, {len(report['attacks'])} attacks, scored on "
        f"{report['systems']['tombola']['scored_on']} and the 8-bit grid; an upper bound. Difference: tombola less the "
        f"system, same images, attacks that all faced, paired bootstrap. Library `{library['digest'][:12]}`, report "
        f"`{report['digest'][:12]}` ({report['verdict']}), commit `{report['versions']['commit'][:12]}`, seeds "
        f"{audit['seed']} and {audit['defender_seed']}."
    )


def write_figures(report: Json, folder: Path) -> list[Path]:
    """Fig. 1 and Fig. 2, those that the report has data for."""
    from service.audits.figures import all_figures

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for title, picture in all_figures(report).items():
        if title in FIGURES:
            write_atomically(folder / FIGURES[title], picture.encode())
            written.append(folder / FIGURES[title])
    return written
