"""The sizes of the perturbations of an audit, in 255ths, for the size of its pictures."""

import math
from dataclasses import dataclass
from typing import Final

from model_store.attacks import Norm
from model_store.input_spec import CIFAR10_INPUT
from service.audit.config import Audit, check_epsilons

USUAL: Final[dict[Norm, tuple[float, ...]]] = {
    "linf": (0.0, 2.0, 4.0, 8.0, 12.0, 20.0),
    "l2": (0.0, 32.0, 64.0, 128.0, 192.0, 320.0),  # of CIFAR-10's pictures: 128/255 is the literature's 0.5
}
HEADLINE: Final[dict[Norm, float]] = {"linf": 8.0, "l2": 128.0}
FAR: Final[dict[Norm, tuple[float, float]]] = {"linf": (64.0, 128.0), "l2": (1020.0, 2040.0)}  # for check 15


@dataclass(frozen=True)
class Epsilons:
    """In 255ths.

    Attributes:
      swept: ascending.
      headline: that all systems face with every attack.
      far: at which no image should be left.
      largest: from any picture to any other.
      about: why they are larger or smaller than for CIFAR-10's pictures; empty where they are not.
    """

    swept: tuple[float, ...]
    headline: float
    far: tuple[float, float]
    largest: float
    about: str = ""


def epsilons_of(audit: Audit, numel: int) -> Epsilons:
    """The request's epsilons, or the usual ones for pictures of `numel` numbers.

    A change of the same size in each pixel has an l2 length that grows with the root of their number. So does the
    usual l2 epsilon, from its value for CIFAR-10's pictures, rounded to a whole 255th.

    Raises:
      AuditRejected: an epsilon beyond the largest distance between two pictures.
    """
    norm, factor = audit.norm, 1.0
    largest = 255.0
    if norm == "l2":
        factor, largest = math.sqrt(numel / CIFAR10_INPUT.numel), 255 * math.sqrt(numel)

    def scaled(epsilon: float) -> float:
        return float(round(epsilon * factor))

    swept = audit.epsilons or tuple(map(scaled, USUAL[norm]))
    check_epsilons(swept, largest)
    usual = scaled(HEADLINE[norm])
    headline = usual if usual in swept else max(swept)
    near, far = map(scaled, FAR[norm])
    return Epsilons(swept, headline, (near, far), largest, explain(factor, given=bool(audit.epsilons)))


def explain(factor: float, *, given: bool) -> str:
    """Why the usual l2 epsilons are `factor` times those of CIFAR-10's pictures; empty where they are not."""
    if given or factor == 1:
        return ""
    side = f"{CIFAR10_INPUT.height}x{CIFAR10_INPUT.width}"
    return f"{factor:.3g} times those of {side} pictures, for the same change of each pixel"


def threat_model(audit: Audit, epsilons: Epsilons) -> dict[str, str]:
    """Every field that a robustness figure needs to mean anything."""
    swept = ", ".join(f"{epsilon:g}" for epsilon in epsilons.swept)
    if epsilons.about:
        swept += f"; {epsilons.about}"
    norm = {
        "linf": "l-infinity: every channel of every pixel changes by at most epsilon",
        "l2": "l2: the length of the whole change is at most epsilon",
    }[audit.norm]
    return {
        "goal": "untargeted: any label but the image's own",
        "norm": norm,
        "epsilon": f"{epsilons.headline:g}/255 for the headline; swept: {swept}",
        "pixels": "[0, 1], delivered as 8-bit RGB at the size of the model's input, scored on that grid",
        "knowledge": "weights, temperatures and the law of theta are public; theta is secret and fresh for each image",
        "order": "the attacker chooses the image before theta is drawn",
        "queries": "none for gradient attacks; counted one by one for black-box attacks",
        "compute": f"profile {audit.profile}",
    }
