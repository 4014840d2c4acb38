"""What an audit costs, estimated before it starts."""

from collections.abc import Sequence
from typing import Final

from model_store.library import Library
from model_store.policy import expected_size
from model_store.structures import multiply_adds
from service.audit.attacks.arc import ArcConfig
from service.audit.attacks.autoattack import AutoAttackConfig
from service.audit.attacks.black_box import QueryAttackConfig
from service.audit.attacks.eot import PgdConfig, Reach
from service.audit.attacks.simple import RandomCorners, SingleModelPgd, UniversalPerturbation
from service.audit.config import Audit, ProfileName, Step
from service.audit.evaluation.draws import Defense
from service.audit.evaluation.members import all_members
from service.audit.plan import images_of
from service.audit.profiles import PROFILES
from service.audit.report.model import GENERATED
from service.audit.rivals import FINALISTS, SECOND, SWAPS
from service.audit.target import Target

GRADIENT: Final = 2.2  # forwards that one forward and backward costs, measured: weights need no gradient
BFLOAT16: Final = 0.5  # of float32's time: measured on AVX512-BF16 and AMX, at 128 images a pass
GMACS_PER_SECOND: Final = 35.0  # one core in float32, measured on the compact library's structures
OPEN: Final = 0.55  # images that can still get riskier, mean over an attack's steps: measured between 0.41 and 0.59
OPEN_FAR: Final = 0.03  # of images at epsilons where none should be left, mean over the steps
OPEN_FIXED: Final = 0.4  # of a system of one state, where an image is broken for good at once
# Of all members for one image, in the checks.
CHECK_FORWARDS: Final[dict[ProfileName, int]] = {"smoke": 60, "standard": 600, "full": 1_400, "reference": 700}


def multiply_adds_of(library: Library, outside: Library | None = None) -> list[int]:
    """Of one image through each member of the bench."""
    size = library.input.size
    return [multiply_adds(ticket.structure, size) for _, ticket in all_members(library, outside)]


def multiply_adds_of_subject(subject: Library | Target, outside: Library | None = None) -> list[int]:
    """Of a library, or of a model of another kind."""
    return subject.multiply_adds() if isinstance(subject, Target) else multiply_adds_of(subject, outside)


def forwards(step: Step, drawn: float, members: int) -> float:
    """Forwards of one image through each member that the attack asks for. drawn: members of a draw."""
    still_open = OPEN_FIXED if drawn == members else OPEN
    match step.settings:
        case Reach(steps=steps):
            return 2 + OPEN_FAR * GRADIENT * steps
        case PgdConfig(steps=steps, restarts=restarts, targets=targets):
            ascents = (restarts + step.warm) * max(1, targets)
            return 2 + still_open * GRADIENT * ((steps + 1) * ascents + 2 * targets)
        case ArcConfig(sweeps=sweeps, candidates=candidates, classes=classes, restarts=restarts):
            each = 1 + candidates * (3 + (1 + classes * (GRADIENT - 1)) * drawn / members)
            return still_open * sweeps * (restarts + 1) * each
        case AutoAttackConfig(method=method, iterations=iterations, restarts=restarts, targets=targets):
            each = 1 if method == "square" else GRADIENT + (method == "fab-t")
            return still_open * each * iterations * restarts * (targets if method.endswith("-t") else 1)
        case SingleModelPgd(steps=steps, restarts=restarts):
            return GRADIENT * max(1, steps) * restarts
        case UniversalPerturbation(epochs=epochs):
            return epochs * (GRADIENT + 1) / 2
        case RandomCorners(count=count):
            return 1 + count
        case QueryAttackConfig(averages=averages, probes=probes):
            return probes * (1 - (1 - drawn / members) ** averages)


def giga_multiply_adds(step: Step, system: Defense, each: Sequence[int], *, bfloat16: bool = False) -> float:
    """What one attack costs, scoring included; as many of float32 as take the time.

    bfloat16: whether attacks are crafted in it. Black boxes ask the model itself.
    """
    used = system.used
    attack = forwards(step, expected_size(system.policy), len(used)) * sum(each[index] for index in used)
    rounded = bfloat16 and not isinstance(step.settings, QueryAttackConfig)
    scored = OPEN if step.stage else 1  # images that earlier attacks broke for good are scored already
    return step.images * (attack * (BFLOAT16 if rounded else 1) + scored * sum(each)) / 1e9


def check_giga_multiply_adds(audit: Audit, each: Sequence[int], *, bfloat16: bool = False) -> float:
    """What the sanity checks cost, which attack the first few images again."""
    images = min(images_of(audit), PROFILES[audit.profile].check_images)
    forwards = CHECK_FORWARDS[audit.profile] * (BFLOAT16 if bfloat16 else 1)
    return images * forwards * sum(each) / 1e9


def expected_rivals(audit: Audit) -> int:
    """The images that rivals are chosen on, if the audit's data set has training images."""
    return 0 if audit.data in (None, GENERATED) else PROFILES[audit.profile].rival_images


def rivals_giga_multiply_adds(images: int, each: Sequence[int], size: int, *, bfloat16: bool = False) -> float:
    """What the choice of rivals costs. each: multiply-adds of each ticket.  size: of the fixed set.

    FGSM on every ticket, PGD on the finalists and on about size + SWAPS / 2 sets. All finalists read every attack.
    """
    finalists = min(FINALISTS, len(each))
    gradient = GRADIENT * (BFLOAT16 if bfloat16 else 1)
    sets = size - 1 + SWAPS / 2
    passes = len(each) * (gradient + 1) + finalists * (SECOND.steps * gradient + finalists)
    passes += sets * (size * SECOND.steps * gradient + finalists)
    return images * passes * sum(each) / len(each) / 1e9


def estimated_seconds(giga: float, threads: int = 1) -> float:
    return giga / (GMACS_PER_SECOND * threads)
