"""What to run: every hyper-parameter of one search, and the presets that make forty of them."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal, Self

from model_store.input_spec import CIFAR10_INPUT, InputSpec
from model_store.structures import POOLS, STRUCTURES, Structure, StructureName
from training.errors import TrainingError

Attack = Literal["n-fgsm", "fgsm-rs", "pgd"]
SHAPE: Final = ("width", "stem_stride", "stem_pool")  # of a structure, where a preset's is changed
Allocation = Literal["uniform", "dense-ends", "erk"]  # how a density is spread: sparsity.layer_densities
Precision = Literal["auto", "float32", "bfloat16"]  # auto: see device.resolve_precision

CIFAR10_SEARCH: Final = 49_000  # its training images less those for selection
LOW_RESOLUTION: Final = 16  # side of the images of early steps
SPARSE: Final = 0.2  # tickets of lower densities are further from the dense network: see Preset.sparse
DENSITIES: Final = (0.07, 0.10, 0.12, 0.15, 0.20, 0.30, 0.40, 0.50, 0.60, 0.70)  # Table 1 of the paper


@dataclass(frozen=True)
class TrainConfig:
    """One ticket's search: clean images, then epsilon ramped up, then full; masks first, kept weights after.

    Shares are fractions of `steps`. Epsilon and step sizes are in pixel units of [0, 1]. A scratch ticket has
    mask_share 1; a dense baseline has density 1 and mask_share 0.
    """

    structure: Structure
    density: float
    seed: int
    steps: int
    batch: int = 128
    mask_share: float = 0.3
    mask_rate: float = 0.1
    weight_rate: float = 0.05
    muon_rate: float = 0.0  # first step of each layer but the classifier, as a share of its norm (Muon); 0: SGD for all
    milestones: tuple[float, ...] = ()  # shares at which a constant rate falls to a tenth; none: cosine to zero
    momentum: float = 0.9
    weight_decay: float = 5e-4
    attack: Attack = "n-fgsm"
    attack_steps: int = 1
    epsilon: float = 8 / 255
    step_size: float = 8 / 255
    noise: float = 1.0  # random start, in epsilons
    clean_until: float = 0.1
    ramp_until: float = 0.4
    low_resolution_until: float = 0.5  # 16x16 images before this share
    allocation: Allocation = "uniform"
    guards: int = 4  # looks at held-out PGD-10 accuracy on the way
    precision: Precision = "bfloat16"
    weights_seed: int | None = None  # frozen weights' own seed; none: `seed`, so that no two tickets share them
    parent: str | None = None  # SHA-256 of the ticket that training goes on from

    def __post_init__(self) -> None:
        shares = (self.mask_share, self.clean_until, self.ramp_until, self.low_resolution_until)
        if not 0 < self.density <= 1 or not all(0 <= share <= 1 for share in shares) or self.steps < 1:
            raise TrainingError(f"{self.name}: densities lie in (0, 1], shares in [0, 1], steps above 0; found {self}")

    @property
    def kind(self) -> Literal["scratch", "fine-tuned"]:
        return "scratch" if self.mask_share == 1 else "fine-tuned"

    @property
    def name(self) -> str:
        return f"{self.structure.name}-{round(100 * self.density):02d}" + ("-scratch" if self.kind == "scratch" else "")

    @property
    def mask_steps(self) -> int:
        return round(self.mask_share * self.steps)

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return {**asdict(self), "structure": self.structure.as_dict(), "milestones": list(self.milestones)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        known = {**fields, "structure": Structure(**fields["structure"]), "milestones": tuple(fields["milestones"])}
        return cls(**known)

    @property
    def digest(self) -> str:
        """SHA-256 of every field: a checkpoint goes on only under the recipe that began it."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()


def stem_of_size(spec: InputSpec, stride: int) -> tuple[int, int]:
    """Stride and pooling of a stem, by the power of two that brings a picture nearest to what the stages see at 32x32.

    So a picture of any size costs between half and twice of one of 32x32 behind the stem. Half of the reduction is the
    stride, up to 4; pooling is the rest.

    stride: the stem's at 32x32.
    """
    ratio = math.sqrt(spec.height * spec.width) * stride / CIFAR10_INPUT.height
    reduction = 2 ** max(0, round(math.log2(ratio)))
    strides = min(reduction, 2 if reduction <= 4 else 4)
    return strides, min(reduction // strides, POOLS[-1])


@dataclass(frozen=True)
class Preset:
    """A whole library: the four structures at their widths, ten densities each, one recipe.

    epochs: passes over the search images.  base: what differs from TrainConfig's defaults.  cores, gpus: of one ticket.
    stem_stride: of pictures of 32x32; see stem_of_size for others.  dense: what differs from `base` for the dense
    networks that tickets are searched inside, `epochs` among it; None: tickets start from random weights.
    sparse: what differs from `base` below SPARSE.  sparse_epochs: how many times the epochs there.
    """

    name: str
    about: str
    widths: Mapping[str, int]
    epochs: float
    base: Mapping[str, Any]
    stem_stride: int = 1
    cores: float = 1
    gpus: float = 0
    dense: Mapping[str, Any] | None = None
    sparse: Mapping[str, Any] = field(default_factory=dict)
    sparse_epochs: float = 1

    def structure(self, name: StructureName, classes: int = 10, spec: InputSpec = CIFAR10_INPUT) -> Structure:
        return Structure(name, self.widths[name], classes, *stem_of_size(spec, self.stem_stride))

    def recipe(
        self,
        name: StructureName,
        density: float,
        images: int,
        classes: int = 10,
        spec: InputSpec = CIFAR10_INPUT,
        **changes: Any,
    ) -> TrainConfig:
        """The job of one ticket on `images` search images; its seed follows from structure and density alone.

        changes: fields of TrainConfig, `epochs` for steps, and the structure's `width`, `stem_stride` or `stem_pool`.
        """
        sparse = density < SPARSE
        fields = {**self.base, **(self.sparse if sparse else {}), **changes}
        shape = {each: fields.pop(each) for each in SHAPE if each in fields}
        epochs = fields.pop("epochs", self.epochs) * (self.sparse_epochs if sparse else 1)
        fields.setdefault("seed", 1 + STRUCTURES.index(name) * 1000 + round(density * 100))
        batch = fields.setdefault("batch", 128)
        fields.setdefault("steps", max(1, round(epochs * images / batch)))
        return TrainConfig(replace(self.structure(name, classes, spec), **shape), density, **fields)

    def tickets(self, images: int, classes: int, spec: InputSpec, **changes: Any) -> list[TrainConfig]:
        """All forty, by structure and density; see `recipe`."""
        return [self.recipe(name, each, images, classes, spec, **changes) for name in STRUCTURES for each in DENSITIES]

    def starts(
        self, names: Iterable[StructureName], images: int, classes: int, spec: InputSpec, **changes: Any
    ) -> list[TrainConfig]:
        """The dense networks that tickets of these structures start in, in the structures' order; none: random ones."""
        if self.dense is None:
            return []
        wanted = set(names)
        chosen = [name for name in STRUCTURES if name in wanted]
        return [baseline(self, name, images, classes, spec, **changes) for name in chosen]


PRESETS: Final[dict[str, Preset]] = {
    "compact": Preset(
        name="compact",
        about="narrow networks for two CPU cores: masks by adversarial search, kept weights then trained",
        widths={"resnet18": 16, "resnet34": 16, "wideresnet32": 1, "wideresnet38": 1},
        epochs=4,
        base={
            "batch": 128,
            "mask_share": 0.5,
            "mask_rate": 0.07,
            "weight_rate": 0.035,
            "muon_rate": 0.014,
            "low_resolution_until": 0.0,
            "precision": "auto",
        },
        stem_stride=2,
    ),
    "wide": Preset(
        name="wide",
        about="wider networks: one dense network of each structure, and its ten tickets searched inside it",
        widths={"resnet18": 32, "resnet34": 24, "wideresnet32": 2, "wideresnet38": 1},
        epochs=3,
        base={
            "batch": 256,
            "mask_share": 0.34,
            "mask_rate": 0.07,
            "weight_rate": 0.035,
            "muon_rate": 0.007,
            "epsilon": 10 / 255,
            "step_size": 10 / 255,
            "clean_until": 0.0,
            "ramp_until": 0.0,
            "low_resolution_until": 0.0,
            "precision": "auto",
        },
        stem_stride=2,
        dense={"epochs": 10, "muon_rate": 0.017, "clean_until": 0.1, "ramp_until": 0.4},
        sparse={"mask_share": 0.25, "muon_rate": 0.01},
        sparse_epochs=2,
    ),
    "paper": Preset(
        name="paper",
        about="the paper's widths and schedule (Robust Scratch Tickets): PGD-7, 160 epochs, one ticket a GPU",
        widths={"resnet18": 64, "resnet34": 64, "wideresnet32": 10, "wideresnet38": 10},
        epochs=160,
        gpus=1,
        base={
            "batch": 256,
            "mask_share": 1.0,
            "milestones": (0.5, 0.75),
            "attack": "pgd",
            "attack_steps": 7,
            "step_size": 2 / 255,
            "clean_until": 0.0,
            "ramp_until": 0.0,
            "low_resolution_until": 0.0,
        },
    ),
}


def whole_library(preset: Preset, images: int, classes: int, spec: InputSpec) -> list[TrainConfig]:
    """Every job of a preset's forty tickets, in the order in which they run."""
    return preset.starts(STRUCTURES, images, classes, spec) + preset.tickets(images, classes, spec)


def continued_from(recipe: TrainConfig, *, parent: str, steps: int, rate: float, **changes: Any) -> TrainConfig:
    """The recipe that trains an exported ticket further: full epsilon and resolution from the first step.

    rate: the first rates, as a share of those in `recipe`, once `changes` are made to it.
    """
    recipe = replace(recipe, **changes)
    fixed: dict[str, Any] = {
        "clean_until": 0.0,
        "ramp_until": 0.0,
        "low_resolution_until": 0.0,
        "parent": parent,
        "steps": steps,
    }
    rates = ("mask_rate", "weight_rate", "muon_rate")
    fixed |= {name: rate * getattr(recipe, name) for name in rates}
    return replace(recipe, **fixed, mask_share=1.0 if recipe.kind == "scratch" else 0.0)


def mask_phase(recipe: TrainConfig) -> TrainConfig:
    """The recipe of a fine-tuned ticket's mask phase alone: but for rounding, a search by it ends in the same masks.

    Raises TrainingError for a scratch ticket, one that training went on from, and an epsilon that was still rising.
    """
    if recipe.kind == "scratch" or not recipe.mask_steps:
        raise TrainingError(f"{recipe.name}: its weights were never trained from masks that a search found")
    if recipe.parent is not None:
        raise TrainingError(
            f"{recipe.name}: training went on from another ticket; its recipe says nothing of its masks"
        )
    if max(recipe.clean_until, recipe.ramp_until, recipe.low_resolution_until) > recipe.mask_share:
        raise TrainingError(f"{recipe.name}: its masks were found before epsilon and resolution were whole")
    until = ("clean_until", "ramp_until", "low_resolution_until")
    stretched: dict[str, Any] = {name: getattr(recipe, name) / recipe.mask_share for name in until}
    guards = round(recipe.guards * recipe.mask_share)
    return replace(recipe, steps=recipe.mask_steps, mask_share=1.0, guards=guards, **stretched)


def baseline(
    preset: Preset,
    name: StructureName,
    images: int,
    classes: int = 10,
    spec: InputSpec = CIFAR10_INPUT,
    **changes: Any,
) -> TrainConfig:
    """A dense network, every weight adversarially trained from the start: a row of Table 2, or where tickets start."""
    fields = {**(preset.dense or {}), **changes, "mask_share": 0.0}
    return preset.recipe(name, 1.0, images, classes, spec, **fields)
