"""`python tests/support/sabotaged.py serve ...`: the real service, whose engine dies when it sees a white image."""

import sys
from typing import Any

from model_store.library import Library
from service import library_manager
from service.engine.base import Engine, Images, Logits
from service.engine.factory import open_for_serving
from service.settings import Settings
from tombola.cli import main


def mortal(library: Library, settings: Settings, *others: Any) -> Engine:
    made = open_for_serving(library, settings, *others)

    def forward(member: int, images: Images) -> Logits:
        if (images.min(axis=(1, 2, 3)) == 255).any():
            raise SystemExit
        return made.forward(member, images)

    fields: dict[str, Any] = {name: getattr(made, name) for name in made.__dataclass_fields__}
    return Engine(**fields | {"forward": forward})


if __name__ == "__main__":
    library_manager.open_for_serving = mortal  # type: ignore[attr-defined, assignment]
    sys.exit(main())
