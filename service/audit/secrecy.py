"""The secrecy meter: what a moving target buys. Robust accuracy with theta secret less with theta known.

The same law, images and attacks on both sides; knowing theta can only help the attacker, so that less than 0 is an
attack on the secret that falls short, or chance.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from service.audit.attack_runner import AuditRun
from service.audit.profiles import SHARED
from service.audit.stats import Interval, bootstrap, crossed_difference


@dataclass(frozen=True)
class SecrecyReading:
    """Chances of the right answer under the attacks that both sides faced alike.

    secret: float64 [images].  known: float64 [thetas, images], one known theta a row.
    """

    secret: Tensor
    known: Tensor

    @property
    def difference(self) -> Interval:
        """What the secret buys, with the scatter of images and of thetas."""
        return crossed_difference(self.secret.numpy(), self.known.numpy())

    @property
    def known_accuracy(self) -> Interval:
        """The average fixed draw of the law, known to its attacker."""
        return bootstrap(self.known.mean(dim=0).numpy())


def read_secrecy(run: AuditRun) -> SecrecyReading | None:
    """On the images on which thetas were known. None where the law has one state, or the shared attacks did not run on
    every known theta."""
    if not run.known:
        return None
    at_headline = [step for step in run.steps if step.epsilon == run.epsilons.headline]
    attacked = {step.system for step in at_headline if step.stage <= SHARED}
    if not {run.systems[0].name, *(theta.name for theta in run.known)} <= attacked:
        return None
    names = {theta.name for theta in run.known}
    count = min(step.images for step in at_headline if step.system in names)
    known = [run.reported(theta, count, shared=True).right for theta in run.known]
    secret = run.reported(run.systems[0], len(run.data), shared=True).right[:count]
    return SecrecyReading(secret, torch.stack(known))
