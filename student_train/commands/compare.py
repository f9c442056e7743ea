"""`student-train compare`, with its prices."""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillroom.errors import ConfigError
from stillroom.program import AsJson, print_result
from student_train.commands.result_lines import compare_lines

if TYPE_CHECKING:
    from student_train.compare.comparing import Price


def compare_sides(
    sides: Annotated[
        list[str],
        typer.Argument(
            metavar="SIDE...", help="Two or more of [NAME=]URL[#MODEL] (OpenAI-compatible servers) and [NAME=]FOLDER."
        ),
    ],
    cache: Annotated[list[Path], typer.Option(help="Cache with the prompts. Repeatable.")],
    where: Annotated[str, typer.Option(help="SQL condition on chains.")] = "split = 'heldout'",
    prompts: Annotated[int, typer.Option(min=1, help="Maximum prompts; only those that name a judge.")] = 200,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per answer.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Concurrent requests per server.")] = 4,
    timeout_s: Annotated[
        float, typer.Option(min=0.1, help="Maximum wait for a server's next bytes, in seconds.")
    ] = 120.0,
    price: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=IN/OUT", help="Price of a million prompt and answer tokens. Repeatable."),
    ] = None,
    price_per_hour: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PRICE", help="Price of an hour of the machine that answers. Repeatable."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Side that the others are compared with: a name, best or all. Default: the first."),
    ] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable that holds the servers' key.")] = None,
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("compare.html"),
    as_json: AsJson = False,
) -> None:
    """Compare served students on the same held-out prompts: accuracy in pairs, latency, tokens, cost."""
    from stillroom.storage.paths import check_out
    from student_train.answers import GenerateConfig
    from student_train.compare.comparing import compare, prompts_of
    from student_train.compare.page import write_page
    from student_train.compare.sides import open_sides

    check_out("--out", out)
    if api_key_env is not None and api_key_env not in os.environ:
        raise ConfigError(f"--api-key-env {api_key_env}: this environment variable is not set")
    api_key = None if api_key_env is None else os.environ[api_key_env]
    prices = _prices(price or [], price_per_hour or [])
    config = GenerateConfig(prompts, max_new_tokens, temperature)
    asked = prompts_of(cache, where, prompts)
    opened = open_sides(sides, api_key, timeout_s)
    result, answered = compare(opened, asked, config, concurrency, prices, against)
    write_page(result, answered, asked, out)
    print_result({**result, "page": str(out)}, compare_lines({**result, "page": str(out)}), as_json)


def _prices(of_tokens: list[str], of_hours: list[str]) -> "dict[str, Price]":
    """Raises ConfigError for anything but NAME=IN/OUT and NAME=PRICE."""
    from student_train.compare.comparing import Price

    prices: dict[str, Price] = {}
    for option, given in [*(("--price", one) for one in of_tokens), *(("--price-per-hour", one) for one in of_hours)]:
        name, _, numbers = given.partition("=")
        try:
            found = dict(zip(_PRICE_PARTS[option], map(float, numbers.split("/")), strict=True))
            if not all(0 <= one < math.inf for one in found.values()):
                raise ValueError
        except ValueError:
            raise ConfigError(f"{option} {given}: {_PRICE_HELP[option]}") from None
        prices[name] = replace(prices.get(name, Price()), **found)
    return prices


_PRICE_PARTS = {"--price": ("prompt", "completion"), "--price-per-hour": ("hour",)}
_PRICE_HELP = {
    "--price": "write NAME=IN/OUT, prices of a million tokens, e.g. int8=0.1/0.4",
    "--price-per-hour": "write NAME=PRICE, e.g. int8=2.5",
}
