"""What a law is held against: chosen under attack, on images that nothing is reported on."""

import io
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from model_store.attacks import ThreatModel
from model_store.image_sample import LabelledImages, read_selection
from model_store.input_spec import CIFAR10_INPUT
from model_store.policy import Policy
from service.admin.audit_estimate import CostEstimator
from service.audit import baselines, rivals
from service.audit.attack_runner import AuditRun, crafting_candidates
from service.audit.config import Audit
from service.audit.cost import multiply_adds_of, rivals_giga_multiply_adds
from service.audit.evaluation.members import CandidateSet, Member
from service.audit.evaluation.members import candidates_of as of_library
from service.audit.events import Event
from service.audit.report.model import GENERATED
from service.audit.rivals import choose_rivals
from service.audit.run import load_held_out, rivals_on
from service.settings import Settings
from tests.support.audit_models import faint, faint_digits, small_cnn, tiny, undefended
from tests.support.digits import digits
from training.data import read_split

THREAT = ThreatModel("linf", 1 / 255)


@pytest.fixture(scope="module")
def candidates() -> CandidateSet:
    """Two that learnt nothing, one that can read, and one that reads half of the digits."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        blank = [small_cnn().requires_grad_(False).eval() for _ in range(2)]
    return candidates_of(blank[0], undefended(), blank[1], Half(0))


class Half(nn.Module):
    """Reads five of ten digits, and says nothing of the others. Both halves together are the whole network."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = undefended()(images)
        known = torch.arange(10) // 5 == self.first
        return torch.where(known, logits, torch.full_like(logits, -4))


def candidates_of(*networks: nn.Module) -> CandidateSet:
    """Draws have two members, so that a rival of equal cost has two."""
    members = tuple(Member(f"network-{place}", network, 1.0) for place, network in enumerate(networks))
    law, count = Policy.fixed([0, 1], len(networks)), len(networks)
    return CandidateSet(members, count, ("a",) * count, law, torch.device("cpu"))


@pytest.fixture(scope="module")
def held_out() -> LabelledImages:
    images = digits().selection.balanced(60)
    return LabelledImages("digits", "held out", faint(images.pixels), images.labels, images.names, held_out=True)


def test_rivals_are_the_best_under_attack_whatever_claims_say(
    candidates: CandidateSet, held_out: LabelledImages
) -> None:
    claimed = baselines.claimed_rivals(candidates, [0.9, 0.1, 0.8, 0.1])
    assert (claimed.best, sorted(claimed.fixed)) == (0, [0, 2])
    chosen = choose_rivals(candidates, candidates, held_out, THREAT, seed=1)
    assert chosen.best == 1
    assert 1 in chosen.fixed
    assert chosen.images == len(held_out)
    assert chosen.best_accuracy is not None
    assert chosen.best_accuracy > 0.5
    for defense in (baselines.best_ticket(candidates, chosen), baselines.equal_cost(candidates, chosen)):
        assert f"under attack on {len(held_out)} held-out training images" in defense.about
    assert "by the library's claims" in baselines.best_ticket(candidates, claimed).about


def test_a_set_is_chosen_by_what_it_keeps_together(held_out: LabelledImages) -> None:
    """Twins add nothing to one another, though each is as good alone as the half that they lack."""
    halves = candidates_of(Half(0), Half(0), Half(0), Half(1))
    chosen = choose_rivals(halves, halves, held_out, THREAT, seed=1)
    assert 3 in chosen.fixed
    assert chosen.best_accuracy is not None
    assert chosen.fixed_accuracy is not None
    assert chosen.fixed_accuracy > chosen.best_accuracy + 0.2


def test_an_exchange_mends_a_bad_beginning(held_out: LabelledImages) -> None:
    halves = candidates_of(Half(0), Half(0), Half(1), Half(1))
    choice = rivals.RivalChoice(halves, halves, held_out, THREAT, 1)
    choice.finalists = (0, 1, 2, 3)
    for index in choice.finalists:
        choice.attack((index,))
    choice.attack((0, 1))
    chosen = choice.exchange((0, 1))
    assert sorted(place // 2 for place in chosen) == [0, 1]
    assert choice.left(chosen) > choice.left((0, 1)) + 0.2


def test_the_same_images_and_seed_choose_the_same(candidates: CandidateSet, held_out: LabelledImages) -> None:
    one, other = (choose_rivals(candidates, candidates, held_out, THREAT, seed=3) for _ in range(2))
    assert one == other


def test_an_audit_chooses_once_and_keeps_attacks_of_other_rivals_apart(tmp_path: Path) -> None:
    library, held_out = tiny(tmp_path / "library"), faint_digits(24)
    audit, events, members = Audit("smoke", images=2), list[Event](), of_library(library)
    first = rivals_on(held_out, tmp_path, audit, library, members, events.append)
    assert first is not None
    assert [event.images for event in events if event.event == "rivals"] == [24]
    events.clear()
    assert rivals_on(held_out, tmp_path, audit, library, members, events.append) == first
    assert not events
    (tmp_path / rivals.STORED).write_text("{")
    assert rivals.stored_rivals(tmp_path, "any") is None
    keys = set()
    for chosen in (first, replace(first, best=(first.best + 1) % 4)):
        run = AuditRun(tmp_path / "audit", audit, library, faint_digits(2), rivals=chosen)
        keys.add(next(run.key_of(step) for step in run.steps if step.system == baselines.BEST))
        assert "under attack on 24 held-out training images" in run.system(baselines.BEST).about
    assert len(keys) == 2


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (value, value, value)).save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for part, count in (("train", 25), ("test", 2)):
            for label, name in enumerate(("0", "1")):
                for number in range(count):
                    archive.writestr(f"{part}/{name}/{number:02d}.png", png(100 * label + number))
    return path


def test_the_images_are_those_that_a_search_sets_aside(data: Path, tmp_path: Path) -> None:
    split, sample = read_split(data, tmp_path / "cache"), read_selection(data, ("0", "1"), 100, CIFAR10_INPUT)
    assert sample is not None
    assert sorted(sample.ids) == sorted(split.selection.names)
    assert sample.labels.tolist() == [0, 1] * 5
    assert not set(sample.ids) & set(split.search.names)


def test_a_data_set_without_training_images_leaves_it_to_the_claims(data: Path, tmp_path: Path) -> None:
    library: Any = tiny(tmp_path / "library")
    path = tmp_path / "test.zip"
    with zipfile.ZipFile(data) as archive, zipfile.ZipFile(path, "w") as rest:
        for name in archive.namelist():
            if name.startswith("test/"):
                rest.writestr(name, archive.read(name))
    assert load_held_out(Audit("standard"), library, path) is None
    assert load_held_out(Audit("standard"), library, None) is None
    assert load_held_out(Audit("smoke"), library, data) is None


def test_more_tickets_and_images_cost_more() -> None:
    each = [1_000_000] * 40
    cost = rivals_giga_multiply_adds(1_000, each, 3)
    assert rivals_giga_multiply_adds(2_000, each, 3) == pytest.approx(2 * cost)
    assert rivals_giga_multiply_adds(1_000, each, 3, bfloat16=True) < cost < rivals_giga_multiply_adds(1_000, each, 4)


def test_a_service_prices_the_choice_of_rivals_where_a_data_set_is_named(tmp_path: Path) -> None:
    library = tiny(tmp_path / "library")
    estimator = CostEstimator(Settings(state_dir=tmp_path))
    costs = {
        (profile, data): estimator.cost(Audit(profile, data=data), library).giga_multiply_adds
        for profile in ("smoke", "standard")
        for data in (None, GENERATED, "photographs.zip")
    }
    each, size = multiply_adds_of(library), rivals.rival_size(of_library(library))
    candidates = of_library(library)
    rounded = crafting_candidates(Audit("standard"), library, candidates).precision == "bfloat16"
    choice = rivals_giga_multiply_adds(1_000, each, size, bfloat16=rounded)
    assert costs["standard", "photographs.zip"] - costs["standard", None] == pytest.approx(choice, abs=0.11)
    assert costs["standard", GENERATED] == costs["standard", None]
    assert len({cost for (profile, _), cost in costs.items() if profile == "smoke"}) == 1
