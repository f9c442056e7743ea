"""Reports: whole, self-contained, escaped, in the reader's theme, readable on a phone; a browser sees what we mean."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from shared.catalog import Catalog
from shared.charts import Change, Group, Line, bars, before_after, histogram, line_chart
from shared.errors import ConfigError, DataError
from shared.reader import open_cache
from shared.report import Figure, Number, Numbers, Section, Table, Text, write_report
from student_train.report import student_sections, write_student_report
from teacher_cache.ask.report import cache_sections, pass_rate_figures, write_cache_report
from teacher_cache.ask.show_page import write_chain_page
from teacher_cache.ask.signal_sample import sample_signals
from teacher_cache.ask.stats import cache_stats
from tests.caches import make_cache

NASTY = "<script>alert(1)</script> & $x^2$ {{ 7 * 7 }}"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --hide-scrollbars"
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")


def fake_run(folder: Path, num_steps: int = 80, scale: float = 1.0) -> Path:
    """A run folder with the two files that a report reads."""
    folder.mkdir(parents=True)
    steps = [
        {
            "stage": "distill",
            "stage_number": 0,
            "step": step,
            "epoch": 0,
            "loss": scale * (0.3 + 2 / step),
            "parts": {"forward_kl_tail_bucket": scale * (0.2 + 2 / step), "cross_entropy": 0.9 + 1 / step},
            "weights": {"forward_kl_tail_bucket": 0.9, "cross_entropy": 0.1},
            "learning_rate": 1e-4,
            "grad_norm": None,
            "num_tokens": 1000,
            "num_loss_tokens": 900,
            "tokens_per_s": 500.0,
            "stall_frac": 0.01,
            "memory_gib": 1.5,
            "step_s": 2.0,
            "time_s": 2.0 * step,
        }
        for step in range(1, num_steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    evals = [evaluation(0, 2.0 * scale, 0.4), evaluation(num_steps, 0.5 * scale, 0.7)]
    (folder / "eval.json").write_text(json.dumps(evals))
    return folder


def evaluation(step: int, kl: float, agreement: float) -> dict[str, object]:
    return {
        "stage": "distill",
        "stage_number": 0,
        "step": step,
        "num_chains": 8,
        "num_tokens": 2000,
        "cross_entropy": kl + 0.5,
        "forward_kl": kl,
        "reverse_kl": kl,
        "js": kl / 6,
        "top1_agreement": agreement,
        "accuracy": agreement,
        "confidence": 0.7,
        "confidence_minus_accuracy": 0.0,
        "entropy": 0.5,
    }


class Outline(HTMLParser):
    """Text of a page by kind of element, and whether its elements are closed."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data


def outline(path: Path) -> Outline:
    parsed = Outline()
    parsed.feed(path.read_text(encoding="utf-8"))
    assert parsed.open == []
    return parsed


def assert_self_contained(page: str) -> None:
    assert "<script" not in page
    assert not re.search(r"""(?:src|href)=["'](?!#)""", page)
    assert "url(http" not in page
    assert "http://" not in page.replace("http-equiv", "")
    assert "default-src 'none'" in page
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page


@pytest.mark.parametrize("codec", ["topk-u8", "topk-f32"])
def test_a_cache_report_says_what_the_cache_holds(tmp_path: Path, codec: str) -> None:
    made = make_cache(tmp_path / "cache", num_chains=100, codec=codec, max_tokens=200, unfinished_frac=0.0)
    write_cache_report(made.catalog, tmp_path / "report.html", price_per_hour=2.0)
    page = (tmp_path / "report.html").read_text()
    assert_self_contained(page)
    found = outline(tmp_path / "report.html")
    tokens = sum(len(chain.token_ids) for chain in made.chains)
    assert "100" in found.texts["dd"]
    assert any(f"{tokens / 1000:.1f}k" in text for text in found.texts["dd"])
    titles = " ".join(found.texts["h3"])
    assert re.search(r"Right chains are (shorter|longer|about as long)", titles)
    assert "is easiest" in titles
    assert "The teacher" in titles
    assert "of the bytes" in titles
    assert found.texts["text"].count("completion tokens of a chain") == 1
    assert "synthetic-teacher" in " ".join(found.texts["td"])


def test_a_title_claims_nothing_from_a_handful_of_chains(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache", num_chains=12)
    write_cache_report(made.catalog, tmp_path / "report.html")
    titles = " ".join(outline(tmp_path / "report.html").texts["h3"])
    assert "Right chains" not in titles
    assert "Half of the chains have" in titles


@pytest.mark.parametrize(
    ("rates", "title"),
    [
        ({"a": 0.9, "b": 0.2}, "a is easiest (90% right), b hardest (20%)"),
        ({"a": 0.1, "b": 0.0, "c": 0.0}, "a is easiest (10% right), 2 sources have 0%"),
        ({"a": 0.0, "b": 0.0}, "All 2 sources have 0% right"),
        ({"a": 0.5}, "a: 50% right"),
    ],
)
def test_ties_of_sources_are_told_as_such(tmp_path: Path, rates: dict[str, float], title: str) -> None:
    stats = cache_stats(make_cache(tmp_path / "cache", num_chains=4).catalog)
    one = next(iter(stats.by_source.values()))
    sources = {name: one.model_copy(update={"pass_rate": rate, "num_judged": 50}) for name, rate in rates.items()}
    (figure,) = pass_rate_figures(stats.model_copy(update={"by_source": sources}))
    assert figure.title == title


def test_an_empty_cache_has_a_report(tmp_path: Path) -> None:
    write_cache_report(Catalog.create(tmp_path / "empty"), tmp_path / "report.html")
    assert "0" in outline(tmp_path / "report.html").texts["dd"]


def test_a_large_cache_is_sampled_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_cache(tmp_path / "cache", num_chains=60)
    whole = sample_signals(made.catalog)
    part = sample_signals(made.catalog, max_tokens=300)
    assert whole is not None
    assert part is not None
    assert whole.is_whole
    assert len(whole.token_ids_T) == sum(len(chain.token_ids) for chain in made.chains)
    assert not part.is_whole
    assert 300 <= len(part.token_ids_T) < len(whole.token_ids_T)
    monkeypatch.setattr("teacher_cache.ask.report.sample_signals", lambda catalog: sample_signals(catalog, 300))
    intros = " ".join(section.intro for section in cache_sections(made.catalog))
    assert "From a sample of" in intros


def test_a_student_report_tells_before_from_after(tmp_path: Path) -> None:
    write_student_report([fake_run(tmp_path / "run")], tmp_path / "report.html")
    assert_self_contained((tmp_path / "report.html").read_text())
    found = outline(tmp_path / "report.html")
    assert "Held-out KL to the teacher is 75% lower than before training" in found.texts["h3"]
    assert "2.000 → 0.500 nats (-75%)" in found.texts["text"]
    assert "forward kl tail bucket" in found.texts["text"]
    assert [text for text in found.texts["td"] if text.startswith("distill")] == ["distill, step 0", "distill, step 80"]


def test_runs_are_compared_by_name(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / "a" / "run"), fake_run(tmp_path / "b" / "run", scale=0.5)]
    write_student_report(runs, tmp_path / "report.html")
    found = outline(tmp_path / "report.html")
    assert "a/run" in found.texts["td"]
    assert any("best is b/run" in title for title in found.texts["h3"])


def test_evaluations_on_other_chains_are_not_compared(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / name) for name in ("a", "b")]
    warning = "The runs were evaluated on different selections of chains"
    write_student_report(runs, tmp_path / "same.html")
    assert warning not in (tmp_path / "same.html").read_text()
    evals = [{**one, "selection": "another"} for one in json.loads((runs[1] / "eval.json").read_text())]
    (runs[1] / "eval.json").write_text(json.dumps(evals))
    write_student_report(runs, tmp_path / "different.html")
    assert warning in (tmp_path / "different.html").read_text()
    # Within a run the curve is of the chains of its last evaluation: here that is one point, and no curve.
    (runs[0] / "eval.json").write_text(json.dumps([evaluation(0, 2.0, 0.4), {**evals[1], "step": 80}]))
    write_student_report(runs[:1], tmp_path / "changed.html")
    assert not any(title.startswith("Held-out KL") for title in outline(tmp_path / "changed.html").texts["h3"])


def test_runs_at_every_stage_have_a_report(tmp_path: Path) -> None:
    begun = fake_run(tmp_path / "begun", num_steps=1)
    (begun / "eval.json").unlink()
    write_student_report([begun], tmp_path / "begun.html")
    evaluated = fake_run(tmp_path / "evaluated")
    (evaluated / "metrics.jsonl").unlink()
    write_student_report([evaluated], tmp_path / "evaluated.html")
    with pytest.raises(DataError, match="name the folder of a run"):
        student_sections(tmp_path)
    with pytest.raises(ConfigError, match="no run"):
        student_sections()


def test_everything_from_outside_is_escaped(tmp_path: Path) -> None:
    sections = [
        Section(NASTY, [Numbers([Number(NASTY, NASTY, NASTY)]), Text(NASTY)], NASTY),
        Section("charts", [Figure(NASTY, svg, NASTY) for svg in nasty_charts()]),
        Section("table", [Table(NASTY, [NASTY], [[NASTY]], NASTY)]),
        Section("left out", []),
    ]
    write_report(tmp_path / "x.html", NASTY, sections, NASTY)
    page = (tmp_path / "x.html").read_text()
    assert_self_contained(page)
    assert "{{ 7 * 7 }}" in page
    assert "left out" not in page
    assert outline(tmp_path / "x.html").tags.isdisjoint({"script", "b", "img"})


def nasty_charts() -> list[str]:
    return [
        line_chart([Line(NASTY, [0, 1], [1, 2]), Line("数$", [0, 1], [1, 2.01])], NASTY, NASTY),
        histogram([Group(NASTY, [1.0, 2.0, 2.0]), Group("", [5.0])], NASTY),
        bars([NASTY, "b"], [1.0, 0.0], [NASTY, "x"], NASTY),
        before_after([Change(NASTY, 2.0, 1.0, NASTY), Change("zero", 0.0, 0.0, "0")]),
    ]


@pytest.mark.parametrize(
    "svg",
    [
        line_chart([Line("", [3.0], [1.0])], "x", "y"),
        line_chart([Line("a", np.arange(5), np.ones(5), np.zeros(5), np.full(5, 2.0))], "x", "y", from_zero=True),
        line_chart([Line("a", [0, 1, 2], [1e-3, 1, 1e3])], "x", "y", log_y=True),
        histogram([Group("one value", [4.0, 4.0])], "x"),
        histogram([Group("", np.linspace(0, 1, 100))], "x"),
        bars(["only"], [0.0], ["0"], "x"),
        before_after([Change("a", 1.0, 2.0, "b")]),
    ],
)
def test_charts_take_the_colours_and_the_width_of_the_page(svg: str) -> None:
    assert svg.startswith("<svg viewBox=")
    assert "var(--" in svg
    assert "#fe" not in svg
    assert "font-family" not in svg
    assert "http" not in svg
    head = svg[: svg.index(">")]
    assert "width=" not in head
    assert "height=" not in head
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {"#ffffff", "#000000"}


def test_lines_that_end_together_have_names_apart() -> None:
    svg = line_chart([Line(name, [0, 1], [0, 1 + number / 1000]) for number, name in enumerate("abc")], "x", "y")
    heights = [float(match[1]) for match in re.finditer(r'translate\([0-9.]+ ([0-9.]+)\)"[^>]*>[abc]</text>', svg)] or [
        float(match[1]) for match in re.finditer(r'<text[^>]* y="([0-9.]+)"[^>]*>[abc]</text>', svg)
    ]
    assert len(heights) == 3
    gaps = np.diff(sorted(heights))
    assert (gaps > 11).all()


def browse(page: Path, folder: Path, *flags: str) -> str:
    """The document after a real browser has laid it out."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *QUIET.split(), f"--user-data-dir={folder}", *flags, f"file://{page}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout


def colours_of(path: Path) -> tuple[float, float]:
    """Mean brightness of a picture, 0 to 1, and the share of its pixels that are not the commonest colour."""
    from matplotlib.image import imread

    pixels = np.asarray(imread(path))[..., :3]
    flat = (pixels.reshape(-1, 3) * 255).astype(np.int64) @ np.array([65536, 256, 1])
    _, counts = np.unique(flat, return_counts=True)
    return float(pixels.mean()), 1 - counts.max() / len(flat)


@needs_browser
def test_a_browser_shows_both_themes_and_no_sideways_scrolling_on_a_phone(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache", num_chains=40, max_tokens=120)
    page = tmp_path / "report.html"
    sections = [*cache_sections(made.catalog), *student_sections(fake_run(tmp_path / "run"))]
    write_report(page, "Both sides", sections)
    for theme, flag in (
        ("light", "--blink-settings=preferredColorScheme=1"),
        ("dark", "--blink-settings=preferredColorScheme=0"),
    ):
        browse(page, tmp_path / theme, flag, "--window-size=1280,1600", f"--screenshot={tmp_path / theme}.png")
    light, dark = colours_of(tmp_path / "light.png"), colours_of(tmp_path / "dark.png")
    assert light[0] > 0.8
    assert dark[0] < 0.3
    assert min(light[1], dark[1]) > 0.05
    # Headless windows are never narrower than 500 pixels: a frame stands in for the phone.
    measure = (
        '<iframe id="phone" src="report.html" style="width:390px;height:800px;border:0"></iframe><p id="answer"></p>'
        "<script>phone.onload = () => { const page = phone.contentDocument.documentElement;"
        "answer.textContent = 'scroll ' + page.scrollWidth + ' of ' + page.clientWidth; }</script>"
    )
    (tmp_path / "phone.html").write_text(measure)
    seen = browse(tmp_path / "phone.html", tmp_path / "phone", "--allow-file-access-from-files", "--dump-dom")
    assert "scroll 390 of 390" in seen


@needs_browser
def test_a_browser_shows_the_distribution_of_a_token(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache", num_chains=4)
    with open_cache(made.root) as cache:
        sample = cache.sample(made.chains[0].sample_id)
    write_chain_page(sample, tmp_path / "chain.html", 2)
    seen = browse(tmp_path / "chain.html", tmp_path / "profile", "--dump-dom")
    assert f"Token 2: “{sample.pieces_T[2]}”" in seen
    assert seen.count("outside the support") == 2
