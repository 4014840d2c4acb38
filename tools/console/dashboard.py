"""The Grafana dashboard's panels, drawn without Grafana: python -m tools.console.dashboard FILE [--seconds N]

A real server with the embedded library is under load, and a real Prometheus with the shipped rules scrapes it. Every
query of deploy/grafana/tombola.json is put to that Prometheus as Grafana would put it. What comes back is drawn by
matplotlib where the dashboard places it. Titles, queries, legends, units and places are the dashboard's; the looks are
not Grafana's, and the picture says so.
"""

import argparse
import json
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from PIL import Image

from model_store.json_object import Json
from model_store.library import open_library
from model_store.quiet_imports import import_matplotlib
from service.outbound import open_url
from tests.deploy.test_prometheus import answer, filled, prometheus
from tests.support.serving import ROOT, serving
from tools.console.traffic import traffic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

matplotlib = import_matplotlib()
DASHBOARD: Final = ROOT / "deploy" / "grafana" / "tombola.json"
RATE_INTERVAL: Final = "15s"  # the server has been scraped for two minutes
AUDIT_S: Final = 3600.0  # at most, on a machine that has other things to do
AUDIT: Final = {"profile": "smoke", "images": 4, "attacks": ["fgsm", "paper-eot"], "epsilons": [8]}
COLUMNS: Final = 24  # of the dashboard's grid
UNIT_IN: Final = 0.72, 0.34  # width and height of one of the grid's cells
FILLED: Final = 0.62  # the part of a panel's height that its axes take
COLOURS: Final = 64
LEGIBLE: Final = 20  # lines of a panel: a legend of more would hide them
UNITS: Final[dict[str, Callable[[float], str]]] = {
    "percentunit": lambda value: f"{100 * value:.3g} %",
    "s": lambda value: f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s",
    "reqps": lambda value: f"{value:.3g}/s",
    "bytes": lambda value: f"{value / 1e6:.0f} MB",
    "short": lambda value: f"{value:.4g}",
}


@dataclass(frozen=True)
class Period:
    """What is drawn, in seconds since the epoch."""

    start: float
    end: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the picture, a PNG")
    parser.add_argument("--seconds", type=int, default=120, help="how long clients ask before the panels are drawn")
    given = parser.parse_args()
    with scraped() as (address, server), traffic(server.public):
        start = time.time()
        time.sleep(given.seconds)
        picture = draw(address, Period(start, time.time()))
    picture.savefig(given.file, dpi=80)
    with Image.open(given.file) as image:
        image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(given.file, optimize=True)
    print(f"{given.file}: {given.file.stat().st_size / 1000:.0f} kB")


@contextmanager
def scraped() -> Iterator[tuple[str, Any]]:
    """Prometheus' address and the server it scrapes, which has been audited."""
    with tempfile.TemporaryDirectory() as place:
        state, folder = Path(place) / "state", Path(place) / "prometheus"
        folder.mkdir()
        with serving(open_library().path, state) as server:
            token = (state / "admin-token").read_text(encoding="ascii").strip()
            submit(server.admin, token, AUDIT)
            wait_for_audits(server.admin, token)
            with prometheus(folder, [server.admin.removeprefix("http://")]) as address:
                while not answer(address, "tombola_ready"):
                    time.sleep(0.5)
                yield address, server


def draw(address: str, period: Period) -> "Figure":
    matplotlib.rcParams.update(
        {"font.size": 7, "axes.titlesize": 8, "axes.titleweight": "bold", "axes.titlelocation": "left"}
    )
    content = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    panels = [each for panel in content for each in (panel, *panel.get("panels", ()))]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) + 2
    figure: Figure = matplotlib.figure.Figure(figsize=(COLUMNS * UNIT_IN[0], rows * UNIT_IN[1]))
    length = period.end - period.start
    about = f"every query of deploy/grafana/tombola.json over a real Prometheus, {length:.0f} s of load"
    figure.text(0.01, 1 - 0.8 / rows, f"Drawn by matplotlib, not by Grafana: {about}", fontsize=9, style="italic")
    for panel in panels:
        place(figure, panel, rows, address, period)
    return figure


def place(figure: "Figure", panel: Json, rows: int, address: str, period: Period) -> None:
    """One panel where the dashboard has it. A row is a heading."""
    grid = panel["gridPos"]
    left, top = grid["x"] / COLUMNS, 1 - (grid["y"] + 2) / rows
    if panel["type"] == "row":
        figure.text(left + 0.01, top - 0.7 / rows, panel["title"], fontsize=10, weight="bold")
        return
    width, height = grid["w"] / COLUMNS, grid["h"] / rows
    margin = 0.3 if panel["type"] == "bargauge" else 0.13  # room for the names of its bars
    size = (width * (0.95 - margin), height * FILLED)
    axes = figure.add_axes((left + margin * width, top - height * (1 + FILLED) / 2 - 0.1 / rows, *size))
    axes.set_title(panel["title"])
    KINDS[panel["type"]](axes, panel, address, period)


def unit(panel: Json) -> Callable[[float], str]:
    name = panel["fieldConfig"]["defaults"].get("unit", "short")
    if name.startswith("suffix:"):
        return lambda value: f"{value:.4g}{name.removeprefix('suffix:')}"
    return UNITS[name]


def targets(panel: Json) -> Iterator[tuple[str, str]]:
    """Queries as Grafana would send them, each with the pattern of its legend."""
    for target in panel["targets"]:
        yield filled(target["expr"], RATE_INTERVAL), target.get("legendFormat", "")


def named(pattern: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        pattern = pattern.replace(f"{{{{{name}}}}}", value)
    return pattern


def now(panel: Json, address: str) -> list[tuple[str, dict[str, str], float]]:
    """Legend, labels and value of every series of a panel that shows the present."""
    return [
        (named(pattern, row["metric"]), row["metric"], float(row["value"][1]))
        for query, pattern in targets(panel)
        for row in answer(address, query)
    ]


def lines(axes: "Axes", panel: Json, address: str, period: Period) -> None:
    count = 0
    for query, pattern in targets(panel):
        for row in series(address, query, period):
            times, values = zip(*((t - period.start, float(v)) for t, v in row["values"]), strict=True)
            axes.plot(times, values, linewidth=1, label=named(pattern, row["metric"]))
            count += 1
    axes.yaxis.set_major_formatter(lambda value, _: unit(panel)(value))
    axes.set_xlim(0, period.end - period.start)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f} s")
    axes.grid(alpha=0.3)
    if not count:
        silent(axes)
    elif count <= LEGIBLE:
        axes.legend(fontsize=5.5, loc="best", ncols=1 + (count > 4), framealpha=0.7)


def series(address: str, query: str, period: Period) -> list[Json]:
    parameters = {"query": query, "start": period.start, "end": period.end, "step": 1}
    with open_url(f"{address}/api/v1/query_range?{urllib.parse.urlencode(parameters)}", 60) as response:
        results: list[Json] = json.load(response)["data"]["result"]
    return results


def silent(axes: "Axes") -> None:
    axes.text(0.5, 0.5, "nothing happened", ha="center", va="center", transform=axes.transAxes, color="grey")


def stat(axes: "Axes", panel: Json, address: str, _: Period) -> None:
    values = [value for _, _, value in now(panel, address)]
    axes.axis("off")
    text = unit(panel)(values[0]) if values else "–"
    axes.text(0.5, 0.45, text, ha="center", va="center", fontsize=20, transform=axes.transAxes)


def bars(axes: "Axes", panel: Json, address: str, _: Period) -> None:
    ranked = sorted(((name, value) for name, _, value in now(panel, address)), reverse=True)
    drawn = axes.barh([name for name, _ in ranked], [value for _, value in ranked], height=0.6)
    axes.bar_label(drawn, [unit(panel)(value) for _, value in ranked], padding=2, fontsize=6)
    axes.set_xticks([])
    axes.margins(x=0.2)
    axes.tick_params(axis="y", labelsize=5.5)


def rows_of(axes: "Axes", panel: Json, address: str, _: Period) -> None:
    axes.axis("off")
    text = "\n".join(f"{' '.join(labels.values())[:24]}…  {value:g}" for _, labels, value in now(panel, address))
    axes.text(0, 0.9, text, va="top", family="monospace", transform=axes.transAxes)


Drawing = Callable[["Axes", Json, str, Period], None]
KINDS: Final[dict[str, Drawing]] = {"timeseries": lines, "stat": stat, "bargauge": bars, "table": rows_of}


def submit(url: str, token: str, content: dict[str, Any]) -> None:
    headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
    with open_url(urllib.request.Request(f"{url}/admin/audits", json.dumps(content).encode(), headers)):
        return


def wait_for_audits(url: str, token: str) -> None:
    """Until none waits or runs."""
    late = time.monotonic() + AUDIT_S
    request = urllib.request.Request(f"{url}/admin/audits", headers={"authorization": f"Bearer {token}"})
    while time.monotonic() < late:
        with open_url(request) as response:
            if all(job["state"] == "done" for job in json.load(response)["audits"]):
                return
        time.sleep(1)
    raise SystemExit(f"the audits were not done within {AUDIT_S:g} s")


if __name__ == "__main__":
    main()
