"""Scores: from members' logits to the probability over theta that each image is classified correctly.

Scoring runs on the device of the draws. Stored logits and scores are on the CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from model_store.ensemble import combine, predictions
from model_store.policy import Policy, Theta, matrix
from service.audit.errors import ModelFailed
from service.audit.evaluation.draws import DrawSet, options_of, states_over
from service.audit.evaluation.threads import WorkerThreads

CERTAIN: Final = 1 - 1e-9  # a risk above which nothing can be gained
MAX_PAIRS: Final = 2**18  # states whose sums are held at once
MAX_CHUNK: Final = 2**22  # floats of ensemble logits held at once


@torch.no_grad()
def wrong(logits: Tensor, labels: Tensor, draws: DrawSet) -> Tensor:
    """bool [R, N], on the draws' device: under which draws which images are misclassified.

    Args:
      logits: [M, N, classes], on any device.
      labels: int64 [N], on any device.

    Raises:
      ModelFailed: a logit is not finite; its argmax would mean nothing.
    """
    logits, labels = logits.to(draws.device), labels.to(draws.device)
    if not bool(torch.isfinite(logits).all()):
        raise ModelFailed("a member's logits are not finite: nothing can be scored with them")
    chunk = max(1, MAX_CHUNK // max(1, logits[0].numel()))
    parts = [predictions(combine(logits, some)) != labels for some in torch.split(draws.rows, chunk)]
    return torch.cat(parts)


def failure(logits: Tensor, labels: Tensor, draws: DrawSet) -> Tensor:
    """float64 [N], on the draws' device: 1 - p_i, the chance over theta that the image is misclassified."""
    return draws.weights @ wrong(logits, labels, draws).to(torch.float64)


@dataclass(frozen=True)
class Scores:
    """What one system does on the images of one attack, on the CPU.

    right: float64 [N], p_i.
    any_wrong: bool [N], whether any draw of the scoring set fails.
    by_size: n -> float64 [N], p_i given n members.
    """

    right: Tensor
    any_wrong: Tensor
    by_size: dict[int, Tensor]

    def pick(self, index: Tensor) -> "Scores":
        sizes = {n: right[index] for n, right in self.by_size.items()}
        return Scores(self.right[index], self.any_wrong[index], sizes)


def scores(logits: Tensor, labels: Tensor, draws: DrawSet) -> Scores:
    right = ~wrong(logits, labels, draws)
    by_size = {}
    for n in sorted({int(size) for size in draws.sizes.tolist()}):
        rows = draws.sizes == n
        share = draws.weights[rows]
        by_size[n] = ((share @ right[rows].to(torch.float64)) / share.sum()).cpu()
    expected = (draws.weights @ right.to(torch.float64)).clamp(0, 1)  # what is never right is 0, not a rounding of it
    return Scores(expected.cpu(), (~right).any(dim=0).cpu(), by_size)


@torch.no_grad()
def score_exactly(
    sampled: Scores,
    logits: Tensor,
    labels: Tensor,
    policy: Policy,
    threads: WorkerThreads | None = None,
    device: torch.device | str = "cpu",
) -> Scores:
    """Scores images under every state of a large policy.

    Args:
      sampled: the same images scored on draws; its by_size is kept.
      logits: [M, N, classes]. The groups are taken in two halves: a state is a pair of their sums.
    """
    logits = logits.to(device)
    options = options_of(policy)
    halves = []
    for part in (options[: len(options) // 2], options[len(options) // 2 :]):
        listed = list(states_over(part))
        rows = matrix([Theta(members) for members, _ in listed], policy.tickets).to(device)
        weights = torch.tensor([p for _, p in listed], dtype=torch.float64, device=device)
        halves.append((combine(logits, rows), weights))
    (first, p), (second, q) = halves
    empty = 0.0 if policy.every else float(p[0] * q[0])  # both halves begin with nothing
    total = float(p.sum() * q.sum()) - empty

    def run(image: int) -> tuple[float, bool]:
        if (alike := same_everywhere(first[:, image], second[:, image], int(labels[image]), policy.every)) is not None:
            return float(alike), not alike
        right = ~pairs_wrong(first[:, image], second[:, image], int(labels[image]))
        states = right.numel()
        if not policy.every:
            right[0, 0], states = False, states - 1
        share = float(p @ (right.to(torch.float32) @ q.to(torch.float32)).double())
        return share / total, int(right.sum()) < states

    right, any_wrong = zip(*(threads or WorkerThreads()).map(run, range(len(labels))), strict=True)
    return Scores(torch.tensor(right, dtype=torch.float64).clamp(0, 1), torch.tensor(any_wrong), sampled.by_size)


def same_everywhere(first: Tensor, second: Tensor, label: int, every: bool) -> bool | None:
    """Whether all states are right, or all wrong; None where that takes counting.

    If one class leads in each part of each half, or none does in any, then so it is in every sum.
    """
    parts = [half if every else half[1:] for half in (first, second)]
    parts = [part for part in parts if len(part)]
    least = torch.stack([(part - part[:, label : label + 1]).amin(dim=0) for part in parts]).amin(dim=0)
    most = torch.stack([(part - part[:, label : label + 1]).amax(dim=0) for part in parts]).amax(dim=0)
    others = torch.arange(first.shape[1], device=first.device) != label
    if bool((least[others] > 0).any()):
        return False
    return True if bool((most[others] < 0).all()) else None


def pairs_wrong(first: Tensor, second: Tensor, label: int) -> Tensor:
    """bool [K, L]: whether the sum of a row of `first` [K, classes] and one of `second` has another argmax."""
    ahead, behind = (half - half[:, label : label + 1] for half in (first, second))
    failed = torch.zeros(len(first), len(second), dtype=torch.bool, device=first.device)
    index = torch.arange(len(first), device=first.device)
    for some in torch.split(index, max(1, MAX_PAIRS // len(second))):
        for other in range(first.shape[1]):
            lead = ahead[some, other, None] + behind[None, :, other]
            if other != label:
                failed[some] |= lead >= 0 if other < label else lead > 0  # the lowest index among equals
    return failed


def riskiest(rights: Tensor, leads: Tensor) -> Tensor:
    """int64 [N]: for each image the attempt that leaves it the least chance; among equals the least lead.

    rights, leads: float64 [attempts, N]. The clean images come first, and win no tie by that.
    """
    lowest = rights == rights.amin(dim=0)
    return leads.masked_fill(~lowest, torch.inf).argmin(dim=0)


def pick_each(several: Sequence[Scores], pick: Tensor) -> Scores:
    """Each image's scores of one attempt. any_wrong is that of all attempts: a failure stays one."""

    def picked(values: list[Tensor]) -> Tensor:
        return torch.stack(values).gather(0, pick[None])[0]

    sizes = {n: picked([one.by_size[n] for one in several]) for n in several[0].by_size}
    any_wrong = torch.stack([one.any_wrong for one in several]).any(dim=0)
    return Scores(picked([one.right for one in several]), any_wrong, sizes)


def pointwise_worst(several: Sequence[Scores]) -> Scores:
    """For each image the attack that leaves it the least chance: the mean of minima, not the minimum of means."""
    return pick_each(several, torch.stack([one.right for one in several]).argmin(dim=0))
