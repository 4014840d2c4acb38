"""The wheel that `python -m build` makes, installed into an environment of its own: it serves the embedded library.

The environment has links to the declared dependencies, as this interpreter has them, and to nothing else: neither the
checkout nor an extra is in sight, and nothing is downloaded.
"""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from email import message_from_bytes
from email.message import Message
from importlib.metadata import Distribution, distribution, packages_distributions
from pathlib import Path
from typing import Final

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from model_store.library import MANIFEST
from model_store.manifest import parse
from tests.support.serving import ROOT, running
from tests.support.side_effects import bare
from tombola.sample_image import draw_sample

PACKAGES: Final = ("model_store", "service", "tombola", "training")
LOG: Final = "training/LOG.md"  # what was tried on the way: for readers of the repository
OWNERS: Final = packages_distributions()
PROJECT: Final = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def committed(*places: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z", *places], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by way of the sdist, as `build` does, from a copy: the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in committed("pyproject.toml", "README.md", *PACKAGES):
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(folder / "dist"),
        str(folder / "source"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (made,) = (folder / "dist").glob("*.whl")
    return made


@dataclass(frozen=True)
class Installed:
    """The wheel in an environment; `home` is the user's folder there and the working folder, empty at first."""

    folder: Path
    home: Path
    temporary: Path

    @property
    def environment(self) -> dict[str, str]:
        return {name: value for name, value in bare(self.home, self.temporary).items() if name != "PYTHONPATH"}

    def program(self, name: str) -> str:
        return str(self.folder / "bin" / name)

    def run(self, name: str, *words: str) -> str:
        command = [self.program(name), *words]
        done = subprocess.run(command, cwd=self.home, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout


def declared() -> set[str]:
    """The names of all dependencies, direct or not, without extras of ours."""
    known: set[tuple[str, str]] = set()
    waiting = [(line, "") for line in PROJECT["dependencies"]]
    while waiting:
        line, extra = waiting.pop()
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        new = {(requirement.name, wanted) for wanted in ("", *requirement.extras)} - known
        known |= new
        waiting += [(line, wanted) for name, wanted in new for line in distribution(name).requires or ()]
    return {canonicalize_name(name) for name, _ in known}


def link(package: Distribution, site: Path) -> None:
    """Links to what a package installed: one for each folder or module of its own, else one for each file."""
    name, files = package.name, [file for file in package.files or () if file.parts[0] not in ("..", "__pycache__")]
    shared = {top for top in {file.parts[0] for file in files} if set(OWNERS.get(top, [name])) != {name}}
    for part in {str(file) if file.parts[0] in shared else file.parts[0] for file in files}:
        (site / part).parent.mkdir(parents=True, exist_ok=True)
        (site / part).symlink_to(Path(str(package.locate_file(part))))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed") / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in declared():
        link(distribution(name), site)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-index", str(wheel)], check=True)
    return folder


@pytest.fixture
def installed(environment: Path, tmp_path: Path) -> Installed:
    for name in ("home", "temporary"):
        (tmp_path / name).mkdir()
    return Installed(environment, tmp_path / "home", tmp_path / "temporary")


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_bytes(archive.read(name))


def test_the_wheel_has_the_committed_files_of_the_packages_and_no_others(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(set(committed(*PACKAGES)) - {LOG})
    for place in (
        *(f"{package}/py.typed" for package in PACKAGES),
        "service/admin/console/index.html",
        "service/admin/console/uPlot.esm.js",
    ):
        assert place in names
    for library in ("library", "library-scratch"):
        entries = parse((ROOT / "model_store" / library / MANIFEST).read_bytes()).entries
        assert {f"model_store/{library}/{entry.file}" for entry in entries} <= set(names)


def test_the_metadata_names_one_command_and_no_licence(wheel: Path) -> None:
    fields = metadata(wheel)
    assert (fields["Name"], fields["Version"]) == ("tombola", PROJECT["version"])
    assert [name for name in fields if name.startswith("License")] == []
    assert not [text for text in fields.get_all("Classifier", ()) if text.startswith("License")]
    with zipfile.ZipFile(wheel) as archive:
        (points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert archive.read(points).decode().split("\n")[:2] == ["[console_scripts]", "tombola = tombola.cli:main"]


IMPORTS: Final = """
import importlib, json, pkgutil
missing = set()
for package in ("model_store", "service", "tombola", "training"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                missing.add((module.name, error.name.split(".")[0]))
print(json.dumps(sorted(missing)))
"""


def test_every_module_but_those_of_extras_is_imported_with_the_declared_dependencies_alone(
    installed: Installed,
) -> None:
    missing: dict[str, str] = dict(json.loads(installed.run("python", "-c", IMPORTS)))
    assert {name for module, name in missing.items() if not module.startswith("service.grpc.")} <= {"ray"}
    assert set(missing.values()) <= {"ray", "grpc", "google", "grpc_health", "grpc_reflection"}
    assert "grpc" in missing.values()  # what is no dependency is out of sight


def test_the_installed_command_serves_the_embedded_library_and_writes_only_its_state(installed: Installed) -> None:
    assert installed.run("tombola", "--version") == f"tombola {PROJECT['version']}\n"
    before = files(installed.folder)
    command = [installed.program("tombola"), "serve", "--port", "0", "--admin-port", "0", "--drain-delay-s", "0"]
    digest = parse((ROOT / "model_store" / "library" / MANIFEST).read_bytes()).digest
    with running(command, installed.environment, installed.home) as server:
        status, answer = server.classify(draw_sample())
        assert (status, answer["library"]) == (200, digest)
        assert answer["predictions"][0]["top"]
        for address in (f"{server.public}/docs", f"{server.admin}/docs", f"{server.admin}/console/app.js"):
            assert server.get(address)[0] == 200
        assert server.end() == 0
    assert [path.name for path in installed.home.iterdir()] == ["state"]
    assert files(installed.folder) == before
    assert list(installed.temporary.iterdir()) == []


def files(folder: Path) -> dict[str, int]:
    """Those of the environment itself, not behind its links."""
    paths = [Path(parent, name) for parent, folders, names in os.walk(folder) for name in (*folders, *names)]
    return {str(path): path.lstat().st_mtime_ns for path in paths}


def test_the_installed_code_is_the_wheel_s_and_names_no_commit(installed: Installed) -> None:
    program = "import tombola, model_store.code_version as v; print(tombola.__file__, v.code_commit(), sep='\\n')"
    place, commit = installed.run("python", "-c", program).splitlines()
    assert Path(place).is_relative_to(installed.folder / "lib")
    assert commit == "unknown"
