from pathlib import Path

import pytest

from model_store.library import open_library
from model_store.structures import Structure
from tests.support.jobs import job_in
from tests.support.searches import CPU
from training.data import read_split
from training.errors import TrainingError
from training.export import export, table
from training.jobs import initialize
from training.recipes import TrainConfig
from training.run_job import run_job


def test_a_done_job_exports_as_a_library_with_its_claims(done_state: Path, tmp_path: Path) -> None:
    library = export(tmp_path / "library", [done_state])
    again = open_library(tmp_path / "library")
    assert library.digest == again.digest
    (entry,) = again.entries
    assert {(claim.metric, claim.data.split) for claim in entry.claims} == {
        (metric, split) for metric in ("clean", "pgd") for split in ("test", "selection")
    }
    assert entry.provenance.recipe["seed"] == 1
    assert entry.provenance.seconds > 0
    assert "resnet18" in str(entry.structure)
    assert "PGD, ε = 8/255, 20 steps of 2/255, 1 random start" in table(again)


def test_baselines_are_exported_beside_the_tickets_and_never_drawn(
    data: Path, done_state: Path, tmp_path: Path
) -> None:
    dense = TrainConfig(Structure("resnet18", 2), 1.0, 3, 10, batch=16, guards=0, mask_share=0.0, precision="float32")
    run_job(job_in(tmp_path / "dense", dense, role="baseline"), read_split(data), CPU)
    library = export(tmp_path / "library", [done_state, tmp_path / "dense"])
    assert (len(library.tickets), len(library.baselines)) == (1, 1)
    assert "\n| dense, never drawn | " in table(library)
    assert "dense" not in table(export(tmp_path / "alone", [done_state]))
    assert library.policy.tickets == 1


def test_nothing_done_writes_nothing(tmp_path: Path) -> None:
    initialize(job_in(tmp_path))
    with pytest.raises(TrainingError, match="no finished ticket; nothing was written"):
        export(tmp_path / "library", [tmp_path])
    assert not (tmp_path / "library").exists()
