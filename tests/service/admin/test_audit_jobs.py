"""Audits over the admin plane: accepted, run in their own process, cancelled, resumed, and refused with a reason."""

import asyncio
import errno
import gzip
import io
import json
import os
import subprocess
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from model_store.json_object import Json
from model_store.library import Library, write_library
from service.admin import audit_process
from service.admin.audit_jobs import AuditQueue
from service.admin.audit_process import LEAST_SHARE, SMOOTHING, CpuShare
from service.admin.audit_store import Job
from service.admin.audit_worker import run as run_job
from service.audit.checks.run import CHECKS
from service.audit.command import INVALID
from service.audit.errors import AuditConflict
from service.audit.events import StepEvent
from service.errors import ErrorMessage
from service.observability.metrics import Metrics
from service.settings import Settings
from tests.support.audit_models import tiny
from tests.support.planes import TOKEN, StandIn, admin_app, behind_a_port, refused
from tests.support.tickets import items, make_ticket
from tests.support.waiting import until
from tombola.cli import main

pytestmark = pytest.mark.usefixtures("warm_start")

PUBLISHED = Path("service/audit/results/report.json")
SMOKE: Json = {"profile": "smoke", "images": 2, "attacks": ["paper-eot"], "epsilons": [8]}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return tiny(tmp_path_factory.mktemp("library"), ("resnet18",))


class Plane:
    """The audits' routes behind the admin gate, without a port."""

    def __init__(self, library: Library, state: Path, **settings: Any) -> None:
        self.settings = Settings(library=library.path, state_dir=state, **settings)
        self.metrics = Metrics()
        self.jobs = AuditQueue(self.settings, self.metrics, lambda: library)
        self.app = admin_app(StandIn(library=library), self.metrics, jobs=self.jobs)

    def ask(self, method: str, path: str, token: str | None = TOKEN, **body: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            headers = {"authorization": f"Bearer {token}"} if token else {}
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://admin", headers=headers) as client:
                return await client.request(method, path, **body)

        return asyncio.run(send())

    def submit(self, **fields: Any) -> str:
        answer = self.ask("POST", "/admin/audits", json={**SMOKE, **fields})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def figure(self, attack: str, norm: str = "linf", epsilon: str = "8") -> float | None:
        labels = {"profile": "smoke", "norm": norm, "attack": attack, "epsilon": epsilon}
        return self.metrics.registry.get_sample_value("tombola_audit_accuracy", labels)

    def secrecy(self, bound: str) -> float | None:
        labels = {"profile": "smoke", "norm": "linf", "bound": bound}
        return self.metrics.registry.get_sample_value("tombola_audit_secrecy", labels)

    def add_done(
        self,
        value: float,
        *,
        verdict: str = "valid",
        digest: str | None = None,
        secrecy: dict[str, float] | None = None,
        **fields: Any,
    ) -> None:
        """A finished audit on disk, whose every attack left value."""
        job = self.jobs.store.get(self.submit(**fields))
        point = {"value": value, "low": value, "high": value, "epsilon": 8.0, "images": 128}
        report = json.loads(PUBLISHED.read_text("utf-8"))
        report |= {"verdict": verdict, "audit": {**report["audit"], "profile": "smoke", **fields}}
        report["systems"]["tombola"]["curve"] = [point]
        report["secrecy"] = {"difference": dict(secrecy)} if secrecy else None
        report["attacks"] = [{**report["attacks"][-1], "system": "tombola", "name": "eot-risk", "epsilon": 8.0}]
        report["attacks"][0]["expected"] = point
        (self.jobs.store.folder / job.id / "report.json").write_text(json.dumps(report))
        self.jobs.store.save(job.model_copy(update={"state": "done", "digest": digest or job.digest}))

    def state(self, audit: str) -> str:
        return str(self.ask("GET", f"/admin/audits/{audit}").json()["state"])


@pytest.fixture
def plane(library: Library, tmp_path: Path) -> Iterator[Plane]:
    made = Plane(library, tmp_path / "state")
    yield made
    made.jobs.stop()


class Pretend:
    """A worker that does nothing until it is told to end."""

    def __init__(self, started: list[Path], folder: Path) -> None:
        started.append(folder)
        self.ended = threading.Event()
        self.code = 0

    def wait(self, timeout: float | None = None) -> int:
        if not self.ended.wait(timeout):
            raise subprocess.TimeoutExpired("pretended", timeout or 0)
        return self.code

    def terminate(self) -> None:
        self.code = -15
        self.ended.set()

    def complete(self) -> None:
        self.ended.set()


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Path], list[Pretend]]:
    """Processes that only pretend: what is tested is the bookkeeping around them."""
    started: list[Path] = []
    made: list[Pretend] = []

    def spawn(folder: Path, _threads: int) -> Pretend:
        made.append(Pretend(started, folder))
        return made[-1]

    monkeypatch.setattr(audit_process, "spawn", spawn)
    return started, made


def test_an_audit_from_request_to_report(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real process, at another priority; its events, its report in both forms, its figures as gauges."""
    monkeypatch.setattr(audit_process, "NICENESS", 1)  # not 19: on a busy machine that may wait for ever
    plane.jobs.start()
    answer = plane.ask("POST", "/admin/audits", json=SMOKE)
    assert answer.status_code == 202
    assert answer.json()["state"] == "queued"
    assert answer.json()["cost"]["attacks"] > 0
    audit = answer.json()["id"]
    until(lambda: plane.jobs.process is not None, "the process")
    process = plane.jobs.process
    assert process is not None
    until(lambda: niceness(process.pid) in (1, None), "its priority")
    stream = plane.ask("GET", f"/admin/audits/{audit}/events").text
    assert stream.count("event: step") == answer.json()["cost"]["attacks"]
    assert stream.count("event: check") == len(CHECKS)
    assert stream.rstrip().endswith('data: {"state": "done", "why": ""}')
    report = plane.ask("GET", f"/admin/audits/{audit}/report.json").json()
    assert report["audit"]["profile"] == "smoke"
    page = plane.ask("GET", f"/admin/audits/{audit}/report")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    row = [row for row in report["attacks"] if row["system"] == "tombola" and row["epsilon"] == 8][-1]
    until(lambda: plane.figure(row["name"]) == row["expected"]["value"], "its figure")
    assert plane.figure("all") is None  # not all attacks were asked for
    until(lambda: plane.metrics.value("audit_runs_total", kind="smoke", outcome="done") == 1, "its count")
    assert plane.ask("GET", "/admin/audits").json()["audits"][0]["id"] == audit
    shown = plane.ask("GET", f"/admin/audits/{audit}").json()
    assert "library" not in shown
    assert shown["progress"]["share"] == 1


def test_the_command_asks_a_running_service_shows_how_it_goes_and_keeps_the_report(
    plane: Plane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit_process, "NICENESS", 1)
    plane.jobs.start()
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    words = ["--profile", "smoke", "--images", "2", "--attacks", "paper-eot", "--epsilons", "8"]
    with behind_a_port(plane.app) as place:
        words += ["--admin-url", f"http://{place}", "--out", str(tmp_path / "out")]
        assert main(["audit", *words]) == 2
        assert "401" in capsys.readouterr().err
        code = main(["audit", *words, "--token-file", str(tmp_path / "token")])
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert code == (INVALID if report["verdict"] == "invalid" else 0)
    shown = capsys.readouterr().out
    assert shown.count("\ncheck ") == len(CHECKS)
    assert "%  paper-eot on tombola" in shown
    assert f"report {report['digest'][:12]}" in shown
    assert (tmp_path / "out" / "report.html").read_text("utf-8").startswith("<!doctype html>")


def test_only_whole_valid_audits_of_the_served_library_say_what_all_attacks_left(plane: Plane) -> None:
    """What an alert on a floor reads must not rise because a later audit was asked for less, or was broken."""
    plane.add_done(0.25)
    plane.add_done(0.31, seed=1)
    plane.add_done(0.6, attacks=["eot-risk"])
    plane.add_done(0.9, norm="l2")
    plane.add_done(0.7, digest="0" * 64)
    plane.jobs.refresh()
    assert plane.figure("all") == 0.31  # the last of its kind
    assert plane.figure("eot-risk") == 0.6  # the last that ran it
    assert plane.figure("all", norm="l2") == 0.9
    plane.add_done(0.99, verdict="invalid")
    plane.jobs.gauges.invalidate()
    plane.jobs.refresh()
    assert plane.figure("all") is None


def test_what_the_secret_is_worth_is_a_gauge_and_stands_in_the_list(plane: Plane) -> None:
    plane.add_done(0.31)
    plane.jobs.refresh()
    assert plane.secrecy("value") is None  # not measured
    plane.add_done(0.31, secrecy={"value": 0.013, "low": 0.005, "high": 0.022})
    plane.jobs.gauges.invalidate()
    plane.jobs.refresh()
    assert [plane.secrecy(bound) for bound in ("value", "low", "high")] == [0.013, 0.005, 0.022]
    job = plane.jobs.store.all()[0]
    plane.jobs.store.save(job.model_copy(update={"result": plane.jobs.result(job.id)}))
    rows = plane.ask("GET", "/admin/audits").json()["audits"]
    (row,) = [row for row in rows if row["id"] == job.id]
    assert row["result"]["secrecy"] == {"value": 0.013, "low": 0.005, "high": 0.022}


def test_the_last_measurement_is_of_the_served_library_and_of_whole_profiles_if_there_is_one(plane: Plane) -> None:
    def finish(value: float, *, whole: bool = False, **fields: Any) -> str:
        plane.add_done(value, **fields)
        job = max(plane.jobs.store.all(), key=lambda job: job.created)
        changes: dict[str, Any] = {"result": plane.jobs.result(job.id), "finished_at": time.time()}
        if whole:
            changes["request"] = {"profile": "smoke", "images": 2}
        plane.jobs.store.save(job.model_copy(update=changes))
        return job.id

    store, served = plane.jobs.store, plane.jobs.library().digest
    assert store.last_measurement(served) is None
    finish(0.31, verdict="invalid")
    plane.submit()
    assert store.last_measurement(served) is None
    for value, fields in ((0.31, {"digest": "ab" * 32}), (0.32, {}), (0.33, {"whole": True})):
        latest = finish(value, **fields)
        assert (last := store.last_measurement(served)) is not None
        assert last.id == latest
    finish(0.34)
    for digest in (served, "cd" * 32):
        assert (last := store.last_measurement(digest)) is not None
        assert last.id == latest  # the whole profile, although chosen attacks ran later


def test_a_start_fills_in_figures_that_an_earlier_version_did_not_keep(plane: Plane) -> None:
    plane.add_done(0.31)
    plane.add_done(0.32)
    (broken, whole) = plane.jobs.store.all()
    (plane.jobs.store.folder / broken.id / "report.json").write_text("{")
    plane.jobs.recover()
    result = plane.jobs.store.get(whole.id).result
    assert result is not None
    assert [point.value for point in result.curve] == [0.31]
    assert plane.jobs.store.get(broken.id).result is None


def test_a_finished_audit_shows_its_figures_in_the_list_and_in_other_formats(plane: Plane) -> None:
    plane.add_done(0.31)
    (job,) = plane.jobs.store.all()
    plane.jobs.store.save(job.model_copy(update={"result": plane.jobs.result(job.id)}))
    (row,) = plane.ask("GET", "/admin/audits").json()["audits"]
    published = json.loads(PUBLISHED.read_text("utf-8"))["systems"]["tombola"]["robust"]
    assert row["result"]["verdict"] == "valid"
    assert row["result"]["measurement"]
    assert row["result"]["robust"] == published["expected"]
    assert row["result"]["ten_tries"] == published["tries"]["k10"]
    assert (row["result"]["norm"], row["result"]["epsilon"]) == ("linf", 8)
    assert row["result"]["curve"] == [{"value": 0.31, "low": 0.31, "high": 0.31, "epsilon": 8, "images": 128}]
    assert row["result"]["judgement"]["word"] == "valid with warnings"
    assert row["digest"] == job.digest
    for name, kind, begins in (
        ("junit", "application/xml", "<?xml"),
        ("sarif", "application/sarif+json", "{"),
        ("md", "text/markdown; charset=utf-8", "### Audit"),
        ("card", "text/markdown; charset=utf-8", "---"),
        ("json", "application/json", "{"),
    ):
        answer = plane.ask("GET", f"/admin/audits/{job.id}/report?format={name}")
        assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
        assert answer.text.startswith(begins)
    answer = plane.ask("GET", f"/admin/audits/{job.id}/report?format=pdf")
    assert answer.status_code == 400
    assert "expected one of json, junit" in answer.json()["error"]


def test_an_estimate_counts_the_cores_that_others_leave(library: Library, tmp_path: Path) -> None:
    """Ten seconds in which a quarter of two cores was idle: an audit takes four times as long as alone."""
    stat = tmp_path / "stat"
    ticks = os.sysconf("SC_CLK_TCK")
    stat.write_text("cpu  0 0 0 0 0 0 0 0 0 0\n")
    share = CpuShare(2, stat)
    share.last = (time.monotonic() - 10, 0.0)
    stat.write_text(f"cpu  {15 * ticks} {1 * ticks} 0 {3 * ticks} {1 * ticks} 0 0 0 0 0\n")
    expected = 1 + SMOOTHING * (5 / 20 - 1)  # one reading moves the estimate by so much
    assert share.update() == pytest.approx(expected, abs=0.01)
    share.share = 0.0
    assert share.update() == LEAST_SHARE
    assert CpuShare(2, tmp_path / "nowhere").update() == 1
    plane = Plane(library, tmp_path / "state")
    plane.jobs.estimator.cpu = CpuShare(2, tmp_path / "nowhere")
    plane.jobs.estimator.cpu.share = 0.25
    cost = plane.ask("POST", "/admin/audits", json=SMOKE).json()["cost"]
    assert cost["cpu_share"] == 0.25
    assert cost["seconds_now"] == pytest.approx(4 * cost["seconds"], abs=2)


def test_another_library_has_other_figures(plane: Plane, library: Library, tmp_path: Path) -> None:
    """After a swap, and while an audit runs: not the figures of the one before, and its own again when it is back."""
    plane.add_done(0.31)
    plane.jobs.refresh()
    assert plane.figure("all") == 0.31
    other = tiny(tmp_path / "other", ("resnet18",), (0.3,))
    plane.jobs.library = lambda: other
    plane.jobs.refresh()
    assert plane.figure("all") is None
    plane.jobs.library = lambda: library
    plane.jobs.refresh()
    assert plane.figure("all") == 0.31


def test_a_report_that_cannot_be_read_ends_nothing(plane: Plane) -> None:
    plane.add_done(0.31)
    next(plane.jobs.store.folder.glob("*/report.json")).write_text("{")
    plane.jobs.start()
    audit = plane.submit()
    assert plane.ask("DELETE", f"/admin/audits/{audit}").status_code == 200
    assert plane.jobs.thread is not None
    assert plane.jobs.thread.is_alive()
    assert plane.figure("all") is None


def niceness(pid: int) -> int | None:
    try:
        return os.getpriority(os.PRIO_PROCESS, pid)
    except ProcessLookupError:
        return None


def test_a_failing_audit_says_why(plane: Plane, pretended: Any) -> None:
    started, made = pretended
    plane.jobs.start()
    audit = plane.submit()
    until(lambda: plane.state(audit) == "running" and bool(started), "it to run")
    (started[0] / "events.jsonl").write_text('{"event": "failed", "why": "the library is another now"}\n')
    made[0].code = 2
    made[0].complete()
    until(lambda: plane.state(audit) == "failed", "the failure")
    assert plane.ask("GET", f"/admin/audits/{audit}").json()["why"] == "the library is another now"
    assert plane.ask("GET", f"/admin/audits/{audit}/report").status_code == 409
    assert plane.metrics.value("audit_runs_total", kind="smoke", outcome="failed") == 1


def test_the_worker_refuses_a_library_that_has_been_replaced(plane: Plane, tmp_path: Path) -> None:
    job = plane.jobs.store.get(plane.submit())
    with pytest.raises(AuditConflict, match="asked of 000000000000"):
        run_job(tmp_path, job.model_copy(update={"digest": "0" * 64}), print)


def test_an_attackers_configured_library_reaches_the_worker(library: Library, tmp_path: Path) -> None:
    theirs = tiny(tmp_path / "theirs", ("resnet18",), (0.3,))
    plane = Plane(library, tmp_path / "state", audit_surrogate_library=theirs.path)
    audit = plane.ask("POST", "/admin/audits", json=SMOKE).json()["id"]
    folder = plane.jobs.store.folder / audit
    run_job(folder, Job.model_validate_json((folder / "job.json").read_text()), lambda _: None)
    report = json.loads((folder / "report.json").read_text())
    assert report["library"]["outside"]["digest"] == theirs.digest
    assert "outside" not in plane.ask("GET", f"/admin/audits/{audit}").json()


def test_an_attackers_library_that_does_not_fit_is_refused_before_anything_waits(
    library: Library, tmp_path: Path
) -> None:
    missing = Plane(library, tmp_path / "state", audit_surrogate_library=tmp_path / "nowhere")
    answer = missing.ask("POST", "/admin/audits", json=SMOKE)
    assert answer.status_code == 409
    assert "outside library cannot be used" in answer.json()["error"]
    two = items([make_ticket("resnet18", 0.5, classes=2)])
    others = write_library(tmp_path / "others", classes=("cat", "dog"), data="random", tickets=two)
    answer = Plane(library, tmp_path / "state", audit_surrogate_library=others.path).ask(
        "POST", "/admin/audits", json=SMOKE
    )
    assert answer.status_code == 400
    assert "outside library of 2 other classes" in answer.json()["error"]
    assert missing.jobs.store.all() == []


def test_one_at_a_time_and_a_bounded_queue(library: Library, tmp_path: Path, pretended: Any) -> None:
    plane = Plane(library, tmp_path / "state", audits_queue=2)
    started, made = pretended
    plane.jobs.start()
    first = plane.submit()
    until(lambda: plane.state(first) == "running", "the first to run")
    second, third = plane.submit(), plane.submit()
    answer = plane.ask("POST", "/admin/audits", json=SMOKE)
    assert answer.status_code == 429
    assert "at most 2 may" in answer.json()["error"]
    assert len(started) == 1
    assert plane.state(second) == plane.state(third) == "queued"
    assert plane.ask("DELETE", f"/admin/audits/{third}").json()["state"] == "cancelled"
    made[0].code = 1
    made[0].complete()
    until(lambda: plane.state(second) == "running", "the second to run")
    assert plane.state(first) == "failed"
    assert "ended with code 1" in plane.jobs.store.get(first).why
    plane.jobs.stop()
    assert len(started) == 2


def test_a_running_audit_is_cancelled(plane: Plane, pretended: Any) -> None:
    plane.jobs.start()
    audit = plane.submit()
    until(lambda: plane.state(audit) == "running", "it to run")
    assert plane.ask("DELETE", f"/admin/audits/{audit}").json()["state"] == "cancelled"
    until(lambda: plane.metrics.value("audit_runs_total", kind="smoke", outcome="cancelled") == 1, "its end")
    assert plane.state(audit) == "cancelled"
    again = plane.ask("DELETE", f"/admin/audits/{audit}")
    assert again.status_code == 409
    assert "cancelled" in again.json()["error"]


def test_a_restart_resumes_what_was_running_and_gives_up_after_three(
    library: Library, tmp_path: Path, pretended: Any
) -> None:
    started, _ = pretended
    first = Plane(library, tmp_path / "state")
    first.jobs.start()
    audit = first.submit()
    for attempt in (1, 2, 3):
        server = first if attempt == 1 else Plane(library, tmp_path / "state")
        if attempt > 1:
            server.jobs.start()
        until(lambda plane=server: plane.state(audit) == "running", "it to run")  # type: ignore[misc]
        assert server.jobs.store.get(audit).attempts == attempt
        server.jobs.stop()
        assert server.state(audit) == "interrupted"
    last = Plane(library, tmp_path / "state")
    last.jobs.start()
    assert last.state(audit) == "interrupted"
    last.jobs.stop()
    assert len(started) == 3


def test_a_service_that_was_killed_left_its_audit_running(library: Library, tmp_path: Path, pretended: Any) -> None:
    """kill -9 leaves "running" on disk and half a line of events; the next service takes it up."""
    plane = Plane(library, tmp_path / "state")
    audit = plane.submit()
    plane.jobs.store.save(plane.jobs.store.get(audit).model_copy(update={"state": "running", "attempts": 1}))
    half = {"event": "step", "id": "fgsm", "attack": "fgsm", "system": "tombola", "epsilon": 8, "images": 2}
    half |= {"accuracy": 0.5, "share": 0.5, "seconds_left": 1}
    (plane.jobs.store.folder / audit / "events.jsonl").write_text(json.dumps(half) + '\n{"event": "st')
    plane.jobs.start()
    until(lambda: plane.state(audit) == "running" and plane.jobs.store.get(audit).attempts == 2, "it to run again")
    assert [event.share for event in plane.jobs.store.events(audit) if isinstance(event, StepEvent)] == [0.5]
    plane.jobs.stop()


BAD: dict[str, tuple[Json, int, str]] = {
    "unknown attack": ({**SMOKE, "attacks": ["magic"]}, 400, "expected one of paper-eot"),
    "epsilon out of range": ({**SMOKE, "epsilons": [300]}, 400, "1 to 255"),
    "no such data set": ({**SMOKE, "data": "../../etc/passwd"}, 404, "no data set"),
    "no labels for standard": ({"profile": "standard"}, 400, "needs labelled images"),
    "too many images": ({**SMOKE, "images": 10**6}, 400, "from 2 to 10000"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_get_a_clear_error(plane: Plane, name: str) -> None:
    body, status, text = BAD[name]
    answer = plane.ask("POST", "/admin/audits", json=body)
    assert answer.status_code == status
    assert text in answer.json()["error"]
    assert plane.jobs.store.all() == []


def test_what_is_beyond_the_limit_on_cost_never_starts(library: Library, tmp_path: Path) -> None:
    plane = Plane(library, tmp_path / "state", audits_max_hours=1e-6)
    answer = plane.ask("POST", "/admin/audits", json=SMOKE)
    assert answer.status_code == 400
    assert "Ask for fewer images" in answer.json()["error"]


def test_bodies_that_are_no_json_are_refused(plane: Plane) -> None:
    for body in (b"", b"{", b"[" * 50_000, b"\xff"):
        answer = plane.ask("POST", "/admin/audits", content=body)
        assert answer.status_code == 400
        assert "not JSON" in answer.json()["error"]
    assert plane.ask("POST", "/admin/audits", content=b" " * 100_000).status_code == 413


def test_without_the_token_nothing_is_told(plane: Plane) -> None:
    for method, path in (("POST", "/admin/audits"), ("GET", "/admin/audits"), ("GET", "/admin/datasets")):
        assert plane.ask(method, path, token=None).status_code == 401
    assert plane.ask("GET", "/admin/audits", token="a-wrong-token-altogether").status_code == 401


@pytest.mark.parametrize("audit", ["nothing", "..", "20250101-000000-00000000", "%2e%2e%2fjobs"])
def test_unknown_audits_are_404(plane: Plane, audit: str) -> None:
    for path in ("", "/events", "/report", "/report.json"):
        assert plane.ask("GET", f"/admin/audits/{audit}{path}").status_code == 404
    assert plane.ask("DELETE", f"/admin/audits/{audit}").status_code == 404


# Data sets


def npz(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


GOOD = npz(images=np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8), labels=np.array([0, 1, 2, 3]))


def test_an_uploaded_set_can_be_audited_with(plane: Plane) -> None:
    answer = plane.ask("PUT", "/admin/datasets/mine", content=GOOD)
    assert answer.status_code == 201
    assert answer.json() == {"name": "mine.npz", "checked": 4, "classes": 4}
    listed = plane.ask("GET", "/admin/datasets").json()["datasets"]
    assert {row["name"] for row in listed} == {"mine.npz", "generated"}
    audit = plane.submit(data="mine.npz")
    assert str(plane.jobs.store.get(audit).data).endswith("/mine.npz")


def test_a_configured_folder_is_listed(library: Library, tmp_path: Path) -> None:
    (tmp_path / "sets/photos").mkdir(parents=True)
    (tmp_path / "sets/digits.npz").write_bytes(GOOD)
    (tmp_path / "sets/notes.txt").write_text("no set")
    plane = Plane(library, tmp_path / "state", audits_data=tmp_path / "sets")
    listed = plane.ask("GET", "/admin/datasets").json()["datasets"]
    assert [(row["name"], row["kind"]) for row in listed] == [
        ("digits.npz", "npz"),
        ("photos", "folder"),
        ("generated", "generated"),
    ]


def pickled() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, images=np.array([{}], dtype=object), labels=np.array([0]))
    return stream.getvalue()


def a_zip(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def two_members(data: bytes) -> bytes:
    """gzip, in two parts (RFC 1952, 2.2)."""
    return gzip.compress(data[:100]) + gzip.compress(data[100:])


BAD_UPLOADS: dict[str, tuple[bytes, str]] = {
    "no archive": (b"hello", "neither a zip nor an npz"),
    "nothing": (b"", "neither a zip nor an npz"),
    "another class count": (npz(images=np.zeros((1, 32, 32, 3), np.uint8), labels=np.array([10])), "has 10 classes"),
    "wrong shapes": (npz(images=np.zeros((1, 64, 64, 3), np.uint8), labels=np.array([0])), "expected uint8"),
    "no labels": (npz(images=np.zeros((1, 32, 32, 3), np.uint8)), "no array 'labels'"),
    "objects": (pickled(), "whole numbers"),
    "no images": (a_zip({"../../escape.png": b"x"}), "1 names that lead out of their folder"),
}


@pytest.mark.parametrize("name", BAD_UPLOADS)
def test_uploads_of_other_kinds_are_refused_and_leave_nothing(plane: Plane, name: str) -> None:
    body, text = BAD_UPLOADS[name]
    answer = plane.ask("PUT", "/admin/datasets/mine", content=body)
    assert answer.status_code == 400
    assert text in answer.json()["error"]
    assert answer.json()["error"].startswith(("mine: ", "the upload"))
    assert list(plane.jobs.datasets.uploads.iterdir()) == []


@pytest.mark.parametrize("name", ["UPPER", ".hidden", "a b", "generated", "x" * 65])
def test_names_of_uploads_are_plain(plane: Plane, name: str) -> None:
    assert plane.ask("PUT", f"/admin/datasets/{name}", content=GOOD).status_code == 400


def test_uploads_are_bounded(library: Library, tmp_path: Path) -> None:
    plane = Plane(library, tmp_path / "state", audits_max_upload_bytes=1024)
    for body, headers in ((GOOD, {}), (gzip.compress(bytes(2000)), {"content-encoding": "gzip"})):
        answer = plane.ask("PUT", "/admin/datasets/mine", content=body, headers=headers)
        refused(answer, 413, ErrorMessage.BODY_TOO_LARGE)
        assert list(plane.jobs.datasets.uploads.iterdir()) == []


@pytest.mark.parametrize(
    ("coding", "pack"), [("gzip", gzip.compress), ("x-gzip", two_members), ("deflate", zlib.compress)]
)
def test_uploads_and_requests_are_unpacked_as_the_public_plane_unpacks_bodies(
    plane: Plane, coding: str, pack: Callable[[bytes], bytes]
) -> None:
    headers = {"content-encoding": coding}
    stored = plane.ask("PUT", "/admin/datasets/digits", content=pack(GOOD), headers=headers)
    assert (stored.status_code, stored.json()["name"]) == (201, "digits.npz")
    assert (plane.jobs.datasets.uploads / "digits.npz").read_bytes() == GOOD
    text = json.dumps({"profile": "unheard of"} | {"images": 1}).encode()
    assert "unheard of" in refused(plane.ask("POST", "/admin/audits", content=pack(text), headers=headers), 400)


@pytest.mark.parametrize(
    ("coding", "body", "status", "text"),
    [
        ("br", GOOD, 415, ErrorMessage.BODY_PACKING),
        ("gzip, gzip", GOOD, 415, ErrorMessage.BODY_PACKING),
        ("gzip", GOOD, 400, ErrorMessage.BODY_INFLATE),
        ("gzip", gzip.compress(GOOD)[:-5], 400, ErrorMessage.BODY_INFLATE),
        ("deflate", b"", 400, ErrorMessage.BODY_INFLATE),
    ],
)
def test_an_upload_that_cannot_be_unpacked_is_refused_and_leaves_nothing(
    plane: Plane, coding: str, body: bytes, status: int, text: ErrorMessage
) -> None:
    answer = plane.ask("PUT", "/admin/datasets/digits", content=body, headers={"content-encoding": coding})
    refused(answer, status, text)
    assert list(plane.jobs.datasets.uploads.iterdir()) == []


def test_requests_hold_nothing_that_json_cannot(plane: Plane) -> None:
    audit = plane.submit(seed=5)
    assert json.loads(plane.jobs.store.get(audit).model_dump_json())["request"]["seed"] == 5


def test_a_full_disk_is_said_and_leaves_nothing(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    refused = plane.ask("POST", "/admin/audits", json=SMOKE)
    assert refused.status_code == 507
    assert refused.json()["error"].endswith("job.json: No space left on device")
    assert list(plane.jobs.store.folder.iterdir()) == []
    stream = io.BytesIO()
    np.savez(stream, images=np.zeros((1, 32, 32, 3), np.uint8), labels=np.zeros(1, np.int64))
    refused = plane.ask("PUT", "/admin/datasets/digits.npz", content=stream.getvalue())
    assert refused.status_code == 507, refused.text
    assert list(plane.jobs.datasets.uploads.iterdir()) == []
    monkeypatch.undo()
    plane.submit()
