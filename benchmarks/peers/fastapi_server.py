"""FastAPI as one writes it: a `def` endpoint in a process for each core. Arguments: PORT CORES.

A process for each core rather than threads: between forward passes threads would wait for the interpreter's lock.
"""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import anyio.to_thread
import uvicorn
from fastapi import Body, FastAPI

from benchmarks.peers.defence import Defence, decode


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.defence = Defence()
    anyio.to_thread.current_default_thread_limiter().total_tokens = 1  # more threads than cores only cost
    yield


app = FastAPI(lifespan=lifespan)


@app.get("/health")
def health() -> bool:
    return True


@app.post("/classify")
def classify(image: Annotated[bytes, Body(media_type="application/octet-stream")]) -> dict[str, Any]:
    defence: Defence = app.state.defence
    return defence.answer([decode(image)])[0]


if __name__ == "__main__":
    uvicorn.run(
        "benchmarks.peers.fastapi_server:app",
        host="127.0.0.1",
        port=int(sys.argv[1]),
        workers=int(sys.argv[2]),
        log_level="warning",
        access_log=False,
        backlog=2048,
    )
