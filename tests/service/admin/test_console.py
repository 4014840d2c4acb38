"""The console: its files and their policy in process, and the page itself in a real Chromium before a real server."""

import base64
import json
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, FilePayload, Page, Route, expect

from service.admin import console_files
from service.errors import ErrorMessage
from service.web.static_files import KINDS
from tests.support.planes import admin_app, ask, refused
from tests.support.serving import Process, serving, tiny_library
from tombola.sample_image import draw_sample
from tools.console.browser import CHROMIUM, chromium, complaints, sign_in

FOLDER: Final = console_files.FOLDER
SCRIPTS: Final = sorted(FOLDER.glob("*.js"))
PAGE: Final = (FOLDER / "index.html").read_text(encoding="utf-8")
SLOW_MS: Final = 90_000  # the machine may be busy
AUDIT_MS: Final = 600_000  # an audit is a process of its own, which begins by loading torch
CONTRAST: Final = 4.5  # WCAG 2.2, 1.4.3, level AA, for text
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
)


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
        assert {f"/console/{path.name}" for path in SCRIPTS} <= named
        for path in named:
            response = ask(admin_app(), "GET", path)
            assert response.status_code == 200, path
            assert response.headers["content-type"] == KINDS[Path(path).suffix]

    def test_other_names_are_not_found_and_nothing_outside_the_folder_is_served(self) -> None:
        for path in ("/console/none.js", "/console/..%2fauth.py", "/console/%2e%2e/auth.py", "/console/"):
            assert ask(admin_app(), "GET", path).status_code in (401, 404), path
        refused(ask(admin_app(), "GET", "/console/none.js"), 404, ErrorMessage.NOT_FOUND)

    def test_nothing_comes_from_elsewhere(self) -> None:
        for path in FOLDER.iterdir():
            text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"https?:|//\w+\.\w", text), path.name

    def test_text_never_becomes_html_but_in_the_report_s_frame(self) -> None:
        unsafe = [
            path.name for path in SCRIPTS if re.search("innerHTML|insertAdjacent|document.write|eval", read(path))
        ]
        assert unsafe == ["audits.js"]
        assert len(re.findall("innerHTML", read(FOLDER / "audits.js"))) == 1

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
    with chromium() as instance:
        yield instance


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
        page.keyboard.press("Tab")
        expect(page.get_by_role("button", name="Swap the library…")).to_be_focused()
        page.reload()
        expect(page.locator("#cost")).to_contain_text("Estimated cost")
        expect(page.get_by_role("table", name="Tickets of the library")).to_be_visible()
        reached: list[str] = []
        while "start" not in reached and len(reached) < 60:
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
        assert reached[0] == "Skip to the content"
        wanted = [
            "Live",
            "Library",
            "Audits",
            "sign-out",
            "swap",
            "file",
            "profile-smoke",
            "data",
            "epsilons",
            "images",
        ]
        assert [name for name in reached if name in {*wanted, "start"}] == [*wanted, "start"]
        page.get_by_role("link", name="Skip to the content").focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("main")).to_be_focused()


TAGS: Final = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
OURS: Final = {"runOnly": TAGS, "resultTypes": ["violations"], "iframes": False}  # an audit's report has its own tests


def barriers(page: Page) -> list[str]:
    """What axe finds wrong, each with its element: names, roles, structure, and contrast as the browser computes it."""
    violations = Axe().run(page, options=OURS).response["violations"]
    return [f"{one['id']}: {node['html'][:200]}" for one in violations for node in one["nodes"]]


@needs_chromium
@pytest.mark.parametrize("width", [360, 1440])
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
    sign_in(page, stand.url, stand.token)
    expect(page.locator("#cost")).to_contain_text("Estimated cost")
    page.get_by_text("all of the profile").click()
    page.get_by_label("Drop an image here").set_input_files(picture())
    expect(page.locator("#verdict")).to_contain_text("draws say")
    expect(page.get_by_role("table", name="Tickets of the library")).to_be_visible()
    assert barriers(page) == []
    page.get_by_role("button", name="Swap the library…").click()
    expect(page.get_by_role("dialog").get_by_role("button", name="Leave it")).to_be_focused()
    assert barriers(page) == []
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Swap the library…")).to_be_focused()


def picture(name: str = "ship.png", content: bytes | None = None) -> FilePayload:
    return {"name": name, "mimeType": "image/png", "buffer": draw_sample() if content is None else content}


REASONS: Final = {
    "loading": "the library is being verified and warmed up",
    "draining": "the server is shutting down",
    "engine": "the engine is not answering",
}


@needs_chromium
class TestLive:
    @pytest.mark.parametrize("reason", REASONS)
    def test_why_the_server_is_not_ready_is_said(self, page: Page, stand: Stand, reason: str) -> None:
        def unready(route: Route) -> None:
            overview = route.fetch().json()
            gone = dict.fromkeys(("library", "engine", "draws")) if reason == "loading" else {}
            route.fulfill(json={**overview, "ready": False, "reason": reason, **gone})

        page.route("**/admin/overview", unready)
        sign_in(page, stand.url, stand.token)
        state = page.get_by_role("status").filter(has_text="Not ready")
        expect(state).to_contain_text(REASONS[reason])
        expect(state).to_have_class("state bad")
        page.unroute_all(behavior="ignoreErrors")

    def test_trouble_stands_out(self, page: Page, stand: Stand) -> None:
        """Every second request turned away and every fourth failed, a full queue, and a ticket drawn too often."""
        looks = 0

        def troubled(route: Route) -> None:
            nonlocal looks
            looks += 1
            overview = route.fetch().json()
            traffic, queue, tickets = overview["traffic"], overview["queue"], overview["draws"]["tickets"]
            traffic["outcomes"] |= {"ok": 10 * looks, "shed": 20 * looks, "error": 10 * looks}
            queue["depth"] = queue["limit"]
            for row in tickets:
                row |= {"expected": 1000 * row["probability"], "drawn": 1000 * row["probability"]}
            tickets[0]["drawn"] *= 1.5
            route.fulfill(json=overview)

        page.route("**/admin/overview", troubled)
        sign_in(page, stand.url, stand.token)
        expect(page.locator("#tile-shed")).to_have_text("50.0 %")
        expect(page.locator("#tile-failed")).to_have_text("25.0 %")
        expect(page.locator(".tile.warn")).to_have_count(3)
        expect(page.locator("#draws-verdict")).to_contain_text("Off the law: resnet18 at 20 %")
        expect(page.locator("#draws-verdict")).to_have_class("bad")
        assert barriers(page) == []
        page.unroute_all(behavior="ignoreErrors")

    def test_readiness_rates_and_the_law(self, inside: Page, stand: Stand) -> None:
        expect(inside.locator("#state")).to_contain_text("Ready")
        assert stand.process is not None
        picture = draw_sample()
        for _ in range(5):
            assert stand.process.classify(picture)[0] == 200
        expect(inside.locator("#tile-p50")).to_contain_text("s")
        expect(inside.locator("#tile-rate")).not_to_have_text(re.compile("^(0|…)$"))
        for _ in range(8):
            inside.evaluate(TRY_AGAIN, stand.token)
        expect(inside.locator("#draws-verdict")).to_contain_text("within chance")
        expect(inside.get_by_role("table", name="resnet34")).to_contain_text("20 % kept")

    def test_the_library_is_shown_with_digests_and_claims(self, inside: Page, stand: Stand) -> None:
        tickets = inside.get_by_role("table", name="Tickets of the library")
        expect(tickets.get_by_role("row")).to_have_count(5)
        manifest = json.loads(read(stand.folder / "library" / "manifest.json"))
        expect(tickets).to_contain_text(manifest["entries"][0]["sha256"][:12])
        tickets.get_by_text("commit").first.click()
        expect(tickets.get_by_text("searched for").first).to_be_visible()

    @pytest.mark.parametrize("width", [360, 1440])
    def test_nothing_is_wider_than_the_window(self, inside: Page, width: int) -> None:
        inside.set_viewport_size({"width": width, "height": 800})
        expect(inside.get_by_role("table", name="Tickets of the library")).to_be_visible()
        assert inside.evaluate("document.documentElement.scrollWidth") == width


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

    def test_an_image_can_be_dropped(self, inside: Page) -> None:
        inside.locator("#drop").evaluate(DROP, base64.b64encode(draw_sample()).decode())
        expect(inside.locator("#verdict")).to_contain_text("draws say")
        expect(inside.locator("#tried-name")).to_have_text("dropped.png")

    def test_what_is_no_image_is_refused_in_words(self, inside: Page) -> None:
        inside.get_by_label("Drop an image here").set_input_files(picture("notes.png", b"no image"))
        expect(inside.locator("#verdict")).to_contain_text("unsupported format")


@needs_chromium
class TestAudits:
    def test_one_is_priced_started_watched_and_read_and_two_are_compared(self, inside: Page, stand: Stand) -> None:
        price = inside.locator("#cost")
        expect(price).to_contain_text("Estimated cost")
        inside.get_by_label("Norm", exact=True).select_option("l2")
        expect(inside.get_by_label("Epsilons")).to_have_value("0, 32, 64, 128, 192, 320")
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
        expect(panel.locator(".steps tbody tr").first).to_be_visible(timeout=AUDIT_MS)
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
        page.reload()
        boxes = page.get_by_role("checkbox", name=re.compile("Compare the audit"))
        expect(boxes).to_have_count(2)
        for index in range(2):
            boxes.nth(index).check()
        page.get_by_role("button", name="Compare two").click()
        compared = page.get_by_role("table", name="Two audits compared")
        expect(compared.get_by_role("row", name=re.compile("Clean accuracy"))).to_contain_text("0.0")
        expect(page.locator("#comparison")).to_contain_text("Same library, images, profile and seed")
        expect(page.locator("#experience")).to_contain_text("The last smoke audit here took")
        assert barriers(page) == []

    def test_one_is_cancelled(self, inside: Page) -> None:
        expect(inside.locator("#cost")).to_contain_text("Estimated cost")
        inside.get_by_label("How many").fill("500")
        inside.get_by_role("button", name="Start the audit").click()
        panel = inside.locator("#audit")
        panel.get_by_role("button", name="Cancel this audit").click()
        inside.get_by_role("dialog").get_by_role("button", name="Cancel the audit").click()
        expect(panel).to_contain_text("It was cancelled before its end")
        expect(inside.locator("#audit-list")).to_contain_text("cancelled")


@needs_chromium
class TestSwapping:
    def swap(self, page: Page) -> None:
        page.get_by_role("button", name="Swap the library…").click()
        page.get_by_role("dialog").get_by_role("button", name="Swap it").click()

    def test_another_library_takes_its_place_and_a_damaged_one_does_not(self, inside: Page, stand: Stand) -> None:
        second = tiny_library(stand.folder / "second", seed=500)
        before = inside.locator("#digest").text_content()
        assert before != second.digest
        stand.link(stand.folder / "second")
        self.swap(inside)
        expect(inside.locator("#swap-message")).to_contain_text(f"Now serving {second.digest[:12]}")
        expect(inside.locator("#digest")).to_have_text(second.digest)
        damaged = Path(shutil.copytree(stand.folder / "second", stand.folder / "damaged"))
        (damaged / "manifest.json").write_text("{}")
        stand.link(damaged)
        self.swap(inside)
        expect(inside.locator("#swap-message")).to_contain_text("the old one keeps serving")
        expect(inside.locator("#digest")).to_have_text(second.digest)
        stand.link(stand.folder / "second")


@needs_chromium
class TestTheServerGoesAway:
    def test_it_is_said_and_the_page_comes_back_by_itself(self, inside: Page, stand: Stand) -> None:
        state, banner = inside.locator("#state"), inside.locator("#banner")
        expect(state).to_contain_text("Ready")
        assert stand.process is not None
        stand.process.process.send_signal(signal.SIGTERM)
        expect(state).to_contain_text("Not ready: the server is shutting down")
        stand.end()
        expect(banner).to_contain_text("No answer from the server")
        expect(state).to_contain_text("Unknown")
        stand.start()
        expect(banner).to_contain_text("The server is back")
        expect(state).to_contain_text("Ready")
        expect(inside.get_by_label("Admin token")).to_be_hidden()

    def test_a_token_that_is_no_longer_right_leads_back_to_signing_in(self, inside: Page, stand: Stand) -> None:
        inside.evaluate("sessionStorage.setItem('tombola-token', 'another-token-altogether')")
        inside.reload()
        expect(inside.get_by_role("alert").filter(has_text="no longer accepted")).to_be_visible()
        expect(inside.get_by_label("Admin token")).to_be_visible()
