from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.digits import digits
from tests.support.jobs import job_in, write_zip
from tests.support.searches import CPU
from training.data import read_split
from training.run_job import run_job


@pytest.fixture(scope="session")
def digits_zip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 digits to search and select on, and 40 to test on."""
    path = tmp_path_factory.mktemp("digits") / "digits.zip"
    write_zip(path, {"train": digits().search.balanced(400), "test": digits().test.balanced(40)})
    return path


@pytest.fixture(scope="package")
def data(digits_zip: Path) -> Iterator[Path]:
    """The zip of digits, and a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOMBOLA_CACHE", str(digits_zip.parent / "cache"))
        yield digits_zip


@pytest.fixture(scope="session")
def done_state(digits_zip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder with one finished ticket."""
    state = tmp_path_factory.mktemp("state")
    run_job(job_in(state), read_split(digits_zip), CPU)
    return state
