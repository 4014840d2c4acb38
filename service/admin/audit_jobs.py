"""Audits as jobs: one at a time in a process of its own, a bounded queue, resumed after a restart."""

import logging
import secrets
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from model_store.errors import os_error_text
from model_store.library import Library
from service.admin import audit_process
from service.admin.audit_estimate import CostEstimator
from service.admin.audit_gauges import AuditGauges
from service.admin.audit_store import PENDING, RESUMABLE, Cost, Job, JobStore, Result, State
from service.admin.dataset_store import DatasetStore
from service.audit.config import Audit, read_audit
from service.audit.errors import AuditConflict, QueueFull
from service.audit.events import FailedEvent
from service.audit.report.model import GENERATED, REPORT, Report
from service.audit.report.verdicts import judge_measurement
from service.engine.factory import resolve_device
from service.observability.metrics import Metrics
from service.outbound import loopback_url
from service.settings import Settings

log = logging.getLogger(__name__)

MAX_ATTEMPTS: Final = 3  # starts of one audit before it stays interrupted
POLL_S: Final = 2.0  # between looks at the queue where nothing tells of a new audit
TERMINATED: Final = 143  # the exit code of a shell whose child ended by SIGTERM


class AuditQueue:
    """Handlers call submit and cancel; a thread of its own starts and watches the processes."""

    def __init__(
        self, settings: Settings, metrics: Metrics, library: Callable[[], Library], url: str | None = None
    ) -> None:
        """library: returns the one being served.  url: of the public plane, for black-box attacks."""
        self.settings, self.metrics, self.library = settings, metrics, library
        self.url = None if url is None else loopback_url(url)
        self.datasets = DatasetStore(settings)
        self.store = JobStore(settings.state_dir / "audits")
        self.gauges = AuditGauges(metrics, self.store)
        self.estimator = CostEstimator(settings)
        self.lock = threading.Lock()
        self.changed = threading.Event()
        self.stopping = False
        self.process: subprocess.Popen[bytes] | None = None
        self.thread: threading.Thread | None = None

    # What handlers call

    def submit(self, fields: Any) -> Job:
        """Queues an audit. Raises AuditRejected, AuditUnknown, CostRejected, QueueFull."""
        audit, library = read_audit(fields), self.library()
        data = self.datasets.path(audit.data, audit.profile)
        cost = self.cost(audit, library)
        with self.lock:
            queued = sum(job.state == "queued" for job in self.store.all())
            if queued >= self.settings.audits_queue:
                raise QueueFull(f"{queued} audits wait already; at most {self.settings.audits_queue} may")
            job = self.new_job(audit, library, data, cost, dict(fields))
            self.store.save(job)
        self.changed.set()
        return job

    def cost(self, audit: Audit, library: Library) -> Cost:
        """Raises CostRejected, AuditRejected."""
        return self.estimator.cost(audit, library)

    def cancel(self, id: str) -> Job:
        """Raises AuditUnknown, AuditConflict."""
        with self.lock:
            job = self.store.get(id)
            if job.state not in PENDING:
                raise AuditConflict(f"the audit is {job.state}; only one that is queued or running can be cancelled")
            process = self.process if job.state == "running" else None
            self.update(job, state="cancelled", finished_at=time.time())
        if process is not None:
            audit_process.terminate(process)
        else:
            self.count(job, "cancelled")
        return self.store.get(id)

    def new_job(self, audit: Audit, library: Library, data: Path | None, cost: Cost, request: dict[str, Any]) -> Job:
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        return Job(
            id=f"{stamp}-{secrets.token_hex(4)}",
            state="queued",
            created=time.time(),
            request={**request, "profile": audit.profile},
            cost=cost,
            digest=library.digest,
            library=None if self.settings.library is None else absolute(library.path),
            data=absolute(data),
            outside=absolute(self.settings.audit_surrogate_library),
            precision=self.settings.precision,
            int8_images=absolute(self.settings.int8_images),
            threads=self.settings.audits_threads,
            device=str(resolve_device(self.settings.device)),
            url=None if self.settings.api_keys_file else self.url,
        )

    def libraries(self) -> set[Path]:
        """The folders of libraries that audits will still open."""
        paths = ((job.library, job.outside) for job in self.store.all() if job.state in RESUMABLE)
        return {Path(path) for pair in paths for path in pair if path}

    # The thread that runs them

    def start(self) -> None:
        """Takes up what an earlier process left, then runs the queue."""
        self.store.folder.mkdir(parents=True, exist_ok=True)
        self.recover()
        self.thread = threading.Thread(target=self.loop, name="audits", daemon=True)
        self.thread.start()

    def recover(self) -> None:
        for job in self.store.all():
            if job.state in ("running", "interrupted"):
                self.update(job, state="queued" if job.attempts < MAX_ATTEMPTS else "interrupted")
            elif job.state == "done" and (job.result is None or job.result.judgement is None):
                self.complete_result(job)

    def complete_result(self, job: Job) -> None:
        """The figures of an audit that an earlier version finished, from its report."""
        try:
            self.update(job, result=self.result(job.id))
        except (OSError, ValueError, KeyError):
            log.exception("audit %s: its report cannot be read; the list shows none of its figures", job.id)

    def stop(self) -> None:
        """Ends the running audit. Its finished attacks are kept, and the next start resumes it."""
        with self.lock:
            self.stopping = True
            process = self.process
        self.changed.set()
        if process is not None:
            audit_process.terminate(process)
        if self.thread is not None:
            self.thread.join()

    def loop(self) -> None:
        while not self.stopping:
            self.changed.clear()
            self.refresh()
            job = self.next()
            if job is None:
                self.changed.wait(POLL_S)
                continue
            try:
                self.run(job)
            except Exception:
                log.exception("audit %s: its bookkeeping failed", job.id)
                self.fail(job)

    def fail(self, job: Job) -> None:
        try:
            self.update(job, state="failed", finished_at=time.time(), why="see the server's log")
        except OSError as error:  # a full disk: the job stays queued, and is tried again after a while
            log.warning("audit %s: %s", job.id, os_error_text(error))
            self.changed.wait(POLL_S)

    def next(self) -> Job | None:
        queued = [job for job in self.store.all() if job.state == "queued"]
        return min(queued, key=lambda job: job.created, default=None)

    def run(self, job: Job) -> None:
        with self.lock:
            if self.stopping or self.store.get(job.id).state != "queued":
                return
            self.update(job, state="running", attempts=job.attempts + 1, started=time.time(), why="")
            self.store.truncate_partial_event(job.id)
            self.process = audit_process.spawn(self.store.folder / job.id, job.threads)
        code = self.watch(self.process)
        with self.lock:
            self.process = None
            self.complete(self.store.get(job.id), code)

    def watch(self, process: subprocess.Popen[bytes]) -> int:
        """Waits for the process; its exit code. A library may be swapped meanwhile."""
        while True:
            try:
                return process.wait(POLL_S)
            except subprocess.TimeoutExpired:
                self.refresh()

    def complete(self, job: Job, code: int) -> None:
        """Records how an audit ended."""
        state = self.end_state(job, code)
        result = self.result(job.id) if state == "done" else None
        why = "" if state == "done" else self.reason(job.id, code)
        self.update(job, state=state, finished_at=time.time(), why=why, result=result)
        self.count(job, "invalid" if result is not None and result.verdict == "invalid" else state)
        log.info("audit %s: %s", job.id, state)
        if state == "done":
            self.gauges.invalidate()
            self.refresh()

    def end_state(self, job: Job, code: int) -> State:
        if job.state == "cancelled":
            return "cancelled"
        if code == 0 and (self.store.folder / job.id / REPORT).exists():
            return "done"
        return "interrupted" if self.stopping or code < 0 or code == TERMINATED else "failed"

    def result(self, id: str) -> Result:
        return result_of(Report.model_validate_json((self.store.folder / id / REPORT).read_bytes()))

    def reason(self, id: str, code: int) -> str:
        reasons = [event.why for event in self.store.events(id) if isinstance(event, FailedEvent)]
        log_file = self.store.folder / id / "worker.log"
        return reasons[-1] if reasons else f"its process ended with code {code}; {log_file} says more"

    def refresh(self) -> None:
        """The gauges anew, for another library or after another audit, and the share of the CPU."""
        self.gauges.refresh(self.library().digest)
        self.estimator.cpu.update()

    def update(self, job: Job, **changes: Any) -> None:
        self.store.save(job.model_copy(update=changes))

    def count(self, job: Job, outcome: str) -> None:
        self.metrics.inc("audit_runs_total", kind=str(job.request["profile"]), outcome=outcome)


def result_of(report: Report) -> Result:
    """The figures that a list shows."""
    clean, robust = report.ours.clean.expected, report.ours.robust.expected
    ten = report.ours.robust.tries["k10"]
    return Result(
        verdict=report.verdict,
        measurement=report.data.name != GENERATED,
        images=report.data.images,
        clean=clean,
        robust=robust,
        ten_tries=ten,
        secrecy=None if report.secrecy is None else report.secrecy.difference,
        norm=report.audit.norm,
        epsilon=report.audit.headline,
        curve=tuple(report.ours.curve),
        judgement=judge_measurement(report),
    )


def absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())
