"""Jobs that take seconds, on scikit-learn's digits."""

import io
import zipfile
from pathlib import Path

from PIL import Image

from model_store.structures import Structure
from training.data import Images
from training.jobs import Job
from training.recipes import TrainConfig


def recipe(seed: int = 1, **changes: object) -> TrainConfig:
    fields: dict[str, object] = {"steps": 30, "batch": 16, "guards": 0, "precision": "float32", **changes}
    return TrainConfig(structure=Structure("resnet18", 2), density=0.3, seed=seed, **fields)  # type: ignore[arg-type]


def write_zip(path: Path, parts: dict[str, Images]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for part, images in parts.items():
            for index, label in enumerate(images.labels.tolist()):
                buffer = io.BytesIO()
                Image.fromarray(images.pixels[index].permute(1, 2, 0).numpy()).save(buffer, "PNG")
                archive.writestr(f"digits/{part}/{label}/{index:04d}.png", buffer.getvalue())


def job_in(folder: Path, made: TrainConfig | None = None, **more: object) -> Job:
    made = made or recipe()
    return Job(made, folder / made.name, data="digits", classes=tuple(map(str, range(10))), **more)  # type: ignore[arg-type]
