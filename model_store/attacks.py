"""Threat models and the gradient attacks inside them: FGSM, and PGD with restarts. Any loss, any callable classifier.

Pixels are in [0, 1] and epsilon is in the same unit. An attack only calls the classifier: it sets no train or eval
flag, gives no gradient to any parameter, and draws from the generator it is handed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Norm = Literal["linf", "l2"]
Loss = Callable[[Any, Tensor], Tensor]
"""(what the classifier returns, labels [N]) -> [N], to be maximised image by image."""

EPS: Final = 1e-30  # only ever divides a zero


@dataclass(frozen=True)
class ThreatModel:
    """What an attacker may do: move each image by at most epsilon in the norm (pixel units) and stay in [0, 1]."""

    norm: Norm
    epsilon: float

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm {self.norm!r}; expected 'linf' or 'l2'")
        if not (math.isfinite(self.epsilon) and self.epsilon >= 0):
            raise ValueError(f"epsilon {self.epsilon}; expected a number from 0 up, in pixel units of [0, 1]")


class Best(NamedTuple):
    """The riskiest images so far, one for each clean image, and their [N] risk and loss."""

    images: Tensor
    risk: Tensor
    loss: Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """[N, classes], [N] -> [N]."""
    return functional.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """[N, classes], [N] -> [N]: the best wrong logit less the right one; above 0 is misclassified."""
    right = logits.gather(1, labels[:, None]).squeeze(1)
    wrong = logits.scatter(1, labels[:, None], -math.inf).amax(dim=1)
    return wrong - right


def misclassified(logits: Tensor, labels: Tensor) -> Tensor:
    """[N, classes], [N] -> [N]: 1 where the argmax is not the label, else 0. A logit that is not finite counts as 1."""
    wrong = (logits.argmax(dim=1) != labels) | ~torch.isfinite(logits).all(dim=1)
    return wrong.to(logits.dtype)


def project(images: Tensor, clean: Tensor, threat: ThreatModel) -> Tensor:
    """The images, moved into the threat model's ball around the clean ones and into [0, 1].

    For linf this is the nearest such point; for l2 the nearest in the ball, clipped (which brings it no further out).
    """
    if threat.norm == "linf":
        near = torch.minimum(torch.maximum(images, clean - threat.epsilon), clean + threat.epsilon)
        return near.clamp(0, 1)
    away = images - clean
    length = away.flatten(1).norm(dim=1).clamp_min(EPS)
    return (clean + away * per_image((threat.epsilon / length).clamp_max(1), away)).clamp(0, 1)


def random_start(clean: Tensor, threat: ThreatModel, generator: torch.Generator) -> Tensor:
    """Uniform in the threat model's ball around each clean image, then clipped to [0, 1]."""
    shape, device = clean.shape, generator.device
    if threat.norm == "linf":
        offset = (torch.rand(shape, generator=generator, device=device) * 2 - 1) * threat.epsilon
    else:
        direction = steepest_direction(torch.randn(shape, generator=generator, device=device), "l2")
        radius = torch.rand(shape[0], generator=generator, device=device) ** (1 / clean[0].numel())
        offset = direction * per_image(radius * threat.epsilon, direction)
    return project(clean + offset.to(clean), clean, threat)


def per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.view(-1, *[1] * (images.dim() - 1))


def steepest_direction(gradient: Tensor, norm: Norm) -> Tensor:
    """The steepest step of length 1 in the norm; zero where the gradient is."""
    if norm == "linf":
        return gradient.sign()
    scaled = gradient / per_image(gradient.abs().flatten(1).amax(dim=1).clamp_min(EPS), gradient)  # no underflow below
    return scaled / per_image(scaled.flatten(1).norm(dim=1).clamp_min(EPS), gradient)


def loss_and_gradient(
    classifier: Callable[[Tensor], Any], images: Tensor, labels: Tensor, loss: Loss
) -> tuple[Any, Tensor, Tensor]:
    """What the classifier returns, the loss [N], and its gradient in the images."""
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        outputs = classifier(images)
        losses = loss(outputs, labels)
        (gradient,) = torch.autograd.grad(losses.sum(), images)
    return outputs, losses.detach(), gradient


def fgsm(
    classifier: Callable[[Tensor], Any],
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    loss: Loss = cross_entropy,
) -> Tensor:
    """Attacks by one step of length epsilon up the loss (Goodfellow et al., 2015).

    Args:
      classifier: from images to logits [N, classes], differentiable.
      images: [N, ...], the clean images, floats in [0, 1].
      labels: [N], their classes.
      threat: the norm and epsilon.
      loss: what is raised, [N] from logits and labels.

    Returns:
      The attacked images, [N, ...], within the threat model.
    """
    check_pixels(images)
    _, _, gradient = loss_and_gradient(classifier, images, labels, loss)
    return project(images + threat.epsilon * steepest_direction(gradient, threat.norm), images, threat)


def pgd(
    classifier: Callable[[Tensor], Any],
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    step_size: float,
    generator: torch.Generator,
    restarts: int = 1,
    momentum: float = 0.0,
    loss: Loss = cross_entropy,
    risk: Loss = misclassified,
) -> Tensor:
    """Attacks by projected gradient ascent from random starts (Madry et al., 2018).

    The clean images, every start and every iterate compete, by `risk` and then by loss. More steps or restarts from
    the same generator state therefore never leave an image safer.

    Args:
      classifier: from images to logits [N, classes], differentiable.
      images: [N, ...], the clean images, floats in [0, 1].
      labels: [N], their classes.
      threat: the norm and epsilon.
      steps: steps of each restart.
      step_size: length of a step, in the norm and in units of pixels.
      generator: the source of the random starts.
      restarts: how many random starts.
      momentum: decay of the gradients' running sum, each scaled to L1 norm 1 (Dong et al., 2018); 0 for none.
      loss: what is raised, [N] from the classifier's outputs and the labels.
      risk: [N] from the same; for a classifier whose outputs are not logits.

    Returns:
      The riskiest point of each image, [N, ...], within the threat model.
    """
    check_pixels(images)
    best = judged(classifier, images, labels, loss, risk)
    for _ in range(restarts):
        start = random_start(images, threat, generator)
        velocity = torch.zeros_like(images)
        for _ in range(steps):
            outputs, losses, gradient = loss_and_gradient(classifier, start, labels, loss)
            best = riskier(best, Best(start, risk(outputs, labels), losses))
            velocity = momentum * velocity + l1_unit(gradient)
            start = project(start + step_size * steepest_direction(velocity, threat.norm), images, threat)
        best = riskier(best, judged(classifier, start, labels, loss, risk))
    return best.images


@torch.no_grad()
def judged(classifier: Callable[[Tensor], Any], images: Tensor, labels: Tensor, loss: Loss, risk: Loss) -> Best:
    outputs = classifier(images)
    return Best(images, risk(outputs, labels), loss(outputs, labels))


@torch.no_grad()
def riskier(old: Best, new: Best) -> Best:
    better = (new.risk > old.risk) | ((new.risk == old.risk) & (new.loss > old.loss))
    pick = (torch.where(per_image(better, b), b, a) for a, b in zip(old, new, strict=True))
    return Best(*pick)


def l1_unit(gradient: Tensor) -> Tensor:
    return gradient / per_image(gradient.abs().flatten(1).sum(dim=1).clamp_min(EPS), gradient)


def check_pixels(images: Tensor) -> None:
    if not images.is_floating_point() or not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError(f"images of {images.dtype}, not all in [0, 1]; attacks take floats in pixel units of [0, 1]")
