"""The console: its files and their policy in process, and the page itself in a real Chromium before a real server."""

import base64
import hashlib
import json
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, FilePayload, Locator, Page, Route, expect

from service.admin import console_files
from service.admin.audit_jobs import result_of
from service.audit.report.model import read_report
from service.errors import ErrorMessage
from service.web.static_files import KINDS
from tests.support.planes import admin_app, ask, refused
from tests.support.serving import Process, serving, tiny_library
from tombola.sample_image import draw_sample
from tools.console.browser import CHROMIUM, chromium, complaints, sign_in

pytestmark = pytest.mark.usefixtures("warm_start")

FOLDER: Final = console_files.FOLDER
VENDORED: Final = {  # of uPlot 1.6.32, as FOLDER's README says
    "uPlot.esm.js": "5dd9b3281aa64b461b42d9945f6adb2649d346502b12281a9ae0d46599a80eba",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
}
OURS: Final = sorted(path for path in FOLDER.iterdir() if path.suffix in KINDS and path.name not in VENDORED)
SCRIPTS: Final = [path for path in OURS if path.suffix == ".js"]
PAGE: Final = (FOLDER / "index.html").read_text(encoding="utf-8")
SLOW_MS: Final = 90_000  # the machine may be busy
AUDIT_MS: Final = 600_000  # an audit is a process of its own, which begins by loading torch
CONTRAST: Final = 4.5  # WCAG 2.2, 1.4.3, level AA, for text
PUBLISHED: Final = Path("service/audit/results/report.json")
PAIRS: Final = (
    ("ink", "card"),
    ("ink", "ground"),
    ("soft", "card"),
    ("soft", "ground"),
    ("ink", "faint"),
    ("accent", "card"),
    ("on-accent", "accent"),
    ("good", "good-ground"),
    ("bad", "bad-ground"),
    ("bad", "card"),
    ("warn", "card"),
    ("warn", "warn-ground"),
    ("ink", "low-1"),
    ("ink", "low-2"),
    ("on-strong", "low-3"),
    ("ink", "high-1"),
    ("ink", "high-2"),
    ("on-strong", "high-3"),
)
MOST_LINES: Final = 250
SCREENS: Final = 5  # of the window's height, that a page may be long
TABS: Final = {"live": "Live", "try": "Try an image", "audits": "Audits", "library": "Library"}


class TestFiles:
    def test_the_page_needs_no_token_and_its_policy_allows_nothing_foreign_and_nothing_inline(self) -> None:
        response = ask(admin_app(), "GET", "/")
        assert response.status_code == 200
        policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert policy["trusted-types"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["cache-control"] == "no-store"

    def test_the_report_s_frame_may_have_styles_but_no_script(self) -> None:
        policy = ask(admin_app(), "GET", "/console/report.html").headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src" not in policy
        assert "sandbox allow-same-origin" in policy

    def test_every_file_that_the_page_names_is_there_with_its_type(self) -> None:
        text = PAGE + "".join(path.read_text(encoding="utf-8") for path in SCRIPTS)
        named = set(re.findall(r'"(/console/[^"]+)"', text)) | {
            f"/console/{name}" for name in re.findall(r'from "\./([^"]+)"', text)
        }
        assert {f"/console/{path.name}" for path in SCRIPTS} | {f"/console/{name}" for name in VENDORED} <= named
        for path in named:
            response = ask(admin_app(), "GET", path)
            assert response.status_code == 200, path
            assert response.headers["content-type"] == KINDS[Path(path).suffix]

    def test_other_names_are_not_found_and_nothing_outside_the_folder_is_served(self) -> None:
        for path in ("/console/none.js", "/console/..%2fauth.py", "/console/%2e%2e/auth.py", "/console/"):
            assert ask(admin_app(), "GET", path).status_code in (401, 404), path
        refused(ask(admin_app(), "GET", "/console/none.js"), 404, ErrorMessage.NOT_FOUND)

    def test_nothing_comes_from_elsewhere(self) -> None:
        for path in OURS:
            text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"https?:|//\w+\.\w", text), path.name

    def test_text_never_becomes_html_but_in_the_report_s_frame(self) -> None:
        writers = [
            path.name for path in SCRIPTS if re.search("innerHTML|insertAdjacent|document.write|eval", read(path))
        ]
        assert writers == ["audit_view.js"]
        assert len(re.findall("innerHTML", read(FOLDER / "audit_view.js"))) == 1

    def test_scripts_are_small(self) -> None:
        assert {path.name: lines for path in SCRIPTS if (lines := len(read(path).splitlines())) > MOST_LINES} == {}

    def test_the_charting_library_is_the_published_one_with_its_licence(self) -> None:
        assert {name: hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() for name in VENDORED} == VENDORED
        assert "MIT License" in read(FOLDER / "uPlot.LICENSE.txt")
        refused(ask(admin_app(), "GET", "/console/README.md"), 404, ErrorMessage.NOT_FOUND)

    def test_every_field_of_the_page_has_a_label(self) -> None:
        fields = re.findall(r"<(?:input|select)[^>]*\bid=\"([^\"]+)\"", PAGE)
        assert set(fields) <= set(re.findall(r"<label[^>]*\bfor=\"([^\"]+)\"", PAGE))

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_text_stands_out_from_its_ground(self, scheme: str) -> None:
        light, dark = re.findall(r":root \{(.*?)\}", read(FOLDER / "style.css"), re.DOTALL)
        colours = dict(re.findall(r"--([\w-]+): #(\w{6});", light if scheme == "light" else dark))
        for text, ground in PAIRS:
            assert contrast(colours[text], colours[ground]) >= CONTRAST, (text, ground)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def contrast(one: str, other: str) -> float:
    """WCAG 2.2: (lighter + 0.05) / (darker + 0.05)."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# In the browser

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian: chromium)")
expect.set_options(timeout=SLOW_MS)


@dataclass
class Stand:
    """A server that can be ended and started again at the same address, its library behind a link."""

    folder: Path
    ports: tuple[int, int]
    stack: ExitStack
    process: Process | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[1]}/"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def token(self) -> str:
        return read(self.state / "admin-token").strip()

    def start(self) -> None:
        """Told to end by SIGTERM, it drains until it is told again."""
        public, admin = (str(port) for port in self.ports)
        flags = ("--port", public, "--admin-port", admin, "--drain-delay-s", "3600")
        self.process = self.stack.enter_context(serving(self.folder / "library", self.state, *flags))

    def end(self) -> None:
        assert self.process is not None
        assert self.process.end(signal.SIGINT) == 0
        self.stack.close()

    def link(self, library: Path) -> None:
        """What is served from the next swap on."""
        new = self.folder / "new"
        new.symlink_to(library)
        new.rename(self.folder / "library")


def free_ports() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        return one.getsockname()[1], two.getsockname()[1]


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    folder = tmp_path_factory.mktemp("console")
    tiny_library(folder / "first")
    with ExitStack() as stack:
        stand = Stand(folder, free_ports(), stack)
        stand.link(folder / "first")
        stand.start()
        yield stand


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as made:
        yield made


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A fresh tab; at the end, that the browser had nothing to complain about."""
    context = browser.new_context()
    context.set_default_timeout(SLOW_MS)
    page = context.new_page()
    problems = complaints(page)
    yield page
    context.close()
    assert problems == []


@pytest.fixture
def inside(page: Page, stand: Stand) -> Page:
    sign_in(page, stand.url, stand.token)
    return page


@needs_chromium
class TestSigningIn:
    def test_a_wrong_token_is_refused_in_words(self, page: Page, stand: Stand) -> None:
        page.goto(stand.url)
        page.get_by_label("Admin token").fill("not-the-token-of-this-server")
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("alert").filter(has_text="not this server's admin token")).to_be_visible()
        expect(page.get_by_role("heading", name="Live")).to_be_hidden()

    def test_the_token_stays_in_the_tab_and_out_of_urls(self, page: Page, stand: Stand, browser: Browser) -> None:
        urls: list[str] = []
        page.on("request", lambda request: urls.append(request.url))
        sign_in(page, stand.url, stand.token)
        page.reload()
        expect(page.get_by_role("heading", name="Live")).to_be_visible()
        assert page.context.cookies() == []
        assert page.evaluate("localStorage.length") == 0
        assert urls
        assert not any(stand.token in url for url in urls)
        assert all(url.startswith(stand.url) for url in urls)
        assert stand.token not in page.content()

    def test_a_copy_of_the_tab_has_no_token(self, inside: Page) -> None:
        """As one that is duplicated or opened again, whose sessionStorage the browser fills from the first's."""
        with inside.expect_popup() as opening:
            inside.evaluate("url => { window.open(url) }", inside.url)
        copy = opening.value
        expect(copy.get_by_role("heading", name="Sign in")).to_be_visible()
        assert copy.evaluate("sessionStorage.length") == 0
        assert inside.evaluate("sessionStorage.length") == 1

    def test_signing_out_forgets_it(self, inside: Page) -> None:
        inside.get_by_role("button", name="Sign out").click()
        expect(inside.get_by_label("Admin token")).to_be_focused()
        assert inside.evaluate("sessionStorage.length") == 0
        inside.reload()
        expect(inside.get_by_role("heading", name="Sign in")).to_be_visible()

    def test_it_works_from_the_keyboard_alone(self, page: Page, stand: Stand) -> None:
        page.goto(stand.url)
        page.get_by_label("Admin token").focus()
        page.keyboard.type(stand.token)
        page.keyboard.press("Enter")
        expect(page.get_by_role("main")).to_be_focused()
        start = page.get_by_role("link", name="Start an audit")
        expect(start).to_be_visible()
        page.keyboard.press("Tab")
        expect(start).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.locator("#cost")).to_contain_text("Estimated cost")
        page.reload()
        expect(page.locator("#cost")).to_contain_text("Estimated cost")
        reached: list[str] = []
        while "start" not in reached and len(reached) < 60:
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
        assert reached[0] == "skip"
        wanted = ["Live", "Try", "Audits", "Library", "sign-out", "profile-smoke", "data", "epsilons", "images"]
        assert [name for name in reached if name in {*wanted, "start"}] == [*wanted, "start"]
        page.get_by_role("link", name="Skip to the content").focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("main")).to_be_focused()
        assert page.url.endswith("#audits/new")


TAGS: Final = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
OPTIONS: Final = {"runOnly": TAGS, "resultTypes": ["violations"], "iframes": False}  # a report has its own tests


def barriers(page: Page) -> list[str]:
    """What axe finds wrong, each with its element: names, roles, structure, and contrast as the browser computes it."""
    violations = Axe().run(page, options=OPTIONS).response["violations"]
    return [f"{one['id']}: {node['html'][:200]}" for one in violations for node in one["nodes"]]


def show(page: Page, hash: str) -> None:
    page.evaluate("hash => { location.hash = hash }", hash)


@needs_chromium
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_barrier(page: Page, stand: Stand, scheme: Literal["light", "dark"], width: int) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(stand.url)
    expect(page.get_by_label("Admin token")).to_be_visible()
    assert barriers(page) == []
    page.get_by_label("Admin token").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#sign-in-error")).not_to_be_empty()
    assert barriers(page) == []
    page.route("**/admin/overview", with_everything)
    sign_in(page, stand.url, stand.token)
    expect(page.locator("#curve canvas")).to_be_visible()
    expect(page.locator("#heat table")).to_be_visible()
    assert barriers(page) == []
    show(page, "#audits/new")
    expect(page.locator("#cost")).to_contain_text("Estimated cost")
    page.get_by_text("all of the profile").click()
    assert barriers(page) == []
    page.get_by_label("Drop an image here").set_input_files(picture())
    expect(page.locator("#verdict")).to_contain_text("draws say")
    assert barriers(page) == []
    show(page, "#library")
    page.locator("#tickets > details > summary").last.click()
    page.get_by_role("button", name="Reload…").click()
    expect(page.locator("#dry-run")).to_be_focused()
    assert barriers(page) == []
    page.get_by_role("button", name="Close").click()
    expect(page.get_by_role("button", name="Reload…")).to_be_focused()
    page.unroute_all(behavior="ignoreErrors")


def with_everything(route: Route) -> None:
    """The overview, with draws of every level and the figures of an audit of another library."""
    data = route.fetch().json()
    data["draws"]["images"] = 1000
    for row, deviation in zip(data["draws"]["tickets"], (-6.5, -2.2, 1.5, 3.4), strict=True):
        row |= {"drawn": 1000, "expected": 1000, "deviation": deviation}
    route.fulfill(json={**data, "audit": measured()})


def measured(**changes: Any) -> dict[str, Any]:
    """A finished audit as the overview has it: that of the committed report."""
    report = read_report(PUBLISHED)
    result = result_of(report).model_dump(mode="json")
    result["secrecy"] = {"value": 0.012, "low": -0.004, "high": 0.03}
    job = {"id": "20260101-000000-00000000", "state": "done", "created": 1.7e9, "started": 1.7e9, "finished": 1.7e9}
    cost = {"attacks": 208, "giga_multiply_adds": 1.0, "seconds": 100, "cpu_share": 1.0, "seconds_now": 100}
    request = {"profile": "standard", "data": "photographs-of-" + "very-" * 30 + "long-names.zip"}
    return {
        **job,
        "request": request,
        "cost": cost,
        "digest": report.library.digest,
        "why": "",
        "result": result,
        **changes,
    }


def picture(name: str = "ship.png", content: bytes | None = None) -> FilePayload:
    return {"name": name, "mimeType": "image/png", "buffer": draw_sample() if content is None else content}


REASONS: Final = {
    "loading": ("the library is being verified and warmed up", "state warn"),
    "draining": ("the server is shutting down as planned", "state warn"),
    "engine": ("the engine is not answering", "state bad"),
}


@needs_chromium
class TestTabs:
    def test_each_has_an_address_that_can_be_opened_reloaded_and_gone_back_to(self, page: Page, stand: Stand) -> None:
        sign_in(page, f"{stand.url}#library", stand.token)
        expect(page.get_by_role("heading", name="Library", exact=True)).to_be_visible()
        for name, heading in TABS.items():
            link = page.get_by_role("navigation", name="Sections").get_by_role("link", name=name.capitalize())
            link.click()
            expect(page.get_by_role("heading", name=heading, exact=True)).to_be_visible()
            expect(link).to_have_attribute("aria-current", "page")
            expect(page.locator("#console > section:visible")).to_have_count(1)
            assert page.url == f"{stand.url}#{name}"
            assert page.title() == f"{heading} · Tombola"
        page.go_back()
        expect(page.get_by_role("heading", name="Audits", exact=True)).to_be_visible()
        page.reload()
        expect(page.get_by_role("heading", name="Audits", exact=True)).to_be_visible()

    @pytest.mark.parametrize(
        "hash", ["#", "#nothing", "#%", "#live/%E0%A4%A", "#<img src=x onerror=alert(1)>", "#__proto__"]
    )
    def test_an_address_that_names_no_tab_shows_the_first(self, inside: Page, hash: str) -> None:
        show(inside, "#library")
        show(inside, hash)
        expect(inside.get_by_role("heading", name="Live")).to_be_visible()

    @pytest.mark.parametrize(
        ("hash", "reason"),
        [
            ("#audits/20200101-000000-00000000", "No such audit."),
            ("#audits/..%2F..%2Flibrary", "No such"),
            ("#audits/<img src=x onerror=alert(1)>", "No such audit."),
            ("#audits/compare", "Choose two audits in the list."),
            ("#audits/compare/x/y", "No such audit."),
        ],
    )
    def test_an_audit_that_is_not_there_is_refused_in_words(self, inside: Page, hash: str, reason: str) -> None:
        show(inside, hash)
        expect(inside.locator("#audits .error:visible")).to_contain_text(reason)

    @pytest.mark.parametrize("width", [360, 1280])
    def test_no_tab_scrolls_sideways_or_is_longer_than_five_screens(self, page: Page, stand: Stand, width: int) -> None:
        page.set_viewport_size({"width": width, "height": 800})
        page.route("**/admin/overview", with_everything)
        page.route("**/admin/audits", many_audits)
        page.route("**/admin/library", forty_tickets)
        sign_in(page, stand.url, stand.token)
        expect(page.locator("#curve canvas")).to_be_visible()
        sizes = {"live": page_size(page)}
        for tab, ready in (
            ("try", "#drop"),
            ("audits", "#audit-list table"),
            ("audits/new", "#profile-smoke"),
            ("library", "#tickets"),
        ):
            show(page, f"#{tab}")
            expect(page.locator(ready).first).to_be_visible()
            sizes[tab] = page_size(page)
        assert {tab: size[0] for tab, size in sizes.items()} == dict.fromkeys(sizes, width)
        assert {tab: size[1] for tab, size in sizes.items() if size[1] > SCREENS * 800} == {}
        if width == 1280:
            assert sizes["live"][1] <= 800  # the first screen answers without scrolling
        page.unroute_all(behavior="ignoreErrors")


def page_size(page: Page) -> tuple[int, int]:
    width, height = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
    return int(width), int(height)


def many_audits(route: Route) -> None:
    """Forty, of every state."""
    states = ["running", "queued", "failed", "cancelled", "interrupted"]
    rows = [measured(id=f"20260101-{number:06}-00000000", created=1.7e9 - number) for number in range(40)]
    for row, state in zip(rows, states, strict=False):
        row |= {"state": state, "result": None}
    route.fulfill(json={"audits": rows})


def forty_tickets(route: Route) -> None:
    data = route.fetch().json()
    entries = [
        {**entry, "name": f"{entry['name']}-{'long' * 10}-{number}"}
        for number in range(10)
        for entry in data["entries"]
    ]
    route.fulfill(json={**data, "entries": entries, "classes": [f"{name}-{'long' * 10}" for name in data["classes"]]})


@needs_chromium
class TestLive:
    @pytest.mark.parametrize("reason", REASONS)
    def test_why_the_server_is_not_ready_is_said(self, page: Page, stand: Stand, reason: str) -> None:
        def unready(route: Route) -> None:
            data = route.fetch().json()
            gone = dict.fromkeys(("library", "engine", "draws")) if reason == "loading" else {}
            route.fulfill(json={**data, "ready": False, "reason": reason, **gone})

        page.route("**/admin/overview", unready)
        sign_in(page, stand.url, stand.token)
        state = page.locator("#state")
        text, name = REASONS[reason]
        expect(state).to_contain_text(text)
        expect(state).to_have_class(name)
        page.unroute_all(behavior="ignoreErrors")

    def test_trouble_stands_out(self, page: Page, stand: Stand) -> None:
        """Every second request turned away and every fourth failed, a full queue, and a ticket drawn too often."""

        def troubled(route: Route) -> None:
            data = route.fetch().json()
            data["now"] |= {"turned_away": 0.5, "failed": 0.25, "p99_s": 1.5}
            data["queue"]["depth"] = data["queue"]["limit"]
            data["draws"]["images"] = 1000
            for row in data["draws"]["tickets"]:
                row |= {"expected": 500, "drawn": 500, "deviation": 0.0}
            data["draws"]["tickets"][0] |= {"drawn": 750, "deviation": 15.8}
            route.fulfill(json=data)

        page.route("**/admin/overview", troubled)
        sign_in(page, stand.url, stand.token)
        expect(page.locator("#tile-shed")).to_have_text("50.0 %")
        expect(page.locator("#tile-failed")).to_have_text("25.0 %")
        expect(page.locator("#tile-p99")).to_have_text("1.5 s")
        expect(page.locator(".tile.warn")).to_have_count(4)
        expect(page.locator("#draws-verdict")).to_contain_text("Not as expected: resnet18 at 20 %")
        expect(page.locator("#draws-verdict")).to_have_class("bad")
        expect(page.locator("#heat [data-level='4']")).to_have_text("+15.8")
        expect(page.locator("#heat [data-level='0']")).to_have_count(3)
        assert barriers(page) == []
        page.unroute_all(behavior="ignoreErrors")

    def test_readiness_rates_history_and_draws(self, inside: Page, stand: Stand) -> None:
        expect(inside.locator("#state")).to_have_text("Ready")
        assert stand.process is not None
        picture = draw_sample()
        for _ in range(5):
            assert stand.process.classify(picture)[0] == 200
        expect(inside.locator("#tile-p50")).to_contain_text("s")
        expect(inside.locator("#tile-rate")).not_to_have_text(re.compile("^(0|–)$"))
        expect(inside.locator(".tile:first-child .spark path")).to_have_attribute("d", re.compile("^M.*L"))
        for _ in range(8):
            inside.evaluate(TRY_AGAIN, stand.token)
        expect(inside.locator("#draws-verdict")).to_contain_text("As expected: all within chance")
        expect(inside.locator("#heat td[data-level]")).to_have_count(4)

    def test_history_outlives_the_tab(self, inside: Page) -> None:
        """The server keeps it: a reload shows the same lines at once."""
        line = inside.locator(".tile:first-child .spark path")
        expect(line).to_have_attribute("d", re.compile("^M.*L"))
        before = line.get_attribute("d") or ""
        inside.reload()
        expect(line).to_have_attribute("d", re.compile("^M.*L"))
        assert len((line.get_attribute("d") or "").split("L")) >= len(before.split("L"))

    def test_the_last_audit_s_figure_has_its_interval_age_and_library(self, page: Page, stand: Stand) -> None:
        page.route("**/admin/overview", with_everything)
        sign_in(page, stand.url, stand.token)
        robust = page.locator("#robust")
        figure = measured()["result"]["robust"]
        expect(robust).to_contain_text(f"{100 * figure['value']:.1f} %")
        expect(robust).to_contain_text(f"[{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]")
        expect(robust).to_contain_text("at ε = 8/255")
        expect(robust).to_contain_text("days ago")
        expect(robust).to_contain_text("another than the one served")
        expect(robust).to_contain_text("+1.2 points [−0.4, +3.0]: no difference shown")
        numbers = page.get_by_role("table", name="Accuracy against epsilon")
        expect(numbers.get_by_role("row")).to_have_count(len(measured()["result"]["curve"]) + 1)
        assert page.locator("#curve canvas").evaluate(COLOURED) > 100
        page.unroute_all(behavior="ignoreErrors")

    def test_without_an_audit_the_first_screen_says_how_to_get_a_figure(self, page: Page, stand: Stand) -> None:
        page.route("**/admin/overview", lambda route: route.fulfill(json={**route.fetch().json(), "audit": None}))
        sign_in(page, stand.url, stand.token)
        expect(page.locator("#robust")).to_contain_text("No audit of this server has measured anything yet")
        expect(page.locator("#curve")).to_be_hidden()
        page.get_by_role("link", name="Start an audit").click()
        expect(page.get_by_role("heading", name="Start an audit")).to_be_visible()
        page.unroute_all(behavior="ignoreErrors")


COLOURED: Final = """canvas => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let count = 0;
  for (let index = 3; index < data.length; index += 4) count += data[index] > 0;
  return count;
}"""


TRY_AGAIN: Final = """token => fetch("/console/icon.svg").then(() => {
  const canvas = new OffscreenCanvas(32, 32);
  canvas.getContext("2d").fillRect(4, 4, 20, 20);
  return canvas.convertToBlob().then((body) =>
    fetch("/admin/try", { method: "POST", body, headers: { authorization: `Bearer ${token}` } }));
}).then((response) => response.status)"""


DROP: Final = """(place, content) => {
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
  for (const kind of ["dragenter", "dragover", "drop"]) {
    place.dispatchEvent(new DragEvent(kind, { dataTransfer, bubbles: true, cancelable: true }));
  }
}"""


@needs_chromium
class TestTryingAnImage:
    def test_twenty_draws_say_what_they_see(self, inside: Page) -> None:
        inside.get_by_label("Drop an image here").set_input_files(picture())
        verdict = inside.locator("#verdict")
        expect(verdict).to_contain_text(re.compile("(All 20|of 20) draws say"))
        expect(inside.get_by_role("img", name="The image that was tried")).to_be_visible()
        inside.get_by_role("button", name="Twenty more draws").click()
        expect(verdict.get_by_role("table")).to_be_visible()

    @pytest.mark.parametrize("place", ["#drop", "#drop-live"])
    def test_an_image_can_be_dropped(self, inside: Page, place: str) -> None:
        inside.locator(place).evaluate(DROP, base64.b64encode(draw_sample()).decode())
        expect(inside.locator("#verdict")).to_contain_text("draws say")
        expect(inside.locator("#tried-name")).to_have_text("dropped.png")
        assert inside.url.endswith("#try")
        expect(inside.locator("#trial-input")).to_have_text(
            "The networks see 32 × 32 pixels; others are stretched (bilinear)."
        )

    def test_what_is_no_image_is_refused_in_words(self, inside: Page) -> None:
        inside.get_by_label("Drop an image here").set_input_files(picture("notes.png", b"no image"))
        expect(inside.locator("#verdict")).to_contain_text("unsupported format")
        expect(inside.locator("#again")).to_be_hidden()  # the same file would be refused again


@needs_chromium
class TestAudits:
    def test_one_is_priced_started_watched_and_read_and_two_are_compared(self, inside: Page, stand: Stand) -> None:
        show(inside, "#audits/new")
        price = inside.locator("#cost")
        expect(price).to_contain_text("Estimated cost")
        inside.get_by_label("Norm", exact=True).select_option("l2")
        expect(inside.get_by_label("Epsilons")).to_have_attribute("placeholder", "0, 32, 64, 128, 192, 320")
        expect(price).to_contain_text("at ε 128 in 255ths, l2.")
        inside.get_by_label("Norm", exact=True).select_option("linf")
        inside.get_by_label("How many").fill("none")
        expect(price).to_contain_text("is not a number")
        expect(inside.get_by_role("button", name="Start the audit")).to_be_disabled()
        inside.get_by_label("How many").fill("2")
        inside.get_by_text("all of the profile").click()
        inside.get_by_label("fgsm").check()
        expect(price).to_contain_text("Estimated cost")
        inside.get_by_role("button", name="Start the audit").click()
        panel = inside.locator("#audit")
        expect(panel.get_by_role("progressbar")).to_be_visible()
        expect(panel.locator("#audit-worst")).to_contain_text(
            "left to the served ensemble at 8/255, the worst so far, by fgsm", timeout=AUDIT_MS
        )
        expect(panel.locator(".groups summary").first).to_contain_text("ticket resnet18-20 1 attack, worst")
        report = panel.frame_locator("iframe")
        expect(report.get_by_role("heading", name="Sanity checks")).to_be_visible(timeout=AUDIT_MS)
        expect(report.get_by_text("Not a measurement").first).to_be_visible()  # of generated images
        assert report.locator("body").evaluate("body => getComputedStyle(body).maxWidth") != "none"  # styles are let in
        assert barriers(inside) == []
        self.compare(inside, stand)

    def compare(self, page: Page, stand: Stand) -> None:
        """With the same audit again, as if it had been run twice."""
        first = next(path.parent for path in (stand.state / "audits").glob("*/report.json"))
        twin = shutil.copytree(first, first.with_name(first.name[:-8] + "0" * 8))
        job = json.loads(read(twin / "job.json"))
        (twin / "job.json").write_text(json.dumps({**job, "id": twin.name, "created": job["created"] + 60}))
        show(page, "#audits")
        page.reload()
        boxes = page.get_by_role("checkbox", name=re.compile("Compare the audit"))
        expect(boxes).to_have_count(2)
        for index in range(2):
            boxes.nth(index).check()
        page.get_by_role("button", name="Compare two").click()
        compared = page.get_by_role("table", name="Two audits compared")
        expect(compared.get_by_role("row", name=re.compile("Clean accuracy"))).to_contain_text("0.0")
        expect(page.locator("#comparison")).to_contain_text("Same library, images, profile and seed")
        assert barriers(page) == []
        page.reload()
        expect(compared).to_be_visible()  # a comparison has an address
        show(page, "#audits/new")
        expect(page.locator("#experience")).to_contain_text("The last smoke audit here took")
        show(page, "#audits")
        row = page.get_by_role("table", name="Audits").get_by_role("row").nth(1)
        expect(row).to_contain_text("not a measurement")
        expect(row).to_contain_text(first_digest(stand))
        assert barriers(page) == []

    def test_one_is_cancelled(self, inside: Page) -> None:
        show(inside, "#audits/new")
        expect(inside.locator("#cost")).to_contain_text("Estimated cost")
        inside.get_by_label("How many").fill("500")
        inside.get_by_role("button", name="Start the audit").click()
        panel = inside.locator("#audit")
        panel.get_by_role("button", name="Cancel this audit").click()
        inside.get_by_role("dialog").get_by_role("button", name="Cancel the audit").click()
        expect(panel).to_contain_text("It was cancelled before its end")
        panel.get_by_role("link", name="All audits").click()
        expect(inside.locator("#audit-list")).to_contain_text("cancelled")

    def test_steps_are_grouped_by_system_with_the_worst_so_far_and_the_time_left(
        self, page: Page, stand: Stand
    ) -> None:
        job = {**measured(), "state": "running", "finished": None, "result": None, "attempts": 1, "progress": None}
        steps = [
            ("fgsm", "tombola", 8, 0.6, 0.1, 30),
            ("eot-risk", "tombola", 8, 0.31, 0.2, 20),
            ("eot-risk", "tombola", 12, 0.1, 0.3, 15),
            ("fgsm", "best-ticket", 8, 0.2, 0.4, 10),
        ]
        lines = [
            {"id": "x", "attack": attack, "system": system, "epsilon": epsilon, "images": 128, "accuracy": accuracy}
            | {
                "tombola": accuracy + 0.05 if system == "best-ticket" else accuracy,
                "share": share,
                "seconds_left": left,
                "time": 1.7e9 + 100 * (place + 1),
            }
            for place, (attack, system, epsilon, accuracy, share, left) in enumerate(steps)
        ]
        body = "".join(f"event: step\ndata: {json.dumps(line)}\n\n" for line in lines)
        page.route("**/admin/audits/*", lambda route: route.fulfill(json=job))
        streams: list[Route] = []

        def stream(route: Route) -> None:
            """Breaks after the last step; the next one brings nothing yet."""
            streams.append(route)
            if len(streams) == 1:
                route.fulfill(body=body, content_type="text/event-stream")

        page.route("**/admin/audits/*/events", stream)
        sign_in(page, f"{stand.url}#audits/{job['id']}", stand.token)
        panel = page.locator("#audit")
        expect(panel.locator("#audit-worst")).to_contain_text(
            "25.0 % left to the served ensemble at 8/255, the worst so far, by fgsm on best-ticket"
        )
        left = "40 % of the attacks · 7 min since the start · about 10 s left for the attacks, at the speed so far"
        expect(panel.locator("#audit-left")).to_have_text(left)
        groups = panel.locator(".groups summary")
        expect(groups).to_have_text(
            [
                "tombola 3 attacks, worst 10.0 % at 12/255 (eot-risk)",
                "best-ticket 1 attack, worst 20.0 % at 8/255 (fgsm)",
            ]
        )
        groups.first.click()
        expect(panel.get_by_role("table", name="Attacks on tombola").get_by_role("row")).to_have_count(4)
        assert barriers(page) == []
        page.unroute_all(behavior="ignoreErrors")


def first_digest(stand: Stand) -> str:
    manifest = json.loads(read(stand.folder / "first" / "manifest.json"))
    return str(manifest["digest"])[:12]


@needs_chromium
class TestLibrary:
    def test_tickets_are_shown_by_structure_with_digests_and_claims(self, inside: Page, stand: Stand) -> None:
        show(inside, "#library")
        groups = inside.locator("#tickets > details > summary")
        expect(groups).to_have_count(2)
        expect(groups.first).to_contain_text("resnet18 2 networks · 20 to 50 % kept")
        tickets = inside.get_by_role("table", name="Tickets: resnet18")
        expect(tickets.get_by_role("row")).to_have_count(3)
        manifest = json.loads(read(stand.folder / "library" / "manifest.json"))
        expect(tickets).to_contain_text(manifest["entries"][0]["sha256"][:12])
        tickets.get_by_text("commit").first.click()
        expect(tickets.get_by_text("searched for").first).to_be_visible()

    def test_a_reload_shows_what_would_change_and_serves_that_alone_once_confirmed(
        self, inside: Page, stand: Stand
    ) -> None:
        second = tiny_library(stand.folder / "second", seed=500, structures=("resnet18", "wideresnet32"))
        show(inside, "#library")
        before = inside.locator("#digest").text_content() or ""
        assert before != second.digest
        reload, dry_run = inside.get_by_role("button", name="Reload…"), inside.locator("#dry-run")
        reload.click()
        expect(dry_run).to_contain_text("Nothing would change")
        expect(dry_run.locator("#serve")).to_have_count(0)
        stand.link(stand.folder / "second")
        reload.click()
        expect(dry_run).to_contain_text(f"{before[:12]} → {second.digest[:12]}")
        expect(dry_run).to_contain_text("2 new, 2 go, 2 changed, 0 as they are")
        expect(dry_run).to_contain_text(str(stand.folder / "library"))
        differences = dry_run.get_by_role("table", name="Tickets that differ")
        expect(differences.get_by_role("row", name="wideresnet32-20")).to_contain_text("new")
        expect(differences.get_by_role("row", name="wideresnet32-20")).to_contain_text("under attack 40.0 %")
        expect(differences.get_by_role("row", name="resnet34-50")).to_contain_text("goes")
        expect(differences.get_by_role("row", name="resnet18-20")).to_contain_text("other weights")
        assert barriers(inside) == []
        dry_run.get_by_role("button", name="Cancel").click()
        expect(inside.locator("#digest")).to_have_text(before)
        reload.click()
        dry_run.get_by_role("button", name=f"Serve {second.digest[:12]}").click()
        expect(inside.locator("#reload-status")).to_contain_text(f"Now serving {second.digest[:12]}")
        expect(inside.locator("#digest")).to_have_text(second.digest)

    def test_neither_a_damaged_library_nor_another_than_the_one_shown_is_served(
        self, inside: Page, stand: Stand
    ) -> None:
        show(inside, "#library")
        before = inside.locator("#digest").text_content() or ""
        third = tiny_library(stand.folder / "third", seed=900)
        stand.link(third.path)
        reload, status = inside.get_by_role("button", name="Reload…"), inside.locator("#reload-status")
        reload.click()
        serve = inside.get_by_role("button", name=f"Serve {third.digest[:12]}")
        expect(serve).to_be_visible()
        fourth = tiny_library(stand.folder / "fourth", seed=1300)
        stand.link(fourth.path)
        serve.click()
        expect(status).to_contain_text("not the one of that digest")
        damaged = Path(shutil.copytree(fourth.path, stand.folder / "damaged"))
        (damaged / "manifest.json").write_text("{}")
        stand.link(damaged)
        reload.click()
        expect(status).to_contain_text("the old one keeps serving")
        expect(inside.locator("#digest")).to_have_text(before)
        stand.link(stand.folder / "first")


def middle(element: Locator) -> float:
    """Of its height, in CSS pixels from the top."""
    box = element.bounding_box()
    assert box is not None
    return box["y"] + box["height"] / 2


@needs_chromium
class TestTheServerGoesAway:
    def test_it_is_said_and_the_page_comes_back_by_itself(self, inside: Page, stand: Stand) -> None:
        state, banner = inside.locator("#state"), inside.locator("#banner")
        expect(state).to_contain_text("Ready")
        assert stand.process is not None
        stand.process.process.send_signal(signal.SIGTERM)
        expect(state).to_contain_text("Draining: the server is shutting down as planned")
        expect(state).to_have_class("state warn")
        nav, way_out = inside.get_by_role("navigation", name="Sections"), inside.locator("#sign-out")
        assert middle(way_out) == pytest.approx(middle(nav), abs=12)  # the sentence leaves them on one line
        stand.end()
        expect(banner).to_contain_text("No answer from the server")
        expect(state).to_have_class("state away")
        stand.start()
        expect(banner).to_contain_text("The server is back")
        expect(state).to_contain_text("Ready")
        expect(inside.get_by_label("Admin token")).to_be_hidden()

    def test_a_token_that_is_no_longer_right_leads_back_to_signing_in(self, inside: Page, stand: Stand) -> None:
        inside.evaluate("sessionStorage.setItem('tombola-token', 'another-token-altogether')")
        inside.reload()
        expect(inside.get_by_role("alert").filter(has_text="no longer accepted")).to_be_visible()
        expect(inside.get_by_label("Admin token")).to_be_visible()
