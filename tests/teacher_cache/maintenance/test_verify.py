"""Verify: a whole cache passes, and every way in which one can be wrong is found and named."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.cache.catalog import Catalog, Table, publish
from stillroom.errors import CorruptError, DataError
from stillroom.log import format_plural
from teacher_cache.maintenance.orphans import find_orphans, lost_commits
from teacher_cache.maintenance.quarantine import verify_command
from teacher_cache.maintenance.verify import VerifyReport, summary_of, verify_cache
from tests.helpers.caches import damage, make_cache, on_disk
from tests.helpers.fake_builds import make_config, make_requests, run_build


@pytest.fixture(params=["topk-f32", "topk-u8"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_cache(tmp_path / "cache", num_chains=30, codec=request.param, num_workers=2).root


@pytest.fixture
def shard(root: Path) -> Path:
    catalog = Catalog(root)
    return on_disk(catalog.chains.path_of(catalog.chains.files()[0]))


def problems(report: VerifyReport) -> list[tuple[str, str]]:
    return [(one.file, one.problem) for one in report.problems]


def register(table: Table, content: pa.Table, worker: str, row_group_size: int = 4) -> str:
    """Adds a shard with any content and a right name."""
    temp = on_disk(table.folder / ".test.tmp")
    pq.write_table(content, temp, row_group_size=row_group_size, write_page_checksum=True)
    file = publish(temp, table.folder, f"test/{worker}-000001", content.num_rows)
    table.commit([file], f"test/{worker}", 1)
    return f"{table.folder.name}/{file.path}"


def test_a_whole_cache_passes(root: Path) -> None:
    report = verify_cache(root)
    assert problems(report) == []
    assert (report.num_shards, report.num_chains, report.orphans) == (3, 30, [])
    assert report.size_bytes == sum(path.stat().st_size for path in (root / "chains").rglob("w*.parquet"))
    assert "30 chains" in summary_of(report)
    assert summary_of(report).endswith("no problems")


@pytest.mark.parametrize("at_frac", [0.0, 0.05, 0.3, 0.5, 0.7, 0.9, 0.99, 1 - 1e-9])
def test_a_flipped_byte_is_found_wherever_it_is(shard: Path, root: Path, at_frac: float) -> None:
    damage(shard, at_frac)
    report = verify_cache(root)
    assert not report.ok
    assert {one.file for one in report.problems} == {f"chains/{shard.relative_to(root / 'chains')}"}
    assert "does not have the bytes that were written" in report.problems[0].problem


def test_a_shard_cut_short_or_missing_is_named(shard: Path, root: Path) -> None:
    name = f"chains/{shard.relative_to(root / 'chains')}"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:1000])
    texts = [text for file, text in problems(verify_cache(root)) if file == name]
    assert texts[0] == f"has 1000 bytes, but {len(whole)} were registered"
    assert any("is not a readable Parquet file" in text for text in texts)
    shard.unlink()
    assert problems(verify_cache(root)) == [(name, "is registered but missing")]


@pytest.mark.parametrize("entry", [0, 1])
def test_a_missing_log_entry_is_named(root: Path, entry: int) -> None:
    (root / "chains" / "_delta_log" / f"{entry:020d}.json").unlink()
    text = f"entry {entry:020d}.json is missing: restore it from a copy; the shards it registered still exist"
    assert problems(verify_cache(root)) == [("chains/_delta_log", text)]
    if entry == 1:
        with pytest.raises(CorruptError) as caught:
            Catalog(root)
        assert str(caught.value) == f"{root}/chains/_delta_log cannot be read: {text}"


@pytest.mark.parametrize("num_lost", [1, 2])
def test_a_lost_newest_log_entry_is_known_from_the_receipts(root: Path, num_lost: int) -> None:
    entries = sorted((root / "chains" / "_delta_log").glob("*.json"))
    for entry in entries[-num_lost:]:
        entry.unlink()
    report = verify_cache(root)
    assert len(report.problems) == num_lost
    assert all("chains/_delta_log" in one.file and "is missing: transaction" in one.problem for one in report.problems)
    assert [one.kind for one in report.orphans] == ["unregistered"] * num_lost
    assert format_plural(num_lost, "orphan") in summary_of(report)


def test_a_lost_entry_shows_though_another_took_its_number(root: Path, shard: Path) -> None:
    table = Catalog(root).chains
    sorted((root / "chains" / "_delta_log").glob("*.json"))[-1].unlink()
    extra = pq.read_table(shard).slice(0, 0)
    register(Catalog(root).chains, extra, "w7")
    assert Catalog(root).chains.version == table.version
    assert any("is missing: transaction" in text for _, text in problems(verify_cache(root)))


def test_entries_below_a_checkpoint_are_missed_too(root: Path) -> None:
    log = root / "chains" / "_delta_log"
    Catalog(root).chains._delta.create_checkpoint()
    (log / f"{1:020d}.json").unlink()
    (found,) = problems(verify_cache(root))
    assert "versions before the checkpoint 3 can no longer be read" in found[1]


def test_orphans_are_listed_and_no_error(root: Path, shard: Path) -> None:
    (shard.parent / f".{shard.name}.1234.tmp").write_bytes(b"half a shard")
    report = verify_cache(root)
    assert report.ok
    assert [(orphan.file.endswith(".tmp"), orphan.size_bytes) for orphan in report.orphans] == [(True, 12)]
    assert find_orphans(Catalog(root).verdicts) == []


def test_rows_that_are_visible_twice_are_named(root: Path, shard: Path) -> None:
    name = register(Catalog(root).chains, pq.read_table(shard), "w9")
    found = [text for file, text in problems(verify_cache(root)) if file == name and "sample_id" in text]
    # The copy has another worker's name in its header too, which is a problem of its own.
    assert len(found) == pq.read_metadata(shard).num_rows
    sample_id = pq.read_table(shard).column("sample_id").to_pylist()[0]
    assert found[0] == f"row 0, column sample_id: {sample_id} is visible more than once"


def replaced(table: pa.Table, column: str, change: Callable[[list[Any]], None]) -> pa.Table:
    """The table with row 5 of a column changed in place, or given another value by returning it through a list."""
    values = table.column(column).to_pylist()
    cell = [values[5]]
    change(cell)
    values[5] = cell[0]
    field = table.schema.field(column)
    place = table.schema.get_field_index(column)
    return table.set_column(place, field, pa.array(values, field.type))


def set_to(value: Any) -> Callable[[list[Any]], None]:
    def change(cell: list[Any]) -> None:
        cell[0] = value

    return change


def put(index: int, value: Any) -> Callable[[list[Any]], None]:
    def change(cell: list[Any]) -> None:
        cell[0][index] = value

    return change


def roll(cell: list[Any]) -> None:
    cell[0] = cell[0][1:] + cell[0][:1]


@pytest.mark.parametrize(
    ("column", "change", "named", "message"),
    [
        ("sample_id", set_to("abc"), "sample_id", "is not 32 hex digits"),
        ("prompt_id", set_to("0" * 32), "prompt_id", "is not the hash of the messages"),
        ("chain_id", set_to("0" * 32), "chain_id", "is not the hash of the token ids"),
        ("metadata", set_to("[1"), "metadata", "is not a JSON object"),
        ("num_tokens", set_to(3), "num_tokens", "is not the length of token_ids"),
        ("reasoning_end", set_to(10_000), "reasoning_end", "lies outside the completion"),
        ("num_reasoning_tokens", set_to(0), "num_reasoning_tokens", "does not follow from reasoning_end"),
        ("prompt_token_ids", put(0, 4000), "prompt_token_ids", "outside the vocabulary of 4000"),
        ("token_ids", put(0, -1), "token_ids", "outside the vocabulary of 4000"),
        ("token_ids", roll, "sampled_logprob", "misaligned"),
        ("sampled_logprob", roll, "sampled_logprob", "misaligned"),
        ("sampled_logprob", put(2, float("nan")), "sampled_logprob", "is not a log probability"),
        ("sampled_rank", put(2, 0), "sampled_rank", "is below 1"),
        ("entropy", put(2, -1.0), "entropy", "is negative"),
        ("topk_ids", put(0, 4000), "topk_ids", "id outside the vocabulary of 4000"),
        ("topk_n", put(0, 100), "topk_n", "is outside 1..max_support"),
        ("mean_logprob", set_to(-9.0), "mean_logprob", "the chain's tokens have"),
        ("mean_entropy", set_to(float("nan")), "mean_entropy", "the chain's tokens have"),
        ("mean_support", set_to(1.0), "mean_support", "the chain's tokens have"),
    ],
)
def test_rows_that_were_written_wrong_are_named(
    root: Path, shard: Path, column: str, change: Callable[[list[Any]], None], named: str, message: str
) -> None:
    content = replaced(pq.read_table(shard), column, change)
    other = root.parent / "other"
    table = Catalog.create(other).chains
    shutil.copytree(root / "runs", other / "runs")
    shutil.copytree(root / "vocab", other / "vocab")
    name = register(table, content, "w0")
    found = problems(verify_cache(other))
    # Row 5 of the shard is row 1 of row group 1.
    assert any(
        file == name and "row group 1" in text and "row 1, column" in text and named in text and message in text
        for file, text in found
    ), found


def test_masses_and_order_are_checked(tmp_path: Path) -> None:
    root = make_cache(tmp_path / "cache", num_chains=10, codec="topk-f32").root
    catalog = Catalog(root)
    content = pq.read_table(catalog.chains.path_of(catalog.chains.files()[0]))
    shutil.rmtree(root / "chains")
    table = Catalog.create(root).chains
    heavier = replaced(content, "tail_logmass", put(0, 0.0))
    swapped = replaced(content, "topk_logprobs", lambda cell: cell[0].__setitem__(slice(0, 2), cell[0][1::-1]))
    names = [register(table, heavier, "w0"), register(Catalog(root).chains, swapped, "w1")]
    found = problems(verify_cache(root))
    assert any(file == names[0] and "do not add up to mass 1" in text for file, text in found)
    assert any(file == names[1] and "increase with rank" in text for file, text in found)


def test_draws_and_log_partitions_are_checked(tmp_path: Path) -> None:
    root = make_cache(tmp_path / "cache", 10, "topk-f32", max_support=2, draws=2, temperatures=(2.0,)).root
    assert problems(verify_cache(root)) == []
    catalog = Catalog(root)
    content = pq.read_table(catalog.chains.path_of(catalog.chains.files()[0]))
    shutil.rmtree(root / "chains")
    table = Catalog.create(root).chains
    (token, *_) = (t for t, num in enumerate(content["draw_n"][5].as_py()) if num)
    place = sum(content["topk_n"][5].as_py()[: token + 1]) + sum(content["draw_n"][5].as_py()[:token])
    again = replaced(content, "topk_ids", lambda cell: cell[0].__setitem__(place, cell[0][place - 1]))
    no_number = replaced(content, "log_partitions", lambda cell: cell[0].__setitem__(0, float("nan")))
    names = [register(table, again, "w0"), register(Catalog(root).chains, no_number, "w1")]
    found = problems(verify_cache(root))
    assert any(file == names[0] and "row 1, column draw_n: token" in text for file, text in found)
    assert any(file == names[1] and "row 1, column log_partitions: token 0" in text for file, text in found)


def test_columns_counts_and_companions_are_checked(root: Path, shard: Path) -> None:
    content = pq.read_table(shard)
    table = Catalog(root).chains
    without = register(table, content.drop_columns(["seed"]), "w8")
    manifest = next((root / "runs").iterdir())
    manifest.unlink()
    vocab = next((root / "vocab").iterdir())
    vocab.write_bytes(b"nothing")
    verdict = Catalog(root).verdicts.path_of(Catalog(root).verdicts.files()[0])
    damage(verdict)
    found = problems(verify_cache(root))
    assert any(file == without and "seed is missing" in text for file, text in found)
    # Once, however many shards it has.
    again = "running its build again writes it"
    assert [text for file, text in found if file == f"runs/{manifest.name}"] == [
        f"is missing, although the run has 4 shards: {again}"
    ]
    assert any(file == f"vocab/{vocab.name}" and "not a readable Parquet file" in text for file, text in found)
    assert any(file.startswith("verdicts/") and "bytes that were written" in text for file, text in found)
    vocab.unlink()
    manifest.write_text("{")
    found = problems(verify_cache(root))
    assert (f"vocab/{vocab.name}", f"is missing, so tokens have no text in SQL: {again}") in found
    assert any(file == f"runs/{manifest.name}" and "is not a run manifest (Expecting" in text for file, text in found)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"temperature": 0.6', '"temperature": 0.7', "make the run id fake_"),
        ('"name": "fake"', '"name": "fame"', "make the run id fame_"),
        ('"revision"', '"revisioo"', "has the unknown key 'revisioo'"),
        ('"capture"', '"capturd"', "is not a run manifest (capture: Field required)"),
        ('"run_id": "fake', '"run_id": "fakd', "is that of run fakd_"),
        ("b" * 32, "b" * 31 + "a", "but its shards' headers have " + "b" * 32),
    ],
)
def test_a_changed_manifest_is_found(tmp_path: Path, before: str, after: str, message: str) -> None:
    cache = tmp_path / "cache"
    run_build(make_config(cache), make_requests(4))
    assert problems(verify_cache(cache)) == []
    (manifest,) = (cache / "runs").glob("*.json")
    text = manifest.read_text()
    assert before in text
    manifest.write_text(text.replace(before, after, 1))
    ((file, problem),) = problems(verify_cache(cache))
    assert file == f"runs/{manifest.name}"
    assert message in problem
    assert problem.endswith("restore it from a copy, or remove it, and running its build again writes it")


def test_an_entry_cut_short_is_named_with_its_remedy(root: Path) -> None:
    entry = root / "chains" / "_delta_log" / f"{1:020d}.json"
    entry.write_bytes(entry.read_bytes()[:40])
    text = f"entry {entry.name} is damaged or truncated: restore it from a copy; the shards it registered still exist"
    assert problems(verify_cache(root)) == [("chains/_delta_log", text)]
    with pytest.raises(CorruptError) as caught:
        Catalog(root)
    assert str(caught.value) == f"{root}/chains/_delta_log cannot be read: {text}"
    shutil.rmtree(root / "verdicts")
    assert ("verdicts/_delta_log", "is missing") in problems(verify_cache(root))


def test_the_next_step_comes_last(root: Path, shard: Path) -> None:
    assert "--quarantine" not in "".join(verify_command(root, quarantine=False)[1])
    damage(shard)
    step = f"teacher-cache verify {root} --quarantine removes damaged files; the next build regenerates their rows"
    assert verify_command(root, quarantine=False)[1][-1] == step
    assert step not in verify_command(root, quarantine=True)[1]


def test_a_path_without_a_cache_says_why(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for path, reason in (
        ("nowhere", " is not a cache: it does not exist"),
        ("file", " is a file"),
        ("empty", " is not a cache: it has no chains/_delta_log"),
        (".", f" is not a cache: did you mean {root}?"),
    ):
        for look in (verify_cache, Catalog):
            with pytest.raises(DataError) as caught:
                look(tmp_path / path)
            assert f"{tmp_path / path}{reason}" in str(caught.value)
    deeper = tmp_path / "demo" / "below"
    deeper.parent.mkdir()
    root.rename(deeper)
    with pytest.raises(DataError, match=r"did you mean .*demo/below"):
        verify_cache(tmp_path)


def test_a_commit_made_meanwhile_is_not_a_lost_entry(root: Path, shard: Path) -> None:
    opened_before = Catalog(root).chains
    register(Catalog(root).chains, pq.read_table(shard).slice(0, 0), "w7")
    assert lost_commits(opened_before) == []
