import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.digits import digits
from tests.support.jobs import job_in, write_zip
from tests.support.searches import CPU
from training.data import read_split
from training.run_job import run_job


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A zip of 1,200 digits to search on and 40 to test on, and a cache of its own."""
    folder = tmp_path_factory.mktemp("digits")
    before = os.environ.get("TOMBOLA_CACHE")
    os.environ["TOMBOLA_CACHE"] = str(folder / "cache")
    write_zip(folder / "digits.zip", {"train": digits().search.balanced(1150), "test": digits().test.balanced(40)})
    yield folder / "digits.zip"
    if before is None:
        os.environ.pop("TOMBOLA_CACHE", None)
    else:
        os.environ["TOMBOLA_CACHE"] = before


@pytest.fixture(scope="package")
def done_state(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder with one finished ticket."""
    state = tmp_path_factory.mktemp("state")
    run_job(job_in(state), read_split(data), CPU)
    return state
