"""Pictures of the console over a running server: python -m tests.console.screenshots FOLDER [--url URL --token TOKEN]

Without --url it serves the embedded library, asks it about some pictures and runs a short audit before it looks. Four
pictures of the whole page, narrow and wide, light and dark, and one of signing in.
"""

import argparse
import base64
import json
import re
import tempfile
import urllib.request
from pathlib import Path
from typing import Any, Final, Literal

from playwright.sync_api import Browser, Page, expect

from model_store.library import open_library
from service.sample import ship
from tests.console.browser import chromium, complaints, sign_in
from tests.serving import Process, serving

WIDTHS: Final = (360, 1440)
SCHEMES: Final[tuple[Literal["light", "dark"], ...]] = ("light", "dark")
SLOW_MS: Final = 300_000
AUDIT: Final = {"profile": "smoke", "images": 4, "attacks": ["fgsm", "paper-eot"], "epsilons": [8]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--url", help="of the admin plane of a running server")
    parser.add_argument("--token", help="its admin token")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.url:
        take(given.folder, given.url, given.token)
        return
    with tempfile.TemporaryDirectory() as place:
        state = Path(place) / "state"
        with serving(open_library().path, state) as process:
            token = (state / "admin-token").read_text(encoding="ascii").strip()
            prepare(process, token)
            take(given.folder, process.admin, token)


def prepare(process: Process, token: str) -> None:
    """Traffic enough for the draws to be compared with their law, and two audits that have ended."""
    body = json.dumps({"images": [base64.b64encode(ship()).decode()] * 64}).encode()
    for _ in range(8):
        process.classify(body, **{"content-type": "application/json"})
    for seed in (0, 1):
        submit(process.admin, token, {**AUDIT, "seed": seed})


def submit(url: str, token: str, content: dict[str, Any]) -> None:
    headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/admin/audits", json.dumps(content).encode(), headers)):
        return


def take(folder: Path, url: str, token: str) -> None:
    with chromium() as browser:
        for width in WIDTHS:
            for scheme in SCHEMES:
                one(browser, folder / f"console-{width}-{scheme}.png", url, token, width, scheme)


def one(browser: Browser, path: Path, url: str, token: str, width: int, scheme: Literal["light", "dark"]) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(SLOW_MS)
    expect.set_options(timeout=SLOW_MS)
    page = context.new_page()
    found = complaints(page)
    page.goto(f"{url}/")
    page.get_by_label("Admin token").wait_for()
    page.screenshot(path=path.with_stem(f"{path.stem}-sign-in"))
    sign_in(page, f"{url}/", token)
    fill(page)
    page.screenshot(path=path, full_page=True)
    print(path, found or "nothing to complain about")
    context.close()


def fill(page: Page) -> None:
    """Something to see in every part of the page."""
    page.locator("#tile-rate").filter(has_not_text="…").wait_for()
    page.locator("#cost").filter(has_text="Estimated").wait_for()
    page.set_input_files("#file", {"name": "ship.png", "mimeType": "image/png", "buffer": ship()})
    page.locator("#trial-label").wait_for()
    boxes = page.get_by_role("checkbox", name=re.compile("Compare the audit"))
    expect(page.locator("#audit-list .pill.done")).to_have_count(2)
    for index in range(2):
        boxes.nth(index).check()
    page.get_by_role("button", name="Compare two").click()
    page.get_by_role("table", name="Two audits compared").wait_for()
    page.get_by_role("button", name=re.compile("Open the audit")).first.click()
    page.frame_locator("iframe").get_by_role("heading", name="Sanity checks").wait_for()
    page.evaluate("scrollTo(0, 0)")


if __name__ == "__main__":
    main()
