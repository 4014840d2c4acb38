"""`python -m service.engine.fork_server SOCKET ARGUMENTS`: opens and compiles a library, and forks worker processes.

Started by `service/engine/launcher.py`; `service/engine/process_pool.py` says why. It ends, and every worker with it,
when SOCKET is closed.
It is not multiprocessing's fork server: that one unpickles what it is sent.
"""

import contextlib
import gc
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.cpu import NICE_LOADING, lower_priority, trim_heap

if TYPE_CHECKING:
    from service.engine.base import Engine


def main(descriptor: int, arguments: dict[str, Any]) -> int:
    control = Connection(os.dup(descriptor))
    steps = NICE_LOADING if arguments["background"] else 0
    with ThreadPoolExecutor(1, "open", initializer=lower_priority, initargs=(steps,)) as pool:
        engine, description = pool.submit(open_engine_from, arguments, control).result()
    gc.collect()
    trim_heap()  # the tickets' networks in torch, and all that was needed to compile them
    send(control, description)
    if engine is None:
        return 1
    from service.engine import worker_process

    worker_process.serve(descriptor, control, engine)
    return 0


def send(control: Connection, message: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):  # the service has ended meanwhile
        control.send_bytes(json.dumps(message).encode())


def open_engine_from(arguments: dict[str, Any], control: Connection) -> "tuple[Engine | None, dict[str, Any]]":
    """The engine and its description, or None and why there is none.

    The imports alone take seconds, so they are here, at this thread's priority.
    """
    from model_store.errors import StoreError
    from model_store.library import open_library
    from service.engine.errors import EngineRejected
    from service.engine.factory import open_engine
    from service.engine.ipc import describe_engine
    from service.observability.logs import configure_logging
    from service.settings import Settings

    settings = Settings(**arguments["settings"])
    configure_logging(settings.log_level)
    try:
        library = open_library(None if arguments["library"] is None else Path(arguments["library"]))
        engine = open_engine(library, settings, on_step=lambda step: send(control, {"step": step}))
    except (StoreError, EngineRejected) as error:
        return None, {"refused": str(error)}
    return engine, describe_engine(engine, library.digest)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), json.loads(sys.argv[2])))
