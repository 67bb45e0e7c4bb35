"""Checks of arguments that several modules take."""

import operator
from typing import Any


def check_integer(name: str, value: Any, *, least: int, hint: str = "") -> int:
    """Returns `value`, the argument `name`, as an `int`, or says what is wrong with it.

    Raises:
      TypeError: it is not an integer (booleans are not).
      ValueError: it is less than `least`.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.{hint}")
    if (integer := operator.index(value)) < least:
        raise ValueError(f"`{name}` must be at least {least}, got {integer}.{hint}")
    return integer
