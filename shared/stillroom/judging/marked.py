r"""Finds the answer that a model marked as its own.

In: the text after the reasoning. Out: candidates, best first, each with the mark that it was found by:

    tag      <answer>...</answer>, always preferred
    box      the last \boxed{...} or \fbox{...}; boxes joined by nothing but "and", commas or names count together
    line     `Final answer: ...`, `#### ...`, 最终答案：..., on the line or below the heading
    bold     the last **...** that is not a heading
    phrase   "the answer is ...", 答案是..., in prose
    clause   what stands behind the last "is", "=" or colon of the last sentence
    number   the only number of the last sentence, or of its last clause
    whole    everything

The last strong mark (box or line) counts, so that a correction wins; weaker marks are read only where there is none.
"""

import re
from dataclasses import dataclass

TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
OPEN_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)\Z", re.DOTALL | re.IGNORECASE)
BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{|[^\s{])")
BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;、，和或]|\\[()\[\],;: ]|\\q?quad|\band\b|\bor\b|\\text\{\s*(?:and|or)\s*\}|"
    r"[A-Za-z](?:_\{?\w\}?)?\s*=)*\.?"
)
BEFORE_BOX = re.compile(r"([A-Za-z](?:_\{?\w\}?)?\s*=)\s*$")
SUBJECT = r"(?:(?:final|correct|required|right|overall|best)\s+)?(?:answer|result|solution|choice|option)"
FINAL_LINE = re.compile(
    r"^[ \t>#*_\-]*(?:(?:so|thus|therefore|hence)[, ]+)?(?:the[ \t]+)?final[ \t]+(?:answer|result|solution)\b[ \t*_]*"
    r"(?:is\b)?[ \t]*[:：=]?[ \t*_]*(.*)$"
    r"|^[ \t*]*####[ \t]*(.+)$"
    r"|^[ \t>#*_\-]*(?:最终答案|最后答案|最终结果)[ \t*_]*(?:为|是)?[ \t]*[:：]?[ \t*_]*(.*)$",
    re.IGNORECASE | re.MULTILINE,
)
ANSWER_LINE = re.compile(
    rf"^[ \t>#*_\-]*(?:(?:so|thus|therefore|hence)[, ]+)?(?:the[ \t]+)?{SUBJECT}[ \t*_]*[:：=][ \t*_]*(.*)$"
    r"|^[ \t>#*_\-]*(?:正确)?答案[ \t*_]*[:：][ \t*_]*(.*)$",
    re.IGNORECASE | re.MULTILINE,
)
BOLD = re.compile(r"\*\*(?=\S)(.+?)(?<=\S)\*\*(?!\s*[:：])|__(?=\S)(.+?)(?<=\S)__(?!\s*[:：])", re.DOTALL)
PHRASE = re.compile(
    rf"\b{SUBJECT}(?:\s+to\s+[^.:]{{1,60}}?)?\s+(?:is|are|was|must\s+be|will\s+be|would\s+be|should\s+be|comes?\s+to|equals?)"
    r"\s*(?:therefore|thus|then|indeed|simply|given\s+by)?\s*[:：]?\s*(.+)"
    r"|(?:(?:答案|结果)\s*(?:应该)?(?:应)?(?:是|为|等于)|故选|应选|选择|选项|选)\s*[:：]?\s*(.+)",
    re.IGNORECASE,
)
COPULA = re.compile(
    r".*(?:\bit['’]s(?=\s)|(?<=\s)(?:is|are|was|were|be|equals?|equal\s+to|becomes?|gives?|get)(?=[\s:])|(?<![<>!=\\])=|[:：]\s|"
    r"(?<=[一-鿿])(?:是|为|等于))\s*[:：]?\s*(.+)",
    re.IGNORECASE | re.DOTALL,
)
CLOSING = re.compile(
    r"\b(?:hope (?:this|that)|let me know|feel free|if you (?:have|need|would)|happy to|would you like|good luck|"
    r"you(?:'re| are) welcome|this can be (?:checked|verified))|^(?:cheers|thanks|great|希望|如有)",
    re.IGNORECASE,
)
ASIDE = re.compile(
    r",?\s+(?:which|because|since|as (?:required|expected|desired|needed|stated)|where|not|rather than|instead of|"
    r"assuming|given that|so that)\b.*|，?(?:而不是|不是|并非|因为|其中).*",
    re.IGNORECASE | re.DOTALL,
)
CONSEQUENCE = re.compile(
    r".*(?:\b(?:so|therefore|thus|hence|in total|altogether|total(?:ling|s)?|making|leaving|giving|means)\b|"
    r"所以|因此|一共|总共|共)",
    re.IGNORECASE | re.DOTALL,
)
NUMBER = re.compile(
    r"(?<!not )(?<![A-Za-z0-9.^_/])(?<![\w)]\s[-−]\s)(?<![\w)][-−])"
    r"[-−]?(?:[$€£¥]\s?)?[-−]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:(?<=\d)\.\d+|(?<![\d.])\.\d+|(?<=\d))(?:\s?/\s?\d+)?(?:[eE][-+]?\d+)?"
    r"(?:\s?\\?%)?(?![A-Za-z0-9_^])"
)
TIME_OR_DATE = re.compile(
    r"(?<![\w:.-])(?:\d{1,2}:\d{2}(?:\s*[ap]\.?m\b)?|\d{4}-\d{2}-\d{2})(?![\w:]|-\d)", re.IGNORECASE
)
VERB = re.compile(
    r"\b(?:has|have|had|needs?|makes?|made|earns?|earned|takes?|took|costs?|pays?|paid|sells?|sold|gets?|got|receives?|"
    r"spends?|spent|saves?|saved|was|were|is|are|contains?|weighs?|travels?|reads?|buys?|bought|owes?|requires?)\s+",
    re.IGNORECASE,
)
SENTENCE = re.compile(r"(?<=[.!?。！？])[*_\"”']*\s+|(?<=[。！？])|\n+")
FENCE = re.compile(
    r"^[ \t]*(?:`{3,}|~{3,})[^\n`]*\n(.*?)(?:^[ \t]*(?:`{3,}|~{3,})[ \t]*$|\Z)", re.DOTALL | re.MULTILINE
)
DECORATION = "*_`\"“”‘’「」『』' \t\r\n"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One text that may be meant as the answer, and the mark that it was found by."""

    text: str
    mark: str


@dataclass(frozen=True, slots=True)
class Found:
    """Candidates, best first. `problem` says why there are none."""

    candidates: tuple[Candidate, ...]
    problem: str | None = None


def find_answer(answer: str, truncated: bool = False) -> Found:
    """The marked answer. Of a `truncated` text only marks that are complete count: prose may break off anywhere."""
    text = answer.replace("\r\n", "\n").replace("﹣", "-")
    tag = _tag(text, truncated)
    if tag is not None:
        inner = _strong(tag, False)
        return Found(inner or (Candidate(tag.strip(), "tag"), *_from_prose(tag)))
    if _last_box_is_cut(text):
        return Found((), "the last box is cut off")
    strong = _strong(text, truncated)
    if strong:
        return Found(strong)
    if truncated:
        return Found((), "cut off before an answer was marked")
    found = _from_prose(text)
    return Found(found) if found else Found((), "no answer found")


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Start, end and content of each closed \boxed{...} or \fbox{...}, outermost ones, braces balanced."""
    found: list[tuple[int, int, str]] = []
    for match in BOX.finditer(text):
        # A box inside a box belongs to the outer one.
        if found and match.start() < found[-1][1]:
            continue
        start = match.end()
        if text[start] != "{":
            found.append((match.start(), start + 1, text[start]))
            continue
        end = closing_brace(text, start)
        if end is not None:
            found.append((match.start(), end + 1, text[start + 1 : end].strip()))
    return found


def closing_brace(text: str, start: int) -> int | None:
    r"""Where the brace at `start` closes; escaped braces (`\{`) do not count."""
    depth, place = 0, start
    while place < len(text):
        if text[place] == "\\":
            place += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place
        place += 1
    return None


def plain(text: str) -> str:
    """Without Markdown emphasis, quotes and a full stop around it."""
    previous = None
    while text != previous:
        previous, text = text, text.strip(DECORATION)
        if text.endswith((".", "。", ",", ";")) and not text.endswith("..."):
            text = text[:-1]
    return text


def last_sentences(text: str) -> list[str]:
    """Sentences and lines, the last first, without what people say when they take their leave."""
    parts = [part.strip() for part in SENTENCE.split(text) if part and part.strip()]
    kept = [part for part in parts if not CLOSING.search(part) and not re.fullmatch(r"[`~]{3,}\w*|[-*_=#]+", part)]
    return list(reversed(kept))


def _tag(text: str, truncated: bool) -> str | None:
    closed = TAG.findall(text)
    opened = OPEN_TAG.search(text)
    # <answer> without an end runs to the end of the text, unless that was cut off.
    if opened and opened[1].strip() and not truncated:
        return opened[1]
    return closed[-1] if closed else None


def _last_box_is_cut(text: str) -> bool:
    last = _last_match(BOX, text)
    return last is not None and text[last.end()] == "{" and closing_brace(text, last.end()) is None


def _strong(text: str, truncated: bool) -> tuple[Candidate, ...]:
    """The last box or final line; of a truncated text a line counts only where another one follows."""
    found = boxes(text)
    box_end = found[-1][1] if found else -1
    for line in reversed(list(FINAL_LINE.finditer(text))):
        content = next((group for group in line.groups() if group is not None), "")
        # Both are strong marks: the later one counts.
        if line.start() < box_end or (truncated and "\n" not in text[line.end() :].rstrip(" ")):
            break
        if plain(content):
            return _of_line(content)
        below = _first_line_of(text[line.end() :])
        if below and not boxes(text[line.end() :]):
            return _of_line(below)
    if not found:
        return ()
    first = len(found) - 1
    # Boxes with nothing but "and" or commas between them are parts of one answer.
    while first and BETWEEN_BOXES.fullmatch(text, found[first - 1][1], found[first][0]):
        first -= 1
    group = found[first:]
    candidates = [Candidate(group[0][2] if len(group) == 1 else ", ".join(_named(text, one) for one in group), "box")]
    # Answers of several parts, a box each, are compared with references of as many parts.
    contents = list(dict.fromkeys(content for _, _, content in found))
    if len(contents) > len(group):
        candidates.append(Candidate(", ".join(contents), "all boxes"))
    return tuple(candidates)


def _named(text: str, box: tuple[int, int, str]) -> str:
    name = BEFORE_BOX.search(text, 0, box[0])
    return f"{name[1]} {box[2]}" if name and "=" not in box[2] else box[2]


def _first_line_of(text: str) -> str:
    return next((line for line in text.splitlines() if plain(line)), "")


def _of_line(content: str) -> tuple[Candidate, ...]:
    bold = [plain(_group(match)) for match in BOLD.finditer(content)]
    found = [Candidate(plain(content), "line")]
    found += [Candidate(bold[-1], "line")] if bold else []
    sentence = SENTENCE.split(content)[0]
    found += [Candidate(plain(ASIDE.sub("", one)), "line") for one in (sentence, content)]
    found += _clauses(sentence)
    return _distinct(found)


def _from_prose(text: str) -> tuple[Candidate, ...]:
    """Candidates from an answer without a strong mark."""
    for line in reversed(list(ANSWER_LINE.finditer(text))):
        content = next((group for group in line.groups() if group is not None), "")
        content = content if plain(content) else _first_line_of(text[line.end() :])
        if plain(content):
            return _of_line(content)
    whole = plain(text)
    found: list[Candidate] = []
    sentences = last_sentences(text)
    bolds = [match for match in BOLD.finditer(text) if _is_conclusion(text, match)]
    if bolds:
        found.append(Candidate(plain(_group(bolds[-1])), "bold"))
        # A bold word inside of a longer last sentence may be emphasis only: what the sentence concludes counts too.
        if len(plain(_group(bolds[-1]))) * 2 > len(sentences[0] if sentences else ""):
            return _distinct(found + _clauses(_group(bolds[-1])))
    for sentence in sentences:
        match = _last_match(PHRASE, sentence)
        if match:
            said = next(group for group in match.groups() if group is not None)
            return _distinct(
                [
                    *found,
                    Candidate(plain(ASIDE.sub("", said)), "phrase"),
                    Candidate(plain(said), "phrase"),
                    *_clauses(said),
                ]
            )
    if sentences:
        last = sentences[0]
        if "\n" not in text.strip() and len(sentences) == 1:
            found.append(Candidate(whole, "whole"))
        found += [Candidate(plain(one), "last line") for one in (last, ASIDE.sub("", last))]
        found += _clauses(last)
    if "\n" in text.strip():
        found.append(Candidate(whole, "whole"))
    return _distinct(found)


def _clauses(sentence: str) -> list[Candidate]:
    """What a sentence says in its end, and its number, if it has one that is beyond doubt."""
    kept = ASIDE.sub("", sentence)
    found: list[Candidate] = []
    match = COPULA.match(kept)
    if match:
        found.append(Candidate(plain(match[1]), "clause"))
    tokens = {one[0] for one in TIME_OR_DATE.finditer(kept)}
    if tokens:
        return [*found, Candidate(tokens.pop(), "time")] if len(tokens) == 1 else found
    consequence = CONSEQUENCE.sub("", kept)
    verbs = [consequence[verb.end() :] for verb in VERB.finditer(consequence)]
    behind_verbs = [number[0] for rest in verbs if (number := NUMBER.match(rest))]
    for part in (kept, consequence, match[1] if match else "", " ".join(behind_verbs)):
        numbers = {one[0].strip() for one in NUMBER.finditer(part) if any(map(str.isdigit, one[0]))}
        # Two different numbers would be a guess.
        if len(numbers) == 1:
            found.append(Candidate(numbers.pop(), "number"))
            break
    return found


def _is_conclusion(text: str, match: re.Match[str]) -> bool:
    content = _group(match).strip()
    if content.endswith((":", "：")) or re.match(
        r"(?:step|note|part|case|solution|explanation)\b", content, re.IGNORECASE
    ):
        return False
    # Only what stands in the last lines concludes; bold words before it are emphasis.
    after = [line for line in text[match.end() :].splitlines() if line.strip() and not CLOSING.search(line)]
    return len(after) <= 1


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(reversed(list(pattern.finditer(text)))), None)


def _group(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None)


def _distinct(candidates: list[Candidate]) -> tuple[Candidate, ...]:
    first: dict[str, Candidate] = {}
    for one in candidates:
        if one.text:
            first.setdefault(one.text, one)
    return tuple(first.values())


def fenced_blocks(text: str) -> list[str]:
    """Contents of fenced blocks."""
    return [match[1].strip("\n") for match in FENCE.finditer(text)]
