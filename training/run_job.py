"""One job, from wherever it stands to its ticket with the claims that were measured."""

from dataclasses import replace
from importlib.metadata import version
from typing import Final

import torch

from model_store.arithmetic import use_reproducible_arithmetic
from model_store.code_version import code_commit
from model_store.manifest import Provenance
from model_store.ticket import load_ticket, save_ticket
from training import search
from training.checkpoints import delete_checkpoints
from training.data import Split
from training.evaluation import measure
from training.files import remove_partial_files, write_text
from training.jobs import TICKET, Job, JobLog, Result, initialize, lock_folder, status

PACKAGES: Final = ("torch", "numpy", "safetensors")


def run_job(job: Job, split: Split, device: torch.device) -> None:
    """Carries one job from wherever it stands to its measured ticket. Does nothing if another process is at it."""
    job = initialize(job, device.type)
    use_reproducible_arithmetic()
    with lock_folder(job.folder) as mine:
        if not mine:
            return
        if (job.folder / "done.json").exists():
            delete_checkpoints(job.folder)  # of a process that ended between its last two steps
            return
        split = replace(split, input=job.input)  # of --from and scratch: the library's own statistics
        (job.folder / "failed.txt").unlink(missing_ok=True)
        remove_partial_files(job.folder)
        try:
            complete(job, split, device)
        except Exception as error:
            write_text(job.folder / "failed.txt", f"{type(error).__name__}: {error}")
            raise


def complete(job: Job, split: Split, device: torch.device) -> None:
    if job.masks:
        ticket = search.scratch_of(job.recipe, load_ticket(job.masks), split, device)
    else:
        start = load_ticket(job.start) if job.start else None
        ticket = search.run(job.recipe, split, job.folder, JobLog(job.folder / "log.jsonl").add, device, start)
    save_ticket(job.folder / TICKET, ticket)
    claims = measure(ticket, split, job.data, device, job.folder / "measured.json")
    result = Result(provenance=provenance(job, split), claims=tuple(claims))
    write_text(job.folder / "done.json", result.model_dump_json(indent=1))
    delete_checkpoints(job.folder)


def provenance(job: Job, split: Split) -> Provenance:
    return Provenance(
        recipe=job.recipe.as_dict(),
        data_digest=split.digest,
        seed=job.recipe.seed,
        commit=code_commit(),
        seconds=round(job.search_seconds + status(job).seconds, 1),
        packages={name: version(name) for name in PACKAGES},
        parent=job.recipe.parent,
    )
