"""Losses over theta in factored form: from the members' logits, each computed once, to a number for every image.

All are maximised. (a) to (e) of the literature: the loss of the expected output (BARRE), the expected loss (Athalye et
al., 2018), the mean of the candidates' own losses (Peng et al.), a hinge that lets go of draws already fooled (Carlini
et al., 2019), and the smoothed 0-1 risk itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from model_store.attacks import margin
from model_store.ensemble import combine
from service.audit.evaluation.draws import DrawSet

HINGE: Final = 0.5  # how far beyond the boundary a draw is pushed, in typical margins
SMOOTH_FROM, SMOOTH_TO = 1.0, 0.05  # the sigmoid's width at the first and the last step, in typical margins


@dataclass(frozen=True)
class Stage:
    """Where the attack stands. scale: a typical margin of the clean images' draws.  progress: 0 to 1."""

    scale: float
    progress: float

    def at(self, progress: float) -> "Stage":
        return replace(self, progress=progress)


Loss = Callable[[Tensor, Tensor, DrawSet, Stage], Tensor]
"""logits [M, N, classes], labels [N], draws, stage -> [N]."""


def ensemble_logits(logits: Tensor, draws: DrawSet) -> Tensor:
    """[R, N, classes]: the mean of each draw's members, whose softmax is what the service answers with."""
    return combine(logits, draws.rows / draws.sizes[:, None])


def expectation(values: Tensor, draws: DrawSet) -> Tensor:
    """[R, N] -> [N]."""
    return draws.weights.to(values) @ values


def per_draw(criterion: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, labels: Tensor) -> Tensor:
    """A loss of ([K, classes], [K]) on [R, N, classes] -> [R, N]."""
    draws, images, classes = outputs.shape
    return criterion(outputs.reshape(-1, classes), labels.repeat(draws)).view(draws, images)


def cross_entropies(outputs: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, labels, reduction="none")


def log_expected_softmax(logits: Tensor, draws: DrawSet) -> Tensor:
    """log E_theta softmax, [N, classes]: what a client who averages answers converges to."""
    weights = draws.weights.to(logits).log()[:, None, None]
    return torch.logsumexp(torch.log_softmax(ensemble_logits(logits, draws), dim=-1) + weights, dim=0)


def mean_output(logits: Tensor, labels: Tensor, draws: DrawSet, _: Stage) -> Tensor:
    """(a) Cross-entropy of the expected probabilities."""
    return functional.nll_loss(log_expected_softmax(logits, draws), labels, reduction="none")


def mean_loss(logits: Tensor, labels: Tensor, draws: DrawSet, _: Stage) -> Tensor:
    """(b) Expected cross-entropy."""
    return expectation(per_draw(cross_entropies, ensemble_logits(logits, draws), labels), draws)


def mean_loss_normalised(logits: Tensor, labels: Tensor, draws: DrawSet, stage: Stage) -> Tensor:
    """(b) on log-probabilities, so that no member with large logits rules the gradient (TREND, 2020)."""
    return mean_loss(torch.log_softmax(logits, dim=-1), labels, draws, stage)


def mean_candidates(logits: Tensor, labels: Tensor, draws: DrawSet, _: Stage) -> Tensor:
    """(c) The mean over the candidates of their own cross-entropies, blind to their voting: the paper's EOT."""
    shares = draws.weights.to(logits) @ (draws.rows > 0).to(logits)
    own = per_draw(cross_entropies, logits, labels)
    return (shares / shares.sum()) @ own


def hinge(logits: Tensor, labels: Tensor, draws: DrawSet, stage: Stage) -> Tensor:
    """(d) -E[relu(kappa + margin)]: draws fooled by more than kappa drop out."""
    lead = -per_draw(margin, ensemble_logits(logits, draws), labels)
    return -expectation(functional.relu(HINGE * stage.scale + lead), draws)


def risk(logits: Tensor, labels: Tensor, draws: DrawSet, stage: Stage) -> Tensor:
    """(e) E[sigmoid(-margin / tau)], tau falling geometrically: towards the failure probability itself."""
    tau = stage.scale * SMOOTH_FROM ** (1 - stage.progress) * SMOOTH_TO**stage.progress
    return expectation(torch.sigmoid(per_draw(margin, ensemble_logits(logits, draws), labels) / tau), draws)


def mean_logits(logits: Tensor, labels: Tensor, draws: DrawSet, _: Stage) -> Tensor:
    """The margin of the mean logits: deterministic, and blind to which draws it fools."""
    mean = torch.einsum("r,rnc->nc", draws.weights.to(logits), ensemble_logits(logits, draws))
    return margin(mean, labels)


LOSSES: Final[dict[str, Loss]] = {
    "mean-output": mean_output,
    "mean-loss": mean_loss,
    "mean-loss-normalised": mean_loss_normalised,
    "mean-candidates": mean_candidates,
    "mean-logits": mean_logits,
    "hinge": hinge,
    "risk": risk,
}


STAGED: Final = ("risk",)  # losses that change on the way: their values at two steps do not compare


@torch.no_grad()
def typical_margin(logits: Tensor, labels: Tensor, draws: DrawSet) -> float:
    """The median absolute margin over draws and images: the unit of kappa and tau."""
    return max(1e-6, float(per_draw(margin, ensemble_logits(logits, draws), labels).abs().median()))
