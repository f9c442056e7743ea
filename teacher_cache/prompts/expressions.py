"""Arithmetic of prompt templates: expressions over named values, exact and without access to anything else.

In: text such as `price * (100 - percent) / 100` and values by name. Out: an int, a Fraction, a float (irrational square
roots and powers alone), a bool or a text. simpleeval evaluates; what it may see is decided here, on the syntax tree.
"""

import ast
import math
import operator
from collections.abc import Collection, Mapping
from fractions import Fraction
from typing import Any

from stillroom.config import nearest_name

Value = int | float | Fraction | bool | str

MAX_CHARS = 1000
MAX_BITS = 4096
"""Size of powers and factorials, so that a slip does not occupy the machine."""
MAX_FACTORIAL = 400
SYNTAX = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp),
    *(ast.Call, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.USub, ast.UAdd, ast.Not),
    *(ast.And, ast.Or, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE),
)


def check_expression(text: str, names: Collection[str]) -> set[str]:
    """The names that it uses. Raises ValueError for anything but arithmetic on `names` and the functions here."""
    try:
        tree = ast.parse(text.strip(), mode="eval") if len(text) <= MAX_CHARS else None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text!r} is not an expression: {getattr(error, 'msg', error)}") from error
    if tree is None:
        raise ValueError(f"an expression of {len(text)} characters is too long: at most {MAX_CHARS}")
    # A name that is called must be a function, and the same name elsewhere a value.
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    used = set()
    for node in ast.walk(tree):
        if not isinstance(node, SYNTAX) or (isinstance(node, ast.Call) and node.keywords):
            raise ValueError(f"{text!r} uses {type(node).__name__}: only arithmetic, comparisons and {_functions()}")
        if isinstance(node, ast.Constant) and not isinstance(node.value, int | float | str):
            raise ValueError(f"{text!r} uses {node.value!r}: only numbers and text")
        if isinstance(node, ast.Call) and not isinstance(node.func, ast.Name):
            raise ValueError(f"{text!r} calls something without a name: only {_functions()}")
        if isinstance(node, ast.Name):
            known = FUNCTIONS if id(node) in called else names
            if node.id not in known:
                raise ValueError(f"{text!r} uses the unknown name {node.id!r}{nearest_name(node.id, [*known])}")
            used |= set() if id(node) in called else {node.id}
    return used


def evaluate(text: str, values: Mapping[str, Value]) -> Value:
    """The value of a checked expression. Raises ValueError where it has none; ImportError without simpleeval."""
    from simpleeval import InvalidExpression, SimpleEval

    evaluator = SimpleEval(operators=OPERATORS, functions=FUNCTIONS, names=dict(values), allowed_attrs={})
    # Decimal constants as fractions, so that 0.1 * 3 is 0.3.
    evaluator.nodes[ast.Constant] = lambda node: exact(node.value)
    try:
        value = evaluator.eval(text)
    except (InvalidExpression, ArithmeticError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    if isinstance(value, complex):
        raise ValueError("it is not a real number")
    return whole(value)


def exact(value: Any) -> Value:
    """A decimal number as the fraction that it is written as."""
    if not isinstance(value, float):
        return value  # type: ignore[no-any-return]
    return whole(Fraction(repr(value)))


def whole(value: Value) -> Value:
    """A fraction without denominator as an int, on which % and gcd work."""
    return value.numerator if isinstance(value, Fraction) and value.denominator == 1 else value


def written(value: Value) -> str:
    """As in a question or an answer: 7, 2.5, 1/3; other real numbers with 12 digits."""
    if isinstance(value, float):
        return f"{value:.12g}"
    if not isinstance(value, Fraction) or not _is_decimal(value.denominator):
        return str(value)
    num_digits = next(n for n in range(value.denominator) if 10**n % value.denominator == 0)
    digits = str(abs(value.numerator) * 10**num_digits // value.denominator).rjust(num_digits + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-num_digits]}.{digits[-num_digits:]}"


def _is_decimal(denominator: int) -> bool:
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1


def _divided(a: Any, b: Any) -> Any:
    is_exact = all(isinstance(one, int | Fraction) for one in (a, b))
    return whole(Fraction(a) / Fraction(b)) if is_exact else a / b


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int | Fraction) and isinstance(exponent, int):
        size = max(Fraction(base).numerator.bit_length(), Fraction(base).denominator.bit_length())
        if size * abs(exponent) > MAX_BITS:
            raise ValueError(f"{base} ** {exponent} is too large")
        return whole(Fraction(base) ** exponent)
    return float(base) ** float(exponent)


def _times(a: Any, b: Any) -> Any:
    if isinstance(a, str) or isinstance(b, str):
        raise ValueError("text cannot be multiplied")
    return a * b


def _sqrt(value: Any) -> Any:
    # Exact where numerator and denominator are squares; fractions are in lowest terms.
    root = Fraction(math.isqrt(Fraction(value).numerator), math.isqrt(Fraction(value).denominator))
    return whole(root) if root * root == value else math.sqrt(value)


def _factorial(value: Any) -> int:
    if value > MAX_FACTORIAL:
        raise ValueError(f"the factorial of {value} is too large")
    return math.factorial(value)


def _comb(n: Any, k: Any) -> int:
    return _factorial(n) // (_factorial(k) * _factorial(n - k))


FUNCTIONS: dict[str, Any] = {
    "abs": abs,
    "min": min,
    "max": max,
    "round": round,
    "floor": math.floor,
    "ceil": math.ceil,
    "gcd": math.gcd,
    "lcm": math.lcm,
    "sqrt": _sqrt,
    "factorial": _factorial,
    "comb": _comb,
}
OPERATORS: dict[type[ast.AST], Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: _times,
    ast.Div: _divided,
    ast.Pow: _power,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Not: operator.not_,
}


def _functions() -> str:
    return ", ".join(FUNCTIONS)
