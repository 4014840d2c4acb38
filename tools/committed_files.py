"""`python -m tools.committed_files FILE...`: refuses private keys and large files before they are committed."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

MAX_BYTES: Final = 2_000_000
LARGE: Final = ("model_store/library/", "model_store/library-scratch/", "libraries/")  # tickets, meant to be here
KEY: Final = b"-----BEGIN " + b"%s" + b"PRIVATE KEY-----"
KINDS: Final = (b"", b"RSA ", b"EC ", b"DSA ", b"OPENSSH ", b"ENCRYPTED ")


def faults(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        data = path.read_bytes()
        if len(data) > MAX_BYTES and not path.as_posix().startswith(LARGE):
            yield f"{path}: {len(data):,} bytes; expected at most {MAX_BYTES:,}"
        if any(KEY % kind in data for kind in KINDS):
            yield f"{path}: a private key"


def main(paths: Sequence[str]) -> int:
    lines = list(faults([Path(path) for path in paths]))
    print(*lines, sep="\n", end="\n" if lines else "", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
