"""Epsilons for the size of the pictures: l-infinity is the same for all, l2 is the same change of each pixel."""

import math

import numpy as np
import pytest

from service.audit.config import Audit
from service.audit.epsilons import epsilons_of, threat_model
from service.audit.errors import AuditRejected

L2 = Audit(norm="l2")


def numel(height: int, width: int) -> int:
    return 3 * height * width


@pytest.mark.parametrize(
    ("size", "swept", "headline", "far"),
    [
        ((32, 32), (0, 32, 64, 128, 192, 320), 128, (1020, 2040)),  # of CIFAR-10, as the literature has them
        ((64, 64), (0, 64, 128, 256, 384, 640), 256, (2040, 4080)),  # sides twice as long
        ((48, 64), (0, 55, 111, 222, 333, 554), 222, (1767, 3533)),  # the root of 3 times
        ((224, 224), (0, 224, 448, 896, 1344, 2240), 896, (7140, 14280)),
    ],
)
def test_l2_grows_with_the_root_of_the_size(
    size: tuple[int, int], swept: tuple[float, ...], headline: float, far: tuple[float, float]
) -> None:
    epsilons = epsilons_of(L2, numel(*size))
    assert (epsilons.swept, epsilons.headline, epsilons.far) == (swept, headline, far)
    assert epsilons.largest == pytest.approx(float(np.linalg.norm(np.full(numel(*size), 255.0))))  # black to white


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (48, 64), (96, 96), (1024, 1024)])
def test_the_usual_l2_change_is_the_same_for_each_pixel(size: tuple[int, int]) -> None:
    """0.5 spread evenly over CIFAR-10's 3,072 numbers is 2.31 grey levels for each; so it is for every size."""
    each = epsilons_of(L2, numel(*size)).headline / math.sqrt(numel(*size))
    assert each == pytest.approx(128 / math.sqrt(3072), abs=0.5 / math.sqrt(numel(*size)))


@pytest.mark.parametrize("size", [(32, 32), (48, 64), (224, 224)])
def test_linf_is_the_same_for_every_size(size: tuple[int, int]) -> None:
    epsilons = epsilons_of(Audit(), numel(*size))
    assert list(epsilons.swept) == [0, 2, 4, 8, 12, 20]
    assert [epsilons.headline, *epsilons.far, epsilons.largest] == [8, 64, 128, 255]
    assert not epsilons.about


def test_epsilons_of_the_request_stay_as_they_are() -> None:
    epsilons = epsilons_of(Audit(norm="l2", epsilons=(100.0, 256.0, 300.0)), numel(64, 64))
    assert (epsilons.swept, epsilons.headline, epsilons.about) == ((100, 256, 300), 256, "")
    assert epsilons_of(Audit(norm="l2", epsilons=(100.0, 300.0)), numel(64, 64)).headline == 300


def test_an_l2_epsilon_beyond_every_other_picture_is_refused() -> None:
    long = Audit(norm="l2", epsilons=(20_000.0,))
    assert epsilons_of(long, numel(64, 64)).headline == 20_000
    with pytest.raises(AuditRejected, match=r"epsilon 20000\.0; expected 0, or 1 to 14134"):
        epsilons_of(long, numel(32, 32))


def test_the_threat_model_says_the_epsilons_and_why() -> None:
    def stated(audit: Audit, *size: int) -> str:
        return threat_model(audit, epsilons_of(audit, numel(*size)))["epsilon"]

    assert stated(L2, 32, 32) == "128/255 for the headline; swept: 0, 32, 64, 128, 192, 320"
    assert stated(L2, 64, 64) == (
        "256/255 for the headline; swept: 0, 64, 128, 256, 384, 640; "
        "2 times those of 32x32 pictures, for the same change of each pixel"
    )
    assert stated(Audit(), 64, 64) == "8/255 for the headline; swept: 0, 2, 4, 8, 12, 20"
