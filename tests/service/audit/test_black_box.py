"""Black-box attacks through the real public plane, on a real port."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model_store.attacks import ThreatModel
from model_store.images import Pixels
from service.audit.attacks import black_box
from service.audit.attacks.black_box import HttpOracle, QueryAttackConfig
from service.audit.errors import AuditRejected, OracleFailed
from service.errors import EngineFailed, Overloaded
from service.scheduling.answers import Probabilities
from tests.support.planes import Oracle, StandIn, behind_a_port, probabilities, public_app
from tests.support.tickets import CLASSES


def grey(*values: int) -> torch.Tensor:
    return torch.stack([torch.full((3, 32, 32), value, dtype=torch.uint8) for value in values])


def test_what_is_asked_is_what_is_classified_and_every_image_is_counted() -> None:
    """150 random images in two requests: not one pixel is lost on the way, and answers come in order, rounded."""
    manager = StandIn()
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (150, 3, 32, 32), np.uint8))
    with behind_a_port(public_app(manager)) as address, asking(address) as oracle:
        shown = oracle(pixels)
    assert np.array_equal(np.concatenate(manager.scheduler.rows), pixels.numpy())
    expected = np.round(probabilities(pixels.numpy()), 2)
    assert np.allclose(shown[shown > 0], expected[shown > 0])
    assert np.array_equal(shown.argmax(axis=1), expected.argmax(axis=1))
    assert oracle.queries == 150


def test_labels_alone_are_enough_to_ask() -> None:
    with behind_a_port(public_app(output_detail="label")) as address, asking(address) as oracle:
        shown = oracle(grey(0, 30, 255))
    assert shown.argmax(axis=1).tolist() == [0, 1, 9]
    assert set(np.unique(shown)) == {0.0, 1.0}


class BusyOnce(Oracle):
    async def submit(self, rows: Pixels, *, client: str, deadline: float | None) -> Probabilities:
        if not self.rows:
            self.rows.append(rows)
            raise Overloaded
        return await super().submit(rows, client=client, deadline=deadline)


def test_a_busy_service_is_given_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(
        black_box, "time", SimpleNamespace(sleep=pauses.append)
    )  # its own alone: other threads sleep too
    with behind_a_port(public_app(StandIn(BusyOnce()))) as address, asking(address) as oracle:
        oracle(grey(0))
    assert pauses == [1.0]
    assert oracle.queries == 1


def test_a_failing_service_ends_the_attack_with_its_words() -> None:
    failing = public_app(StandIn(Oracle(error=EngineFailed())))
    refused = pytest.raises(OracleFailed, match="500 while it was attacked")
    with behind_a_port(failing) as address, asking(address) as oracle, refused:
        oracle(grey(0))


def test_a_service_that_is_not_there_ends_the_attack() -> None:
    with nobody() as oracle, pytest.raises(OracleFailed, match="while it was attacked"):
        oracle(grey(0))


def test_square_finds_its_way_over_http() -> None:
    """The stand-in's class is a matter of mean red alone, 3 away from the next: epsilon 8 reaches it."""
    pixels, labels = grey(22, 53), torch.tensor([0, 2])
    with behind_a_port(public_app()) as address, asking(address) as oracle:
        stops = black_box.attack(
            oracle, pixels, labels, ThreatModel("linf", 8 / 255), QueryAttackConfig("square", 1, 120), 0
        )
        assert oracle(stops[-1].pixels).argmax(axis=1).tolist() != labels.tolist()
    assert oracle.queries == 2 * 120 + 2


def test_other_norms_are_refused() -> None:
    with nobody() as oracle, pytest.raises(AuditRejected, match="l-infinity"):
        black_box.attack(oracle, grey(0), torch.tensor([0]), ThreatModel("l2", 1.0), QueryAttackConfig(), 0)


def asking(address: str) -> HttpOracle:
    return HttpOracle(f"http://{address}", len(CLASSES))


def nobody() -> HttpOracle:
    """Port 9 discards, where anything listens there at all."""
    return asking("127.0.0.1:9")
