"""docs/configuration.md is what the models say, and every key says what it is."""

from tools.config_reference import PAGE, fields_without_text, reference


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: python -m tools.config_reference"


def test_every_key_has_a_text() -> None:
    assert fields_without_text() == []


def test_every_block_has_its_keys() -> None:
    page = reference()
    for said in (
        "| `cache` | path | **required** |",
        "### `prompts.sources[] (kind: jsonl)`",
        "| `max_support` | whole number, at least 1, at most 1024 | `8` | Maximum exact entries per token",
        "### `stages[].lora`",
        "### `engine (kind: server)`",
    ):
        assert said in page
