"""Where jobs run. This module holds what the executors share."""

from collections.abc import Sequence
from typing import Final

from training.cost import cost
from training.jobs import Job, status

POLL_SECONDS: Final = 3


def remaining_cost(job: Job) -> float:
    now = status(job)
    return cost(job.recipe, job.input) * (1 - now.step / job.recipe.steps)


def longest_first(jobs: Sequence[Job]) -> list[Job]:
    """The unfinished jobs, longest first, so that the last hour is not one process alone."""
    waiting = [job for job in jobs if not (job.folder / "done.json").exists()]
    return sorted(waiting, key=remaining_cost, reverse=True)
