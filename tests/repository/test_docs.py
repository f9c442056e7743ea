"""The documentation keeps up with the programs: links lead somewhere, commands parse, recipes are valid."""

import ast
import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import TypeAdapter, ValidationError

from stillroom.config import StrictModel, validate_config
from student_train.cli import app as student_app
from student_train.config.run import TrainConfig
from teacher_cache.cli import app as teacher_app
from teacher_cache.config import BuildConfig, ScoreConfig
from teacher_cache.states.config import FeaturesConfig
from tests.helpers import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "schemas" / "FORMAT.md"])
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
PROGRAMS = {"teacher-cache": teacher_app, "student-train": student_app}
MODELS: dict[str, type[StrictModel]] = {
    "student": TrainConfig,
    "completions": ScoreConfig,
    "prompts": BuildConfig,
    "chains": FeaturesConfig,
}
WHOLE = {"run", "chains"}
"""Keys that whole configurations alone have."""


def blocks(page: Path, *languages: str) -> Iterator[str]:
    text = page.read_text(encoding="utf-8")
    for language, body in re.findall(r"^```(\w*).*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language in languages:
            yield body


def commands() -> Iterator[tuple[str, str]]:
    """Page and command line of every command of ours, those that scripts put variables into aside."""
    for page in PAGES:
        for body in blocks(page, "sh", "bash", ""):
            for line in body.replace("\\\n", " ").splitlines():
                if line.startswith(tuple(f"{name} " for name in PROGRAMS)):
                    yield page.name, line


def configurations() -> Iterator[tuple[str, str]]:
    """Page and YAML of every whole configuration; blocks of some keys alone are fragments."""
    for page in PAGES:
        for body in blocks(page, "yaml"):
            found = yaml.safe_load(body)
            if isinstance(found, dict) and WHOLE & found.keys():
                yield page.name, body


@pytest.mark.parametrize("page", [*PAGES, *RESULTS], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if heading:
            assert heading in anchors(target), link


def anchors(page: Path) -> set[str]:
    """Names of a page's headings as links write them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(("page", "line"), list(commands()), ids=lambda value: str(value)[:60])
def test_commands_parse(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    end = min([words.index(word) for word in ("<", ">", "|", "&") if word in words], default=len(words))
    program, name, *arguments = words[:end]
    parse(program, name, arguments)


def parse(program: str, name: str, arguments: list[str]) -> None:
    command_of(program, name).make_context(name, arguments)


def command_of(program: str, name: str) -> Any:
    group = typer.main.get_command(PROGRAMS[program])
    assert isinstance(group, typer.core.TyperGroup)
    command = group.get_command(click_context(group), name)
    assert command is not None, f"{program} has no command {name}"
    return command


def click_context(group: typer.core.TyperGroup) -> Any:
    return group.make_context(group.name, ["doctor"])


def test_a_wrong_command_is_found() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse("teacher-cache", "stats", ["cache", "--jsom"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_sentences_have_their_options(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for program, name, rest in re.findall(rf"`({'|'.join(PROGRAMS)}) ([a-z][\w-]*)([^`]*)`", text):
        known = {option for one in command_of(program, name).params for option in (*one.opts, *one.secondary_opts)}
        assert set(re.findall(r"(?<!\S)--[\w-]+", rest)) <= known, (name, rest)


@pytest.mark.parametrize("page", [*PAGES, *RESULTS], ids=lambda page: page.name)
def test_modules_that_are_run_exist(page: Path) -> None:
    for module in re.findall(r"python -m ((?:benchmarks|tools)(?:\.\w+)+)", page.read_text(encoding="utf-8")):
        assert find_spec(module) is not None, module


@pytest.mark.parametrize(("page", "body"), list(configurations()), ids=lambda value: str(value)[:40])
def test_recipes_are_valid(page: str, body: str) -> None:
    found = yaml.safe_load(body)
    (model,) = [model for key, model in MODELS.items() if key in found]
    assert validate_config(found, model, page).model_dump()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_of_some_keys_alone_are_valid(page: Path) -> None:
    for body in blocks(page, "yaml"):
        found = yaml.safe_load(body)
        if not isinstance(found, dict) or WHOLE & found.keys():
            continue
        for key, value in found.items():
            types = [one.model_fields[key].annotation for one in MODELS.values() if key in one.model_fields]
            assert types or "apiVersion" in found, key
            problems = [problems_of(one, value) for one in types]
            assert not problems or [] in problems, (key, problems)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_parses(page: Path) -> None:
    for body in blocks(page, "python"):
        ast.parse(body)


def problems_of(kind: Any, value: Any) -> list[Any]:
    """What is wrong with a value besides keys that are not shown."""
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        return [one for one in error.errors() if one["type"] != "missing"]
    return []


def test_there_are_recipes_and_commands() -> None:
    assert len(list(configurations())) >= 6
    assert len(list(commands())) >= 50


def sources() -> str:
    """All code, with the pieces of its long texts put together."""
    folders = ("schemas", "shared", "teacher_cache", "student_train")
    code = "\n".join(
        path.read_text(encoding="utf-8") for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))
    )
    return re.sub(r'"\s*\n\s*f?"', "", code)


def test_messages_of_troubleshooting_are_in_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    assert len(quoted) > 20
    foreign = {"operator torchvision::nms does not exist"}
    code = sources()
    assert [one for one in quoted if one not in code and one not in foreign] == []


def test_every_page_is_in_the_index() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    index = (ROOT / "docs" / "decisions" / "README.md").read_text(encoding="utf-8")
    linked = {ROOT / "docs" / "decisions" / name for name in re.findall(r"\((\w+\.md)\)", index)}
    pages = [page for page in PAGES if "docs" in page.parts and page not in linked]
    assert [page.name for page in pages if f"({page.relative_to(ROOT)})" not in readme] == []


def test_every_result_is_in_the_page_of_performance() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert [one.name for one in RESULTS if f"results/{one.name})" not in page] == []
