"""Audits as jobs: one at a time in a process of its own, a bounded queue, state on disk, resumed after a restart."""

import json
import logging
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from model_store.errors import StoreError, os_error_text
from model_store.files import write_atomically
from model_store.library import Library, open_library
from model_store.ticket import Ticket
from service.admin.dataset_store import DatasetStore
from service.audit import baselines
from service.audit.config import Audit, read_audit
from service.audit.cost import check_giga_multiply_adds, estimated_seconds, giga_multiply_adds, multiply_adds_of
from service.audit.errors import AuditConflict, AuditUnknown, CostRejected, QueueFull
from service.audit.evaluation.members import Member, candidates_of
from service.audit.plan import plan
from service.cpu import NICE_AUDIT
from service.engine.factory import resolve_device
from service.observability.metrics import Metrics
from service.settings import Settings

log = logging.getLogger(__name__)

ID: Final = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{8}")
ATTEMPTS: Final = 3  # starts of one audit before it stays interrupted
WAIT_S: Final = 2.0  # between looks at the queue where nothing tells of a new audit
NICENESS: Final = NICE_AUDIT  # serving keeps its latency: an audit gets what is left
PATIENCE_S: Final = 5.0  # from SIGTERM to SIGKILL
WAITING: Final = ("queued", "running")
REPORT: Final = "report.json"
PAGE: Final = "report.html"
Json = dict[str, Any]


class AuditQueue:
    """Handlers call submit, get, cancel; a thread of its own starts and watches the processes."""

    def __init__(
        self, settings: Settings, metrics: Metrics, library: Callable[[], Library], url: str | None = None
    ) -> None:
        """library: the one being served.  url: of the public plane, for black-box attacks."""
        self.settings, self.metrics, self.library = settings, metrics, library
        self.url = None if url is None else reachable(url)
        self.datasets = DatasetStore(settings)
        self.folder = settings.state_dir / "audits"
        self.lock = threading.Lock()
        self.changed = threading.Event()
        self.stopping = False
        self.process: subprocess.Popen[bytes] | None = None
        self.thread: threading.Thread | None = None
        self.published = ""  # digest of the library whose figures are the gauges'

    # The process's life

    def start(self) -> None:
        """Takes up what an earlier process left, then runs the queue."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.recover()
        self.thread = threading.Thread(target=self.loop, name="audits", daemon=True)
        self.thread.start()

    def recover(self) -> None:
        for job in self.all():
            if job["state"] in ("running", "interrupted"):
                again = job["attempts"] < ATTEMPTS
                self.save({**job, "state": "queued" if again else "interrupted"})

    def stop(self) -> None:
        """Ends the running audit; what it finished is kept, and the next start resumes it."""
        with self.lock:
            self.stopping = True
            process = self.process
        self.changed.set()
        if process is not None:
            end(process)
        if self.thread is not None:
            self.thread.join()

    def loop(self) -> None:
        while not self.stopping:
            self.changed.clear()
            self.refresh()
            job = self.next()
            if job is None:
                self.changed.wait(WAIT_S)
                continue
            try:
                self.run(job)
            except Exception:
                log.exception("audit %s: its bookkeeping failed", job["id"])
                self.fail(job)

    def fail(self, job: Json) -> None:
        try:
            self.save({**job, "state": "failed", "finished": time.time(), "why": "see the server's log"})
        except OSError as error:  # a full disk: the job stays queued, and is tried again after a while
            log.warning("audit %s: %s", job["id"], os_error_text(error))
            self.changed.wait(WAIT_S)

    def next(self) -> Json | None:
        queued = [job for job in self.all() if job["state"] == "queued"]
        return min(queued, key=lambda job: job["created"], default=None)

    def run(self, job: Json) -> None:
        folder = self.folder / job["id"]
        with self.lock:
            if self.stopping or self.get(job["id"])["state"] != "queued":
                return
            self.save({**job, "state": "running", "attempts": job["attempts"] + 1, "started": time.time(), "why": ""})
            truncate_partial_line(folder / "events.jsonl")
            self.process = spawn(folder, job["threads"])
        code = self.watch(self.process)
        with self.lock:
            self.process = None
            self.finish(job["id"], code)

    def watch(self, process: subprocess.Popen[bytes]) -> int:
        """Waits for the process; its exit code. A library may be swapped meanwhile."""
        while True:
            try:
                return process.wait(WAIT_S)
            except subprocess.TimeoutExpired:
                self.refresh()

    def finish(self, id: str, code: int) -> None:
        job = self.get(id)
        if job["state"] == "cancelled":
            state = "cancelled"
        elif code == 0 and (self.folder / id / REPORT).exists():
            state = "done"
        elif self.stopping or code < 0 or code == 143:
            state = "interrupted"
        else:
            state = "failed"
        why = "" if state == "done" else self.reason(id, code)
        self.save({**job, "state": state, "finished": time.time(), "why": why})
        told = "invalid" if state == "done" and self.report(id)["verdict"] == "invalid" else state
        self.metrics.inc("audit_runs_total", kind=job["request"]["profile"], outcome=told)
        log.info("audit %s: %s", id, told)
        if state == "done":
            self.published = ""
            self.refresh()

    def reason(self, id: str, code: int) -> str:
        told = [event["why"] for event in self.events(id) if event["event"] == "failed"]
        return told[-1] if told else f"its process ended with code {code}; {self.folder / id / 'worker.log'} says more"

    def report(self, id: str) -> Json:
        return dict(json.loads((self.folder / id / REPORT).read_text(encoding="utf-8")))

    def refresh(self) -> None:
        """The gauges anew, for another library or after another audit."""
        digest = self.library().digest
        if digest == self.published:
            return
        self.published = digest
        try:
            self.publish(digest)
        except (OSError, ValueError, KeyError):
            log.exception("a finished audit in %s cannot be read: no figures", self.folder)

    def publish(self, digest: str) -> None:
        """As gauges: the last figures that audits of the library being served found. None by an invalid audit; none for
        all attacks together by one that was asked for some of its profile's, which may be the weak ones."""
        self.metrics.forget("audit_accuracy")
        for last in self.last_of_each_kind(digest):
            report = self.report(last)
            if report["verdict"] == "invalid":
                continue
            kind = {name: report["audit"][name] for name in ("profile", "norm")}
            rows = [row for row in report["attacks"] if row["system"] == baselines.OURS]
            found = [(row["name"], row["epsilon"], row["expected"]["value"]) for row in rows]
            if not report["audit"]["attacks"]:
                curve = report["systems"][baselines.OURS]["curve"]
                found += [("all", point["epsilon"], point["value"]) for point in curve]
            for attack, epsilon, value in found:
                self.metrics.set("audit_accuracy", value, **kind, attack=attack, epsilon=f"{epsilon:g}")

    def last_of_each_kind(self, digest: str) -> list[str]:
        """The last finished audit of the library for each thing asked for, seeds apart; the oldest first."""
        last: dict[str, str] = {}
        for job in self.all():
            if job["state"] == "done" and job["digest"] == digest:
                asked = {name: value for name, value in job["request"].items() if not name.endswith("seed")}
                last.setdefault(json.dumps(asked, sort_keys=True), job["id"])
        return list(reversed(last.values()))

    # What handlers ask for

    def submit(self, fields: Any) -> Json:
        """Queues an audit. Raises AuditRejected, AuditUnknown, CostRejected, QueueFull."""
        asked, library = read_audit(fields), self.library()
        path = self.datasets.path(asked.data, asked.profile)
        cost = self.cost(asked, library)
        with self.lock:
            waiting = sum(job["state"] == "queued" for job in self.all())
            if waiting >= self.settings.audits_queue:
                raise QueueFull(f"{waiting} audits wait already; at most {self.settings.audits_queue} may")
            job = self.described(asked, library, path, cost, dict(fields))
            folder = self.folder / job["id"]
            folder.mkdir(parents=True)
            try:
                self.save(job)
            except OSError:
                folder.rmdir()
                raise
        self.changed.set()
        return job

    def described(self, asked: Audit, library: Library, path: Path | None, cost: Json, request: Json) -> Json:
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        return {
            "id": f"{stamp}-{secrets.token_hex(4)}",
            "state": "queued",
            "created": time.time(),
            "attempts": 0,
            "request": {**request, "profile": asked.profile},
            "cost": cost,
            "digest": library.digest,
            "library": named(self.settings.library),
            "data": named(path),
            "outside": named(self.settings.audits_outside),
            "int8_images": named(self.settings.int8_images),
            "threads": self.settings.audits_threads,
            "device": str(resolve_device(self.settings.device)),
            "url": None if self.settings.api_keys_file else self.url,
            "why": "",
        }

    def cost(self, asked: Audit, library: Library) -> Json:
        """What it will cost, before it starts. Raises CostRejected."""
        bench = candidates_of(library, outside=self.outside, build=planning_stub)
        compared = baselines.compared_systems(bench, baselines.strengths(library))
        steps, each = plan(asked, bench, compared), multiply_adds_of(library, self.outside)
        by_name = {s.name: s for s in (*compared, *(baselines.single(bench, j) for j in range(len(bench.members))))}
        attacks = sum(giga_multiply_adds(step, by_name[step.system], each) for step in steps)
        giga = attacks + check_giga_multiply_adds(asked, each)
        seconds = estimated_seconds(giga, self.settings.audits_threads)
        if seconds > 3600 * self.settings.audits_max_hours:
            raise CostRejected(
                f"about {seconds / 3600:.1f} hours ({giga:,.0f} giga-multiply-adds); at most "
                f"{self.settings.audits_max_hours:g}. Ask for fewer images, attacks or epsilons, or another profile"
            )
        return {"attacks": len(steps), "giga_multiply_adds": round(giga, 1), "seconds": round(seconds)}

    @cached_property
    def outside(self) -> Library | None:
        """The attacker's own library, verified once: to plan on. Raises AuditConflict if it cannot be opened."""
        if self.settings.audits_outside is None:
            return None
        try:
            return open_library(self.settings.audits_outside)
        except StoreError as error:
            raise AuditConflict(f"the configured outside library cannot be used: {error}") from None

    def all(self) -> list[Json]:
        """Every job on disk, the newest first."""
        found = [path for path in self.folder.glob("*/job.json") if ID.fullmatch(path.parent.name)]
        jobs = [json.loads(path.read_text(encoding="utf-8")) for path in found]
        return sorted(jobs, key=lambda job: -job["created"])

    def get(self, id: str) -> Json:
        """Raises AuditUnknown."""
        path = self.folder / id / "job.json"
        if not ID.fullmatch(id) or not path.exists():
            raise AuditUnknown("no such audit")
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def shown(self, id: str) -> Json:
        """A job without its paths, with its last progress."""
        job = self.get(id)
        steps = [event for event in self.events(id) if event["event"] == "step"]
        hidden = ("library", "data", "outside", "int8_images", "url", "threads", "device")
        said = {name: value for name, value in job.items() if name not in hidden}
        return {**said, "progress": steps[-1] if steps else None}

    def events(self, id: str) -> list[Json]:
        """What the worker told so far. A line that is still being written is left for the next time."""
        path = self.folder / id / "events.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def cancel(self, id: str) -> Json:
        """Raises AuditUnknown, AuditConflict."""
        with self.lock:
            job = self.get(id)
            if job["state"] not in WAITING:
                raise AuditConflict(f"the audit is {job['state']}; only one that is queued or running can be cancelled")
            self.save({**job, "state": "cancelled", "finished": time.time()})
            process = self.process if job["state"] == "running" else None
        if process is not None:
            end(process)
        else:
            self.metrics.inc("audit_runs_total", kind=job["request"]["profile"], outcome="cancelled")
        return self.get(id)

    def file(self, id: str, name: str) -> bytes:
        """A finished audit's report. Raises AuditUnknown, AuditConflict."""
        job = self.get(id)
        if job["state"] != "done":
            raise AuditConflict(f"the audit is {job['state']}; it has no report yet")
        return (self.folder / id / name).read_bytes()

    def save(self, job: Json) -> None:
        write_atomically(self.folder / job["id"] / "job.json", json.dumps(job, indent=1).encode())


def named(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())


def truncate_partial_line(path: Path) -> None:
    """Takes away the line that a killed worker began, so that the next one's begins on its own."""
    if path.exists():
        text = path.read_bytes()
        write_atomically(path, text[: text.rfind(b"\n") + 1])


def spawn(folder: Path, threads: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MPLBACKEND": "agg"}
    environment = {name: value for name, value in environment.items() if not name.startswith("TOMBOLA_ADMIN_TOKEN")}
    command = [sys.executable, "-m", "service.admin.audit_worker", str(folder), str(NICENESS)]
    with (folder / "worker.log").open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment)  # noqa: S603


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()


def reachable(url: str) -> str:
    """From this machine, where the service listens on all addresses."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def planning_stub(_ticket: Ticket, name: str, _device: torch.device) -> Member:
    """A member without its network: enough to plan on."""
    return Member(name, nn.Identity(), 1.0)
