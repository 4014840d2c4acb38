"""Losses over theta in factored form: from the members' logits, each computed once, to a number for every image.

All are maximised. Of the literature:

- (a) the loss of the expected output (BARRE);
- (b) the expected loss (Athalye et al., 2018);
- (c) the mean of the candidates' own losses (Peng et al.);
- (d) a hinge that lets go of draws already fooled (Carlini et al., 2019);
- (e) the smoothed 0-1 risk itself.
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
    """Where the attack stands. scale: a typical margin of the clean images' draws.  progress: 0 to 1.

    targets: int64 [N], the wrong class that a targeted loss raises.
    """

    scale: float
    progress: float
    targets: Tensor | None = None

    def at(self, progress: float) -> "Stage":
        return replace(self, progress=progress)

    def of(self, index: Tensor) -> "Stage":
        """For some of the images."""
        return self if self.targets is None else replace(self, targets=self.targets[index])

    @property
    def width(self) -> float:
        """Of the sigmoid that smooths the risk: it falls geometrically."""
        return float(self.scale * SMOOTH_FROM ** (1 - self.progress) * SMOOTH_TO**self.progress)


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
    return expectation(torch.sigmoid(per_draw(margin, ensemble_logits(logits, draws), labels) / stage.width), draws)


def mean_logits(logits: Tensor, labels: Tensor, draws: DrawSet, _: Stage) -> Tensor:
    """The margin of the mean logits: deterministic, and blind to which draws it fools."""
    mean = torch.einsum("r,rnc->nc", draws.weights.to(logits), ensemble_logits(logits, draws))
    return margin(mean, labels)


def targeted(logits: Tensor, labels: Tensor, draws: DrawSet, stage: Stage) -> Tensor:
    """E[sigmoid((z_t - z_y) / tau)]: the smoothed chance that one wrong class overtakes the right one. Without targets
    it is the wrong class that leads in the mean over theta."""
    outputs = ensemble_logits(logits, draws)
    aims = leading_wrong(logits, labels, draws) if stage.targets is None else stage.targets
    ahead, behind = (
        outputs.gather(2, index.expand(len(outputs), -1)[..., None]).squeeze(2) for index in (aims, labels)
    )
    return expectation(torch.sigmoid((ahead - behind) / stage.width), draws)


def probability_margin(logits: Tensor, labels: Tensor, draws: DrawSet, _: Stage) -> Tensor:
    """E[max_c p_c - p_y] over wrong classes c: the margin of probabilities (Xie et al., 2024)."""
    return expectation(per_draw(margin, torch.softmax(ensemble_logits(logits, draws), dim=-1), labels), draws)


def difference_of_logits_ratio(outputs: Tensor, labels: Tensor) -> Tensor:
    """DLR (Croce and Hein, 2020), [N]; with fewer than three classes the margin."""
    if outputs.shape[1] < 3:
        return margin(outputs, labels)
    top = outputs.topk(3, dim=1).values
    return margin(outputs, labels) / (top[:, 0] - top[:, 2]).clamp_min(1e-12)


def alternating(logits: Tensor, labels: Tensor, draws: DrawSet, stage: Stage) -> Tensor:
    """Cross-entropy, the margin and DLR, each for a third of the steps (Antoniou et al., 2022)."""
    criteria = (cross_entropies, margin, difference_of_logits_ratio)
    criterion = criteria[min(2, int(3 * stage.progress))]
    return expectation(per_draw(criterion, ensemble_logits(logits, draws), labels), draws)


def member_shares(draws: DrawSet, like: Tensor) -> Tensor:
    """[M]: each member's weight in the mean of the logits over theta."""
    return draws.weights.to(like) @ (draws.rows / draws.sizes[:, None]).to(like)


def leading_wrong(logits: Tensor, labels: Tensor, draws: DrawSet) -> Tensor:
    """int64 [N]: the wrong class with the highest mean logit over theta."""
    mean = torch.einsum("m,mnc->nc", member_shares(draws, logits), logits.detach())
    return mean.scatter(1, labels[:, None], -torch.inf).argmax(dim=1)


def reweighted(logits: Tensor, labels: Tensor, draws: DrawSet, _: Stage) -> Tensor:
    """The margin of the mean logits: MORA (Yu et al., 2022), for sums of logits.

    A member weighs as much as it can still move the ensemble's softmax from the right class to its rival.
    """
    shares = member_shares(draws, logits)
    mean = torch.einsum("m,mnc->nc", shares, logits)
    rival = leading_wrong(logits, labels, draws)
    softmax = torch.softmax(logits.detach(), dim=-1)
    right, wrong = (softmax.gather(2, index.expand(len(logits), -1)[..., None]).squeeze(2) for index in (labels, rival))
    all_right, all_wrong = ((shares @ each).clamp_min(1e-12) for each in (right, wrong))
    pull = shares[:, None] * wrong * (right / all_right + (1 - wrong) / all_wrong)
    weights = pull / pull.sum(dim=0).clamp_min(1e-12)
    return margin((mean + torch.einsum("mn,mnc->nc", weights, logits)) / 2, labels)


LOSSES: Final[dict[str, Loss]] = {
    "mean-output": mean_output,
    "mean-loss": mean_loss,
    "mean-loss-normalised": mean_loss_normalised,
    "mean-candidates": mean_candidates,
    "mean-logits": mean_logits,
    "hinge": hinge,
    "risk": risk,
    "targeted": targeted,
    "probability-margin": probability_margin,
    "alternating": alternating,
    "reweighted": reweighted,
}


STAGED: Final = ("risk", "targeted", "alternating")  # these change on the way: two steps do not compare


@torch.no_grad()
def typical_margin(logits: Tensor, labels: Tensor, draws: DrawSet) -> float:
    """The median absolute margin over draws and images: the unit of kappa and tau."""
    return max(1e-6, float(per_draw(margin, ensemble_logits(logits, draws), labels).abs().median()))
