"""Imports of packages that would otherwise write files or call somewhere when they are imported.

Other modules get these packages from here and never import them directly. A test holds that, and another lists what
every command writes and whom it calls.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np


def import_openvino() -> Any:
    """OpenVINO without its telemetry.

    `import openvino` starts a Google Analytics client and writes into ~/intel, unless `CI` is set. Where the package
    openvino_telemetry cannot be imported, OpenVINO uses a stub of its own instead.
    """
    modules: dict[str, Any] = sys.modules
    modules["openvino_telemetry"] = None  # the import system's own mark of a package that is not to be found
    import openvino

    return openvino


def import_matplotlib() -> Any:
    """Matplotlib with matplotlib.figure, without its folders in HOME and without the font cache of fc-list."""
    with scratch_folder("MPLCONFIGDIR", "XDG_CACHE_HOME"):
        import matplotlib.figure
        import matplotlib.font_manager

    return matplotlib


def import_hop_skip_jump() -> tuple[Any, Any]:
    """ART's HopSkipJump and BlackBoxClassifier, without ~/.art. It takes seconds."""
    settings: Any = ModuleType("art.config")
    settings.ART_NUMPY_DTYPE, settings.ART_DATA_PATH = np.float32, tempfile.gettempdir()
    sys.modules.setdefault("art.config", settings)  # the real one makes the folder as soon as it is imported
    from art.attacks.evasion import HopSkipJump
    from art.estimators.classification import BlackBoxClassifier

    return HopSkipJump, BlackBoxClassifier


def import_dataset(name: str) -> Any:
    """A class of torchvision.datasets, without the cache folder of torch's compiler, which it has no use for."""
    with scratch_folder("TORCHINDUCTOR_CACHE_DIR"):
        from torchvision import datasets

    return getattr(datasets, name)


@contextmanager
def scratch_folder(*variables: str) -> Iterator[None]:
    """Points those of the variables that the user has not set at a folder that is removed afterwards."""
    unset = [name for name in variables if name not in os.environ]
    with tempfile.TemporaryDirectory(prefix="tombola-", ignore_cleanup_errors=True) as folder:
        os.environ.update(dict.fromkeys(unset, folder))
        try:
            yield
        finally:
            for name in unset:
                os.environ.pop(name, None)
