"""Adversarial mask search of one ticket, resumable to the step.

A network with frozen random signs is trained by choosing which of its weights exist (the scores' top-k), on
adversarial images made against the very mask in force; then, unless the ticket is a scratch ticket, the mask is frozen
and the kept weights are trained on. All chance comes from (seed, step), so that a run that was interrupted anywhere
and goes on from its checkpoint ends in the same bits.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from model_store.attacks import ThreatModel, pgd
from model_store.files import replacing
from model_store.structures import Network, Structure, calibrate, convs
from model_store.ticket import Ticket
from training.data import Images, Split, as_floats, batches
from training.errors import CheckpointRejected, SearchFailed
from training.recipes import TrainConfig
from training.sparsity import init_scores, init_weights, pack_mask, score_gradient, spread, top_k, unpack_mask

Phase = Literal["mask", "weights"]
CHECKPOINT, GOOD = "checkpoint.safetensors", "good.safetensors"
CHECKPOINT_FORMAT: Final = "2"
CHECKPOINT_SECONDS: Final = float(os.environ.get("TRAINING_CHECKPOINT_SECONDS", "45"))
CALIBRATION_IMAGES: Final = 5_000
GUARD_IMAGES: Final = 256
LOW_RESOLUTION: Final = 16
LIKELY: Final = 0.65  # of signs alike, see scratch_of: 0.76 and more in the embedded library


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


def densities_of(network: Network, recipe: TrainConfig) -> dict[str, float]:
    """Each convolution's density, by the recipe's allocation.

    uniform: the same for all.  dense-ends: the stem and the classifier stay whole (they hold 1 % of the weights), the
    others have the density.  erk: Erdos-Renyi-Kernel (Evci et al., "Rigging the Lottery", ICML 2020): in proportion to
    (inputs + outputs + kernel height + width) / weights, at most 1, so that all layers together have the density.
    """
    layers = convs(network)
    if recipe.allocation == "erk":
        return erk({name: layer.weight.shape for name, layer in layers.items()}, recipe.density)
    ends = {"stem.0", "classifier"} if recipe.allocation == "dense-ends" else set()
    return {name: 1.0 if name in ends else recipe.density for name in layers}


def erk(shapes: Mapping[str, torch.Size], density: float) -> dict[str, float]:
    """shapes: of the weights [out, in, h, w]."""
    whole: set[str] = set()
    while True:  # a layer that would be over 1 is whole, and the others share what it leaves
        rest = {name: sum(shape) for name, shape in shapes.items() if name not in whole}
        budget = density * sum(map(math.prod, shapes.values())) - sum(math.prod(shapes[name]) for name in whole)
        scale = budget / sum(rest.values()) if rest else 0.0
        full = {name for name, size in rest.items() if scale * size >= math.prod(shapes[name])}
        if not full:
            return {name: scale * rest[name] / math.prod(shapes[name]) if name in rest else 1.0 for name in shapes}
        whole |= full


def layout_of(structure: Structure) -> torch.memory_format:
    """Channels last is faster, but not for the narrowest networks: below 8 channels oneDNN's gradient of a strided 1x1
    convolution's weights writes past its buffer on processors without AVX-512 (oneDNN issue 6035)."""
    shortcuts = [layer for layer in convs(structure.blank()).values() if layer.kernel_size == (1, 1)]
    narrowest = min(layer.in_channels for layer in shortcuts if layer.stride != (1, 1))
    return torch.contiguous_format if narrowest < 8 else torch.channels_last


def generator_of(*parts: int) -> torch.Generator:
    """A generator of its own for each (seed, step, use): nothing to save, nothing shared."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part) % (2**63)
    return torch.Generator().manual_seed(seed)


class Search:
    """One ticket in the making: network, scores, masks and momenta at `step`."""

    def __init__(self, recipe: TrainConfig, split: Split, device: torch.device, start: Ticket | None = None) -> None:
        self.recipe, self.split, self.device = recipe, split, device
        self.layout = layout_of(recipe.structure)
        self.network = recipe.structure.blank().to(memory_format=self.layout).to(device)
        self.densities = densities_of(self.network, recipe)
        self.step = 0
        self.seconds = 0.0
        self.noise = recipe.noise
        self.best_robust = 0.0
        self.frozen: dict[str, Tensor] = {}
        self.scores: dict[str, Tensor] = {}
        self.momenta: dict[str, Tensor] = {}
        self.order: tuple[int, Tensor] | None = None
        self.begin(start)

    # --- state ---------------------------------------------------------------------------------------------------

    def begin(self, start: Ticket | None) -> None:
        seed = self.recipe.seed if self.recipe.weights_seed is None else self.recipe.weights_seed
        for index, (name, layer) in enumerate(convs(self.network).items()):
            shape = layer.weight.shape
            weights = init_weights(shape, generator_of(seed, index, 1))
            scores = init_scores(shape, generator_of(self.recipe.seed, index, 2))
            if start is not None:
                weights, scores = continued(weights, scores, start, name)
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
            kinds = {"scores": self.scores, "momentum": self.momenta}
        else:
            weights = {name: layer.weight.detach()[self.masks[name]] for name, layer in convs(self.network).items()}
            momenta = {name: value[self.masks[name]] for name, value in self.momenta.items()}
            masks = {name: pack_mask(mask) for name, mask in self.masks.items()}
            kinds = {"mask": masks, "weight": weights, "momentum": momenta}
        return {f"{kind}/{name}": value for kind, group in kinds.items() for name, value in group.items()}

    def metadata(self) -> dict[str, str]:
        values = {"step": self.step, "seconds": self.seconds, "noise": self.noise, "best_robust": self.best_robust}
        return {
            "format": CHECKPOINT_FORMAT,
            "state": json.dumps(values),
            "recipe": self.recipe.digest,
            "data": self.split.digest,
        }

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        state = json.loads(metadata["state"])
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        self.noise, self.best_robust = float(state["noise"]), float(state["best_robust"])
        groups: dict[str, dict[str, Tensor]] = {"scores": {}, "mask": {}, "weight": {}, "momentum": {}}
        for key, value in tensors.items():
            kind, name = key.split("/", 1)
            groups[kind][name] = value.to(self.device)
        self.momenta = groups["momentum"]
        if self.phase == "mask":
            self.scores = groups["scores"]
            self.masks = {name: top_k(scores, self.densities[name]) for name, scores in self.scores.items()}
            self.apply_masks(self.frozen)
            return
        for name, layer in convs(self.network).items():
            mask = unpack_mask(groups["mask"][name], layer.weight.shape)
            self.masks[name] = mask
            layer.weight.copy_(spread(groups["weight"][name], mask))
        self.momenta = {name: spread(value, self.masks[name]) for name, value in self.momenta.items()}

    # --- one step ------------------------------------------------------------------------------------------------

    def train_step(self) -> tuple[float, float]:
        """One optimiser step. Returns the loss and accuracy on the (adversarial) batch."""
        if self.phase == "weights" and self.step == self.recipe.mask_steps:
            self.momenta = {}  # they belong to the scores
        images, labels = self.batch_of(self.step)
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

    def batch_of(self, step: int) -> tuple[Tensor, Tensor]:
        """The step's images, cropped and flipped: floats in [0, 1] at the step's resolution."""
        batch = self.recipe.batch
        per_epoch = max(1, len(self.split.search) // batch)
        picked = self.order_of(step // per_epoch)[(step % per_epoch) * batch :][:batch]
        images = as_floats(self.split.search.pixels[picked])
        images = augmented(images, generator_of(self.recipe.seed, step, 4))
        if step < self.recipe.low_resolution_until * self.recipe.steps:
            images = functional.avg_pool2d(images, images.shape[-1] // LOW_RESOLUTION)
        images = images.to(self.device, memory_format=self.layout)
        return images, self.split.search.labels[picked].to(self.device)

    def order_of(self, epoch: int) -> Tensor:
        """The epoch's order of the images, drawn once an epoch."""
        if self.order is None or self.order[0] != epoch:
            generator = generator_of(self.recipe.seed, epoch, 3)
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
        noise = torch.rand(images.shape, generator=generator_of(recipe.seed, self.step, 5)).to(images)
        spread = self.noise if recipe.attack == "n-fgsm" else 1.0
        moved = images + (2 * noise - 1) * spread * epsilon
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
        gradient = gradient.add(value, alpha=self.recipe.weight_decay)
        value.sub_(self.with_momentum(name, gradient), alpha=self.rate())

    def muon_step(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        """Muon (Jordan et al., 2024) for a layer whose norm does not matter, as a norm layer follows it.

        The momentum of the weights' gradient is orthogonalised; the step is a share of the value's norm. For scores
        it is carried through the mask's straight-through gradient after that: signs of weights and scores would
        scatter what the orthogonalisation is to find.
        """
        momentum = self.with_momentum(name, gradient)
        ahead = gradient.add(momentum, alpha=self.recipe.momentum)  # Nesterov's
        step = orthogonal(ahead.flatten(1)).view_as(weight)
        value = weight
        if self.phase == "mask":
            value = self.scores[name]
            step = score_gradient(step, self.frozen[name], value)
        else:
            step = step * self.masks[name]
        norm = value.norm()
        value.sub_(step, alpha=float(self.recipe.muon_rate * self.schedule() * norm / (step.norm() + 1e-12)))
        if self.phase == "weights":
            value.mul_(norm / value.norm())

    def with_momentum(self, name: str, gradient: Tensor) -> Tensor:
        before = self.momenta.get(name)
        self.momenta[name] = gradient if before is None else before.mul_(self.recipe.momentum).add_(gradient)
        return self.momenta[name]

    # --- looking and leaving ---------------------------------------------------------------------------------------

    def calibrate(self, count: int = CALIBRATION_IMAGES) -> None:
        """Norm statistics of the present mask, on clean search images. Leaves eval mode, parameters frozen."""
        images = self.split.search.balanced(count)
        calibrate(self.network, (part.to(self.device) for part, _ in batches(images, 250)))
        self.network.requires_grad_(False)

    def check_overfit(self) -> tuple[float, float]:
        """Clean and PGD-10 accuracy on held-out training images."""
        self.calibrate(GUARD_IMAGES * 4)
        held = self.split.selection.balanced(GUARD_IMAGES)
        return accuracy(self.network, held, self.device), robust_accuracy(
            self.network, held, self.recipe.epsilon, self.device
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
        )
        return with_temperature(bare, self.split.selection)


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
    if share < LIKELY:  # training turns some signs, and leaves most; by chance half are alike
        raise SearchFailed(
            f"{trained.name}: {100 * share:.0f} % of its weights have the sign of those it is said to come from"
        )
    search.masks = {name: mask.to(device) for name, mask in trained.masks.items()}
    search.apply_masks(search.frozen)
    search.step = recipe.steps
    return search.ticket()


def orthogonal(matrix: Tensor) -> Tensor:
    """About the nearest matrix [m, n] with orthonormal rows or columns: every singular value near 1.

    Five steps of a Newton-Schulz iteration with Muon's coefficients, which trade exactness for speed: singular values
    end between 0.7 and 1.2 (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = (matrix.T if tall else matrix) / (matrix.norm() + 1e-12)
    square = x @ x.T  # every step is a polynomial of it times x: iterated on the small square alone
    turned = identity = torch.eye(len(square), dtype=square.dtype, device=square.device)
    for _ in range(5):
        step = a * identity + b * square + c * square @ square
        turned = step @ turned
        square = step @ square @ step
    x = turned @ x
    return x.T if tall else x


def continued(weights: Tensor, scores: Tensor, start: Ticket, name: str) -> tuple[Tensor, Tensor]:
    """Frozen weights and scores that reproduce the ticket: its values where kept, its mask as the scores' top-k.

    A ticket does not keep its scores, only their order at the threshold; fresh magnitudes are dealt so that every
    kept weight outranks every other.
    """
    mask = start.masks[name]
    weights = weights.clone()
    weights[mask] = start.values[name]
    magnitudes = scores.abs().flatten().sort(descending=True).values
    kept = int(mask.sum())
    dealt = torch.empty_like(scores)
    dealt[mask], dealt[~mask] = magnitudes[:kept], magnitudes[kept:]
    return weights, dealt * scores.sign()


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of the images padded by 4, and mirror images by a fair coin. images: floats [N, 3, H, W]."""
    count, _, height, width = images.shape
    padded = functional.pad(images, (4, 4, 4, 4))
    top, left = (torch.randint(0, 9, (count, 1), generator=generator) for _ in range(2))
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    flipped = torch.randint(0, 2, (count, 1), generator=generator).bool()
    columns = torch.where(flipped, columns.flip(1), columns)
    which = torch.arange(count).view(-1, 1, 1)
    return padded[which, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(classifier: Callable[[Tensor], Tensor], images: Images, device: torch.device) -> float:
    right = sum(
        int((classifier(part.to(device)).argmax(1) == labels.to(device)).sum()) for part, labels in batches(images, 250)
    )
    return right / len(images)


def robust_accuracy(
    classifier: Callable[[Tensor], Tensor],
    images: Images,
    epsilon: float,
    device: torch.device,
    *,
    steps: int = 10,
    step_size: float = 2 / 255,
    seed: int = 0,
) -> float:
    """Accuracy on PGD images (l-infinity, cross-entropy, one random start, best iterate)."""
    threat, right = ThreatModel("linf", epsilon), 0
    generator = generator_of(seed, 6)
    for part, labels in batches(images, 250):
        part, labels = part.to(device, memory_format=torch.channels_last), labels.to(device)
        moved = pgd(classifier, part, labels, threat, steps=steps, step_size=step_size, generator=generator)
        with torch.no_grad():
            right += int((classifier(moved).argmax(1) == labels).sum())
    return right / len(images)


def with_temperature(ticket: Ticket, held: Images) -> Ticket:
    """The ticket with the temperature that minimises cross-entropy on held-out images (convex in 1/T)."""
    with torch.no_grad():
        logits = torch.cat([ticket.network()(part) for part, _ in batches(held, 250)])
    low, high = math.log(0.02), math.log(50.0)  # of 1/T
    for _ in range(60):
        third = (high - low) / 3
        losses = [
            float(functional.cross_entropy(logits * math.exp(at), held.labels)) for at in (low + third, high - third)
        ]
        low, high = (low, high - third) if losses[0] < losses[1] else (low + third, high)
    return replace(ticket, temperature=math.exp(-(low + high) / 2))


# --- checkpoints -----------------------------------------------------------------------------------------------------


def save_checkpoint(path: Path, search: Search) -> None:
    """Atomic: a crash leaves the checkpoint before this one."""
    tensors = {k: v.contiguous() for k, v in search.state_dict().items()}
    try:
        with replacing(path) as file:
            save_file(tensors, file.name, metadata=search.metadata())
    except (OSError, SafetensorError) as error:
        raise SearchFailed(
            f"{path}: the checkpoint could not be written ({error}); the last one stands. Free some space."
        ) from None


def load_checkpoint(path: Path, search: Search) -> None:
    """Raises CheckpointRejected for a damaged file, or one of another recipe or data set."""
    try:
        with safe_open(path, framework="pt") as file:
            numbers = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise CheckpointRejected(
            f"{path}: unreadable checkpoint ({error}); delete it to start this ticket afresh"
        ) from None
    expected = search.metadata()
    if numbers.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointRejected(
            f"{path}: checkpoint of format {numbers.get('format', '1')}; expected {CHECKPOINT_FORMAT}. "
            "Delete it to start this ticket afresh, or go on with the version that began it."
        )
    for field, what in (("recipe", "recipe"), ("data", "data set")):
        if numbers.get(field) != expected[field]:
            raise CheckpointRejected(
                f"{path}: checkpoint of another {what} ({str(numbers.get(field))[:12]}); expected "
                f"{expected[field][:12]}. "
                "Go on with the one that began it, or choose another --state folder."
            )
    search.load_state_dict(tensors, numbers)


def delete_checkpoints(folder: Path) -> None:
    """What a finished job has no more use for."""
    for path in (folder / CHECKPOINT, folder / GOOD):
        path.unlink(missing_ok=True)
        path.with_suffix(".tmp").unlink(missing_ok=True)


def run(
    recipe: TrainConfig, split: Split, folder: Path, report: Report, device: torch.device, start: Ticket | None = None
) -> Ticket:
    """Runs a search to its end from wherever its checkpoint in `folder` stands."""
    search = Search(recipe, split, device, start)
    path = folder / CHECKPOINT
    if path.exists():
        load_checkpoint(path, search)
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
            save_checkpoint(path, search)
            search.seconds += time.monotonic() - last
            saved = last = time.monotonic()
        if now - saved > CHECKPOINT_SECONDS or search.done:
            save_checkpoint(path, search)
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
        load_checkpoint(good, search)
        search.noise, search.seconds = noise, seconds
    else:
        search.best_robust = max(robust, search.best_robust)
        save_checkpoint(good, search)
    return search
