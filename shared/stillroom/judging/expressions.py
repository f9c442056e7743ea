"""Equality of two sympy values: exact where they are numbers, else at sampled points."""

import functools
from typing import Any

MAX_EXPONENT = 20_000
"""Larger powers and factorials are compared as they are written: sympy would compute all their digits."""
# Positive, so that roots and logarithms are real, and no whole numbers, at which different expressions often agree.
SAMPLES = ((0.37, 1.91, 2.83, 0.71, 1.33), (1.73, 0.59, 3.11, 2.29, 0.43), (2.61, 3.47, 0.83, 1.19, 4.07))
# x and |x| differ only here; where a root or logarithm turns complex, the point is skipped.
NEGATIVE_SAMPLE = (-1.57, -2.39, -0.67, -3.23, -1.13)
RELATIVE_TOLERANCE = 1e-9


@functools.lru_cache(maxsize=4096)
def same_expression(ours: Any, theirs: Any) -> bool:
    """Equality of two sympy values: exact where they are numbers, else at sampled points and by simplification."""
    from sympy import Basic
    from sympy.matrices import MatrixBase

    if ours == theirs:
        return True
    if isinstance(ours, MatrixBase) or isinstance(theirs, MatrixBase):
        is_same_shape = isinstance(ours, MatrixBase) and isinstance(theirs, MatrixBase) and ours.shape == theirs.shape
        return is_same_shape and all(same_expression(a, b) for a, b in zip(ours, theirs, strict=True))
    if not isinstance(ours, Basic) or not isinstance(theirs, Basic) or _is_too_large(ours) or _is_too_large(theirs):
        return False
    # sympy keeps rationals in lowest terms: equal ones were equal above.
    if ours.is_Rational and theirs.is_Rational:
        return False
    symbols = sorted(ours.free_symbols | theirs.free_symbols, key=str)
    if not symbols:
        return _same_number(ours, theirs)
    if len(symbols) > len(NEGATIVE_SAMPLE):
        return _simplifies_to_zero(ours, theirs)
    return _same_at_samples(ours, theirs, symbols)


def _same_number(ours: Any, theirs: Any) -> bool:
    try:
        # 30 digits are computed and 20 compared: cancellation may spoil the last ones.
        a, b = ours.evalf(30), theirs.evalf(30)
        if a.is_infinite or b.is_infinite:
            return bool(a == b)
        scale = max(abs(a), abs(b))
        return bool(abs(a - b) <= 1e-20 * scale)
    except (TypeError, ValueError, AttributeError, OverflowError):
        return _simplifies_to_zero(ours, theirs)


def _same_at_samples(ours: Any, theirs: Any, symbols: list[Any]) -> bool:
    num_compared = 0
    for sample in (*SAMPLES, NEGATIVE_SAMPLE):
        point = dict(zip(symbols, sample, strict=False))
        try:
            a, b = complex(ours.evalf(20, subs=point)), complex(theirs.evalf(20, subs=point))
        except (TypeError, ValueError, OverflowError, AttributeError):
            continue
        is_complex = max(abs(a.imag), abs(b.imag)) > RELATIVE_TOLERANCE
        if a != a or b != b or (sample is NEGATIVE_SAMPLE and is_complex):
            continue
        if abs(a - b) > RELATIVE_TOLERANCE * max(abs(a), abs(b), 1e-300):
            return False
        num_compared += 1
    # A single point may agree by chance.
    return num_compared >= 2 or _simplifies_to_zero(ours, theirs)


def _simplifies_to_zero(ours: Any, theirs: Any) -> bool:
    from math_verify import verify

    try:
        return bool(verify(ours, theirs, float_rounding=12, timeout_seconds=5))
    except Exception:  # noqa: BLE001 - what sympy cannot compare is not equal
        return False


# 9^9^9 has more digits than memory.
def _is_too_large(value: Any) -> bool:
    from sympy import Pow, factorial, preorder_traversal

    for node in preorder_traversal(value):
        argument = node.exp if isinstance(node, Pow) else node.args[0] if isinstance(node, factorial) else None
        if argument is not None and argument.is_number and (argument.has(Pow) or not abs(argument) <= MAX_EXPONENT):
            size = argument.evalf(5) if not argument.has(factorial) else None
            if size is None or not abs(size) <= MAX_EXPONENT:
                return True
    return False


def as_float(value: Any) -> float | None:
    try:
        number = complex(value.evalf(20))
    except (TypeError, ValueError, OverflowError, AttributeError):
        return None
    return number.real if abs(number.imag) < 1e-12 * max(1.0, abs(number.real)) else None
