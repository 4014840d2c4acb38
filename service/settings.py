"""Every setting of the service, with unit, default and reason. Read once: flag > variable > file > default."""

import argparse
import difflib
import ipaddress
import os
import re
import secrets
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, cast

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from model_store.errors import TombolaError
from model_store.files import write_new
from model_store.input_spec import CHANNELS, MAX_PIXELS, MAX_SIDE

PREFIX: Final = "TOMBOLA_"
CONFIG_FILE: Final = Path("tombola.toml")  # read from the working directory, if it is there
CONFIG_VARIABLE: Final = f"{PREFIX}CONFIG"  # names another file
MAX_PICTURE_BYTES: Final = CHANNELS * MAX_SIDE**2  # of the largest picture that a library takes
TOKEN_CHARACTERS: Final = 16  # the shortest admin token accepted: 16 random characters are beyond guessing
# Kubernetes sets these for every Service of the namespace whose name begins with "tombola". They are not for us.
SERVICE_LINK: Final = re.compile(rf"{PREFIX}(\w+_)?(SERVICE_(HOST|PORT\w*)|PORT_\d+_(TCP|UDP|SCTP)\w*)")
SERVICE_PORT: Final = re.compile(rf"{PREFIX}(\w+_)?PORT")  # with a value such as tcp://10.0.0.1:8000
ORIGIN: Final = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?:[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::(?P<port>\d{1,5}))?")
DEFAULT_PORTS: Final = {"http": "80", "https": "443"}
# Variables of the commands that make libraries.
OTHER_VARIABLES: Final = frozenset({CONFIG_VARIABLE, f"{PREFIX}CACHE", f"{PREFIX}CHECKPOINT_SECONDS"})
# Names before 0.2.0 and what they became.
RENAMED: Final = {
    "window_rows": "max_batch_size",
    "queue_rows": "max_queue_size",
    "top": "top_k",
    "detail": "output_detail",
    "quantum_ms": "latency_quantum_ms",
    "max_bodies_bytes": "body_memory_bytes",
    "audits_outside": "audit_surrogate_library",
}


class SettingsRejected(TombolaError):
    """A setting that cannot be used: one line that names it, says what was found and what was expected."""


TIME: Final[dict[str, float]] = {"gt": 0, "le": 3600}  # what the event loop's clock can surely count


def setting(default: Any, unit: str, what: str, reason: str, **limits: Any) -> Any:
    """A field with its documentation. `limits` are pydantic's (ge, le, gt, ...)."""
    return Field(default=default, description=f"{what}. {reason}.", json_schema_extra={"unit": unit}, **limits)


PrecisionChoice = Literal["auto", "float32", "bfloat16"]


def read_library(value: Any) -> Any:
    """A location stays text, since a path would lose one of its slashes."""
    return Path(value) if isinstance(value, str) and "://" not in value else value


class Settings(BaseSettings):
    """The service's settings. Times are in seconds and sizes in bytes, unless the name says otherwise."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid", validate_default=False
    )

    host: str = setting("127.0.0.1", "address", "Where the public plane listens", "Loopback: exposing it is a decision")
    port: int = setting(8000, "port", "Port of the public plane", "0 takes a free one and prints it", ge=0, le=65535)
    http_processes: int = setting(
        1,
        "processes",
        "Processes that read requests, decode images and encode answers",
        "The default: the service's own. More pay off above about four cores; Linux only",
        ge=1,
        le=64,
    )
    grpc: bool = setting(
        False,
        "yes/no",
        "Whether the Open Inference Protocol is also served over gRPC (extra `grpc`)",
        "Off: one port less to expose",
    )
    grpc_port: int = setting(
        8002, "port", "Port of gRPC, on the public plane's address", "0 takes a free one", ge=0, le=65535
    )
    admin_host: str = setting(
        "127.0.0.1", "address", "Where the admin plane listens", "Anything but loopback needs a token of your own"
    )
    admin_port: int = setting(8001, "port", "Port of the admin plane", "0 takes a free one", ge=0, le=65535)
    admin_token: SecretStr | None = setting(
        None, "secret", "Bearer token of the admin plane", "Unset: one is made and kept in STATE_DIR/admin-token"
    )
    admin_token_file: Path | None = setting(
        None, "path", "File that contains the admin token", "A mounted secret does not show in the process list"
    )
    metrics_open: bool = setting(
        True,
        "yes/no",
        "Whether /metrics answers without the admin token",
        "Scrapers rarely have one; the admin port alone",
    )
    api_keys_file: Path | None = setting(
        None,
        "path",
        "File of accepted API keys, one a line: name and SHA-256 of the key",
        "Unset: the public plane needs no key. It is read again on SIGHUP",
    )
    trusted_proxies: str = setting(
        "",
        "addresses",
        "Proxies whose X-Forwarded-For is believed, separated by commas",
        "None: a client is the address of its connection",
    )

    cors_origins: str = setting(
        "",
        "origins",
        "Web origins whose pages may use the public plane, separated by commas, such as https://app.example; or *",
        "None: browsers keep pages of other origins out. Cookies are never asked for, so a key travels in a header",
    )

    library: Annotated[Path | str | None, BeforeValidator(read_library)] = setting(
        None,
        "path or location",
        "Folder of the library to serve, or https://, s3://, hf:// or oci:// with #sha256= and its digest",
        "Unset: the embedded one. From elsewhere it is fetched into STATE_DIR and verified before it is opened",
    )
    device: str = setting(
        "auto",
        "torch device",
        "Where tickets run: auto, cpu, cuda, cuda:1",
        "auto: the CPU, or CUDA where that is measured to be faster at the start",
    )
    engine: Literal["auto", "torch", "openvino"] = setting(
        "auto", "name", "What runs the tickets", "auto: openvino on a CPU where it is installed, else torch"
    )
    precision: PrecisionChoice = setting(
        "auto",
        "name",
        "Arithmetic of the tickets on a CPU",
        "auto: bfloat16 where the processor multiplies in it and OpenVINO runs the tickets, else float32",
    )
    int8_images: Path | None = setting(
        None,
        "path",
        "Images to calibrate 8-bit tickets on (OpenVINO): a zip, an npz or a folder",
        "Unset: what PRECISION says. Audits then attack the rounded tickets. Take other images than you audit with",
    )
    threads: int = setting(
        0,
        "threads",
        "Tickets run at the same time, one core each",
        "0: the cores this container may use",
        ge=0,
        le=1024,
    )
    engine_processes: bool = setting(
        True,
        "yes/no",
        "Whether each of these threads has a process of its own (OpenVINO on Linux)",
        "A crash then ends a process, not the service, and the event loop has the interpreter to itself. "
        "No: less memory",
    )
    state_dir: Path = setting(
        Path("state"), "path", "Folder for compiled models, audits and the admin token", "The only place written to"
    )
    output_detail: Literal["rounded", "label", "full"] = setting(
        "rounded",
        "name",
        "How much an answer reveals: label, probabilities to two decimals (rounded), or all digits (full)",
        "Exact probabilities help an attacker more than a user",
    )
    top_k: int = setting(
        5, "classes", "Likeliest classes listed for each image of /v1/classify", "Enough for people", ge=1, le=1000
    )

    max_body_bytes: int = setting(
        16 << 20, "bytes", "Largest request body, also once inflated", "Bounds the memory of a request", ge=1024
    )
    body_memory_bytes: int = setting(
        256 << 20,
        "bytes",
        "Memory for the bodies of all concurrent requests; beyond it 503",
        "Bounds memory, whatever clients send",
        ge=1024,
    )
    pixel_memory_bytes: int = setting(
        256 << 20,
        "bytes",
        "Memory for the pixels of all images that are decoded or wait; beyond it 503",
        "A library of large pictures gets a shorter queue and smaller requests",
        ge=MAX_PICTURE_BYTES,
    )
    max_pixels: int = setting(
        4_000_000,
        "pixels",
        "Largest image, from its header, once decoded: a large JPEG is decoded at a fraction of its size",
        "Above: a decompression bomb",
        ge=1024,
        le=MAX_PIXELS,
    )
    max_images: int = setting(512, "images", "Images in one request", "They share one deadline", ge=1, le=65536)
    max_requests: int = setting(
        1024, "requests", "Concurrent requests; beyond it 503", "Health is answered regardless", ge=1
    )
    max_queue_size: int = setting(
        1024,
        "images",
        "Images admitted and not yet answered; beyond it 503",
        "Divided by images per second, it is the longest wait",
        ge=1,
    )
    max_batch_size: int = setting(
        32,
        "images",
        "Most images whose tickets are run together",
        "More gains little throughput and makes everyone wait longer",
        ge=1,
        le=4096,
    )
    rate_images_per_s: float = setting(
        0.0, "images/s", "Images per second of one API key or address; beyond it 429", "0: no limit", ge=0, le=1e9
    )
    rate_burst_images: int = setting(
        512, "images", "Images that one client may send at once before the rate applies", "One full request", ge=1
    )

    deadline_s: float = setting(
        10.0, "s", "Longest wait for an answer; a request may ask for less", "Then 504 and no more work", **TIME
    )
    header_timeout_s: float = setting(
        10.0, "s", "From connection to the end of the request's headers", "Ends slowloris connections", **TIME
    )
    body_timeout_s: float = setting(10.0, "s", "From headers to the end of the body", "Slow bodies hold memory", **TIME)
    decode_timeout_s: float = setting(5.0, "s", "Decoding the images of a request", "Far above the honest cost", **TIME)
    keep_alive_s: float = setting(5.0, "s", "An idle connection is kept this long", "Proxies should keep less", **TIME)
    drain_delay_s: float = setting(
        5.0, "s", "After SIGTERM: not ready, yet answering", "Time for load balancers to notice", ge=0, le=3600
    )
    drain_timeout_s: float = setting(
        30.0, "s", "Then: work in flight may take this long", "As Kubernetes' grace", **TIME
    )
    latency_quantum_ms: float = setting(
        0.0,
        "ms",
        "Answers leave on multiples of this after admission",
        "0: at once. Above, latency reveals less of theta's size",
        ge=0,
        le=3_600_000,
    )
    engine_timeout_s: float = setting(
        10.0,
        "s",
        "One forward pass of one ticket; beyond it the engine counts as dead",
        "Far above any honest one",
        **TIME,
    )
    engine_restarts: int = setting(
        3, "times", "Dead engines replaced before the process gives up", "Then exit 1: the platform restarts it", ge=0
    )

    audits_data: Path | None = setting(
        None,
        "path",
        "Folder of labelled sets to audit with: zips, npz files and folders of images, each known by its name",
        "Unset: only uploaded sets, and generated images for smoke",
    )
    audit_surrogate_library: Path | None = setting(
        None,
        "path",
        "Surrogate library for transfer attacks: an attacker's own, of the same classes",
        "Unset: transfer from the library's own tickets and baselines alone",
    )
    audits_queue: int = setting(8, "audits", "Audits that may wait; beyond it 429", "One runs at a time", ge=1, le=1000)
    audits_threads: int = setting(
        1, "threads", "Threads of an audit", "It runs beside the service, at the lowest priority", ge=1, le=1024
    )
    audits_max_hours: float = setting(
        12.0, "h", "Estimated length beyond which an audit is refused", "A night on two cores", gt=0, le=8760
    )
    audits_max_upload_bytes: int = setting(
        256 << 20,
        "bytes",
        "Largest labelled set that may be uploaded",
        "Bounds the disk that a client may fill",
        ge=1024,
    )

    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "name", "Least severe line that is logged", "JSON lines on standard error"
    )
    log_requests: bool = setting(
        False, "yes/no", "Log every request; otherwise only 5xx without 503", "It costs throughput"
    )
    tracing: bool = setting(
        False,
        "yes/no",
        "Send a trace of each classification request to an OpenTelemetry collector (extra `tracing`)",
        "Off: the service calls nobody. Where to and how many: the standard OTEL_* variables",
    )
    tracing_proxy: str = setting(
        "", "URL", "Proxy on the way to that collector", "None: proxies of the environment are never used"
    )
    commit: str = setting(
        "unknown", "hash", "Commit of the running source, shown in build_info", "The image's build sets it"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then variables, then the file that `toml_file` names."""
        del dotenv_settings, file_secret_settings
        variables = cast("EnvSettingsSource", env_settings)
        variables.env_vars = {
            name: value for name, value in variables.env_vars.items() if not is_service_link(name.upper(), value or "")
        }
        return init_settings, variables, TomlConfigSettingsSource(settings_cls)

    @model_validator(mode="after")
    def check_consistency(self) -> Self:
        if self.max_queue_size < self.max_images:
            raise ValueError(
                f"TOMBOLA_MAX_QUEUE_SIZE {self.max_queue_size}: below TOMBOLA_MAX_IMAGES {self.max_images}, "
                "so that a full request could never be admitted"
            )
        if self.body_memory_bytes < self.max_body_bytes:
            raise ValueError(
                f"TOMBOLA_BODY_MEMORY_BYTES {self.body_memory_bytes}: below "
                f"TOMBOLA_MAX_BODY_BYTES {self.max_body_bytes}, so that a full body could never be read"
            )
        self.check_http_processes()
        if self.port and self.port == self.admin_port and self.host == self.admin_host:
            raise ValueError(f"TOMBOLA_PORT and TOMBOLA_ADMIN_PORT are both {self.port}; the planes need two ports")
        if self.latency_quantum_ms > 1000 * self.deadline_s:
            raise ValueError(
                f"TOMBOLA_LATENCY_QUANTUM_MS {self.latency_quantum_ms:g}: above TOMBOLA_DEADLINE_S "
                f"{self.deadline_s:g}, so that no answer would leave in time"
            )
        for name, host in (("HOST", self.host), ("ADMIN_HOST", self.admin_host)):
            if not host.strip("[] "):
                raise ValueError(f"TOMBOLA_{name}: empty; expected an address, such as 127.0.0.1 or ::")
        check_proxies(self.trusted_proxies)
        check_origins(self.cors_origins)
        if self.admin_token is not None and self.admin_token_file is not None:
            raise ValueError("TOMBOLA_ADMIN_TOKEN and TOMBOLA_ADMIN_TOKEN_FILE are both set; choose one")
        return self

    def check_http_processes(self) -> None:
        """Each of them gets an equal share of the limits on requests and on bodies."""
        count = self.http_processes
        if count > 1 and sys.platform != "linux":
            raise ValueError(f"TOMBOLA_HTTP_PROCESSES {count}: only Linux shares a port among processes; expected 1")
        if count > self.max_requests:
            raise ValueError(f"TOMBOLA_HTTP_PROCESSES {count}: above TOMBOLA_MAX_REQUESTS {self.max_requests}")
        if self.body_memory_bytes < count * self.max_body_bytes:
            raise ValueError(
                f"TOMBOLA_BODY_MEMORY_BYTES {self.body_memory_bytes}: below TOMBOLA_MAX_BODY_BYTES "
                f"{self.max_body_bytes} for each of {count} HTTP processes, so that a full body could never be read"
            )

    def shown(self) -> dict[str, Any]:
        """Every setting as JSON values, secrets masked."""
        return self.model_dump(mode="json")


# The groups of the table, each with its first setting.
GROUPS: Final = {
    "host": "addresses and access",
    "library": "library, engine and answers",
    "max_body_bytes": "limits",
    "deadline_s": "time",
    "audits_data": "audits",
    "log_level": "logs and traces",
}


@dataclass(frozen=True)
class SettingDoc:
    """One row of the table of settings."""

    name: str
    group: str
    variable: str
    flag: str
    unit: str
    default: str
    meaning: str


def setting_docs() -> list[SettingDoc]:
    """The table of settings, in the order they are declared."""
    group, rows = "", []
    for name, field in Settings.model_fields.items():
        group = GROUPS.get(name, group)
        rows.append(
            SettingDoc(
                name=name,
                group=group,
                variable=PREFIX + name.upper(),
                flag=flag_of(name),
                unit=str(cast("dict[str, Any]", field.json_schema_extra)["unit"]),
                default=default_text(field.default),
                meaning=str(field.description),
            )
        )
    return rows


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def default_text(default: Any) -> str:
    """As people write it: yes, no, unset, 0."""
    if isinstance(default, bool):
        return "yes" if default else "no"
    return "unset" if default in (None, "") else f"{default:g}" if isinstance(default, float) else str(default)


class RenamedFlag(argparse.Action):
    """A flag's old name: refused, with the new one."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        parser.error(f"{'/'.join(self.option_strings)}: now named {self.const}")


def add_renamed_flag(parser: Any, old: str, new: str) -> None:
    parser.add_argument(
        old, action=RenamedFlag, const=new, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


def add_flags(parser: argparse.ArgumentParser, only: Iterable[str] | None = None) -> None:
    """One flag per setting (of those in `only`), in groups. A flag that is not given leaves no trace."""
    chosen = [row for row in setting_docs() if only is None or row.name in set(only)]
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(row.group for row in chosen)}
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help=f"settings in TOML ({CONFIG_VARIABLE}, or {CONFIG_FILE} here)"
    )
    for row in chosen:
        text = f"{row.meaning} [{row.unit}; {row.default}; {row.variable}]".replace("%", "%%")
        if Settings.model_fields[row.name].annotation is bool:
            groups[row.group].add_argument(
                row.flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
        else:
            metavar = row.unit.split("/")[0].upper()
            groups[row.group].add_argument(row.flag, default=argparse.SUPPRESS, help=text, metavar=metavar)
    for old, new in RENAMED.items():
        if new in {row.name for row in chosen}:
            add_renamed_flag(parser, flag_of(old), flag_of(new))


def read_settings(flags: Mapping[str, Any] | None = None) -> Settings:
    """Reads the settings: flag > variable > file > default.

    Args:
      flags: settings by name, as strings or values; entries that are no settings are passed over.

    Returns:
      The settings, frozen.

    Raises:
      SettingsRejected: a value, a variable or the file cannot be used. The message is one line.
    """
    given = dict(flags or {})
    refuse_unknown_variables(os.environ)
    path = config_file(given.get("config"), os.environ)

    class FileSettings(Settings, toml_file=path):
        """The settings with the values of the file as their defaults."""

    try:
        return FileSettings(**{name: value for name, value in given.items() if name in Settings.model_fields})
    except ValidationError as error:
        raise SettingsRejected("; ".join(one_line(problem) for problem in error.errors())) from None


def config_file(flag: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The file to read, if any. Raises SettingsRejected for one that cannot be read or has an unknown key."""
    path = flag or Path(environ.get(CONFIG_VARIABLE) or CONFIG_FILE)
    if not path.exists() and not flag and not environ.get(CONFIG_VARIABLE):
        return None
    try:
        keys = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"no TOML: {error}"
        raise SettingsRejected(f"{path}: {reason}") from None
    for key in keys:
        if key not in Settings.model_fields:
            raise SettingsRejected(f"{path}: {key}: {hint(key, Settings.model_fields, RENAMED)}")
    return path


def hint(name: str, known: Iterable[str], renamed: Mapping[str, str]) -> str:
    """What to say of an unknown name: its new one, or the nearest that exists."""
    if name in renamed:
        return f"now named {renamed[name]}"
    near = difflib.get_close_matches(name, known, n=1)
    return "no such setting" + (f"; did you mean {near[0]}?" if near else "")


def refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    """A misspelt variable would otherwise be a silent default."""
    known = {row.variable for row in setting_docs()} | OTHER_VARIABLES
    renamed = {PREFIX + old.upper(): PREFIX + new.upper() for old, new in RENAMED.items()}
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name in known or is_service_link(name, environ[name]):
            continue
        raise SettingsRejected(f"{name}: {hint(name, sorted(known), renamed)}")


def is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes set the variable, for a Service whose name begins with "tombola"."""
    return bool(SERVICE_LINK.fullmatch(name) or ("://" in value and SERVICE_PORT.fullmatch(name)))


def one_line(problem: Any) -> str:
    """A pydantic error as `TOMBOLA_PORT (--port): ..., got 'abc'`; a secret's value is never shown."""
    text = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"]:
        return text
    name = str(problem["loc"][0])
    shown = "" if name == "admin_token" else f", got {str(problem['input'])[:80]!r}"
    return f"{PREFIX}{name.upper()} (--{name.replace('_', '-')}): {text[0].lower()}{text[1:]}{shown}"


def cors_origins(settings: Settings) -> list[str]:
    return [origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()]


def check_origins(text: str) -> None:
    """Raises ValueError for an origin that no browser would ever send (RFC 6454, 6.2)."""
    for origin in (part.strip() for part in text.split(",")):
        parts = ORIGIN.fullmatch(origin)
        if origin in ("", "*") or (parts and (parts["port"] or "no") != DEFAULT_PORTS.get(parts["scheme"])):
            continue
        raise ValueError(
            f"TOMBOLA_CORS_ORIGINS {origin[:80]!r}: expected * or scheme://host or scheme://host:port, in lower case, "
            "without a path and without the scheme's own port, as browsers send it"
        )


def check_proxies(text: str) -> None:
    """Raises ValueError for what is no address: it would never be believed, and its clients would all be one."""
    for proxy in (part.strip() for part in text.split(",")):
        try:
            if proxy not in ("", "*"):
                ipaddress.ip_network(proxy)
        except ValueError:
            raise ValueError(
                f"TOMBOLA_TRUSTED_PROXIES {proxy[:80]!r}: expected *, addresses or networks such as 10.0.0.0/8"
            ) from None


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def admin_token(settings: Settings) -> str:
    """The admin plane's token: the variable's, the file's, or (on loopback alone) one made and kept in STATE_DIR."""
    if settings.admin_token is not None:
        return validate_token(settings.admin_token.get_secret_value(), "TOMBOLA_ADMIN_TOKEN")
    if settings.admin_token_file is not None:
        return validate_token(
            read_secret(settings.admin_token_file), f"TOMBOLA_ADMIN_TOKEN_FILE {settings.admin_token_file}"
        )
    if not is_loopback(settings.admin_host):
        raise SettingsRejected(
            f"TOMBOLA_ADMIN_HOST {settings.admin_host}: reachable from other machines, and no admin token is set. "
            "Set TOMBOLA_ADMIN_TOKEN_FILE (or TOMBOLA_ADMIN_TOKEN), or listen on 127.0.0.1"
        )
    return load_or_create_token(ensure_state_dir(settings) / "admin-token")


def validate_token(token: str, where: str) -> str:
    if len(token) < TOKEN_CHARACTERS or not token.isascii() or not token.isprintable() or " " in token:
        raise SettingsRejected(
            f"{where}: expected at least {TOKEN_CHARACTERS} printable ASCII characters without spaces"
        )
    return token


def read_secret(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsRejected(f"{path}: cannot be read as a token ({type(error).__name__})") from None


def load_or_create_token(path: Path) -> str:
    """The token in `path`; made there, readable by this user alone, when there is none yet."""
    token = secrets.token_urlsafe(32)
    try:
        if not path.exists():
            write_new(path, f"{token}\n".encode(), 0o600)
            return token
    except FileExistsError:  # another process was faster: its token is this one's too
        pass
    token = read_secret(path)
    if len(token) < TOKEN_CHARACTERS:
        raise SettingsRejected(
            f"{path}: {len(token)} characters, left by a start that could not finish; expected an admin token of at "
            f"least {TOKEN_CHARACTERS}. Delete the file: the next start makes a new one"
        )
    return validate_token(token, str(path))


def require_folders(settings: Settings) -> None:
    """What audits read has to be there from the start, not when the first audit asks. Raises SettingsRejected."""
    for name, path in (
        ("AUDITS_DATA", settings.audits_data),
        ("AUDIT_SURROGATE_LIBRARY", settings.audit_surrogate_library),
    ):
        if path is not None and not path.is_dir():
            raise SettingsRejected(f"TOMBOLA_{name} {path}: no such folder")


def ensure_state_dir(settings: Settings) -> Path:
    """STATE_DIR, made if need be and shown to be writable."""
    try:
        settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
    except OSError as error:
        raise SettingsRejected(f"TOMBOLA_STATE_DIR {settings.state_dir}: cannot be made ({error.strerror})") from None
    if not os.access(settings.state_dir, os.W_OK | os.X_OK):
        raise SettingsRejected(f"TOMBOLA_STATE_DIR {settings.state_dir}: this user cannot write to it")
    return settings.state_dir
