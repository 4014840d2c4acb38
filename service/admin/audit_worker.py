"""The process of one audit: low priority, its folder for everything, and it ends when the service does."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Final

from service.cpu import NICE_AUDIT, die_with_parent, set_idle_priority

FAILED: Final = 2
Json = dict[str, Any]


def main(folder: Path, niceness: int) -> int:
    """Runs the audit that job.json asks for. Its events, and why it failed, go to events.jsonl."""
    die_with_parent(signal.SIGTERM)  # a killed service takes its audit with it; the next one resumes it
    os.nice(niceness)
    if niceness == NICE_AUDIT:
        set_idle_priority()
    events = folder / "events.jsonl"

    def tell(event: Json) -> None:
        line = json.dumps({**event, "time": round(time.time(), 3)}) + "\n"
        with events.open("a", encoding="utf-8") as file:
            file.write(line)

    from model_store.errors import StoreError, os_error_text
    from service.audit.errors import AuditError

    try:
        work(folder, json.loads((folder / "job.json").read_text(encoding="utf-8")), tell)
    except OSError as error:  # a full disk, for example
        tell({"event": "failed", "why": os_error_text(error)})
        return FAILED
    except (AuditError, StoreError) as error:
        tell({"event": "failed", "why": str(error)})
        return FAILED
    return 0


def work(folder: Path, job: Json, tell: Any) -> None:
    from model_store.library import open_library
    from service.audit.config import read_audit
    from service.audit.errors import AuditConflict
    from service.audit.run import load_images, run_audit

    asked = read_audit(job["request"])
    library = open_library(Path(job["library"]) if job["library"] else None)
    if library.digest != job["digest"]:
        raise AuditConflict(f"the library is {library.digest[:12]} now; the audit was asked of {job['digest'][:12]}")
    data = load_images(asked, library, Path(job["data"]) if job["data"] else None, job["threads"])
    outside, served = (Path(job[name]) if job.get(name) else None for name in ("outside", "int8_images"))
    run_audit(
        folder,
        asked,
        library,
        data,
        device=job["device"],
        url=job["url"],
        outside=open_library(outside) if outside else None,
        int8_images=served,
        emit=tell,
        threads=job["threads"],
    )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
