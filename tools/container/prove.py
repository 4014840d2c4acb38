"""Builds the Dockerfile and runs its image without a container engine, and checks what the file promises.

As root, with Debian's debootstrap, buildah, iproute2 and util-linux:

    python -m tools.container.prove            everything; ends with the figures as JSON, 0 if all holds

The file's own instructions are run by buildah, each in a chroot, on a Debian made by debootstrap. That stands in for
the slim Python image. The image is then started as an engine would start it. Its entry point is process 1 of new
process, mount and network namespaces, as its user: root read-only, no capabilities, no way out of its network. torch is
the CPU build if pip's own configuration has one among its links, else the CUDA build.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.servers import set_size_kb
from model_store.errors import StoreError
from model_store.files import write_atomically
from model_store.json_object import Json
from model_store.library import open_library, write_library
from service.cpu import process_tree
from service.outbound import open_url
from tests.support.tickets import CLASSES, eight_tickets, items
from tombola.sample_image import draw_sample

ROOT: Final = Path(__file__).parents[2]
SUITE: Final = "bookworm"  # its Python is the Dockerfile's
PACKAGES: Final = "python3,python3-venv,python-is-python3,ca-certificates"
BASE: Final = "python:3.11-slim"
SOURCES: Final = (
    "Dockerfile",
    ".dockerignore",
    "pyproject.toml",
    "README.md",
    "model_store",
    "training",
    "service",
    "tombola",
)
WORK: Final = Path("/var/tmp/tombola-proof")  # noqa: S108 -- several GB, so not in memory
NETWORK: Final = "tombola-proof"
READY_S: Final = 600.0  # forty tickets on a busy machine
OUTSIDE, INSIDE = "10.231.0.1", "10.231.0.2"
BUDGET_MB: Final = {"cpu": 1200, "cuda": 7000}  # what our layers add to the base image, uncompressed


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """What the command printed. Ends the program, with what it said, if it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=cwd)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


@dataclass
class Proof:
    work: Path
    checks: dict[str, bool] = field(default_factory=dict)
    figures: Json = field(default_factory=dict)

    def buildah(self, *arguments: str | Path) -> str:
        return run(
            "buildah", "--root", self.work / "storage", "--runroot", self.work / "run", *arguments, cwd=self.work
        ).strip()

    def check(self, what: str, *, holds: bool) -> None:
        self.checks[what] = holds
        print(f"{'ok  ' if holds else 'FAIL'} {what}", flush=True)


# Building


def stand_in(proof: Proof) -> None:
    """A minimal Debian with Python, as the image that the Dockerfile begins with. Made once per work folder."""
    if BASE in proof.buildah("images", "--format", "{{.Name}}:{{.Tag}}"):
        return
    base = proof.work / "base"
    run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, base)
    shutil.rmtree(base / "var/cache/apt")
    shutil.rmtree(base / "var/lib/apt/lists")
    container = proof.buildah("from", "scratch")
    proof.buildah("add", "--quiet", container, base, "/")
    proof.buildah("commit", "--quiet", "--rm", container, BASE)


def cpu_wheel() -> Path | None:
    """A CPU build of torch among the links that this machine's pip is configured with."""
    result = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.find-links"], capture_output=True, text=True, check=False
    )
    folders = [*result.stdout.split(), *os.environ.get("PIP_FIND_LINKS", "").split()]
    return next((wheel for folder in folders for wheel in Path(folder).glob("torch-*+cpu-cp311-*x86_64.whl")), None)


def torch_index(proof: Proof, wheel: Path) -> Path:
    """An index like PyTorch's: the wheel and what it needs, a folder for each."""
    index, wheels = proof.work / "torch-index", proof.work / "wheels"
    if not index.exists():
        run(sys.executable, "-m", "pip", "download", "--quiet", "--dest", wheels, wheel)
        for file in wheels.glob("*.whl"):
            home = index / file.name.split("-")[0].lower().replace("_", "-")
            home.mkdir(parents=True)
            shutil.copy(file, home)
            (home / "index.html").write_text(f'<a href="{file.name}">{file.name}</a>')
    return index


def context(proof: Proof) -> Path:
    """What `docker build .` would be given; with a library of random tickets if there is none yet."""
    folder = proof.work / "context"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "library-scratch"))
        else:
            shutil.copy(ROOT / name, folder / name)
    library = folder / "model_store" / "library"
    try:
        open_library(library)
    except StoreError:
        shutil.rmtree(library, ignore_errors=True)
        random_library(library, 8)
    return folder


def random_library(folder: Path, tickets: int) -> None:
    write_library(folder, classes=CLASSES, data="random", tickets=items(eight_tickets()[:tickets]))


def build(proof: Proof, folder: Path, tag: str, index: Path | None) -> float:
    """Seconds that it took. pip inside trusts what this machine trusts."""
    (proof.work / "pip.conf").write_text("[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n")
    shared = [f"{proof.work}/pip.conf:/etc/pip.conf:ro", "/etc/ssl/certs:/etc/ssl/certs:ro"]
    arguments = {"COMMIT": run("git", "-C", ROOT, "rev-parse", "HEAD").strip()}
    if index is not None:
        shared.append(f"{index}:/torch-index:ro")
        arguments["TORCH_INDEX_URL"] = "file:///torch-index"
    words = ["bud", "--isolation", "chroot", "--format", "docker", "--pull-never", "--layers", "--tag", tag]
    words += [word for volume in shared for word in ("--volume", volume)]
    words += [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
    begun = time.monotonic()
    proof.buildah(*words, folder)
    return time.monotonic() - begun


def layers(proof: Proof, tag: str) -> list[str]:
    diff_ids: list[str] = json.loads(proof.buildah("inspect", "--type", "image", tag))["OCIv1"]["rootfs"]["diff_ids"]
    return diff_ids


def prove_layers(proof: Proof, folder: Path, index: Path | None) -> None:
    """Layers: the base image, dependencies, library, code. What changes seldom must stay when the rest changes."""
    first = layers(proof, "tombola-proof")
    shutil.rmtree(folder / "model_store" / "library")
    random_library(folder / "model_store" / "library", 4)
    build(proof, folder, "tombola-proof-other", index)
    second = layers(proof, "tombola-proof-other")
    proof.check("a new library leaves the dependencies' layer", holds=first[:2] == second[:2] and first[2] != second[2])
    with (folder / "service" / "__init__.py").open("a") as file:
        file.write("# changed\n")
    build(proof, folder, "tombola-proof-other", index)
    third = layers(proof, "tombola-proof-other")
    proof.check("new code leaves all other layers", holds=second[:3] == third[:3] and second[3] != third[3])


# Running


def config(proof: Proof) -> Json:
    docker_config: Json = json.loads(proof.buildah("inspect", "--type", "image", "tombola-proof"))["Docker"]["config"]
    return docker_config


@contextmanager
def network() -> Iterator[None]:
    """A network with one cable to us and no way further."""
    run("ip", "netns", "add", NETWORK)
    try:
        run("ip", "link", "add", "tombola0", "type", "veth", "peer", "name", "eth0", "netns", NETWORK)
        run("ip", "address", "add", f"{OUTSIDE}/30", "dev", "tombola0")
        run("ip", "link", "set", "tombola0", "up")
        for words in (("address", "add", f"{INSIDE}/30", "dev", "eth0"), ("link", "set", "eth0", "up")):
            run("ip", "-n", NETWORK, *words)
        run("ip", "-n", NETWORK, "link", "set", "lo", "up")
        yield
    finally:
        run("ip", "netns", "delete", NETWORK)


def started(root: str, image: Json, log: Path) -> subprocess.Popen[bytes]:
    """The image's entry point as process 1, as the image's user, on a read-only root with a tmpfs at /tmp."""
    prepare = [
        f"mount --bind {root} {root}",
        f"mount -o remount,bind,ro {root}",
        f"mount -t proc proc {root}/proc",
        f"mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs {root}/tmp",  # noqa: S108 -- in the container
        f"mount -t tmpfs -o mode=755 tmpfs {root}/dev",
        *(f"touch {root}/dev/{name} && mount --bind /dev/{name} {root}/dev/{name}" for name in ("null", "urandom")),
        f'exec chroot {root} "$@"',
    ]
    user, group = image["User"].split(":")
    drop = ["setpriv", "--reuid", user, "--regid", group, "--clear-groups"]
    drop += ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
    environment = ["env", "--ignore-environment", f"--chdir={image['WorkingDir']}", *image["Env"]]
    inside = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
    command = ["ip", "netns", "exec", NETWORK, *inside, "sh", "-ec", "\n".join(prepare), "sh"]
    command += [*drop, *environment, *image["Entrypoint"], *image["Cmd"]]
    with log.open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=out)


def first_process(parent: int) -> int:
    """Process 1 of the namespace, by its number outside: the child of unshare, which `ip` has become."""
    file = Path(f"/proc/{parent}/task/{parent}/children")
    wait(lambda: bool(file.read_text().split()), "the container's first process")
    return int(file.read_text().split()[0])


def wait(condition: Any, what: str, limit_s: float = 180.0) -> None:
    late = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > late:
            sys.exit(f"waited in vain for {what}")
        time.sleep(0.05)


def status_of(path: str, body: bytes | None = None) -> tuple[int, bytes]:
    try:
        with open_url(urllib.request.Request(f"http://{INSIDE}:8000{path}", body), 30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
    except OSError:
        return 0, b""


def reachable(port: int) -> bool:
    import socket

    try:
        socket.create_connection((INSIDE, port), timeout=2).close()
    except OSError:
        return False
    return True


def listening(process: int) -> set[tuple[str, int]]:
    """(address, port) of the namespace's listening sockets; addresses as hexadecimal, 00000000 being all."""
    rows = [line.split() for line in Path(f"/proc/{process}/net/tcp").read_text().splitlines()[1:]]
    return {(row[1].split(":")[0], int(row[1].split(":")[1], 16)) for row in rows if row[3] == "0A"}


def within(process: int, image: Json, *command: str) -> int:
    """The exit code of a command run in the container, as its user and in its environment: what `docker exec` does."""
    enter = ["nsenter", "--target", str(process), "--mount", "--net", "--pid", "--root", "--wd"]
    entered = ["env", "--ignore-environment", *image["Env"], *command]
    drop = ["setpriv", "--reuid", "10001", "--regid", "10001", "--clear-groups"]
    return subprocess.run([*enter, *drop, *entered], capture_output=True, check=False).returncode


def prove_running(proof: Proof, root: str, library: str) -> None:
    image = config(proof)
    prove_config(proof, image)
    with network():
        begun = time.monotonic()
        server = started(root, image, proof.work / "server.log")
        try:
            wait(lambda: server.poll() is not None or status_of("/health/ready")[0] == 200, "readiness", READY_S)
            if server.poll() is not None:
                sys.exit((proof.work / "server.log").read_text()[-4000:])
            proof.figures["start_s"] = round(time.monotonic() - begun, 1)
            process = first_process(server.pid)
            prove_inside(proof, process, image)
            prove_outside(proof, library)
            prove_audit(proof, process, image)
            prove_end(proof, server, process)
        finally:
            # Not the first alone: one that changed its user no longer dies with its parent.
            for member in process_tree(server.pid):
                with suppress(ProcessLookupError):
                    os.kill(member, signal.SIGKILL)
            server.wait()


def prove_config(proof: Proof, image: Json) -> None:
    user = image["User"].split(":")
    proof.check("the user is a number and not 0", holds=all(part.isdigit() and part != "0" for part in user))
    proof.check("the entry point is no shell", holds=image["Entrypoint"] == ["python", "-m", "tombola"])
    proof.check("SIGTERM stops it", holds=image["StopSignal"] in ("SIGTERM", "15"))
    exposed = set(image["ExposedPorts"])
    proof.check("the ports of HTTP and gRPC are exposed", holds=exposed == {"8000/tcp", "8002/tcp"})
    labels = {name.rsplit(".", 1)[1] for name in image["Labels"] if name.startswith("org.opencontainers.image.")}
    wanted = {"title", "description", "version", "revision", "created"}
    proof.check("OCI labels name what it is", holds=wanted <= labels)


def prove_inside(proof: Proof, process: int, image: Json) -> None:
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    proof.check("the server is process 1", holds=status["NSpid"].split()[-1] == "1" and "python" in status["Name"])
    proof.check("it runs as 10001", holds=set(status["Uid"].split()) == {"10001"} == set(status["Gid"].split()))
    proof.check("it has no capability", holds=int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0)
    proof.check("it can gain none", holds=status["NoNewPrivs"] == "1")
    mounts = [line.split() for line in Path(f"/proc/{process}/mountinfo").read_text().splitlines()]
    proof.check("its root is read-only", holds=any(m[4] == "/" and "ro" in m[5].split(",") for m in mounts))
    proof.check("HEALTHCHECK succeeds when ready", holds=within(process, image, *image["Healthcheck"]["Test"][1:]) == 0)
    sockets = listening(process)
    proof.check("the admin plane listens on loopback", holds=sockets == {("00000000", 8000), ("0100007F", 8001)})
    proof.figures["resident_mb"] = round(sum(set_size_kb(member) for member in process_tree(process)) / 1000)


def prove_outside(proof: Proof, library: str) -> None:
    code, answer = status_of("/v1/classify", draw_sample())
    proof.check("it classifies", holds=code == 200 and json.loads(answer)["library"] == library)
    proof.check("the admin plane is out of reach", holds=not reachable(8001) and status_of("/metrics")[0] == 404)
    routes = run("ip", "-n", NETWORK, "route", "show", "default")
    proof.check("it needed no network to start", holds=routes == "")


def prove_audit(proof: Proof, process: int, image: Json) -> None:
    """Beside the server, from what the image holds: the smoke profile, and what only longer ones ask with."""
    audit = ["python", "-m", "tombola", "audit", "--profile", "smoke", "--out", "/tmp/audit"]  # noqa: S108 -- as above
    proof.check("an audit runs in it, and is valid", holds=within(process, image, *audit) == 0)
    asks = "import httpx, art.attacks.evasion, art.estimators.classification"
    proof.check("the black-box attacks are there", holds=within(process, image, "python", "-c", asks) == 0)


def prove_end(proof: Proof, server: subprocess.Popen[bytes], process: int) -> None:
    begun = time.monotonic()
    os.kill(process, 15)
    code = server.wait(timeout=60)
    proof.figures["stop_s"] = round(time.monotonic() - begun, 1)
    proof.check("SIGTERM ends it with 0", holds=code == 0)


# Measuring


def megabytes(folder: Path) -> float:
    return round(sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir()) / 1e6, 1)


def prove_size(proof: Proof, root: Path, variant: str) -> None:
    names = {"dependencies": "tombola", "library": "library", "code": "code"}
    sizes = {name: megabytes(root / "opt" / folder) for name, folder in names.items()}
    proof.figures |= {"variant": variant, "layers_mb": sizes, "ours_mb": round(sum(sizes.values()))}
    proof.check(f"our layers are within {BUDGET_MB[variant]} MB", holds=sum(sizes.values()) <= BUDGET_MB[variant])


def prove_licences(proof: Proof, root: Path) -> None:
    """Every package says its licence, in its metadata or in a file beside it, and is listed in packages.json."""
    silent = []
    listed = json.loads((root / "opt" / "tombola" / "packages.json").read_text(encoding="utf-8"))["installed"]
    for info in (root / "opt" / "tombola").rglob("*.dist-info"):
        text = (info / "METADATA").read_text(encoding="utf-8").casefold()
        files = [file for file in info.rglob("*") if file.name.casefold().startswith(("licen", "copying"))]
        if not files and "license" not in text:
            silent.append(info.name)
    # What setuptools carries inside itself is part of setuptools; pip made the list and then went.
    installed = (root / "opt" / "tombola").glob("lib/python*/site-packages/*.dist-info")
    there = {info.name.split("-")[0].casefold() for info in installed}
    names = {package["metadata"]["name"].replace("-", "_").replace(".", "_").casefold() for package in listed}
    proof.figures["packages"] = len(there)
    proof.check("every package kept its licence", holds=not silent)
    proof.check("packages.json lists every package", holds=there == names - {"pip"})
    bill = json.loads((root / "opt" / "tombola" / "sbom.json").read_text(encoding="utf-8"))
    components = {part["name"].replace("-", "_").replace(".", "_").casefold() for part in bill["components"]}
    proof.check(
        "sbom.json is CycloneDX and lists every package", holds=bill["bomFormat"] == "CycloneDX" and components == there
    )


def prove(proof: Proof) -> None:
    stand_in(proof)
    wheel = cpu_wheel()
    index, variant = (torch_index(proof, wheel), "cpu") if wheel else (None, "cuda")
    folder = context(proof)
    library = open_library(folder / "model_store" / "library").digest
    proof.figures["build_s"] = round(build(proof, folder, "tombola-proof", index))
    container = proof.buildah("from", "--pull-never", "tombola-proof")
    try:
        root = proof.buildah("mount", container)
        prove_size(proof, Path(root), variant)
        prove_licences(proof, Path(root))
        prove_running(proof, root, library)
    finally:
        proof.buildah("rm", container)
    prove_layers(proof, folder, index)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="kept between runs (%(default)s)")
    parser.add_argument("--out", type=Path, help="file for the figures")
    given = parser.parse_args()
    proof = Proof(given.work)
    proof.work.mkdir(parents=True, exist_ok=True)
    prove(proof)
    text = json.dumps({**proof.figures, "checks": proof.checks}, indent=2)
    if given.out is not None:
        write_atomically(given.out, text + "\n")
    print(text)
    return 0 if all(proof.checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
