"""The AutoAttack authors' code (pyautoattack) against deterministic proxies of a randomised ensemble.

Their success flags are not used, and their own EOT is not either: on a random model it keeps lucky draws. What counts
is every image they try: the riskiest over theta is kept, whether or not it fools the proxy. Their code reseeds torch's
global generator; here that touches nothing of ours.
"""

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from model_store.attacks import ThreatModel, per_image, project
from service.audit.attacks.losses import ensemble_logits, log_expected_softmax
from service.audit.evaluation.members import AttackTarget
from service.audit.evaluation.scoring import CERTAIN, failure

Proxy = Literal["soft-vote", "mean-logits", "mean-log-softmax"]
Method = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square"]
NORMS: Final = {"linf": "Linf", "l2": "L2"}


@dataclass(frozen=True)
class AutoAttackConfig:
    """method: one of AutoAttack's four, or its untargeted DLR.  iterations: of each restart and target class."""

    method: Method
    proxy: Proxy = "soft-vote"
    iterations: int = 100
    restarts: int = 1
    targets: int = 9


@dataclass(frozen=True, eq=False)
class ExpectedLogits:
    """A deterministic, differentiable stand-in for a randomised ensemble: images -> [N, classes], fresh each time.

    soft-vote: log E_theta softmax.  mean-logits: E_theta of the mean logits.  mean-log-softmax: E_theta log softmax.
    see: is shown every batch of images asked about, with the members' logits [M, N, classes].
    """

    target: AttackTarget
    proxy: Proxy
    see: Callable[[Tensor, Tensor], None] = lambda _images, _logits: None

    def __call__(self, images: Tensor) -> Tensor:
        logits = self.target(images.flatten().view(images.shape))  # so that gradients are contiguous, as they expect
        self.see(images.detach(), logits.detach())
        if self.proxy == "soft-vote":
            return log_expected_softmax(logits, self.target.draws)
        drawn = ensemble_logits(logits, self.target.draws)
        values = drawn if self.proxy == "mean-logits" else torch.log_softmax(drawn, dim=-1)
        return torch.einsum("r,rnc->nc", self.target.draws.weights.to(values), values)


@dataclass
class WorstCaseTracker:
    """Of all images that a library asks about inside the threat model: for each clean one, the riskiest over theta."""

    target: AttackTarget
    clean: Tensor
    labels: Tensor
    threat: ThreatModel
    images: Tensor = field(init=False)
    risk: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.images = self.clean.clone()
        self.risk = torch.zeros(len(self.clean), dtype=torch.float64, device=self.clean.device)

    @torch.no_grad()
    def see(self, images: Tensor, logits: Tensor) -> None:
        """Libraries ask in any order and selection: an image belongs to the clean one it is nearest to."""
        power = torch.inf if self.threat.norm == "linf" else 2.0
        away, rows = torch.cdist(images.flatten(1), self.clean.flatten(1), p=power).min(dim=1)
        risk = failure(logits, self.labels[rows], self.target.draws)
        inside = away <= self.threat.epsilon + 1e-6
        for place in (inside & (risk > self.risk[rows])).nonzero().flatten().tolist():
            row = rows[place]
            if risk[place] > self.risk[row]:
                self.images[row], self.risk[row] = images[place], risk[place]


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Global generators seeded inside and exactly as before outside: numpy's, random's and torch's."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 -- what the libraries use
    cuda = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)


def attack(
    target: AttackTarget,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    standard: AutoAttackConfig,
    seed: int,
    known: Sequence[Tensor] = (),
) -> Tensor:
    """float [N, 3, H, W]: the riskiest of all images that the library tried; the clean one if none was riskier.

    known: images of earlier attacks. Those that all draws misread already are kept, and not attacked again.
    """
    reached = project(known[0], images, threat) if known else images.clone()
    with isolated_rng(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zero gradients: the audit's own check 5 says so, and fails
        open_still = not_yet_broken(target, reached, labels)
        for place, index in enumerate(torch.split(open_still, target.batch(images)) if len(open_still) else ()):
            clean, right = images[index].contiguous(), labels[index]
            kept = WorstCaseTracker(target, clean, right, threat)
            perturb = build_attack(ExpectedLogits(target, standard.proxy, kept.see), threat, standard, seed + place)
            offer(kept, project(perturb(clean, right).detach(), clean, threat))
            reached[index] = kept.images
    return reached


@torch.no_grad()
def not_yet_broken(target: AttackTarget, images: Tensor, labels: Tensor) -> Tensor:
    """The images that are not misclassified under every draw already."""
    risk = failure(target.logits(images), labels, target.draws)
    return (risk < CERTAIN).nonzero().flatten()


@torch.no_grad()
def offer(kept: WorstCaseTracker, final: Tensor) -> None:
    """What the library itself chose, which among equally risky images has the highest loss."""
    risk = failure(kept.target(final), kept.labels, kept.target.draws)
    better = risk >= kept.risk
    kept.images = torch.where(per_image(better, final), final, kept.images)
    kept.risk = torch.maximum(risk, kept.risk)


def build_attack(
    classifier: ExpectedLogits, threat: ThreatModel, standard: AutoAttackConfig, seed: int
) -> Callable[[Tensor, Tensor], Tensor]:
    from pyautoattack import autopgd_base, fab_pt, square  # here, since a server that only serves has no use for them

    norm, device = NORMS[threat.norm], classifier.target.draws.rows.device
    shared: dict[str, Any] = {"eps": threat.epsilon, "seed": seed, "device": device}
    shared |= {"norm": norm, "n_iter": standard.iterations, "n_restarts": standard.restarts, "verbose": False}
    if standard.method in ("apgd-ce", "apgd-dlr"):
        apgd = autopgd_base.APGDAttack(classifier, loss=standard.method.removeprefix("apgd-"), **shared)
        return lambda x, y: apgd.perturb(x, y, best_loss=True)  # the highest loss: a proxy's mistake is not our risk
    if standard.method == "apgd-t":
        targeted = autopgd_base.APGDAttack_targeted(classifier, n_target_classes=standard.targets, **shared)
        return lambda x, y: targeted.perturb(x, y)
    if standard.method == "fab-t":
        fab = fab_pt.FABAttack_PT(classifier, targeted=True, n_target_classes=standard.targets, **shared)
        return lambda x, y: fab.perturb(x, y)
    settings = {("n_queries" if name == "n_iter" else name): value for name, value in shared.items()}
    search = square.SquareAttack(no_graph(classifier), p_init=0.8, loss="margin", resc_schedule=False, **settings)
    return lambda x, y: search.perturb(x, y)


def no_graph(classifier: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            return classifier(images)

    return run
