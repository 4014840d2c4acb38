"""Pictures of the console: python -m tools.console.screenshots FOLDER [--whole] [--url URL --token TOKEN]

Without --url it serves the embedded library with its published audit, and looks while clients ask.
With --library it serves that library instead, and takes pictures of what its size changes. A picture is what a window
shows; with --whole, whole pages in every width and scheme, to be reviewed.
"""

import argparse
import json
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, Literal

from PIL import Image
from playwright.sync_api import Browser, Page, expect

from model_store.library import EMBEDDED
from service.admin.audit_jobs import result_of
from service.admin.audit_store import Cost, Job, JobStore
from service.audit.report import html_report, plots
from service.audit.report.model import Report, read_report
from service.outbound import open_url
from tests.support.serving import serving
from tombola.sample_image import draw_sample
from tools.console.browser import chromium, sign_in
from tools.console.traffic import traffic

Scheme = Literal["light", "dark"]
PUBLISHED: Final = Path("service/audit/results/report.json")
SLOW_MS: Final = 300_000
LOOK_S: Final = 120.0  # of traffic, so that the lines of the tiles have something to show
PAUSE_MS: Final = 2000
COLOURS: Final = 128  # of a picture's palette: a page of few colours loses nothing that is seen
MAX_BYTES: Final = 150_000
ALL_TABS: Final = ("live", "try", "audits", "audits/new", "library")


@dataclass(frozen=True)
class Shot:
    """One picture: the window's size in CSS pixels, and the tab. whole: of the page, not of the window."""

    name: str
    scheme: Scheme
    width: int
    height: int
    tab: str
    whole: bool = False


SHOTS: Final = (
    Shot("console-light", "light", 1280, 800, "live"),
    Shot("console-dark", "dark", 1280, 800, "live"),
    Shot("console-try-dark", "dark", 1280, 800, "try"),
    Shot("console-audits-light", "light", 1280, 800, "audits"),
    Shot("console-library-light", "light", 1280, 800, "library"),
    Shot("report-light", "light", 1280, 800, "audits/{audit}"),
    Shot("console-360-light", "light", 360, 780, "live"),
    Shot("console-360-dark", "dark", 360, 780, "try"),
)
OF_A_LIBRARY: Final = (
    Shot("console-own-light", "light", 1280, 800, "try"),
    Shot("console-own-dark", "dark", 1280, 800, "library"),
)
WHOLE: Final = tuple(
    Shot(f"whole-{tab.replace('/', '-')}-{width}-{scheme}", scheme, width, 800, tab, whole=True)
    for width in (360, 1280)
    for scheme in ("light", "dark")
    for tab in (*ALL_TABS, "audits/{audit}")
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--whole", action="store_true", help="whole pages in two widths and both schemes")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="pictures whose names begin so")
    parser.add_argument("--url", help="of the admin plane of a running server with an audit that is done")
    parser.add_argument("--token", help="its admin token")
    parser.add_argument("--library", type=Path, help="a library of your own")
    parser.add_argument("--image", type=Path, help="the image that is tried (default: a ship)")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    image = given.image.read_bytes() if given.image else draw_sample()
    shots = WHOLE if given.whole else OF_A_LIBRARY if given.library else SHOTS
    shots = tuple(shot for shot in shots if not given.only or shot.name.startswith(tuple(given.only)))
    server = nullcontext((given.url, given.token)) if given.url else busy_server(given.library or EMBEDDED)
    with server as (url, token), chromium() as browser:
        for shot in shots:
            page = opened(browser, url, token, shot)
            fill(page, shot.tab, image)
            take(page, shot, given.folder / f"{shot.name}.png")
            page.context.close()


@contextmanager
def busy_server(library: Path) -> Iterator[tuple[str, str]]:
    """The admin plane's address and token. Clients have asked for a while."""
    with tempfile.TemporaryDirectory() as place:
        state = Path(place) / "state"
        if library == EMBEDDED:
            keep(state, read_report(PUBLISHED))
        with serving(library, state, "--engine", "openvino") as process:
            token = (state / "admin-token").read_text(encoding="ascii").strip()
            with traffic(process.public):
                time.sleep(LOOK_S)
                yield process.admin, token


def keep(state: Path, report: Report) -> None:
    """A report among the server's audits, as if it had been run there when it was."""
    ended = datetime.fromisoformat(report.timings.finished_at).timestamp()
    started = ended - report.timings.seconds
    name = time.strftime("%Y%m%d-%H%M%S-", time.gmtime(started)) + report.digest[:8]
    store = JobStore(state / "audits")
    store.save(
        Job(
            id=name,
            state="done",
            created=started,
            started=started,
            finished_at=ended,
            request={"profile": report.audit.profile, "data": report.data.name, "images": report.data.images},
            cost=Cost(attacks=len(report.attacks), giga_multiply_adds=0, seconds=round(report.timings.seconds)),
            digest=report.library.digest,
            result=result_of(report),
            attempts=1,
        )
    )
    (store.folder / name / "report.json").write_bytes(report.as_bytes())
    page = html_report.render(report, plots.all_figures(report), [])
    (store.folder / name / "report.html").write_text(page, encoding="utf-8")


def opened(browser: Browser, url: str, token: str, shot: Shot) -> Page:
    """Signed in, in a window of its own."""
    context = browser.new_context(viewport={"width": shot.width, "height": shot.height}, color_scheme=shot.scheme)
    context.set_default_timeout(SLOW_MS)
    expect.set_options(timeout=SLOW_MS)
    page = context.new_page()
    page.on("pageerror", lambda error: print(f"the page raised {error}"))
    sign_in(page, f"{url}/#{shot.tab.format(audit=last_measured(url, token))}", token)
    return page


def last_measured(url: str, token: str) -> str:
    """The audit that the first screen shows; none: an empty text."""
    request = urllib.request.Request(f"{url}/admin/overview", headers={"authorization": f"Bearer {token}"})
    with open_url(request) as response:
        audit = json.load(response)["audit"]
    return "" if audit is None else str(audit["id"])


def fill(page: Page, tab: str, image: bytes) -> None:
    """Waits until the tab has something to see."""
    page.locator("#state").filter(has_text="Ready").wait_for()
    if tab == "live":
        page.locator("#tiles .spark path").first.wait_for()
    elif tab == "try":
        try_image(page, image)
    elif tab == "audits":
        page.locator("#audit-list table, #audit-list .empty").first.wait_for()
    elif tab == "audits/new":
        page.locator("#cost").filter(has_text="Estimated").wait_for()
    elif tab == "library":
        page.locator("#tickets").wait_for()
    elif page.locator("#audit").is_visible():
        page.frame_locator("iframe").get_by_role("heading", name="Sanity checks").wait_for()
    page.evaluate("document.activeElement.blur()")


def try_image(page: Page, image: bytes) -> None:
    page.set_input_files("#file", {"name": "picture", "mimeType": "image/png", "buffer": image})
    answer, refusal = page.locator("#trial-label, #verdict .error"), page.locator("#verdict .error")
    answer.wait_for()
    while refusal.is_visible():  # the server is busy, and says when to come back
        page.wait_for_timeout(PAUSE_MS)
        page.get_by_role("button", name="Try again").click()
        answer.wait_for()


def take(page: Page, shot: Shot, path: Path) -> None:
    """Raises SystemExit where the picture is too large for a repository."""
    page.screenshot(path=path, full_page=shot.whole)
    if shot.whole:
        return
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path}: {size / 1000:.0f} kB")
    if size > MAX_BYTES:
        raise SystemExit(f"{path}: {size} bytes, expected at most {MAX_BYTES}: show less of the page")


if __name__ == "__main__":
    main()
