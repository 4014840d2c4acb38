"""What a library costs on this machine and this data set, measured before hours are spent on it."""

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from model_store.data_files import LOCAL
from model_store.errors import DataRejected as ReadRejected
from model_store.input_spec import InputSpec
from model_store.labelled_images import DataSet, open_data
from model_store.structures import Structure
from model_store.ticket import kept_count, layers
from training.data import Images, ListedParts, Split, decode_images, list_parts, measured_input
from training.errors import DataRejected
from training.evaluation import MEASUREMENTS, PGD20, count_correct
from training.recipes import TrainConfig
from training.search import Search

SAMPLE: Final = 256  # pictures that are decoded for it
ATTACKED: Final = 8  # images of the timed PGD-20
CHECKPOINT_BYTES: Final = 8  # a weight, see search.Search.state_dict


@dataclass(frozen=True)
class StructureTrial:
    """step_s: seconds of an adversarial step.  attack_s: seconds of PGD-20 on one image.  structure: what was run."""

    structure: Structure
    step_s: float
    attack_s: float

    def steps_s(self, recipe: TrainConfig) -> float:
        """Seconds of all steps; those on clean images leave out the attack."""
        passes = 3 + 2 * recipe.attack_steps  # as cost.cost counts them
        clean = recipe.clean_until * 2 * recipe.attack_steps / passes
        return self.step_s * recipe.steps * (1 - clean)

    def claims_s(self, sizes: Mapping[str, int]) -> float:
        """Seconds of what is measured in the end.  sizes: of the split's parts."""
        attacked = sum(min(each.images, sizes[each.split]) for each in MEASUREMENTS if each.attack is not None)
        return self.attack_s * attacked


def timed_as(recipe: TrainConfig) -> tuple[Any, ...]:
    """What the seconds of a step depend on."""
    return recipe.structure, recipe.batch, recipe.attack, recipe.attack_steps, recipe.precision


@dataclass(frozen=True)
class Trial:
    """listed: the data set's pictures.  decode_s: seconds of one.  memory_bytes: the most that this process held.

    timed: what was run, by what the seconds of a step depend on.
    """

    listed: ListedParts
    input: InputSpec
    decode_s: float
    timed: dict[tuple[Any, ...], StructureTrial]
    memory_bytes: int

    def hours(self, recipes: Sequence[TrainConfig]) -> tuple[float, float]:
        """Of one process: what the claims of some recipes take, and what their steps take."""
        sizes = self.listed.sizes()
        timed = [(self.timed[timed_as(recipe)], recipe) for recipe in recipes]
        claims = sum(each.claims_s(sizes) for each, _ in timed)
        return claims / 3600, sum(each.steps_s(recipe) for each, recipe in timed) / 3600

    @property
    def cache_bytes(self) -> int:
        return self.listed.pictures * self.input.numel


def sample_of(path: Path, spec: InputSpec) -> tuple[ListedParts, Split, float]:
    """Lists a data set and decodes a sample of its training pictures. Raises DataRejected.

    Returns:
      What is there; the sample as a split, its statistics measured; seconds of one picture.
    """
    if not path.exists():
        raise DataRejected(f"{path}: no such file or folder")
    try:
        with open_data(path, LOCAL) as data:
            listed = list_parts(path, data)
            began = time.perf_counter()
            sample = decode_sample(data, listed, spec)
            decode_s = (time.perf_counter() - began) / len(sample)
    except ReadRejected as error:
        raise DataRejected(f"{path}: {error}") from None
    measured = measured_input(listed.classes, sample.pixels, torch.arange(len(sample)), spec)
    return listed, Split(listed.classes, sample, sample, sample, measured), decode_s


def decode_sample(data: DataSet, listed: ListedParts, spec: InputSpec) -> Images:
    places = sorted(set(np.linspace(0, len(listed.train) - 1, SAMPLE, dtype=int).tolist()))
    train = listed.train
    some = replace(
        train,
        ids=tuple(train.ids[place] for place in places),
        labels=tuple(train.labels[place] for place in places),
        load=lambda index, spec: train.load(places[index], spec),
    )
    return decode_images(data, some, listed.classes, spec, None, skip_damaged=True)


def time_structure(recipe: TrainConfig, split: Split, device: torch.device, seconds: float) -> StructureTrial:
    """Runs a recipe's steps for so many seconds, at least two of them, and one attack of the claims."""
    full = replace(recipe, clean_until=0.0, ramp_until=0.0, low_resolution_until=0.0)
    search = Search(full, split, device)
    search.train_step()  # what is allocated and chosen once
    began, steps = time.perf_counter(), 0
    while steps < 2 or time.perf_counter() - began < seconds:
        if search.done:
            search.step = 0
        search.train_step()
        steps += 1
    step_s = (time.perf_counter() - began) / steps
    search.network.eval().requires_grad_(False)
    images = split.test.pixels[:ATTACKED].float() / 255
    began = time.perf_counter()
    count_correct(search.network, images.to(device), split.test.labels[:ATTACKED].to(device), PGD20, 0)
    return StructureTrial(recipe.structure, step_s, (time.perf_counter() - began) / len(images))


def measure(
    sample: tuple[ListedParts, Split, float], recipes: Sequence[TrainConfig], device: torch.device, seconds: float
) -> Trial:
    """Times one recipe of each kind (see timed_as), the seconds shared among them. All densities cost the same."""
    listed, split, decode_s = sample
    torch.set_num_threads(1)  # as a worker has it
    firsts: dict[tuple[Any, ...], TrainConfig] = {}
    for recipe in recipes:
        firsts.setdefault(timed_as(recipe), recipe)
    timed = {kind: time_structure(each, split, device, seconds / len(firsts)) for kind, each in firsts.items()}
    return Trial(listed, split.input, decode_s, timed, peak_bytes())


def peak_bytes() -> int:
    """The largest resident set so far; macOS counts in bytes, Linux in KiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def state_bytes(recipes: Sequence[TrainConfig], workers: int) -> int:
    """Of a state folder, the cache apart: every ticket, and two checkpoints of each process at work."""
    shapes = {recipe.structure: layers(recipe.structure)[0].values() for recipe in recipes}
    weights = {structure: sum(shape.numel() for shape in all_shapes) for structure, all_shapes in shapes.items()}
    tickets = sum(
        weights[recipe.structure] // 8 + 2 * kept_count(weights[recipe.structure], recipe.density) for recipe in recipes
    )
    return tickets + workers * 2 * CHECKPOINT_BYTES * max(weights.values())
