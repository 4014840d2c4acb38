"""The page /docs of both planes: its files, and the page itself in a real Chromium before a real server."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from playwright.sync_api import Browser, expect

from service.web.docs_files import FOLDER
from tests.support.serving import Process, serving, tiny_library
from tools.console.browser import CHROMIUM, chromium, complaints

pytestmark = pytest.mark.usefixtures("warm_start")

DIGESTS: Final = {  # of swagger-ui-dist 5.35.0, as FOLDER's README says
    "swagger-ui-bundle.js": "e6a898692f2d768e807c3ba4626068a69a2c5dd960dd6c76f3e4d3a3de180af2",
    "swagger-ui.css": "a6a4cf68f069eb89984d5d43644e6a812e749df08d2b1320c6e06e6973847d10",
}
SLOW_MS: Final = 90_000  # the machine may be busy
expect.set_options(timeout=SLOW_MS)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("docs")
    tiny_library(folder / "library")
    with serving(folder / "library", folder / "state") as ready:
        yield ready


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as made:
        yield made


def test_the_files_of_others_are_those_that_were_published_with_their_licences() -> None:
    assert {name: hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() for name in DIGESTS} == DIGESTS
    assert "Apache License" in (FOLDER / "LICENSE").read_text(encoding="utf-8")
    assert "SmartBear" in (FOLDER / "NOTICE").read_text(encoding="utf-8")
    assert "MIT" in (FOLDER / "swagger-ui-bundle.js.LICENSE.txt").read_text(encoding="utf-8")


def test_only_the_folder_s_files_are_served_and_scripts_come_from_there_alone(process: Process) -> None:
    for plane in (process.public, process.admin):
        assert process.get(f"{plane}/docs/README.md")[0] == 404
        assert process.get(f"{plane}/docs/..%2fauth.py")[0] in (401, 404)
        assert process.get(f"{plane}/docs/swagger-ui-bundle.js")[0] == 200


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian: chromium)")
@pytest.mark.parametrize(
    ("plane", "operation", "path"),
    [("public", "POST /v1/classify", "/health/live"), ("admin", "POST /admin/audits", "/health/live")],
)
def test_the_page_shows_every_operation_runs_one_and_calls_nobody_else(
    process: Process, browser: Browser, plane: str, operation: str, path: str, tmp_path: Path
) -> None:
    origin = getattr(process, plane)
    context = browser.new_context()
    context.set_default_timeout(SLOW_MS)
    page = context.new_page()
    complained, requested = complaints(page), []
    page.on("request", lambda request: requested.append(request.url))
    page.goto(f"{origin}/docs")
    method, shown = operation.split()
    block = page.locator(".opblock", has=page.locator(f'[data-path="{shown}"]')).filter(has_text=method).first
    expect(block).to_be_visible()
    live = page.locator(".opblock", has=page.locator(f'[data-path="{path}"]'))
    live.locator(".opblock-summary-control").click()
    live.get_by_role("button", name="Try it out").click()
    live.get_by_role("button", name="Execute").click()
    expect(live.locator(".live-responses-table .response-col_status").last).to_contain_text("200")
    expect(live.locator(".live-responses-table")).to_contain_text('"live": true')
    page.screenshot(path=tmp_path / "docs.png", full_page=True)
    context.close()
    assert complained == []
    assert {url for url in requested if not url.startswith(("data:", f"{origin}/"))} == set()
    assert f"{origin}/openapi.json" in requested


def test_the_first_page_s_links_lead_somewhere(process: Process) -> None:
    status, page = process.get(f"{process.public}/")
    links = re.findall(r'href="([^"]+)"', page.decode())
    assert status == 200
    assert "docs" in links
    assert all(process.get(f"{process.public}/{link}")[0] == 200 for link in links)
