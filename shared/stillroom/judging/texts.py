"""Compares answers as text, as a person would: case, quotes, Markdown, brackets around a letter, dates, thousands."""

import datetime
import functools
import json
import re
import unicodedata
from decimal import Decimal, InvalidOperation

from stillroom.judging.marked import DECORATION, plain

MONTHS = ["january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
          "december"]  # fmt: skip
CHOICE = re.compile(
    r"(?:(?:option|choice|answer|选项|选)\s*[:：]?\s*)?[(\[（]?\s*([A-Za-z])\s*(?:[)\]）](?=\W|$|\w)|[.:：、](?=\s|$)|\s*[-–—]\s*(?=\w{2})|$)(.*)",
    re.IGNORECASE | re.DOTALL,
)
STYLE = re.compile(
    r"\\(?:text|mathrm|textbf|textrm|textit|texttt|mathbf|mbox|operatorname|emph|underline)\s*\{([^{}]*)\}"
)
AMOUNT = re.compile(
    r"(?:US|USD\s*)?\\?[$€£¥]?\s*([-+]?)\s*\\?[$€£¥]?\s*(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?\s*(\\?%|percent)?\s*"
    r"(?:[^\W\d_][\w./ ]*\^?\{?[23]?\}?|°\s*[CF]?|€|¥|元|个)?",
    re.IGNORECASE,
)


def same_text(reference: str, given: str) -> bool:
    """Whether two texts say the same, apart from case, typography and the brackets around a list or letter."""
    return normal_text(reference) == normal_text(given)


@functools.lru_cache(maxsize=1024)
def normal_text(text: str) -> str:
    """Lower case, NFKC, no Markdown, quotes, LaTeX text commands, closing stop or superfluous space."""
    text = unicodedata.normalize("NFKC", _unstyled(text)).replace("−", "-")
    text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", text.replace(r"\dfrac", r"\frac"))
    text = re.sub(r"\\(log|ln|sin|cos|tan|exp|max|min)(?![a-z])", r"\1", text)
    text = re.sub(r"\s*([-+*/=^<>,()\[\]])\s*", r"\1", text)
    text = re.sub(r"\\[,;:! ]|\\quad|~", " ", text).replace(r"\%", "%").replace(r"\_", "_").replace(r"\$", "")
    text = re.sub(r"[“”«»\"]|(?<!\w)['‘’]|['‘’](?!\w)|\*\*|`|\$|\\[()\[\]]", "", text)
    text = re.sub(r"\s+", " ", plain(text)).strip().rstrip("!")
    return text.casefold()


def same_answer(reference: str, given: str) -> str | None:
    """The rule by which two answers are the same to a person, None where they are not."""
    if same_text(reference, given):
        return "text"
    letter = choice_letter(reference)
    if letter is not None and choice_letter(given, with_option=True) == letter:
        return "choice"
    ours, theirs = number_of(reference), number_of(given)
    if ours is not None and theirs is not None and _same_number(ours, theirs):
        return "number"
    if date_of(normal_text(reference)) is not None and date_of(normal_text(reference)) == date_of(normal_text(given)):
        return "date"
    items, others = _list_of(reference), _list_of(given)
    if items is not None and others is not None and len(items) == len(others):
        return "list" if all(same_answer(a, b) for a, b in zip(items, others, strict=True)) else None
    without = re.sub(r"^[(\[{]|[)\]}]$", "", normal_text(given)), re.sub(r"^[(\[{]|[)\]}]$", "", normal_text(reference))
    return "text" if without[0] == without[1] and without[0] else None


def choice_letter(text: str, with_option: bool = False) -> str | None:
    r"""The letter of a multiple-choice answer: B, (b), \text{(B)}; `with_option` also `B) Paris` and `Option B`."""
    match = CHOICE.fullmatch(normal_text(text))
    if not match or (match[2].strip() and not with_option):
        return None
    # A bare small letter in a reference is a variable.
    if not with_option and re.fullmatch(r"[a-z]", _unstyled(text).strip()):
        return None
    return match[1].upper()


def number_of(text: str) -> tuple[Decimal, bool, bool] | None:
    """The number that a text is, whether it is a percentage, and whether something else stands beside it."""
    cleaned = normal_text(text.replace("{,}", ",").replace(r"\,", ""))
    # Large numbers of a column with a gap were floats: 1e+16.
    if re.fullmatch(r"[-+]?\d+(?:\.\d+)?e[-+]?\d{1,3}", cleaned):
        return Decimal(cleaned), False, False
    match = AMOUNT.fullmatch(cleaned)
    if not match:
        return None
    try:
        number = Decimal(match[1] + match[2].replace(",", "") + (match[3] or ""))
    except InvalidOperation:
        return None
    bare = re.fullmatch(r"[-+]?[\d,]+(?:\.\d+)?", cleaned)
    return number, match[4] is not None, bare is None


def date_of(text: str) -> datetime.date | None:
    """A day in one of the forms that leave no doubt: 2024-05-01, May 1, 2024, 1 May 2024."""
    text = plain(text).lower()
    if match := re.fullmatch(r"(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})", text):
        return _date(int(match[1]), int(match[2]), int(match[3]))
    names = "|".join(f"{name}|{name[:3]}" for name in MONTHS)
    if match := re.fullmatch(rf"(?:\w+day,?\s+)?({names})\.?\s+(\d{{1,2}})(?:st|nd|rd|th)?(?:,\s*|\s+)(\d{{4}})", text):
        return _date(int(match[3]), _month(match[1]), int(match[2]))
    if match := re.fullmatch(
        rf"(?:\w+day,?\s+)?(\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?({names})\.?(?:,\s*|\s+)(\d{{4}})", text
    ):
        return _date(int(match[3]), _month(match[2]), int(match[1]))
    if match := re.fullmatch(r"(\d{4})年(\d{1,2})月(\d{1,2})日", text):
        return _date(int(match[1]), int(match[2]), int(match[3]))
    return None


def _date(year: int, month: int, day: int) -> datetime.date | None:
    try:
        return datetime.date(year, month, day)
    except ValueError:
        return None


def _month(name: str) -> int:
    return next(number for number, month in enumerate(MONTHS, 1) if month.startswith(name[:3]))


def _same_number(ours: tuple[Decimal, bool, bool], theirs: tuple[Decimal, bool, bool]) -> bool:
    # "20" accepts "20%" and "5 meters"; "20%" accepts "20"; two different units are compared by nobody here.
    return ours[0] == theirs[0] and not (ours[2] and theirs[2] and ours[1] != theirs[1])


def _list_of(text: str) -> list[str] | None:
    """Items of a JSON or Python list, or of text with commas."""
    stripped = _unstyled(text).strip(DECORATION)
    try:
        data = json.loads(stripped)
        if isinstance(data, list):
            return [item if isinstance(item, str) else json.dumps(item) for item in data]
    except ValueError:
        pass
    inner = re.sub(r"^[\[({]|^\\\{|[\])}]$|\\\}$", "", stripped)
    # 1,234 is a number, not a list of two.
    if re.fullmatch(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?", inner):
        return None
    parts = [part.strip(DECORATION) for part in re.split(r"\s*(?:[,;、]\s*(?:and\s+)?|\n|\s+and\s+)", inner.strip())]
    parts = [re.sub(r"^(?:[-*•]|\d+[.)])\s+", "", part) for part in parts if part]
    return parts if len(parts) > 1 else None


def _unstyled(text: str) -> str:
    # STYLE matches what holds no braces: one level of nesting at a time.
    previous = None
    while text != previous:
        previous, text = text, STYLE.sub(r"\1", text)
    return text
