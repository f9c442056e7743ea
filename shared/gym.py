"""reasoning-gym without its noise, and its entries as plain JSON."""

import math
import warnings
from collections.abc import Mapping
from typing import Any


def import_reasoning_gym() -> Any:
    """The package, imported late: it takes seconds. Raises ImportError where it is not installed."""
    with warnings.catch_warnings():
        # cellpylib compares with `is` and a literal: Python says so once, when it first compiles the file.
        warnings.simplefilter("ignore", SyntaxWarning)
        import reasoning_gym
    return reasoning_gym


def task_names() -> list[str]:
    """Names of all tasks."""
    import_reasoning_gym()
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS)


def jsonable(value: Any) -> Any:
    """The value as plain JSON: text keys, lists, finite numbers; whatever else JSON lacks as text."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((jsonable(item) for item in value), key=repr)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (str, bool, int)) else str(value)
