"""The demo's questions, easy enough for a teacher of 135M weights: `python -m benchmarks.demo.questions` writes them.

Out: one JSON Lines file per kind under benchmarks/demo/questions/, rows of question and answer; the same seed writes
the same files. Each kind has few templates, so that a student can learn them from a few hundred chains.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

from stillroom.storage.paths import write_text_atomic

FOLDER = Path(__file__).parent / "questions"
NUM_QUESTIONS = 48
SEED = 3

NAMES = ["Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry"]
THINGS = ["apples", "books", "coins", "pens", "cards", "stamps"]
WARES = ["pen", "book", "cake", "ticket"]
COLORS = ["red", "blue", "green", "yellow", "black", "white"]
CAPITALS = (
    "France:Paris Italy:Rome Spain:Madrid Germany:Berlin Japan:Tokyo Egypt:Cairo Russia:Moscow China:Beijing "
    "Greece:Athens Portugal:Lisbon Canada:Ottawa Austria:Vienna Poland:Warsaw Norway:Oslo Sweden:Stockholm"
)
OPPOSITES = (
    "hot:cold big:small fast:slow up:down young:old happy:sad open:closed light:dark rich:poor full:empty hard:soft "
    "early:late left:right strong:weak day:night high:low"
)

Question = tuple[str, str]


def capital(rng: random.Random) -> Question:
    """A fact about the world."""
    country, city = rng.choice(CAPITALS.split()).split(":")
    template = rng.choice(
        [
            "What is the capital of {}?",
            "Which city is the capital of {}?",
            "Name the capital of {}.",
            "Tell me the capital city of {}.",
        ]
    )
    return template.format(country), _word(city)


def opposite(rng: random.Random) -> Question:
    """A fact about words."""
    word, other = rng.choice(OPPOSITES.split()).split(":")
    template = rng.choice(
        ["What is the opposite of {}?", "Name the opposite of the word {}.", "Which word means the opposite of {}?"]
    )
    return template.format(word), _word(other)


def car(rng: random.Random) -> Question:
    """The answer is in the question."""
    names, colors, asked = rng.sample(NAMES, 2), rng.sample(COLORS, 2), rng.randrange(2)
    stated = f"{names[0]} has a {colors[0]} car and {names[1]} has a {colors[1]} car."
    return f"{stated} What color is {names[asked]}'s car?", _word(colors[asked])


def price(rng: random.Random) -> Question:
    """A product of two small numbers, about money."""
    dollars, count, ware = rng.randint(2, 6), rng.randint(2, 6), rng.choice(WARES)
    return f"A {ware} costs {dollars} dollars. How many dollars do {count} {ware}s cost?", str(dollars * count)


def boxes(rng: random.Random) -> Question:
    """A product of two small numbers, about a person and things."""
    name, thing, count, size = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 6), rng.randint(2, 6)
    stated = f"{name} has {count} boxes with {size} {thing} each."
    return f"{stated} How many {thing} does {name} have in all?", str(count * size)


KINDS: dict[str, Callable[[random.Random], Question]] = {
    "capitals": capital,
    "opposites": opposite,
    "cars": car,
    "prices": price,
    "boxes": boxes,
}


def rows(kind: str) -> str:
    """The JSON Lines of one kind: NUM_QUESTIONS different questions, fewer where its templates have no more."""
    rng, found = random.Random(f"{SEED} {kind}"), dict[str, str]()
    for _ in range(100 * NUM_QUESTIONS):
        if len(found) == NUM_QUESTIONS:
            break
        question, answer = KINDS[kind](rng)
        found[question] = answer
    return "".join(json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in found.items())


def _word(word: str) -> str:
    """For the judge `regex`: the word, wherever the answer says it."""
    return rf"(?i)\b{word}\b"


if __name__ == "__main__":
    for kind in KINDS:
        write_text_atomic(FOLDER / f"{kind}.jsonl", rows(kind))
