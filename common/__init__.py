"""What the scripts share, in rooms: data, text, model, measure, train, use. `open_run` is the door to a model."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "open_run":  # on demand: `import common.options` alone has to stay quick
        from common.use.runs import open_run

        return open_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
