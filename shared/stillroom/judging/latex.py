r"""LaTeX, Unicode and plain text of one answer, brought to one notation before anything is parsed.

`tidy` keeps the mathematics and drops the typography: `\left`, `\dfrac`, thin spaces, dollars, bold. Words
(`\text{cm}`, `apples`) become marked words, so that they are read as units or as text, never as products of letters.
"""

import re
import unicodedata

from stillroom.judging.marked import boxes, closing_brace, plain

WORD_OPEN, WORD_CLOSE = "⟦", "⟧"
WORD = re.compile(rf"{WORD_OPEN}([^{WORD_CLOSE}]*){WORD_CLOSE}")

UNICODE = {
    "−": "-", "–": "-", "—": "-", "﹣": "-", "×": r"\times ", "✕": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",
    "÷": "/", "⁄": "/", "∕": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ",
    "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∓": r"\mp ", "°": r"^\circ ", "∪": r"\cup ", "∩": r"\cap ",
    "∅": r"\emptyset ", "∈": r"\in ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}",
    "…": r"\ldots ", "⋯": r"\ldots ", "⟨": "(", "⟩": ")", "∖": r"\setminus ", "′": "'", "ℓ": "l", "％": "%",
    "½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "⅕": " 1/5", "⅖": " 2/5", "⅗": " 3/5", "⅘": " 4/5",
    "⅙": " 1/6", "⅚": " 5/6", "⅛": " 1/8", "⅜": " 3/8", "⅝": " 5/8", "⅞": " 7/8", "α": r"\alpha ", "β": r"\beta ",
    "γ": r"\gamma ", "δ": r"\delta ", "θ": r"\theta ", "λ": r"\lambda ", "μ": r"\mu ", "ρ": r"\rho ", "σ": r"\sigma ",
    "φ": r"\phi ", "ω": r"\omega ", "Δ": r"\Delta ",
}  # fmt: skip
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")

STYLES = re.compile(
    r"\\(?:text|mathrm|textrm|textbf|textit|texttt|textsf|textnormal|mathbf|mathit|mathsf|mathtt|mathop|boldsymbol|bm|"
    r"mbox|hbox|operatorname\*?)\s*(?=\{)"
)
FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp|min|max|gcd|lcm|det"
COMMANDS = [
    (r"\\(?:left|right|middle|[bB]igg?[lr]?)(?![A-Za-z])\s*\.?(?=[\[\](){}|.\\/]|\Z)", ""),
    (r"\\(?:displaystyle|textstyle|limits|nolimits|rm|bf|it|large|Large|huge|Huge|tt)(?![A-Za-z])", ""),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\(?:dbinom|tbinom)(?![A-Za-z])", r"\\binom"),
    (r"\\(?:leqslant|leqq|leq)(?![A-Za-z])|<=", r"\\le "),
    (r"\\(?:geqslant|geqq|geq)(?![A-Za-z])|>=", r"\\ge "),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"\\neq(?![A-Za-z])|!=", r"\\ne "),
    (r"\\(?:lbrace)(?![A-Za-z])", r"\\{"),
    (r"\\(?:rbrace)(?![A-Za-z])", r"\\}"),
    (r"\\(?:lbrack)(?![A-Za-z])", "["),
    (r"\\(?:rbrack)(?![A-Za-z])", "]"),
    (r"\\langle(?![A-Za-z])", "("),
    (r"\\rangle(?![A-Za-z])", ")"),
    (r"\\(?:lvert|rvert|vert|mid)(?![A-Za-z])", "|"),
    (r"\\(?:varnothing)(?![A-Za-z])", r"\\emptyset "),
    (r"\\(?:dots|cdots|dotsc|dotsb|dotsm|ldots)(?![A-Za-z])|\.\.\.", r"\\ldots "),
    (r"\\(?:colon)(?![A-Za-z])", ":"),
    (r"\\(?:land|wedge)(?![A-Za-z])", r" \\land "),
    (r"\\(?:lor|vee)(?![A-Za-z])", r" \\lor "),
    (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![A-Za-z])", r"^\\circ "),
    (r"\\(?:quad|qquad|thinspace|enspace|space|hspace\{[^}]*\})(?![A-Za-z])", " "),
    (r"\\(?:implies|Rightarrow|iff|Leftrightarrow|to|rightarrow)(?![A-Za-z])", r" \\to "),
    (r"\\mathbb\s*([A-Z])", r"\\mathbb{\1}"),
    (r"\\mathbb\{\s*([A-Z])\s*\}", r"\\mathbb{\1}"),
    (r"\\infin(?![A-Za-z])", r"\\infty "),
    (r"\\pmod\s*\{?\s*(\w+)\s*\}?", r"\\pmod{\1}"),
]  # fmt: skip
COMMANDS_COMPILED = [(re.compile(pattern), put) for pattern, put in COMMANDS]
PLAIN = [
    (r"\*\*", "^"),
    (r"(?<![\w.\\])(\d+(?:\.\d+)?)\s*[eE]\s*([+-]?\d+)(?![\w.])", r"\1\\times 10^{\2}"),
    (rf"(?<![\\A-Za-z])({FUNCTIONS})(?=\s*[\d(^_{{x]|\s*\\)", r"\\\1 "),
    (r"(?<![\\A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])", r"\\infty "),
    (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
    (r"\\exp\s*\(([^()]*)\)", r"e^{\1}"),
    (r"\^\s*\(([^()]*)\)", r"^{\1}"),
    (r"\^\s*(-?\d+)(?![\d.])", r"^{\1}"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\frac\s*(\d|[a-z])\s*\{", r"\\frac{\1}{"),
    (r"(\\frac\{[^{}]*\})\s*(\d|[a-zA-Z])", r"\1{\2}"),
    (r"\\frac\s*([a-z\d])\s*([a-z\d])", r"\\frac{\1}{\2}"),
    (r"\\sqrt\s*(\d|[a-zA-Z])", r"\\sqrt{\1}"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
]
PLAIN_COMPILED = [(re.compile(pattern), put) for pattern, put in PLAIN]
REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?")
DIGIT_GROUP = re.compile(r"(?<=\d)(?:(?<!\\)\\,|\\!\s*,?|,\\!|\{,\}|(?<!\\)\\[;: ]|~|(?<=\d)[    ])(?=\d{3}(?!\d))")
CURRENCY = re.compile(r"(?:US|USD|HK|A|C)?\\?\$|[€£¥₹]|\b(?:USD|EUR|GBP|Rs\.?|RMB|INR)(?=\s*[\d-])")


def tidy(text: str) -> str:
    """One notation for one answer; words are marked."""
    text = _unicode(plain(_unboxed(text)))
    text = re.sub(r"^\s*(?:\$\$?|\\\(|\\\[)(.*?)(?:\$\$?|\\\)|\\\])\s*$", r"\1", text, flags=re.DOTALL)
    # A matrix row may end in \\[2pt], whose bracket opens no formula.
    text = re.sub(r"\\[()\[\]](?![A-Za-z\d])|\\[()]", " ", text) if r"\\[" not in text else text
    text = CURRENCY.sub(" ", text).replace("$", " ")
    for pattern, put in COMMANDS_COMPILED:
        text = pattern.sub(put, text)
    # Before spaces are evened out: those between groups of digits belong to one number.
    text = DIGIT_GROUP.sub("", text)
    text = re.sub(r"(?<!\\)\\[!,;:> ]|~|\{\}", lambda match: "" if match[0] == r"\!" else " ", text)
    text = _words(text).replace(r"\%", "%")
    text = REPEATING.sub(_fraction_of_repeating, text)
    for pattern, put in PLAIN_COMPILED:
        text = pattern.sub(put, text)
    text = re.sub(r"(?<![\d.])\.(?=\d)", "0.", text)
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"(?:\\\\|[.,;。\s])+$", "", text)


def has_words(text: str) -> bool:
    """Whether something in tidied text is a word rather than a name or a command."""
    return bool(WORD.search(text))


def words_of(text: str) -> str:
    """Tidied text without the marks of words."""
    return re.sub(r"\s+", " ", WORD.sub(r"\1", text)).strip()


def split_top(text: str, separators: str) -> list[str]:
    """Parts between separators (a pattern) that stand outside all brackets."""
    pattern, parts, depth, start, place = re.compile(separators), [], 0, 0, 0
    while place < len(text):
        match = pattern.match(text, place) if depth == 0 else None
        if match and match.end() > place:
            parts.append(text[start:place])
            place = start = match.end()
            continue
        if text.startswith((r"\{", r"\}"), place):
            depth += 1 if text[place + 1] == "{" else -1
            place += 2
            continue
        if text.startswith((r"\begin", r"\end"), place):
            depth += 1 if text.startswith(r"\begin", place) else -1
            # The length of `\end`; what it leaves of `\begin` is letters.
            place += 4
            continue
        # Never below 0: ]0, 1] closes more than it opens, and what follows still has separators.
        depth = max(depth + {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(text[place], 0), 0)
        place += 1
    return [part.strip() for part in [*parts, text[start:]]]


def _unboxed(text: str) -> str:
    found = boxes(text)
    # From the last one, so that the places of the others stay right.
    for start, end, content in reversed(found):
        text = text[:start] + content + text[end:]
    return _unboxed(text) if found else text


def _unicode(text: str) -> str:
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda match: "^{" + match[0].translate(SUPERSCRIPTS) + "}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda match: "_{" + match[0].translate(SUBSCRIPTS) + "}", text)
    text = re.sub(r"√\s*(\d+(?:\.\d+)?|[a-zA-Z])", r"\\sqrt{\1}", text)
    text = re.sub(r"√\s*\(([^()]*)\)", r"\\sqrt{\1}", text).replace("√", r"\sqrt ")
    text = "".join(UNICODE.get(character, character) for character in text)
    # After the rest: NFKC by itself makes 2 of a superscript 2, and x2 of a square.
    return unicodedata.normalize("NFKC", text)


def _words(text: str) -> str:
    r"""Marks words: contents of \text and the like that are not numbers, runs of two letters or more, other scripts."""
    out, place = [], 0
    while match := STYLES.search(text, place):
        end = closing_brace(text, match.end())
        if end is None:
            break
        content = text[match.end() + 1 : end].strip()
        out += [_bare_words(text[place : match.start()]), _styled(content, match[0])]
        place = end + 1
    return "".join([*out, _bare_words(text[place:])])


def _styled(content: str, command: str) -> str:
    if re.fullmatch(r"(?:,?\s*(?:and|or)\s*|\s*,\s*)", content):
        return " , "
    if re.fullmatch(FUNCTIONS, content) and content not in UNIT_WORDS:
        return f"\\{content} "
    if not re.search(r"[^\W\d_]", content) or "\\" in content:
        return " " + _words(content) + " "
    if len(content) == 1 and not command.startswith((r"\text", r"\mbox")) and content in "ijkenxyzXYZC":
        return content
    return _bare_words(content) if re.search(r"\d|[()]", content) else f" {WORD_OPEN}{content}{WORD_CLOSE} "


def _bare_words(text: str) -> str:
    text = re.sub(r"(?<![\\A-Za-z])(?:,?\s*\b(?:and|or)\b|[、；]|[和或])(?![A-Za-z])", " , ", text)
    # A run of letters with no digit or operator beside it is a word; `xy` beside one (`2xy`) is a product.
    pattern = (
        rf"\\(?:begin|end)\{{\w+\}}|\\[A-Za-z]+|(?<![A-Za-z\\])(?:{FUNCTIONS}|sqrt|pi|infinity|inf|oo)(?![a-zA-Z])"
        r"|[一-鿿]+|(?<![A-Za-z])[A-Za-z]{2,}"
    )

    def mark(match: re.Match[str]) -> str:
        word = match[0]
        if word in UNIT_WORDS and not re.match(r"\s*[({\\_]", text[match.end() :]):
            return f" {WORD_OPEN}{word}{WORD_CLOSE} "
        if word.startswith("\\") or re.fullmatch(rf"{FUNCTIONS}|pi|infinity|inf|oo", word):
            return word
        if word == "sqrt":
            return r"\sqrt "
        is_product = len(word) <= 3 and word == word.lower() and _touches_mathematics(text, match.start(), match.end())
        return word if is_product else f" {WORD_OPEN}{word}{WORD_CLOSE} "

    return re.sub(pattern, mark, text)


def _touches_mathematics(text: str, start: int, end: int) -> bool:
    r"""`2xy`, `xy+1`, `ab^2`: letters beside an operator. `12 cm`, `5cm`: a unit, though a digit stands before it."""
    after = text[end:].lstrip()
    before = text[:start].rstrip()
    if text[start:end] in UNIT_WORDS:
        return False
    return (
        (after[:1] in tuple("+-*/^=_(<>}") and bool(after))
        or (before[-1:] in tuple("+-*/^=(<>{") and bool(before))
        or (before[-1:].isdigit() and before == text[:start])
    )


UNIT_WORDS = frozenset(
    {
        "cm", "mm", "km", "dm", "nm", "um", "kg", "mg", "lb", "lbs", "ft", "in", "yd", "mi", "mph", "kmh",
        "kph", "hr", "hrs", "min", "mins", "sec", "secs", "ml", "oz", "am", "pm", "AM", "PM", "deg", "rad",
        "gal", "pt", "qt", "ms", "kn", "kW", "MW", "Hz", "Pa", "kPa", "mol", "cal",
    }
)  # fmt: skip


def _fraction_of_repeating(match: re.Match[str]) -> str:
    """0.1(6): the repeating decimal as a fraction."""
    whole, fixed, repeated = match[1] or "0", match[2], match[3]
    # 0.1(6) = (16 - 1) / 90
    numerator = int(whole + fixed + repeated) - int(whole + fixed)
    return rf"\frac{{{numerator}}}{{{(10 ** len(repeated) - 1) * 10 ** len(fixed)}}}"
