"""One chain shown: parts, alternatives, and text of a model that stays text."""

import base64
import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

from stillroom.cache.reader import Sample, open_cache
from stillroom.errors import ConfigError
from stillroom.html.charts import WIDE_IN
from stillroom.schema.records import Signals
from teacher_cache.inspect.show import (
    candidate_lines,
    levels_of,
    parts_of,
    print_chain,
    print_token,
    top1_prob_of,
    write_chain_page,
)
from tests.helpers.caches import make_cache

NASTY = "<script>alert(1)</script>\x1b[31m\u202e[bold]"


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    made = make_cache(tmp_path_factory.mktemp("cache"), num_chains=4, min_tokens=20, unfinished_frac=0.0)
    with open_cache(made.root) as cache:
        return cache.sample(made.chains[0].sample_id)


@pytest.fixture
def nasty(sample: Sample) -> Sample:
    """The same chain with hostile text wherever text can be."""
    return Sample(
        chain={**sample.chain, "source": NASTY, "judge": NASTY, "reference": NASTY},
        messages=[{"role": NASTY, "content": NASTY + "</script><img src=x onerror=alert(2)>"}],
        token_ids_T=sample.token_ids_T,
        signals=sample.signals,
        header=sample.header,
        piece_of=dict.fromkeys(sample.piece_of, NASTY + "</script>"),
    )


def test_the_whole_chain_is_printed_in_parts(sample: Sample, capsys: pytest.CaptureFixture[str]) -> None:
    print_chain(sample)
    text = capsys.readouterr().out
    assert sample.chain["sample_id"] in text
    assert text.index("── prompt, user") < text.index("── reasoning") < text.index("── answer")
    end = sample.chain["reasoning_end"]
    assert "".join(sample.pieces_T[:end]) in text
    assert "".join(sample.pieces_T[end:]) in text
    assert "\x1b" not in text


def test_a_token_lists_its_candidates_and_marks_the_sampled_one(
    sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    for position in range(len(sample.token_ids_T)):
        lines = candidate_lines(sample, position)
        signals = sample.signals.slice(position, position + 1)
        rank, support = int(signals.sampled_rank_T[0]), int(signals.topk_n_T[0])
        if rank <= support:
            assert [number for number, line in enumerate(lines, 1) if "sampled" in line] == [rank]
        assert "outside the support" in lines[support]
    print_token(sample, 3)
    assert "token 3 of" in capsys.readouterr().out
    for position in (-1, len(sample.token_ids_T)):
        with pytest.raises(ConfigError, match="tokens 0 to"):
            print_token(sample, position)


def test_draws_from_the_tail_are_named(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache", num_chains=8, codec="topk-u8", draws=3)
    with open_cache(made.root) as cache:
        sample = cache.sample(made.chains[0].sample_id)
    draws = sample.signals.draws
    assert draws is not None
    position = int(np.argmax(draws.n_T > 0))
    named = {sample.piece_of[int(token)] for token in draws.slice(position, position + 1).ids_D}
    (line,) = [line for line in candidate_lines(sample, position) if "drawn from the tail" in line]
    assert all(f"'{piece}'" in line for piece in named)
    write_chain_page(sample, tmp_path / "chain.html")
    assert "Drawn from the tail" in (tmp_path / "chain.html").read_text()


def test_certainty_is_that_of_the_first_choice(sample: Sample) -> None:
    probs_T = top1_prob_of(sample)
    assert np.allclose(probs_T, np.exp(sample.dense()[1][:, 0]))
    assert levels_of(np.array([0.95, 0.8, 0.6, 0.4, 0.1], np.float32)) == [0, 1, 2, 3, 4]


def test_reasoning_that_never_ended_is_one_part(sample: Sample) -> None:
    num_tokens = len(sample.token_ids_T)
    for end, names in ((None, ["reasoning, which never ended"]), (0, ["answer"]), (num_tokens, ["reasoning"])):
        cut = Sample({**sample.chain, "reasoning_end": end}, [], sample.token_ids_T, sample.signals, sample.header, {})
        assert [name for name, _, _ in parts_of(cut)] == names


def test_terminal_escapes_stay_text(nasty: Sample, capsys: pytest.CaptureFixture[str]) -> None:
    print_chain(nasty)
    print_token(nasty, 2)
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\x1b[31m\\u202e[bold]" in text


def test_markup_in_a_chain_stays_text_on_the_page(nasty: Sample, tmp_path: Path) -> None:
    write_chain_page(nasty, tmp_path / "chain.html", 2)
    page = (tmp_path / "chain.html").read_text()
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 2
    digest = base64.b64encode(hashlib.sha256(scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "alert(" not in scripts[1]
    assert "<img" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "\x1b" not in page
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", page)
    with pytest.raises(ConfigError, match="tokens 0 to"):
        write_chain_page(nasty, tmp_path / "chain.html", 10_000)


def test_signals_of_one_token_make_a_page(sample: Sample, tmp_path: Path) -> None:
    one: Signals = sample.signals.slice(0, 1)
    chain = {**sample.chain, "reasoning_end": None}
    write_chain_page(
        Sample(chain, sample.messages, sample.token_ids_T[:1], one, sample.header, sample.piece_of), tmp_path / "x.html"
    )
    assert "which never ended" in (tmp_path / "x.html").read_text()


def test_the_chart_of_a_page_takes_its_width(sample: Sample, tmp_path: Path) -> None:
    write_chain_page(sample, tmp_path / "chain.html")
    chart = re.search(r'<svg[^>]*viewBox="0 0 ([0-9.]+) ', (tmp_path / "chain.html").read_text())
    assert chart is not None
    assert float(chart[1]) == 72 * WIDE_IN


@pytest.mark.parametrize("codec", ["topk-u8", "topk-f32"])
def test_a_rounded_list_says_why_it_differs(tmp_path: Path, codec: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_cache(tmp_path / "cache", num_chains=2, codec=codec)
    with open_cache(made.root) as cache:
        print_token(cache.sample(made.chains[0].sample_id), 0)
    assert ("stored as 8-bit codes" in capsys.readouterr().out) == (codec == "topk-u8")
