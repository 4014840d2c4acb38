"""All thirty-six checks, in order, each finished one kept on disk; from Carlini et al. (2019), Pintor et al. (2022),
AutoAttack's flags and Athalye et al. (2018). The list is neither necessary nor sufficient."""

import hashlib
import json
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final

from model_store.files import write_atomically
from model_store.json_object import Json, digest_of
from service.audit.attack_runner import AuditRun
from service.audit.checks import attacks, model, planted, report
from service.audit.checks.base import Check, CheckContext, evaluate_check
from service.audit.events import CheckEvent

PACKAGE: Final = Path(__file__).parents[1]
SOURCES: Final = tuple(PACKAGE / name for name in ("attacks", "checks", "evaluation", "secrecy.py", "stats.py"))
CHECKS: Final[tuple[Check, ...]] = (*model.CHECKS, *attacks.CHECKS, *report.CHECKS, *planted.CHECKS, attacks.ROUNDING)


def run_checks(run: AuditRun) -> list[Json]:
    """The table, for the attacks that a run has made."""
    context, rows = CheckContext(run), []
    for check in CHECKS:
        began = time.monotonic()
        path = run.folder / "checks" / f"{key_of(run, check)}.json"
        if path.exists():
            row: Json = json.loads(path.read_text())
        else:
            row = evaluate_check(check, context)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(row).encode())
        rows.append(row)
        seconds = round(time.monotonic() - began, 2)
        shown = {name: row[name] for name in ("name", "outcome", "value")}
        run.emit(CheckEvent(id=check.id, **shown, seconds=seconds))
    return rows


def key_of(run: AuditRun, check: Check) -> str:
    """Changes with anything that changes the check's result: the attacks it looks at above all, and its own code."""
    about = [run.library.digest, run.fingerprint, run.data.digest, str(run.audit), [run.key_of(s) for s in run.steps]]
    about += [run.options.precision, str(run.options.int8_images), digest_of_code(SOURCES)]
    return f"{check.id:02d}-{digest_of(about)[:24]}"


@cache
def digest_of_code(sources: Sequence[Path]) -> str:
    """SHA-256 of the Python files among these files and folders."""
    state = hashlib.sha256()
    for source in sources:
        for path in sorted(source.glob("*.py")) if source.is_dir() else [source]:
            state.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return state.hexdigest()
