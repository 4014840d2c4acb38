"""Figures of finished audits as gauges of the metrics endpoint."""

import json
import logging
from typing import Final

from service.admin.audit_store import Job, JobStore
from service.audit.report.model import OURS, REPORT, Report
from service.observability.metrics import BOUNDS, Metrics

log = logging.getLogger(__name__)
ACCURACY: Final = "audit_accuracy"
SECRECY: Final = "audit_secrecy"
ALL: Final = "all"


class AuditGauges:
    """Publishes what the last audits of the served library measured."""

    def __init__(self, metrics: Metrics, store: JobStore) -> None:
        self.metrics, self.store = metrics, store
        self.published = ""  # digest of the library whose figures are shown

    def invalidate(self) -> None:
        """The next refresh reads the reports again."""
        self.published = ""

    def refresh(self, digest: str) -> None:
        """Publishes anew for another library, or after another audit."""
        if digest == self.published:
            return
        self.published = digest
        try:
            self.publish(digest)
        except (OSError, ValueError, KeyError):
            log.exception("a finished audit in %s cannot be read: no figures", self.store.folder)

    def publish(self, digest: str) -> None:
        """An invalid audit has no figures. One of chosen attacks alone says nothing of all attacks together."""
        self.metrics.forget(ACCURACY)
        self.metrics.forget(SECRECY)
        for job in last_of_each_kind(self.store.all(), digest):
            report = Report.model_validate_json((self.store.folder / job.id / REPORT).read_bytes())
            if report.verdict == "invalid":
                continue
            rows = [(row.name, row.epsilon, row.expected.value) for row in report.attacks if row.system == OURS]
            if not report.audit.attacks:
                rows += [(ALL, point.epsilon, point.value) for point in report.ours.curve]
            for attack, epsilon, value in rows:
                labels = {"profile": report.audit.profile, "norm": report.audit.norm, "attack": attack}
                self.metrics.set(ACCURACY, value, **labels, epsilon=f"{epsilon:g}")
            if report.secrecy is not None:
                for bound in BOUNDS:
                    value = getattr(report.secrecy.difference, bound)
                    self.metrics.set(SECRECY, value, profile=report.audit.profile, norm=report.audit.norm, bound=bound)


def last_of_each_kind(jobs: list[Job], digest: str) -> list[Job]:
    """The last finished audit of a library for each request, seeds apart; the oldest first. jobs: newest first."""
    last: dict[str, Job] = {}
    for job in jobs:
        if job.state == "done" and job.digest == digest:
            request = {name: value for name, value in job.request.items() if not name.endswith("seed")}
            last.setdefault(json.dumps(request, sort_keys=True), job)
    return list(reversed(last.values()))
