"""The environments that a server is started in: no user, other programs' variables, locales without UTF-8."""

import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.support.serving import environment, serving, tiny_library
from tombola.sample_image import draw_sample


def test_metrics_stay_in_the_process_whatever_folder_another_program_left(tmp_path: Path) -> None:
    """prometheus_client would read PROMETHEUS_MULTIPROC_DIR when it is imported, and write every value there."""
    folder = tmp_path / "values"
    folder.mkdir()
    script = """
from service.observability.metrics import Metrics
metrics = Metrics()
metrics.inc("inference_images_total", 3)
assert metrics.value("inference_images_total") == 3
assert b"tombola_inference_images_total 3.0" in metrics.text()
"""
    variables = environment(PROMETHEUS_MULTIPROC_DIR=str(folder))
    subprocess.run([sys.executable, "-c", script], env=variables, check=True)
    assert not list(folder.iterdir())


NAMELESS = """
import pwd, sys

def nobody(uid):
    raise KeyError(uid)

pwd.getpwuid = nobody
from tombola.cli import main
sys.exit(main())
"""


def test_a_user_without_a_name_and_without_a_home_is_served(tmp_path: Path) -> None:
    """As a container runs with a numeric user: no HOME, and no entry in the password file."""
    library = tiny_library(tmp_path / "library")
    program, without = ("-c", NAMELESS), ("HOME", "USER", "LOGNAME", "USERNAME")
    with serving(library.path, tmp_path / "state", program=program, without=without) as process:
        assert process.classify(draw_sample())[0] == 200
        assert process.end() == 0


def service_links(name: str, port: int) -> dict[str, str]:
    """What Kubernetes sets in every container of a namespace for a Service of that name and a port called http."""
    prefix, address = name.upper().replace("-", "_"), "10.0.0.1"
    return {
        f"{prefix}_SERVICE_HOST": address,
        f"{prefix}_SERVICE_PORT": str(port),
        f"{prefix}_SERVICE_PORT_HTTP": str(port),
        f"{prefix}_PORT": f"tcp://{address}:{port}",
        f"{prefix}_PORT_{port}_TCP": f"tcp://{address}:{port}",
        f"{prefix}_PORT_{port}_TCP_PROTO": "tcp",
        f"{prefix}_PORT_{port}_TCP_PORT": str(port),
        f"{prefix}_PORT_{port}_TCP_ADDR": address,
    }


SERVICES: Final = ("tombola", "tombola-admin", "tombola-grpc", "tombola-metrics", "tombola-library", "tombola-port")


def test_a_process_starts_in_the_environment_of_a_container_of_a_busy_namespace(tmp_path: Path) -> None:
    """Links to Services whose names begin with ours, no HOME, no user's name, another program's folder of metrics, and
    a locale of ASCII alone; the planes listen where the flags say."""
    metrics = tmp_path / "metrics"
    metrics.mkdir()
    variables = {name: value for service in SERVICES for name, value in service_links(service, 8000).items()}
    assert {"TOMBOLA_ADMIN_PORT", "TOMBOLA_GRPC_PORT", "TOMBOLA_PORT"} < set(variables)
    variables |= {"PROMETHEUS_MULTIPROC_DIR": str(metrics), "LC_ALL": "POSIX"}
    variables |= {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    library = tiny_library(tmp_path / "library")
    without = ("HOME", "USER", "LOGNAME", "USERNAME", "LANG", "LC_CTYPE")
    with serving(library.path, tmp_path / "state", program=("-c", NAMELESS), without=without, **variables) as process:
        assert process.classify(draw_sample())[0] == 200
        assert process.metric("inference_images_total") == 1
        assert process.end() == 0
    assert not list(metrics.iterdir())


def test_a_locale_without_utf_8_gets_escapes_where_it_lacks_a_character(tmp_path: Path) -> None:
    variables = environment(PYTHONUTF8="1", PYTHONIOENCODING="ascii:strict")
    script = 'import sys; from tombola.cli import main; code = main(["sample", "\\u03b8.png"]); sys.exit(code)'
    shown = subprocess.run(
        [sys.executable, "-c", script], env=variables, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("\\u03b8.png: a ship")
