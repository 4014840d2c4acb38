"""Pictures of the console: python -m tools.console.screenshots FOLDER [--whole] [--url URL --token TOKEN]

Without --url it serves the embedded library, runs a short audit, and looks while clients ask. A picture is what a
window shows; with --whole, the whole page in every width and scheme, to be reviewed.
"""

import argparse
import json
import re
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from PIL import Image
from playwright.sync_api import Browser, Page, expect

from model_store.library import open_library
from service.outbound import open_url
from tests.support.serving import serving
from tombola.sample_image import draw_sample
from tools.console.browser import chromium, sign_in
from tools.console.traffic import traffic

Scheme = Literal["light", "dark"]
SLOW_MS: Final = 300_000
AUDIT_S: Final = 3600.0  # at most, on a machine that has other things to do
LOOK_MS: Final = 45_000  # of traffic, so that the lines of the tiles have something to show
PAUSE_MS: Final = 2000
AUDIT: Final = {"profile": "smoke", "images": 4, "attacks": ["fgsm", "paper-eot"], "epsilons": [8]}
COLOURS: Final = 128  # of a picture's palette: a page of few colours loses nothing that is seen
MAX_BYTES: Final = 150_000


@dataclass(frozen=True)
class Shot:
    """One picture: the window's size in CSS pixels, and what is at its top (None: the whole page)."""

    name: str
    scheme: Scheme
    width: int
    height: int
    top: str | None


SHOTS: Final = (
    Shot("console-light", "light", 1280, 860, "#live"),
    Shot("console-dark", "dark", 1280, 980, "#trial"),
    Shot("report-light", "light", 1280, 860, "#audit"),
    Shot("console-360-light", "light", 360, 780, "#live"),
    Shot("console-360-dark", "dark", 360, 780, "#trial"),
)
WHOLE: Final = tuple(
    Shot(f"whole-{width}-{scheme}", scheme, width, 900, None)
    for width in (360, 768, 1440, 2200)
    for scheme in ("light", "dark")
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--whole", action="store_true", help="whole pages in every width and scheme")
    parser.add_argument("--url", help="of the admin plane of a running server with an audit that is done")
    parser.add_argument("--token", help="its admin token")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    with nullcontext((given.url, given.token)) if given.url else busy_server() as (url, token), chromium() as browser:
        for shot in WHOLE if given.whole else SHOTS:
            page = opened(browser, f"{url}/", token, shot)
            fill(page)
            if shot.top == "#live":
                page.wait_for_timeout(LOOK_MS)
            take(page, shot, given.folder / f"{shot.name}.png")
            page.context.close()


@contextmanager
def busy_server() -> Iterator[tuple[str, str]]:
    """The admin plane's address and token. An audit has ended, and clients ask."""
    with tempfile.TemporaryDirectory() as place:
        state = Path(place) / "state"
        with serving(open_library().path, state) as process:
            token = (state / "admin-token").read_text(encoding="ascii").strip()
            submit(process.admin, token, AUDIT)
            wait_for_audits(process.admin, token)
            with traffic(process.public):
                yield process.admin, token


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


def opened(browser: Browser, url: str, token: str, shot: Shot) -> Page:
    """Signed in, in a window of its own."""
    context = browser.new_context(viewport={"width": shot.width, "height": shot.height}, color_scheme=shot.scheme)
    context.set_default_timeout(SLOW_MS)
    expect.set_options(timeout=SLOW_MS)
    page = context.new_page()
    page.on("pageerror", lambda error: print(f"the page raised {error}"))
    sign_in(page, url, token)
    return page


def fill(page: Page) -> None:
    """Something to see in every part of the page."""
    page.locator("#tile-rate").filter(has_not_text="…").wait_for()
    page.locator("#cost").filter(has_text="Estimated").wait_for()
    page.set_input_files("#file", {"name": "ship.png", "mimeType": "image/png", "buffer": draw_sample()})
    answer, refusal = page.locator("#trial-label, #verdict .error"), page.locator("#verdict .error")
    answer.wait_for()
    while refusal.is_visible():  # the server is busy, and says when to come back
        page.wait_for_timeout(PAUSE_MS)
        page.get_by_role("button", name="Twenty more draws").click()
        answer.wait_for()
    boxes = page.get_by_role("checkbox", name=re.compile("Compare the audit"))
    boxes.first.wait_for()
    if boxes.count() >= 2:
        for index in range(2):
            boxes.nth(index).check()
        page.get_by_role("button", name="Compare two").click()
        page.get_by_role("table", name="Two audits compared").wait_for()
    page.get_by_role("button", name=re.compile("Open the audit")).first.click()
    page.frame_locator("iframe").get_by_role("heading", name="Sanity checks").wait_for()
    page.evaluate("document.activeElement.blur()")


def take(page: Page, shot: Shot, path: Path) -> None:
    """Raises SystemExit where the picture is too large for a repository."""
    jump = "top => top ? document.querySelector(top).scrollIntoView({behavior: 'instant'}) : scrollTo(0, 0)"
    page.evaluate(jump, shot.top)
    page.screenshot(path=path, full_page=shot.top is None)
    if shot.top is None:
        return
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path}: {size / 1000:.0f} kB")
    if size > MAX_BYTES:
        raise SystemExit(f"{path}: {size} bytes, expected at most {MAX_BYTES}: show less of the page")


if __name__ == "__main__":
    main()
