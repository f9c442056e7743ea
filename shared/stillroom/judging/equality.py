r"""Compares two typed answers as wholes, by the rules of their types.

    number, expression   equal in value at exact or sampled points; decimals to the digits that the reference has
    list, set, tuple, interval, union, matrix   element by element, ends and brackets included
    equation, inequality   the same solutions: multiples of each other, or the same interval
    ratio, time, date, base-n numeral, words   as what they are

Two different texts that do not parse whole are undecided.
"""

import datetime
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from stillroom.judging.expressions import as_float, same_expression
from stillroom.judging.texts import same_text
from stillroom.judging.values import Clock, Expression, Group, Numeral, Ratio, Raw, Relation, Value, Words, squeezed

MIN_SIGNIFICANT_DIGITS = 4
"""A decimal reference of at least this many digits counts as rounded: answers that round to it are right."""

UNITS = {
    "mm": ("length", Fraction(1, 1000)), "cm": ("length", Fraction(1, 100)), "m": ("length", Fraction(1)),
    "km": ("length", Fraction(1000)), "inch": ("imperial", Fraction(1)), "in": ("imperial", Fraction(1)),
    "ft": ("imperial", Fraction(12)), "feet": ("imperial", Fraction(12)), "foot": ("imperial", Fraction(12)),
    "yard": ("imperial", Fraction(36)), "mile": ("imperial", Fraction(63360)), "mg": ("mass", Fraction(1, 1000)),
    "g": ("mass", Fraction(1)), "gram": ("mass", Fraction(1)), "kg": ("mass", Fraction(1000)),
    "kilogram": ("mass", Fraction(1000)), "second": ("time", Fraction(1)), "s": ("time", Fraction(1)),
    "sec": ("time", Fraction(1)), "minute": ("time", Fraction(60)), "min": ("time", Fraction(60)),
    "hour": ("time", Fraction(3600)), "hr": ("time", Fraction(3600)), "h": ("time", Fraction(3600)),
    "day": ("time", Fraction(86400)), "centimeter": ("length", Fraction(1, 100)), "meter": ("length", Fraction(1)),
    "millimeter": ("length", Fraction(1, 1000)), "kilometer": ("length", Fraction(1000)),
    "metre": ("length", Fraction(1)), "cent": ("money", Fraction(1, 100)), "dollar": ("money", Fraction(1)),
}  # fmt: skip


def equal(reference: Value, given: Value) -> tuple[bool | None, str]:
    """Whether the given value is what the reference says, None where nobody can tell; and the rule that decided."""
    for rule, compare in _RULES:
        said = compare(reference, given)
        if said is not None:
            return (None if said == "undecided" else bool(said)), rule
    return False, "other kind of answer"


# Rules: True or False where they decide, None where they do not apply, "undecided" where nobody can tell.


def _same_raw(reference: Value, given: Value) -> bool | str | None:
    if isinstance(reference, Raw) and isinstance(given, Raw):
        return squeezed(reference.text) == squeezed(given.text) or "undecided"
    # Against a reference that does not parse whole nothing can be said to be wrong.
    return "undecided" if isinstance(reference, Raw) else None


def _same_words(reference: Value, given: Value) -> bool | None:
    if isinstance(reference, Words):
        return isinstance(given, Words) and same_text(reference.text, given.text)
    return None


def _same_special(reference: Value, given: Value) -> bool | None:
    match reference, given:
        case datetime.date(), _:
            return reference == given
        case Clock(), Clock():
            return _same_clock(reference, given)
        case Ratio(), Clock():
            return _same_ratio(reference, Ratio(tuple(_whole(part) for part in given.minutes[:2])))
        case Ratio(), Ratio():
            return _same_ratio(reference, given)
        case Ratio(terms=(top, bottom)), Expression() if isinstance(top, Expression) and isinstance(bottom, Expression):
            return bottom.value != 0 and same_expression(top.value / bottom.value, given.value)
        case Expression(), Ratio(terms=(top, bottom)) if isinstance(top, Expression) and isinstance(bottom, Expression):
            return bottom.value != 0 and same_expression(reference.value, top.value / bottom.value)
        case Numeral(), Numeral():
            return (
                int(reference.digits, reference.base) == int(given.digits, given.base) and reference.base == given.base
            )
        case Numeral(), Expression():
            return str(given.value) == reference.digits
        case Expression(), Numeral():
            return str(reference.value) == given.digits
        case ((Clock() | Ratio() | Numeral()), _):
            return False
    return None


def _same_clock(ours: Clock, theirs: Clock) -> bool:
    """2:30 PM is 14:30, and 2:30 where one side names no half of the day."""
    if ours.minutes == theirs.minutes:
        return not ours.half or not theirs.half or ours.half == theirs.half
    return _of_day(ours) == _of_day(theirs)


def _of_day(clock: Clock) -> tuple[int, ...]:
    hours = clock.minutes[0] % 12 + 12 * (clock.half == "pm") if clock.half else clock.minutes[0]
    return (hours, *clock.minutes[1:])


def _whole(number: int) -> Expression:
    from sympy import Integer

    return Expression(Integer(number))


def _same_ratio(reference: Ratio, given: Ratio) -> bool:
    ours, theirs = ([term.value for term in one.terms if isinstance(term, Expression)] for one in (reference, given))
    if len(ours) != len(theirs) or not ours:
        return False
    return all(same_expression(a * theirs[0], b * ours[0]) for a, b in zip(ours, theirs, strict=True))


def _same_interval(reference: Value, given: Value) -> bool | str | None:
    """Intervals, unions of them, and inequalities in one variable, as sets of real numbers."""
    if not (_is_set_like(reference) or _is_set_like(given)):
        return None
    ours, theirs = _as_set(reference), _as_set(given)
    if ours is None or theirs is None:
        return None
    from sympy import Interval

    if isinstance(ours, Interval) and isinstance(theirs, Interval):
        ends = ((ours.start, theirs.start), (ours.end, theirs.end))
        is_same = all(same_expression(a, b) for a, b in ends)
        return bool(is_same and (ours.left_open, ours.right_open) == (theirs.left_open, theirs.right_open))
    return bool(ours == theirs or ours.symmetric_difference(theirs).is_empty)


def _is_set_like(value: Value) -> bool:
    if isinstance(value, Group):
        return value.kind in ("interval", "union") or (value.kind == "tuple" and _has_infinity(value))
    return isinstance(value, Relation) and any(
        operator in ("<", ">", r"\le", r"\ge", r"\ne") for operator in value.operators
    )


def _has_infinity(group: Group) -> bool:
    return any(isinstance(item, Expression) and getattr(item.value, "is_infinite", False) for item in group.items)


def _as_set(value: Value) -> Any:
    from sympy import FiniteSet, Interval, Set, Union

    match value:
        case Group(kind="interval" | "tuple", items=(Expression() as start, Expression() as end)):
            try:
                return Interval(start.value, end.value, value.brackets[0] == "(", value.brackets[1] == ")")
            except (TypeError, ValueError):
                return None
        case Group(kind="union"):
            parts = [_as_set(item) for item in value.items]
            return None if any(part is None for part in parts) else Union(*parts)
        case Group(kind="set"):
            items = [item.value for item in value.items if isinstance(item, Expression)]
            return FiniteSet(*items) if len(items) == len(value.items) else None
        case Relation():
            return _solved(value)
        case Expression(value=Set()):
            return value.value
    return None


def _solved(relation: Relation) -> Any:
    """The real solutions of inequalities in one variable; None where sympy does not find them."""
    from sympy import Intersection, S, Symbol, solve_univariate_inequality

    compared = _sympy_relations(relation)
    if compared is None:
        return None
    symbols = set().union(*(one.free_symbols for one in compared))
    if len(symbols) != 1:
        return None
    # One real variable, whatever the answer calls it.
    symbol = Symbol("x", real=True)
    found = []
    for one in compared:
        renamed = one.xreplace({next(iter(symbols)): symbol})
        try:
            if renamed in (S.true, S.false):
                return None
            found.append(solve_univariate_inequality(renamed, symbol, relational=False))
        except Exception:  # noqa: BLE001 - sympy raises many kinds for what it cannot solve
            return None
    return Intersection(*found)


def _sympy_relations(relation: Relation) -> list[Any] | None:
    from sympy import Eq, Ge, Gt, Le, Lt, Ne

    kinds = {"=": Eq, "<": Lt, ">": Gt, r"\le": Le, r"\ge": Ge, r"\ne": Ne}
    found = []
    for left, operator, right in zip(relation.sides, relation.operators, relation.sides[1:], strict=False):
        if operator not in kinds or not isinstance(left, Expression) or not isinstance(right, Expression):
            return None
        try:
            found.append(kinds[operator](left.value, right.value))
        except TypeError:
            return None
    return found


def _same_group(reference: Value, given: Value) -> bool | str | None:
    if isinstance(reference, Expression) and isinstance(given, Group):
        # {5} for 5; a matrix or set that one expression stands for is none of ours.
        # "1/2, or 50%" names one value twice.
        return all(equal(reference, item)[0] for item in given.items)
    if not isinstance(reference, Group):
        return None
    if not isinstance(given, Group):
        if len(reference.items) == 1 and reference.kind in ("set", "list"):
            return equal(reference.items[0], given)[0] or False
        return False
    ours, theirs = _unnamed(reference, given)
    if "matrix" in (reference.kind, given.kind):
        ours, theirs = (
            _column(items) if kind == "tuple" or _is_vector(items) else items
            for items, kind in ((ours, given.kind), (theirs, reference.kind))
        )
        return _same_in_order(ours, theirs)
    if reference.kind == "row":
        return _same_in_order(ours, theirs)
    if {reference.kind, given.kind} <= {"list", "set"}:
        return _same_in_any_order(ours, theirs)
    if reference.kind == "interval" and given.kind != "list":
        return reference.brackets == given.brackets and _same_in_order(ours, theirs)
    if {reference.kind, given.kind} == {"tuple", "set"}:
        return False
    return _same_in_order(ours, theirs)


def _is_vector(items: tuple[Value, ...]) -> bool:
    rows = [item for item in items if isinstance(item, Group) and item.kind == "row"]
    return bool(rows) and len(rows) == len(items) and (len(rows) == 1 or all(len(row.items) == 1 for row in rows))


def _column(items: tuple[Value, ...]) -> tuple[Value, ...]:
    flat: list[Value] = []
    for item in items:
        flat += item.items if isinstance(item, Group) and item.kind == "row" else [item]
    return tuple(flat)


def _unnamed(reference: Group, given: Group) -> tuple[tuple[Value, ...], tuple[Value, ...]]:
    """Items, without the names that one side lacks; named values in the order of their names."""
    sides = []
    for one, other in ((reference, given), (given, reference)):
        items = one.items
        if _all_named(one) and not _all_named(other):
            ordered = sorted((item for item in items if isinstance(item, Relation)), key=lambda item: item.name or "")
            items = tuple(item.sides[-1] for item in ordered)
        sides.append(items)
    return sides[0], sides[1]


def _all_named(group: Group) -> bool:
    return all(isinstance(item, Relation) and item.name and set(item.operators) == {"="} for item in group.items)


def _same_in_order(ours: Sequence[Value], theirs: Sequence[Value]) -> bool | str:
    if len(ours) != len(theirs):
        return False
    said = [equal(a, b)[0] for a, b in zip(ours, theirs, strict=True)]
    return False if False in said else "undecided" if None in said else True


def _same_in_any_order(ours: Sequence[Value], theirs: Sequence[Value]) -> bool | str:
    left = list(theirs)
    is_undecided = False
    for one in ours:
        # Each of theirs is used once: {1, 1, 2} must not match {1, 2, 2}.
        said = [equal(one, other)[0] for other in left]
        if True in said:
            del left[said.index(True)]
        elif None in said:
            is_undecided = True
        else:
            return False
    # A root that is named twice is one root.
    if is_undecided:
        return "undecided"
    return all(any(equal(one, other)[0] for one in ours) for other in left) and len(left) <= len(ours)


def _same_relation(reference: Value, given: Value) -> bool | str | None:
    if isinstance(reference, Expression | Raw) and isinstance(given, Relation):
        # "n = 12" for 12, "5 + 3 = 8" for 8; an equation in variables is not a value.
        is_valued = set(given.operators) == {"="} and (
            given.name or _is_number(given.sides[0]) or _is_operation(given.sides[0]) or len(given.sides) > 2
        )
        return (equal(reference, given.sides[-1])[0] or False) if is_valued else False
    if not isinstance(reference, Relation):
        return None
    if not isinstance(given, Relation):
        if set(reference.operators) == {"="} and (reference.name or _is_number(reference.sides[0])):
            said = equal(reference.sides[-1], given)[0]
            return "undecided" if said is None else said
        return None if isinstance(given, Group) else False
    return _same_relations(reference, given)


def _same_relations(reference: Relation, given: Relation) -> bool | str:
    if reference.name and given.name and set(reference.operators) == set(given.operators) == {"="}:
        is_same_name = squeezed(reference.name) == squeezed(given.name)
        both_functions = (
            not _is_number(reference.sides[-1])
            and {reference.name, given.name} & {"y"}
            and "(" in (reference.name + given.name)
        )
        said = equal(reference.sides[-1], given.sides[-1])[0]
        if said and (is_same_name or both_functions):
            return True
        if is_same_name and len(reference.sides) == 2 and _is_number(reference.sides[-1]):
            return "undecided" if said is None else False
    ours, theirs = _sympy_relations(reference), _sympy_relations(given)
    if ours is None or theirs is None:
        in_order = _same_in_order(reference.sides, given.sides)
        return in_order if reference.operators == given.operators else "undecided"
    if len(ours) != 1 or len(theirs) != 1:
        return _same_in_order(reference.sides, given.sides) if reference.operators == given.operators else False
    return _proportional(ours[0], theirs[0])


def _proportional(ours: Any, theirs: Any) -> bool:
    """Whether two equations or inequalities are multiples of each other, in the right direction."""
    from sympy import Eq, Ge, Gt, Le, Lt, Ne, S, simplify

    if ours in (S.true, S.false) or theirs in (S.true, S.false):
        return bool(ours == theirs)
    flipped = {Lt: Gt, Gt: Lt, Le: Ge, Ge: Le, Eq: Eq, Ne: Ne}
    kinds = (type(ours), type(theirs))
    if kinds[0] is not kinds[1] and flipped.get(kinds[0]) is not kinds[1]:
        return False
    a, b = ours.lhs - ours.rhs, theirs.lhs - theirs.rhs
    if a.free_symbols != b.free_symbols or b == 0:
        return False
    ratio = simplify(a / b)
    if ratio.free_symbols or not ratio.is_number or ratio == 0:
        return False
    # Equations may differ by any factor; with inequalities its sign must fit the direction.
    if kinds[0] in (Eq, Ne):
        return True
    return bool(ratio > 0) == (kinds[0] is kinds[1])


def _is_operation(value: Value) -> bool:
    """An integral, derivative or sum, whose value stands on the other side."""
    from sympy import Basic, Derivative, Integral, Limit, Sum

    if isinstance(value, Raw):
        return True
    return (
        isinstance(value, Expression)
        and isinstance(value.value, Basic)
        and bool(value.value.has(Integral, Derivative, Sum, Limit))
    )


def _is_number(value: Value) -> bool:
    return isinstance(value, Expression) and not getattr(value.value, "free_symbols", True)


def _same_quantity(reference: Value, given: Value) -> bool | str | None:
    if isinstance(reference, Expression) and isinstance(given, Expression):
        return _same_measured(reference, given)
    return None


def _same_measured(reference: Expression, given: Expression) -> bool | str:
    if reference.is_percent != given.is_percent and _is_number(reference) and _is_number(given):
        return _same_percent(reference, given)
    if reference.unit and given.unit and reference.unit != given.unit:
        ours, theirs = UNITS.get(_singular(reference.unit)), UNITS.get(_singular(given.unit))
        if ours and theirs and ours[0] == theirs[0]:
            return same_expression(reference.value * _rational(ours[1]), given.value * _rational(theirs[1]))
        if ours and theirs:
            return False
    if same_expression(reference.value, given.value):
        return True
    return _rounds_to(reference, given)


def _same_percent(reference: Expression, given: Expression) -> bool | str:
    plain, percent = (given, reference) if reference.is_percent else (reference, given)
    as_written = same_expression(plain.value, percent.value)
    as_share = same_expression(plain.value * 100, percent.value)
    if reference.is_percent or not as_written:
        return as_written or as_share
    # 0.2 and 0.2%: the question may have asked for percent or for a share. 20 and 20% mean one thing.
    return True if bool(abs(reference.value) >= 1) else "undecided"


def _singular(unit: str) -> str:
    unit = unit.strip()
    return (
        unit
        if unit in UNITS
        else unit.removesuffix("es")
        if unit.removesuffix("es") in UNITS
        else unit.removesuffix("s")
    )


def _rational(fraction: Fraction) -> Any:
    from sympy import Rational

    return Rational(fraction.numerator, fraction.denominator)


def _rounds_to(reference: Expression, given: Expression) -> bool:
    """Whether the given number, written with more digits, rounds to the decimals of the reference.

    3.1416 is what pi, and 3.14159, round to; 12.5 is exact, and 12.46 another number. A rounded answer to an exact
    reference must keep six digits, as math-verify asks.
    """
    if not (_is_number(reference) and _is_number(given)):
        return False
    ours, theirs = as_float(reference.value), as_float(given.value)
    if ours is None or theirs is None:
        return False
    if reference.decimal is not None and (given.decimal is None or len(given.decimal) > len(reference.decimal)):
        digits = len(reference.decimal.partition(".")[2])
        if len(reference.decimal.strip("-").replace(".", "").lstrip("0")) >= MIN_SIGNIFICANT_DIGITS - (
            given.decimal is None
        ):
            # Half of the last digit, and a little for what binary fractions cannot hold.
            return bool(abs(ours - theirs) <= 0.5000001 * 10.0**-digits)
    if given.decimal is not None and reference.decimal is None and not getattr(reference.value, "is_Integer", False):
        significant = len(given.decimal.strip("-").replace(".", "").lstrip("0"))
        digits = len(given.decimal.partition(".")[2])
        return significant >= 6 and bool(abs(ours - theirs) <= 0.5000001 * 10.0**-digits)
    return False


# The first rule that says anything decides, so what is special stands before what is general.
_RULES = (
    ("text", _same_raw),
    ("words", _same_words),
    ("interval", _same_interval),
    ("special", _same_special),
    ("relation", _same_relation),
    ("group", _same_group),
    ("value", _same_quantity),
)
