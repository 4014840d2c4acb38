"""Adversarial mask search of one ticket, resumable to the step.

A network with frozen random signs is trained by choosing which of its weights exist: the scores' top-k. Its images are
adversarial, made against the very mask in force. Then the mask is frozen and the kept weights are trained on, unless
the ticket is a scratch ticket. All chance comes from (seed, step). So a run that was interrupted anywhere and goes on
from its checkpoint ends in the same bits.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional

from model_store.structures import Structure, calibrate, convs
from model_store.ticket import Ticket, pack, unpack
from training.augmentation import augment
from training.checkpoints import CHECKPOINT, GOOD, load_checkpoint, save_checkpoint
from training.data import Split, as_floats, batch_of, batches
from training.device import resolve_precision
from training.errors import SearchFailed
from training.evaluation import accuracy, robust_accuracy, with_temperature
from training.optimizers import Momentum, muon_direction, relative_step, sgd_step
from training.recipes import LOW_RESOLUTION, TrainConfig
from training.seeding import make_generator
from training.sparsity import (
    begin_dense,
    init_scores,
    init_weights,
    layer_densities,
    reproduce_ticket,
    scatter_values,
    score_gradient,
    top_k,
)

Phase = Literal["mask", "weights"]
CHECKPOINT_SECONDS: Final = float(os.environ.get("TOMBOLA_CHECKPOINT_SECONDS", "45"))
CALIBRATION_IMAGES: Final = 5_000
CALIBRATION_BYTES: Final = 2**27  # of pixels in memory: fewer images from 95x95 on
GUARD_IMAGES: Final = 256
SAME_SIGN_SHARE: Final = 0.65  # of signs alike, see scratch_of: 0.76 and more in the embedded library


@dataclass(frozen=True)
class Step:
    """What a step did: for the log and the progress bar. seconds: spent on this search so far, all sessions."""

    step: int
    steps: int
    phase: Phase
    loss: float
    accuracy: float
    epsilon: float
    rate: float
    images_per_second: float
    seconds: float


@dataclass(frozen=True)
class OverfitCheck:
    """Held-out accuracy on the way. rolled_back: catastrophic overfitting was seen and undone."""

    step: int
    clean: float
    robust: float
    noise: float
    seconds: float
    rolled_back: bool


Report = Callable[[Step | OverfitCheck], None]


def memory_format(structure: Structure) -> torch.memory_format:
    """Channels last, which is faster, but for the narrowest networks.

    Below 8 channels, oneDNN's gradient of a strided 1x1 convolution's weights writes past its buffer on processors
    without AVX-512 (oneDNN issue 6035).
    """
    shortcuts = [layer for layer in convs(structure.blank()).values() if layer.kernel_size == (1, 1)]
    narrowest = min(layer.in_channels for layer in shortcuts if layer.stride != (1, 1))
    return torch.contiguous_format if narrowest < 8 else torch.channels_last


class Search:
    """One ticket in the making: network, scores, masks and momenta at `step`."""

    def __init__(self, recipe: TrainConfig, split: Split, device: torch.device, start: Ticket | None = None) -> None:
        self.recipe, self.split, self.device = resolve_precision(recipe, device.type), split, device
        self.memory_format = memory_format(recipe.structure)
        self.network = recipe.structure.blank(split.input).to(memory_format=self.memory_format).to(device)
        self.densities = layer_densities(self.network, recipe)
        self.step = 0
        self.seconds = 0.0
        self.noise = recipe.noise
        self.best_robust = 0.0
        self.frozen: dict[str, Tensor] = {}
        self.scores: dict[str, Tensor] = {}
        self.momentum = Momentum(recipe.momentum)
        self.order: tuple[int, Tensor] | None = None
        self.initialize(start)

    # --- state ---------------------------------------------------------------------------------------------------

    def initialize(self, start: Ticket | None) -> None:
        """Sets frozen weights, scores and masks: from the seed, from a dense network, or to reproduce a ticket."""
        seed = self.recipe.seed if self.recipe.weights_seed is None else self.recipe.weights_seed
        for index, (name, layer) in enumerate(convs(self.network).items()):
            shape = layer.weight.shape
            weights = init_weights(shape, make_generator(seed, index, 1))
            scores = init_scores(shape, make_generator(self.recipe.seed, index, 2))
            if start is not None and start.density == 1 > self.recipe.density:
                weights, scores = begin_dense(start, name)
            elif start is not None:
                weights, scores = reproduce_ticket(weights, scores, start, name)
            self.frozen[name] = weights.to(self.device)
            self.scores[name] = scores.to(self.device)
        self.masks = {name: top_k(scores, self.densities[name]) for name, scores in self.scores.items()}
        self.apply_masks(self.frozen)

    @torch.no_grad()
    def apply_masks(self, weights: Mapping[str, Tensor]) -> None:
        """Puts mask * weights into the network."""
        for name, layer in convs(self.network).items():
            layer.weight.copy_(weights[name] * self.masks[name])

    @property
    def phase(self) -> Phase:
        return "mask" if self.step < self.recipe.mask_steps else "weights"

    @property
    def done(self) -> bool:
        return self.step >= self.recipe.steps

    def state_dict(self) -> dict[str, Tensor]:
        """What seed, start and recipe do not say: 8 bytes a weight in the mask phase, then 8 a kept weight.

        The mask phase has scores and momenta; the masks follow from the scores. The weights phase has the masks as
        bits, and the weights and momenta that are kept.
        """
        if self.phase == "mask":
            kinds = {"scores": self.scores, "momentum": self.momentum.buffers}
        else:
            weights = {name: layer.weight.detach()[self.masks[name]] for name, layer in convs(self.network).items()}
            momenta = {name: value[self.masks[name]] for name, value in self.momentum.buffers.items()}
            masks = {name: pack(mask.cpu()) for name, mask in self.masks.items()}
            kinds = {"mask": masks, "weight": weights, "momentum": momenta}
        return {f"{kind}/{name}": value for kind, group in kinds.items() for name, value in group.items()}

    def metadata(self) -> dict[str, str]:
        values = {"step": self.step, "seconds": self.seconds, "noise": self.noise, "best_robust": self.best_robust}
        return {"state": json.dumps(values), "recipe": self.recipe.digest, "data": self.split.digest}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        state = json.loads(metadata["state"])
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        self.noise, self.best_robust = float(state["noise"]), float(state["best_robust"])
        groups: dict[str, dict[str, Tensor]] = {"scores": {}, "mask": {}, "weight": {}, "momentum": {}}
        for key, value in tensors.items():
            kind, name = key.split("/", 1)
            groups[kind][name] = value.to(self.device)
        self.momentum.buffers = groups["momentum"]
        if self.phase == "mask":
            self.scores = groups["scores"]
            self.masks = {name: top_k(scores, self.densities[name]) for name, scores in self.scores.items()}
            self.apply_masks(self.frozen)
            return
        for name, layer in convs(self.network).items():
            mask = unpack(name, groups["mask"][name].cpu(), tuple(layer.weight.shape)).to(self.device)
            self.masks[name] = mask
            layer.weight.copy_(scatter_values(groups["weight"][name], mask))
        self.momentum.buffers = {
            name: scatter_values(kept, self.masks[name]) for name, kept in groups["momentum"].items()
        }

    def save(self, path: Path) -> None:
        save_checkpoint(path, self.state_dict(), self.metadata())

    def load(self, path: Path) -> None:
        self.load_state_dict(*load_checkpoint(path, self.metadata()))

    # --- one step ------------------------------------------------------------------------------------------------

    def train_step(self) -> tuple[float, float]:
        """One optimiser step. Returns the loss and accuracy on the (adversarial) batch."""
        if self.phase == "weights" and self.step == self.recipe.mask_steps:
            self.momentum.clear()  # it belongs to the scores
        images, labels = self.make_batch(self.step)
        if self.epsilon() > 0:
            images = self.adversarial(images, labels)
        self.network.train().requires_grad_(True)
        with self.autocast():
            logits = self.network(images).float()
        loss = functional.cross_entropy(logits, labels)
        if not math.isfinite(loss.item()):
            raise SearchFailed(
                f"{self.recipe.name}: loss {loss.item()} at step {self.step}; expected a finite one. Lower the rate."
            )
        self.network.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer_step()
        self.step += 1
        return loss.item(), float((logits.argmax(1) == labels).float().mean())

    def make_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The step's images, cropped and flipped: floats in [0, 1] at the step's resolution."""
        batch = self.recipe.batch
        per_epoch = max(1, len(self.split.search) // batch)
        indices = self.epoch_order(step // per_epoch)[(step % per_epoch) * batch :][:batch]
        images = as_floats(self.split.search.pixels[indices])
        images = augment(images, make_generator(self.recipe.seed, step, 4))
        if step < self.recipe.low_resolution_until * self.recipe.steps:
            images = functional.avg_pool2d(images, max(1, min(images.shape[2:]) // LOW_RESOLUTION))
        images = images.to(self.device, memory_format=self.memory_format)
        return images, self.split.search.labels[indices].to(self.device)

    def epoch_order(self, epoch: int) -> Tensor:
        """The epoch's order of the images, drawn once an epoch."""
        if self.order is None or self.order[0] != epoch:
            generator = make_generator(self.recipe.seed, epoch, 3)
            self.order = epoch, torch.randperm(len(self.split.search), generator=generator)
        return self.order[1]

    def epsilon(self) -> float:
        recipe = self.recipe
        start, end = recipe.clean_until * recipe.steps, recipe.ramp_until * recipe.steps
        if self.step >= end:
            return recipe.epsilon
        return 0.0 if self.step <= start else recipe.epsilon * (self.step - start) / (end - start)

    def rate(self) -> float:
        """SGD's rate at this step."""
        recipe = self.recipe
        return (recipe.mask_rate if self.phase == "mask" else recipe.weight_rate) * self.schedule()

    def schedule(self) -> float:
        """The share of its first rate that a phase has left: a cosine to zero, or tenths at milestones."""
        recipe = self.recipe
        begin, end = (0, recipe.mask_steps) if self.phase == "mask" else (recipe.mask_steps, recipe.steps)
        share = (self.step - begin) / (end - begin)
        if recipe.milestones:
            return float(0.1 ** sum(share >= milestone for milestone in recipe.milestones))
        return 0.5 * (1 + math.cos(math.pi * share))

    def autocast(self) -> torch.autocast:
        kind = getattr(torch, self.recipe.precision)
        return torch.autocast(self.device.type, dtype=kind, enabled=kind is not torch.float32)

    def adversarial(self, images: Tensor, labels: Tensor) -> Tensor:
        """N-FGSM (no projection), FGSM with a random start, or PGD-k, on batch statistics, parameters frozen."""
        recipe, epsilon = self.recipe, self.epsilon()
        scale = epsilon / recipe.epsilon
        noise = torch.rand(images.shape, generator=make_generator(recipe.seed, self.step, 5)).to(images)
        start = self.noise if recipe.attack == "n-fgsm" else 1.0
        moved = images + (2 * noise - 1) * start * epsilon
        self.network.train().requires_grad_(False)
        for _ in range(recipe.attack_steps):
            moved = moved.clamp(0, 1).requires_grad_(True)
            with self.autocast():
                loss = functional.cross_entropy(self.network(moved).float(), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, moved)
            moved = moved.detach() + recipe.step_size * scale * gradient.sign()
            if recipe.attack != "n-fgsm":
                moved = images + (moved - images).clamp(-epsilon, epsilon)
        return moved.clamp(0, 1).detach()

    @torch.no_grad()
    def optimizer_step(self) -> None:
        for name, layer in convs(self.network).items():
            gradient = cast("Tensor", layer.weight.grad)
            if self.phase == "weights":
                gradient = gradient * self.masks[name]
            if self.recipe.muon_rate and name != "classifier":
                self.muon_step(name, layer.weight, gradient)
            else:
                self.sgd_step(name, layer.weight, gradient)
        if self.phase == "mask":  # once a step: attack and update see the same mask
            self.masks = {name: top_k(scores, self.densities[name]) for name, scores in self.scores.items()}
            self.apply_masks(self.frozen)

    def sgd_step(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        """SGD with momentum and weight decay, on the scores or on the kept weights."""
        value = weight
        if self.phase == "mask":
            gradient, value = score_gradient(gradient, self.frozen[name], self.scores[name]), self.scores[name]
        sgd_step(value, gradient, self.momentum, name, rate=self.rate(), decay=self.recipe.weight_decay)

    def muon_step(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        """Muon for a layer whose norm does not matter, as a norm layer follows it. Steps are shares of that norm.

        - For scores, the direction is carried through the mask's straight-through gradient after it is orthogonalised:
          signs of weights and scores would scatter what the orthogonalisation is to find.
        - Weights keep the norm that they had.
        """
        direction = muon_direction(gradient, self.momentum, name)
        share = self.recipe.muon_rate * self.schedule()
        if self.phase == "mask":
            direction = score_gradient(direction, self.frozen[name], self.scores[name])
            relative_step(self.scores[name], direction, share)
        else:
            norm = weight.norm()
            relative_step(weight, direction * self.masks[name], share)
            weight.mul_(norm / weight.norm())

    # --- measuring and leaving ---------------------------------------------------------------------------------------

    def calibrate(self, count: int = CALIBRATION_IMAGES) -> None:
        """Norm statistics of the present mask, on clean search images. Leaves eval mode, parameters frozen."""
        images = self.split.search.balanced(min(count, CALIBRATION_BYTES // self.split.input.numel))
        parts = batches(images, batch_of(images))  # of one image alone a variance may be unknown
        calibrate(self.network, (part.to(self.device) for part, _ in parts if len(part) > 1))
        self.network.requires_grad_(False)

    def check_overfit(self) -> tuple[float, float]:
        """Clean and PGD-10 accuracy on held-out training images."""
        self.calibrate(GUARD_IMAGES * 4)
        images = self.split.selection.balanced(GUARD_IMAGES)
        return accuracy(self.network, images, self.device), robust_accuracy(
            self.network, images, self.recipe.epsilon, self.device
        )

    def ticket(self) -> Ticket:
        """The finished ticket: calibrated statistics, kept values as stored, temperature from held-out images."""
        self.calibrate()
        weights = {name: layer.weight.detach().float().cpu() for name, layer in convs(self.network).items()}
        masks = {name: mask.cpu() for name, mask in self.masks.items()}
        values = {name: weights[name][masks[name]] for name in weights}
        if self.recipe.kind == "fine-tuned":
            values = {name: kept.half().float() for name, kept in values.items()}
        statistics = {
            name: value.detach().float().cpu()
            for name, value in self.network.state_dict().items()
            if name.endswith(("running_mean", "running_var"))
        }
        bare = Ticket(
            structure=self.recipe.structure,
            density=self.recipe.density,
            densities=self.densities,
            masks=masks,
            values=values,
            statistics=statistics,
            temperature=1.0,
            kind=self.recipe.kind,
            input=self.split.input,
        )
        return with_temperature(bare, self.split.selection, self.device)


def scratch_of(recipe: TrainConfig, trained: Ticket, split: Split, device: torch.device) -> Ticket:
    """The pure scratch ticket that a search went through on its way to `trained`: the same masks, over the frozen
    weights that they were found for. Nothing is searched; statistics and temperature are measured.

    recipe: recipes.mask_phase of the trained ticket's. Raises SearchFailed if its weights do not come from these.
    """
    search = Search(recipe, split, device)
    alike = [
        search.frozen[name][mask.to(device)].sign().cpu() == trained.values[name].sign()
        for name, mask in trained.masks.items()
    ]
    share = float(torch.cat(alike).float().mean())
    if share < SAME_SIGN_SHARE:  # training turns some signs, and leaves most; by chance half are alike
        raise SearchFailed(
            f"{trained.name}: {100 * share:.0f} % of its weights have the sign of those it is said to come from"
        )
    search.masks = {name: mask.to(device) for name, mask in trained.masks.items()}
    search.apply_masks(search.frozen)
    search.step = recipe.steps
    return search.ticket()


def run(
    recipe: TrainConfig, split: Split, folder: Path, report: Report, device: torch.device, start: Ticket | None = None
) -> Ticket:
    """Runs a search to its end from wherever its checkpoint in `folder` stands."""
    search = Search(recipe, split, device, start)
    path = folder / CHECKPOINT
    if path.exists():
        search.load(path)
    saved = last = time.monotonic()
    every = max(1, recipe.steps // max(1, recipe.guards))
    while not search.done:
        loss, right = search.train_step()
        now = time.monotonic()
        search.seconds += now - last
        report(progress_of(search, loss, right, now - last))
        last = now
        if (
            recipe.guards
            and search.step % every == 0
            and search.step < recipe.steps
            and search.epsilon() == recipe.epsilon
        ):
            search = guard_overfitting(search, folder, report)
            search.save(path)
            search.seconds += time.monotonic() - last
            saved = last = time.monotonic()
        if now - saved > CHECKPOINT_SECONDS or search.done:
            search.save(path)
            saved = now
    return search.ticket()


def progress_of(search: Search, loss: float, right: float, seconds: float) -> Step:
    return Step(
        search.step,
        search.recipe.steps,
        "mask" if search.step <= search.recipe.mask_steps else "weights",
        loss,
        right,
        search.epsilon(),
        search.rate() if not search.done else 0.0,
        search.recipe.batch / max(seconds, 1e-9),
        search.seconds,
    )


def guard_overfitting(search: Search, folder: Path, report: Report) -> Search:
    """Catastrophic overfitting (held-out PGD-10 under half of its best): back to the last good state, more noise."""
    good = folder / GOOD
    clean, robust = search.check_overfit()
    overfitted = robust < 0.5 * search.best_robust
    report(OverfitCheck(search.step, clean, robust, search.noise, search.seconds, overfitted))
    if overfitted and good.exists():
        noise, seconds = search.noise * 1.5, search.seconds
        search.load(good)
        search.noise, search.seconds = noise, seconds
    else:
        search.best_robust = max(robust, search.best_robust)
        search.save(good)
    return search
