"""The report as one HTML page that needs nothing else: no script, no font, no request."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, Final

Json = dict[str, Any]
STYLE: Final = """
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1c2733;background:#fff}
h1{margin:0 0 .3rem}
h2{margin:2.2rem 0 .6rem;border-bottom:1px solid #d5dde5;padding-bottom:.2rem}
table{border-collapse:collapse;margin:.6rem 0;font-size:13.5px}
td,th{padding:.25rem .6rem;border-bottom:1px solid #e4e9ee;text-align:left;vertical-align:top}
.number{text-align:right;font-variant-numeric:tabular-nums}
td.number{white-space:nowrap}
.pass{color:#17663a}
.warn{color:#8a5a00}
.fail{color:#a11b1b;font-weight:600}
.skipped{color:#687684}
.box{border-left:4px solid #8a5a00;background:#fdf7ea;padding:.5rem .9rem;margin:1rem 0}
.box.invalid{border-color:#a11b1b;background:#fdeeee}
.box.valid{border-color:#17663a;background:#eef8f1}
svg{max-width:100%;height:auto}
code{font-size:12.5px;overflow-wrap:anywhere}
figure{display:inline-block;margin:.3rem .8rem .6rem 0;text-align:center;font-size:12px}
figure img{image-rendering:pixelated;margin:0 1px}
"""


CAPTIONS: Final = {
    "Accuracy against epsilon": "Each system under everything tried on it within epsilon, on the same images all "
    "along (fewer than for the headline); the band is the 95 % interval of tombola's.",
    "Transfer between tickets": "Row: the ticket attacked. Column: the ticket that answers. The darker a square off "
    "the diagonal, the better the attack carries over, and the less it helps that theta is secret.",
    "Risk by step": "Attacks on tombola at the headline epsilon: expected accuracy over theta, the best so far, mean "
    "over the images. A curve that still falls at its end belongs to an attack that was too short.",
    "Loss by step": "The same attacks' own losses, each on a scale of its own.",
    "Accuracy against queries": "Square sees probabilities, HopSkipJump labels. An attacker who averages q answers "
    "pays q queries for each probe. Every point is scored over theta, not by the answers that the attacker saw.",
}


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def spread(found: Json) -> str:
    return f"{percent(found['value'])} <small>[{percent(found['low'])}, {percent(found['high'])}]</small>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 1) -> str:
    """Cells are HTML already. From column `numbers` on they are aligned as numbers."""
    top = "".join(f"<th{' class=number' if i >= numbers else ''}>{escape(head)}</th>" for i, head in enumerate(heads))
    body = "".join(
        "<tr>" + "".join(f"<td{' class=number' if i >= numbers else ''}>{c}</td>" for i, c in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def page(report: Json, figures: Mapping[str, str], examples: Sequence[Json]) -> str:
    parts = [
        heading(report),
        section("Systems compared", systems(report)),
        section("What randomness is worth", comparisons(report)),
        *(section(title, f"<p>{escape(CAPTIONS[title])}</p>{figure}") for title, figure in figures.items()),
        section("Attacks", attacks(report)),
        section("Tickets alone", tickets(report)),
        section("Transfer in words", transfer(report)),
        section("One perturbation for all images", universal(report)),
        section("Examples", pictures(examples)),
        section("Sanity checks", checks(report)),
        section("Threat model", table(["field", "what it is"], fields(report["threat_model"]), 9)),
        section("Not covered", bullets(report["not_covered"])),
        section("Left out by this profile", bullets(report["profile"]["left_out"]) or "nothing"),
        section("Where this comes from", provenance(report)),
    ]
    title = f"Audit {escape(report['digest'][:12])}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(part for part in parts if part)}</body></html>"
    )


def section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>{body}" if body else ""


def bullets(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def fields(found: Mapping[str, Any]) -> list[list[str]]:
    return [[escape(str(name)), escape(str(value))] for name, value in found.items()]


def headline(report: Json) -> str:
    """The one line worth quoting, with its conditions."""
    audit, ours = report["audit"], report["systems"]["tombola"]
    robust, clean = ours["robust"]["expected"], ours["clean"]["expected"]
    threat = f"{audit['norm']}, epsilon {audit['headline']:g}/255"
    only = f" (of them only {', '.join(audit['attacks'])})" if audit["attacks"] else ""
    return (
        f"Accuracy under the attacks run{only}: {percent(robust['value'])} % [{percent(robust['low'])}, "
        f"{percent(robust['high'])}] ({threat}, n = {report['data']['images']}, profile {audit['profile']}); "
        f"clean {percent(clean['value'])} %."
    )


def heading(report: Json) -> str:
    word, only = report["verdict"], report["audit"]["attacks"]
    said = []
    if word == "invalid":
        failed = ", ".join(map(str, report["failed"]))
        said.append(f"INVALID: failed checks: {failed}. The figures below mean nothing.")
    if only:
        said.append(f"Only {', '.join(only)} ran, as asked: what they leave says little of what others would.")
    if report["warned"]:
        said.append(f"Checks with warnings: {', '.join(map(str, report['warned']))}. Read them before the figures.")
    box = escape(" ".join(said) or "All checks that ran passed.")
    return (
        f"<h1>Audit of library <code>{escape(report['library']['digest'][:12])}</code></h1>"
        f'<div class="box {word}">{box}</div><p><strong>{escape(headline(report))}</strong> '
        "This is an upper bound: a stronger attack can only lower it.</p>"
        f"<p>Images: {escape(report['data']['origin'])}. {escape(report['profile']['about']).capitalize()}.</p>"
    )


def systems(report: Json) -> str:
    rows = []
    ours = report["systems"]["tombola"]
    for name, system, kind in (
        ("tombola, all attacks", ours, "robust"),
        *((name, system, "shared") for name, system in report["systems"].items()),
    ):
        robust, clean = system[kind], system["clean"]
        tries = [percent(robust["tries"][k]["value"]) for k in ("k10", "k100")]
        about = f"{system['about']}; {system['scored_on']}"
        single = [spread(clean["expected"]), spread(robust["expected"]), *tries]
        rows.append(
            [
                f"<strong>{escape(name)}</strong><br><small>{escape(about)}</small>",
                *single,
                percent(robust["no_failing_draw"]["value"]),
                percent(robust["majority"]["value"]),
            ]
        )
    heads = ["system", "clean %", "robust % [95 %]", "10 tries %", "100 tries %", "no failing draw %", "majority %"]
    note = (
        "<p>Robust: the chance of the right answer, mean over the images, each under the worst attack run on it. The "
        "first row counts every attack; the others only those that all systems faced alike, so that they compare. "
        "10 and 100 tries: the attacker sends the image so often, and every answer must be right. Majority: images "
        "that more than half of the draws classify rightly, which is what a client gets who averages answers.</p>"
    )
    return note + table(heads, rows) + by_size(report)


def by_size(report: Json) -> str:
    sizes = report["systems"]["tombola"]["robust"]["by_size"]
    cells = ", ".join(f"n = {n}: {percent(value)} %" for n, value in sizes.items())
    return f"<p>Robust accuracy of tombola by the number of members drawn: {escape(cells)}.</p>"


def comparisons(report: Json) -> str:
    rows = [
        [
            f"{escape(row['against'])}: <strong>{escape(row['words'])}</strong>",
            spread(row["clean"]),
            spread(row["robust"]),
        ]
        for row in report["comparisons"]
    ]
    note = "<p>Tombola less the other, in points, on the same images under the same attacks; paired bootstrap.</p>"
    return note + table(["against", "clean, points", "robust, points"], rows) if rows else ""


def attacks(report: Json) -> str:
    rows = [
        [
            escape(row["id"]),
            spread(row["expected"]),
            percent(row["tombola"]),
            str(row["broken"]),
            str(row["broken_by_no_other"]),
        ]
        for row in report["attacks"]
    ]
    note = (
        "<p>Broken: images whose majority the attack turns. The reported figure is the mean over images of the worst "
        "attack, never the worst attack's mean.</p>"
    )
    return note + table(["attack", "left, its system %", "left, tombola %", "broken", "by no other"], rows)


def tickets(report: Json) -> str:
    rows = [
        [
            escape(row["name"]),
            escape(row["role"]),
            *(spread(row[name]) if name in row else "-" for name in ("clean", "fgsm", "pgd-20")),
        ]
        for row in report["tickets"]
    ]
    return table(["name", "role", "clean %", "FGSM %", "PGD-20 %"], rows, 2)


def transfer(report: Json) -> str:
    found = report["transfer"]
    if found is None:
        return ""
    said = (
        f"<p>{escape(found['attack'])} on one ticket, answered by another. Diagonal {percent(found['diagonal'])} %. "
        f"A random attacker's ticket against a random defender's: {percent(found['naive_random_against_random'])} %. "
        "That last figure is the naive one: its attacker knows less than the threat model says.</p>"
    )
    structures = list(dict.fromkeys(name.split(" -> ")[0] for name in found["blocks"]))
    rows = [
        [escape(first), *(mean_of(found["blocks"].get(f"{first} -> {second}")) for second in structures)]
        for first in structures
    ]
    return said + table(["mean %, attacked: row, answers: column", *structures], rows)


def mean_of(value: float | None) -> str:
    return "-" if value is None else percent(value)


def universal(report: Json) -> str:
    found = report["universal"]
    if found is None:
        return ""
    rows = [
        [escape(name), spread(row["clean"]), spread(row["own"]) if row["own"] else "-", spread(row["worst"])]
        for name, row in found["systems"].items()
    ]
    made = escape(", ".join(found["made_against"]))
    note = f"<p>One made against each of {made}, on other images than the {found['images']} measured here.</p>"
    return note + table(["system", "clean %", "under its own %", "under the worst of all %"], rows)


def pictures(examples: Sequence[Json]) -> str:
    return "".join(
        "<figure>"
        + "".join(f'<img src="{escape(uri)}" alt="">' for uri in item["pictures"])
        + f"<br>{escape(item['label'])}: {percent(item['clean'])} → {percent(item['attacked'])} %</figure>"
        for item in examples
    )


def checks(report: Json) -> str:
    rows = [
        [
            str(row["id"]),
            escape(row["name"]),
            f'<span class="{row["outcome"]}">{row["outcome"]}</span>',
            "hard" if row["hard"] else "warning",
            escape(row["criterion"]),
            escape(row["value"]),
        ]
        for row in report["checks"]
    ]
    return table(["#", "check", "outcome", "weight", "criterion", "found"], rows, 9)


def outside(found: Json | None) -> str:
    return "none" if found is None else f"{found['digest']}, {len(found['members'])} networks"


def provenance(report: Json) -> str:
    data, library = report["data"], report["library"]
    rows = fields(
        {
            "report digest (all but timings)": report["digest"],
            "library digest": library["digest"],
            "attacker's own library": outside(library["outside"]),
            "states of theta": f"{library['states']} (effective: {library['effective_states']})",
            "images": f"{data['images']} of {data['name']}, digest {data['digest']}",
            "seeds": f"attacker {report['audit']['seed']}, defender {report['audit']['defender_seed']}",
            "versions": ", ".join(f"{name} {found}" for name, found in report["versions"].items()),
            "seconds": report["timings"]["seconds"],
        }
    )
    return table(["what", "value"], rows, 9)
