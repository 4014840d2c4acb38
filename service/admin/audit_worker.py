"""The process of one audit: low priority, its folder for everything, and it ends when the service does."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from service.cpu import NICE_AUDIT, die_with_parent, set_idle_priority

if TYPE_CHECKING:
    from service.admin.audit_store import Job
    from service.audit.events import Event

FAILED: Final = 2


def main(folder: Path, niceness: int) -> int:
    """Runs the audit of job.json. Its events, and why it failed, go to events.jsonl."""
    die_with_parent(signal.SIGTERM)  # a killed service takes its audit with it; the next one resumes it
    os.nice(niceness)
    if niceness == NICE_AUDIT:
        set_idle_priority()

    from model_store.errors import StoreError, os_error_text
    from service.admin.audit_store import EVENTS, JOB, Job
    from service.audit.errors import AuditError
    from service.audit.events import Event, FailedEvent

    def write(event: Event) -> None:
        line = event.model_copy(update={"time": round(time.time(), 3)}).model_dump_json()
        with (folder / EVENTS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    try:
        run(folder, Job.model_validate_json((folder / JOB).read_bytes()), write)
    except (AuditError, StoreError) as error:
        write(FailedEvent(why=str(error)))
        return FAILED
    except OSError as error:  # a full disk, for example
        write(FailedEvent(why=os_error_text(error)))
        return FAILED
    return 0


def run(folder: Path, job: "Job", emit: "Callable[[Event], None]") -> None:
    """Raises AuditError, StoreError."""
    from model_store.library import open_library
    from service.audit.attack_runner import RunOptions
    from service.audit.config import read_audit
    from service.audit.errors import AuditConflict
    from service.audit.run import load_held_out, load_images, run_audit

    audit = read_audit(job.request)
    library = open_library(Path(job.library) if job.library else None)
    if library.digest != job.digest:
        raise AuditConflict(f"the library is {library.digest[:12]} now; the audit was asked of {job.digest[:12]}")
    path = Path(job.data) if job.data else None
    data, held_out = load_images(audit, library, path, job.threads), load_held_out(audit, library, path)
    options = RunOptions(
        device=job.device,
        threads=job.threads,
        url=job.url,
        outside=open_library(Path(job.outside)) if job.outside else None,
        precision=job.precision,
        int8_images=Path(job.int8_images) if job.int8_images else None,
    )
    run_audit(folder, audit, library, data, options, emit=emit, held_out=held_out)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
