r"""Types an answer or reference: number, list, tuple, interval, equation, time, words, and so on.

In: text as a model or data set writes it. Out: a `Value`, parsed whole or not at all. Expressions are parsed by
latex2sympy2_extended; what does not parse whole is `Raw`, never one of the numbers in it.
"""

import datetime
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stillroom.judging.latex import WORD, has_words, split_top, tidy, words_of
from stillroom.judging.texts import date_of

MAX_DIGITS = 20_000
RELATION = re.compile(r"\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])|\\approx|\\in(?![a-z])|\\to(?![a-z])|<|>|=")
NAME = re.compile(
    r"\\frac\{d[^{}]*\}\{d[^{}]*\}|\\?[A-Za-z]+(?:_(?:\{\w+\}|\w))?'*(?:\s*\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])*\s*\))?"
)
CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?\s*([ap]\.?\s*m\.?)?", re.IGNORECASE)
NUMERAL = re.compile(r"([0-9A-Fa-f]+)_\{?\s*(\d+|two|eight|ten|sixteen)\s*\}?")
BASES = {"two": 2, "eight": 8, "ten": 10, "sixteen": 16}
MIXED = re.compile(r"(-?)\s*(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}|(-?)\s*(\d+)\s+(\d+)\s*/\s*(\d+)")
DECIMAL = re.compile(r"-?\d+\.\d+")
MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|array)\}(?:\{[^}]*\})?(.*)\\end\{\1\}", re.DOTALL)
DEGREES = r"^\circ"
ALL_REALS = {"all real numbers", "all reals", "real numbers", "all real", "r"}
NOTHING = {"no solution", "no solutions", "no real solution", "no real solutions", "empty set", "the empty set"}
APPROXIMATELY = re.compile(
    r"^(?:⟦(?:approximately|approx|about|exactly|only|around)⟧\s*\.?|\\approx)\s*", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Expression:
    """A parsed expression with its unit; `digits` after the point where it was written as one decimal number."""

    value: Any
    unit: str = ""
    is_percent: bool = False
    decimal: str | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Several values. `kind` is list, set, tuple, interval (its brackets in `brackets`), union or matrix (rows)."""

    kind: str
    items: tuple["Value", ...]
    brackets: str = ""


@dataclass(frozen=True, slots=True)
class Relation:
    """`sides[0] operators[0] sides[1] ...`; `name` is the left side where it is a name like x, x_1 or f(x)."""

    sides: tuple["Value", ...]
    operators: tuple[str, ...]
    name: str | None


@dataclass(frozen=True, slots=True)
class Clock:
    minutes: tuple[int, ...]
    half: str


@dataclass(frozen=True, slots=True)
class Ratio:
    terms: tuple["Value", ...]


@dataclass(frozen=True, slots=True)
class Numeral:
    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Words:
    text: str


@dataclass(frozen=True, slots=True)
class Raw:
    """What does not parse whole."""

    text: str


Value = Expression | Group | Relation | Clock | Ratio | Numeral | Words | Raw | datetime.date


def parse_value(text: str) -> Value | None:
    """The typed value of an answer or reference; None where nothing is left of it."""
    tidied = tidy(text)
    return _typed(tidied) if tidied else None


def _typed(text: str) -> Value:
    """Types tidied text; sequences of rules from the most to the least special."""
    text = re.sub(r"\s*\(\s*⟦[^()]*\)$", "", APPROXIMATELY.sub("", text)).strip()
    for rule in (_as_special, _as_matrix, _as_several, _as_bracketed, _as_relation, _as_quantity):
        value = rule(text)
        if value is not None:
            return value
    if has_words(text):
        return _as_words(text)
    value = _as_expression(text)
    return Raw(squeezed(text)) if value is None else value


def _as_words(text: str) -> Value:
    words = words_of(text)
    lowered = words.lower()
    if lowered in ALL_REALS:
        return _as_expression(r"\mathbb{R}") or Raw(lowered)
    return Words("no solution" if lowered in NOTHING else "does not exist" if lowered == "dne" else words)


def _as_special(text: str) -> Value | None:
    date = date_of(words_of(text))
    if date:
        return date
    clock = CLOCK.fullmatch(words_of(text))
    if clock and int(clock[1]) < 25 and int(clock[2]) < 60:
        half = re.sub(r"[.\s]", "", clock[4] or "").lower()
        return Clock(tuple(int(part) for part in (clock[1], clock[2], clock[3] or "0")), half)
    numeral = NUMERAL.fullmatch(re.sub(r"[⟦⟧]|\\text", "", text).replace(" ", ""))
    if numeral:
        base = BASES.get(numeral[2]) or int(numeral[2])
        if 2 <= base <= 36 and all(int(digit, 36) < base for digit in numeral[1]):
            return Numeral(numeral[1].lower().lstrip("0") or "0", base)
    if text in (r"\emptyset", r"\{ \}", r"\{\}"):
        return Words("no solution")
    if ":" in text and not has_words(text) and r"\{" not in text:
        parts = split_top(text, ":")
        terms = [_as_expression(part) for part in parts]
        if len(parts) > 1 and all(terms):
            return Ratio(tuple(term for term in terms if term is not None))
    return None


def _as_matrix(text: str) -> Value | None:
    match = MATRIX.fullmatch(text)
    # A vmatrix is a determinant, which is a number.
    if not match or match[1] == "vmatrix":
        return None
    rows = [row for row in re.split(r"\\\\", match[2]) if row.strip()]
    return Group("matrix", tuple(Group("row", tuple(_typed(cell.strip()) for cell in row.split("&"))) for row in rows))


def _as_several(text: str) -> Value | None:
    """Lists at top level, unions, and values with plus or minus."""
    # 1,234,567 with or without a unit is one number.
    if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?\s*(?:%|⟦.*⟧.*)?", text):
        return None
    parts = [part for part in split_top(text, r"\s*[,;]\s*(?!\d{3}(?!\d)(?<=\d,\d{3}))|\\land") if part]
    if len(parts) > 1:
        wordy = [part for part in parts if has_words(part)]
        are_only_words = [part for part in parts if not WORD.sub("", part).strip()]
        # A sentence with commas is not a list.
        if any(len(WORD.findall(part)) > 3 for part in wordy) or (are_only_words and len(are_only_words) < len(parts)):
            return None
        return _list([_typed(part) for part in parts])
    united = split_top(text, r"\\cup(?![a-z])|\\lor(?![a-z])")
    if len(united) > 1:
        return Group("union", tuple(_typed(part) for part in united))
    if re.search(r"\\pm(?![a-z])|\\mp(?![a-z])", text):
        pair = [re.sub(r"\\pm(?![a-z])", sign, re.sub(r"\\mp(?![a-z])", other, text)) for sign, other in ("+-", "-+")]
        return _list([_typed(part.lstrip("+ ")) for part in pair])
    return None


def _list(items: list[Value]) -> Value:
    """A list; `x = 1, x = 2` and `x = 1, 2` are its values, `x = 1, y = 2` keeps its names."""
    names = {item.name for item in items if isinstance(item, Relation) and item.operators == ("=",)}
    others = [item for item in items if not isinstance(item, Relation)]
    if len(names) == 1 and None not in names and (len(items) - len(others) > 1 or others):
        items = [item.sides[-1] if isinstance(item, Relation) else item for item in items]
    flat: list[Value] = []
    for item in items:
        flat += item.items if isinstance(item, Group) and item.kind == "list" else [item]
    return Group("list", tuple(flat))


def _as_bracketed(text: str) -> Value | None:
    r"""(a, b), [a, b), \{a, b\}; brackets around a single value leave."""
    if text.startswith(r"\{") and text.endswith(r"\}") and len(split_top(text[2:-2], "$^")) == 1:
        inner = text[2:-2].strip()
        if re.search(r"\||:", inner):
            condition = re.match(r"[a-z]\s*(?:\\in\s*\\mathbb\{R\})?\s*[|:](.+)", inner)
            return _typed(condition[1].strip()) if condition else None
        return Group("set", _items(inner)) if _closes_last(text) else None
    if not (text[:1] in ("(", "[") and text[-1:] in (")", "]")) or not _closes_last(text):
        return None
    items = _items(text[1:-1])
    brackets = text[0] + text[-1]
    # (3) is 3.
    if len(items) == 1:
        return items[0] if brackets in ("()", "[]") else None
    if brackets == "()":
        return Group("tuple", items, brackets)
    return Group("interval" if len(items) == 2 else "tuple", items, brackets)


def _items(text: str) -> tuple[Value, ...]:
    parts = [_typed(part) for part in split_top(text, r"[,;]") if part]
    flat: list[Value] = []
    for part in parts:
        flat += part.items if isinstance(part, Group) and part.kind == "list" else [part]
    return tuple(flat)


def _closes_last(text: str) -> bool:
    """Whether the bracket that opens the text is closed by its last one; half-open intervals mix brackets."""
    depth = 0
    place = 0
    while place < len(text):
        if text.startswith((r"\{", r"\}"), place):
            depth += 1 if text[place + 1] == "{" else -1
            place += 2
        else:
            depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(text[place], 0)
            place += 1
        if depth == 0 and place < len(text):
            return False
    return depth == 0


def _as_relation(text: str) -> Value | None:
    parts = split_top(text, RELATION.pattern)
    operators = [match.strip() for match in _operators(text)]
    if len(parts) < 2 or len(parts) != len(operators) + 1 or not parts[-1]:
        return None
    # "x in [0, 1]": the set is the answer.
    if operators == ["\\in"]:
        return _typed(parts[1])
    if not parts[0]:
        return None if operators[0] not in ("=", "\\approx", "\\to") else _typed(parts[-1])
    if "\\to" in operators:
        # "2x = 6 \to x = 3": what follows counts.
        place = max(index for index, operator in enumerate(operators) if operator == "\\to")
        return _typed(_joined(parts[place + 1 :], operators[place + 1 :]))
    operators = ["=" if operator == "\\approx" else operator for operator in operators]
    name = squeezed(parts[0]) if NAME.fullmatch(parts[0]) else None
    is_point = re.fullmatch(r"\(\s*[a-z](?:\s*,\s*[a-z])+\s*\)", parts[0])
    if (has_words(parts[0]) or is_point) and set(operators) == {"="}:
        # "Area = 12", "(x, y) = (1, 2)": what they name is the last side.
        return _typed(parts[-1])
    sides = tuple(_typed(part) for part in parts)
    return Relation(sides, tuple(operators), name)


def _operators(text: str) -> list[str]:
    found, rest = [], split_top(text, RELATION.pattern)
    place = 0
    for part in rest[:-1]:
        place = text.index(part, place) + len(part)
        match = RELATION.search(text, place)
        assert match is not None
        found.append(match[0])
        place = match.end()
    return found


def _joined(parts: Sequence[str], operators: Sequence[str]) -> str:
    return parts[0] + "".join(f" {operator} {part}" for operator, part in zip(operators, parts[1:], strict=True))


def _as_quantity(text: str) -> Value | None:
    """A number or expression with a unit or percent sign behind it."""
    if text.endswith("%"):
        value = _as_expression(text[:-1].strip())
        return None if value is None else Expression(value.value, "", True, value.decimal)
    text = re.sub(r"\s*⟦(?:percent|per cent|percentage)⟧$", "%", text)
    if text.endswith("%"):
        return _as_quantity(text)
    body, unit = text, ""
    is_trigonometric = re.search(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])", text)
    if DEGREES in text and not is_trigonometric:
        body, unit = text.replace(DEGREES, " ").strip(), "degree"
        body = re.sub(r"\s*⟦?[CF]⟧?$", "", body)
    match = re.match(r"(.*?)\s*(⟦.*)$", body, re.DOTALL)
    if match and match[1] and re.search(r"\d|\\pi|\\sqrt", match[1]):
        tail = match[2]
        # "5 where x > 2": words with a relation are a condition, not a unit.
        if re.search(r"[=<>]", tail):
            return None
        value = _as_mixed(match[1]) or _as_expression(match[1].rstrip("-/ "))
        if value is not None:
            return Expression(
                value.value, re.sub(r"[^\w/^ ]", "", words_of(tail)).strip().lower(), False, value.decimal
            )
        return None
    # "5 m" is five metres; "5m" is five times m.
    letter = re.fullmatch(r"(-?\d+(?:\.\d+)?)\s+([mghsLl])(?:\s*\^\s*\{?[23]\}?)?", body)
    if letter:
        body, unit = letter[1], letter[2]
    value = _as_mixed(body)
    if value is None and unit:
        value = _as_expression(body)
    return None if value is None else Expression(value.value, unit, False, value.decimal)


def _as_mixed(text: str) -> Expression | None:
    r"""2\frac{1}{3} and 2 1/3."""
    match = MIXED.fullmatch(text.strip())
    if not match:
        return None
    from sympy import Rational

    sign, whole, top, bottom = match.groups()[:4] if match[2] else match.groups()[4:]
    if int(bottom) == 0:
        return None
    value = int(whole) + Rational(int(top), int(bottom))
    return Expression(-value if sign else value)


@functools.lru_cache(maxsize=256)
def _as_expression(text: str) -> Expression | None:
    """Parsed by latex2sympy, exact; None where the text does not parse whole or is not an expression."""
    from latex2sympy2_extended import latex2sympy
    from sympy import Basic, Float, I, Integral, Rational, Sum, Symbol
    from sympy.core.relational import Relational
    from sympy.logic.boolalg import Boolean
    from sympy.matrices import MatrixBase

    text = text.strip()
    if not text or has_words(text) or r"\ldots" in text:
        return None
    mixed = _as_mixed(text)
    if mixed is not None:
        return mixed
    # latex2sympy adds numbers with a space between them: "5 3" is nothing that anyone writes.
    if re.search(r"(?<![_\d])\d+\s+\d", text) or text.endswith(("+", "-", "*", "/", "^", "_", "=")):
        return None
    dense = squeezed(text)
    plain = dense.replace(",", "") if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", dense) else dense
    if re.fullmatch(r"[-+]?\d+(?:\.\d+)?", plain):
        if len(plain) > MAX_DIGITS:
            return None
        return Expression(Rational(plain), decimal=plain if "." in plain else None)
    text = re.sub(rf"(\d+(?:\.\d+)?)\s*{re.escape(DEGREES)}", r"(\1\\cdot\\pi/180)", text)
    text = re.sub(r"([A-Za-z])\s+(?=\^)", r"\1", text).replace("'", "")
    try:
        value = latex2sympy(text, is_real=True, convert_degrees=False, normalization_config=None)
    except Exception:  # noqa: BLE001 - the parser raises plain exceptions, sympy whatever it meets
        return None
    if not isinstance(value, Basic | MatrixBase) or (
        isinstance(value, Relational | Boolean) and not isinstance(value, Symbol)
    ):
        return None
    # 0.1 as written is 1/10, and not the binary fraction next to it.
    exact = {number: Rational(str(number)) for number in value.atoms(Float)} if isinstance(value, Basic) else {}
    value = value.xreplace(exact) if exact else value
    # i is the imaginary unit, but in sums and integrals it is an index.
    if not value.has(Sum, Integral):
        value = value.xreplace({Symbol("i", real=True): I})
    return Expression(value, decimal=dense if DECIMAL.fullmatch(dense) else None)


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", WORD.sub(r"\1", text))
