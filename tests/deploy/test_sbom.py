"""The image's bill of materials: the Dockerfile's own command, run on the environment of the tests."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Final

import jsonschema
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from referencing import Registry
from referencing.jsonschema import DRAFT7

from tests.deploy.test_files import DEPLOY, VERSION

cyclonedx: Final = pytest.importorskip("cyclonedx.schema", reason="cyclonedx-bom is not installed")
COMMAND: Final = re.compile(r"/sbom/bin/cyclonedx-py ((?:.*\\\n)*.*)")


def schema_errors(bill: object) -> list[str]:
    """By CycloneDX' own schema. The formats of texts are left to the build: checking every URI takes minutes."""
    folder = Path(cyclonedx.__file__).parent / "_res"
    names = ("bom-1.6.SNAPSHOT.schema.json", "spdx.SNAPSHOT.schema.json", "jsf-0.82.SNAPSHOT.schema.json")
    schemas = {name: json.loads((folder / name).read_text("utf-8")) for name in names}
    for schema in schemas.values():
        schema.pop("$id")  # they refer to one another by the names of their files
    resources = [(name, DRAFT7.create_resource(schema)) for name, schema in schemas.items()]
    validator = jsonschema.Draft7Validator(schemas[names[0]], registry=Registry().with_resources(resources))
    return [error.message for error in validator.iter_errors(bill)]


def test_the_dockerfile_s_command_writes_a_valid_bill_of_every_dependency(tmp_path: Path) -> None:
    match = COMMAND.search((DEPLOY.parent / "Dockerfile").read_text("utf-8"))
    assert match is not None
    places = {
        "/opt/tombola/sbom.json": str(tmp_path / "sbom.json"),
        "/opt/tombola": sys.executable,
        "/src/pyproject.toml": str(DEPLOY.parent / "pyproject.toml"),
    }
    words = [places.get(word, word) for word in match[1].replace("\\\n", " ").split()]
    assert places.keys() <= set(match[1].split())
    done = subprocess.run(
        [sys.executable, "-m", "cyclonedx_py", words[0], "--no-validate", *words[1:]],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # the step has left /src by then
        check=False,
    )
    assert done.returncode == 0, done.stderr
    bill = json.loads((tmp_path / "sbom.json").read_text("utf-8"))
    assert schema_errors(bill) == []
    assert schema_errors({**bill, "misspelt": 1})
    root = bill["metadata"]["component"]
    assert (root["name"], root["version"], root["type"]) == ("tombola", VERSION, "application")
    parts = {canonicalize_name(part["name"]): part for part in bill["components"]}
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text("utf-8"))["project"]
    for requirement in map(Requirement, project["dependencies"]):
        if requirement.marker is None or requirement.marker.evaluate():
            part = parts[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(part["version"], prereleases=True)
            assert part["purl"].startswith(f"pkg:pypi/{canonicalize_name(requirement.name)}@")
