"""Caches in an object store, against a real S3 server: what is read equals the local cache by key and bytes, what is
written is visible whole or not at all, and a store that cannot be used is one line.
"""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from obstore.exceptions import GenericError
from typer.testing import CliRunner

from stillroom.cache.catalog import Catalog, DataFile, Table
from stillroom.cache.features import FeatureSet
from stillroom.cache.reader import open_cache
from stillroom.cache.shards import open_shard
from stillroom.config import validate_config
from stillroom.errors import CacheConflict, ConfigError, CorruptError, DataError, StillroomError
from stillroom.storage import objects
from stillroom.storage.objects import ObjectPath
from stillroom.storage.paths import Location, create_file, location, spool
from student_train.config.data import CacheConfig
from student_train.data.epoch_plan import PlanSpec
from student_train.data.freezing import CacheSource, SelectionRequest, freeze
from student_train.data.pack import Pack
from student_train.data.rows import read_rows
from student_train.data.selection import load_selection
from student_train.data.stream import PackStream
from teacher_cache.cli import app
from teacher_cache.engine.fake import FakeEngine
from teacher_cache.maintenance.copy import copy_caches
from teacher_cache.maintenance.gc import gc_cache
from teacher_cache.maintenance.verify import verify_cache
from teacher_cache.prompts.config import PromptsConfig
from teacher_cache.prompts.prompts import load_prompts
from tests.helpers import ROOT
from tests.helpers.caches import SyntheticCache, make_cache, visible_ids
from tests.helpers.fake_builds import PART_CHAINS, join_build, make_config, make_engine, make_requests, run_build
from tests.helpers.feature_sets import add_features
from tests.helpers.object_store import ACCESS_KEY, BUCKET, SECRET_KEY, ObjectStore, object_store
from tests.helpers.programs import Program
from tests.helpers.slow_link import slow_link


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store(tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture
def store(server: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ObjectPath:
    """An empty prefix of the server."""
    server.use(monkeypatch)
    root = location(f"s3://{BUCKET}/{tmp_path.name}")
    assert isinstance(root, ObjectPath)
    return root


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> SyntheticCache:
    return make_cache(tmp_path_factory.mktemp("local") / "cache", num_chains=60, codec="topk-u8", max_tokens=40)


def upload(folder: Path, root: ObjectPath) -> None:
    """The files as any tool would copy them, logs last."""
    files = sorted((one for one in folder.rglob("*") if one.is_file()), key=lambda one: "_delta_log" in one.parts)
    for path in files:
        (root / path.relative_to(folder).as_posix()).upload(path)


def epoch(root: Location, folder: Path) -> list[Pack]:
    folder.mkdir()
    selection = freeze(folder / "selection.parquet", SelectionRequest([CacheSource(root)], "split = 'train'"))
    assert load_selection(folder / "selection.parquet").header == selection.header
    with PackStream(selection, PlanSpec(pack_tokens=128), packs_per_step=1, num_epochs=1, buffer_mib=1) as stream:
        return list(stream)


def test_names_of_places(tmp_path: Path) -> None:
    root = location("s3://bucket/a//b/")
    assert (str(root), str(root / "c" / "d.parquet"), (root / "x/y.tmp").name) == (
        "s3://bucket/a/b",
        "s3://bucket/a/b/c/d.parquet",
        "y.tmp",
    )
    assert location(str(tmp_path)) == tmp_path
    assert location("a:b") == Path("a:b")
    for wrong in ("s3://bucket", "s3:///a", "s3://bucket/../x", "http://host/a", "S3://bucket/a"):
        with pytest.raises(ConfigError, match="BUCKET/PREFIX"):
            location(wrong)
    with pytest.raises(ConfigError, match=r"path: ftp://x/y is not supported.*ftp://x/y"):
        validate_config({"path": "ftp://x/y"}, CacheConfig, "run.yaml")
    config = CacheConfig(path=location("gs://bucket/a"))
    assert config.model_dump(mode="json")["path"] == "gs://bucket/a"
    assert CacheConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_store_without_conditional_puts_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    error = GenericError("Error performing PUT, status code: 501 Not Implemented ... retry_timeout: 60s")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setattr("obstore.put", Mock(side_effect=error))
    with pytest.raises(DataError, match=r"AWS .* refuses conditional puts, without which workers cannot share a cache"):
        ObjectPath("s3", "bucket/x").create(b"")


def test_prompts_are_read_from_the_store(store: ObjectPath) -> None:
    lines = [f'{{"q": "{number}+1?"}}\n'.encode() for number in range(4)]
    (store / "data/train/a.jsonl").write_bytes(lines[0])
    (store / "data/train/b.jsonl.zst").write_bytes(pa.compress(lines[1], codec="zstd", asbytes=True))
    (store / "data/test/c.jsonl").write_bytes(lines[2])
    (store / "data/.cache/d.jsonl").write_bytes(b"not data")
    (store / "page.jsonl").write_bytes(b"<html>")
    table = io.BytesIO()
    pq.write_table(pa.table({"q": ["3+1?"]}), table)
    (store / "x.parquet").write_bytes(table.getvalue())

    def questions(name: str, kind: str = "jsonl", **more: str) -> str:
        source = {"kind": kind, "name": "s", "path": f"{store}/{name}", "prompt_field": "q", **more}
        loaded = load_prompts(validate_config({"sources": [source]}, PromptsConfig, "test"))
        return " ".join(sorted(prompt.messages[0].content[0] for prompt in loaded.prompts))

    assert questions("data", split="train") == "0 1"
    assert questions("data/*/*.jsonl") == "0 2"
    assert questions("data/**/*.zst") == "1"
    assert questions("x.parquet", "parquet") == "3"
    wrong = {
        "data": "holds the splits test and train",
        "page.jsonl": "is a web page",
        "none.jsonl": "does not exist",
        "*.x": "no file",
    }
    for name, message in wrong.items():
        with pytest.raises(DataError, match=message):
            questions(name)
    with pytest.raises(DataError, match=r"page\.jsonl is a web page"):
        questions("page.jsonl", "parquet")


def test_an_epoch_from_a_distant_store_is_the_local_one_bit_for_bit(
    local: SyntheticCache, store: ObjectPath, server: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    upload(local.root, store)
    here = epoch(local.root, tmp_path / "here")
    with slow_link(server.port, 0.005) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        there = epoch(store, tmp_path / "there")
    assert len(here) == len(there) > 5
    for one, other in zip(here, there, strict=True):
        assert_same(asdict(one), asdict(other))


def assert_same(one: object, other: object) -> None:
    if isinstance(one, dict) and isinstance(other, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same(value, other[key])
    elif isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, other)
    else:
        assert one == other


def test_readers_ask_the_store_and_nothing_else_of_it(local: SyntheticCache, store: ObjectPath) -> None:
    upload(local.root, store)
    query = "SELECT * FROM chains ORDER BY sample_id"
    tokens = "SELECT sample_id, position, piece, entropy, tail_mass FROM tokens ORDER BY ALL"
    with open_cache(local.root) as here, open_cache(str(store)) as there:
        assert there.sql(query).arrow().equals(here.sql(query).arrow())
        assert there.sql(tokens).arrow().equals(here.sql(tokens).arrow())
        sample_id = local.chains[7].sample_id
        np.testing.assert_array_equal(there.sample(sample_id).dense(4)[1], here.sample(sample_id).dense(4)[1])
        (store.parent / "secret.csv").write_bytes(b"a,b\n1,2\n")
        for forbidden in (f"{store.parent}/secret.csv", f"{store}/runs/{local.manifests[0].run_id}.json"):
            with pytest.raises(ConfigError, match="is not a file of the cache"):
                there.sql(f"SELECT * FROM read_text('{forbidden}')")


@pytest.mark.parametrize("arguments", [["verify"], ["stats"], ["sql", "SELECT count(*) AS n FROM chains"], ["gc"]])
def test_commands_take_a_url(local: SyntheticCache, store: ObjectPath, arguments: list[str]) -> None:
    upload(local.root, store)
    command, *rest = arguments
    answered = CliRunner().invoke(app, [command, str(store), *rest], catch_exceptions=False)
    assert (answered.exit_code, "60" in answered.stdout or command == "gc") == (0, True), answered.output


def test_a_flipped_byte_in_the_store_is_found_and_never_trained_on(
    local: SyntheticCache, store: ObjectPath, tmp_path: Path
) -> None:
    upload(local.root, store)
    path = store / "chains" / Catalog(store).chains.files()[1].path
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(bytes(content))
    report = verify_cache(store)
    assert [problem.file.rpartition("/")[2] for problem in report.problems][:1] == [path.name]
    with pytest.raises(CorruptError, match="row group"):
        epoch(store, tmp_path / "run")


def test_a_build_in_the_store_is_the_local_build(store: ObjectPath, tmp_path: Path) -> None:
    requests = make_requests(60)
    shards = {"row_group_tokens": 200, "max_mb": 0.01}
    run_build(make_config(tmp_path / "c", shard=shards), requests)
    here = make_config(store, shard=shards)
    first = run_build(here, requests[:40])
    assert first.recorded.num_shards > 1
    second = run_build(here, requests, worker="w1")
    assert (second.num_done_before, second.recorded.num_committed) == (40, 20)
    assert visible_ids(store) == visible_ids(tmp_path / "c")
    assert verify_cache(store).ok
    columns = "sample_id, text, num_tokens, mean_entropy, seed"
    with open_cache(store) as one, open_cache(tmp_path / "c") as other:
        query = f"SELECT {columns} FROM chains ORDER BY sample_id"
        assert one.sql(query).arrow().equals(other.sql(query).arrow())
    assert [one for one in spool(store / "chains" / first.run_id).iterdir() if one.suffix != ".lock"] == []


def test_features_in_the_store_are_the_local_ones(store: ObjectPath, tmp_path: Path) -> None:
    root = make_cache(tmp_path / "c", num_chains=20).root
    copy_caches([root], store)
    assert (add_features(root).num_chains, add_features(store).num_chains) == (20, 20)
    assert add_features(store).num_done_before == 20
    assert verify_cache(store).ok
    here, there = FeatureSet.open(root), FeatureSet.open(str(store))
    found = there.read(here.sample_ids())
    for sample_id, row in here.read(here.sample_ids()).items():
        np.testing.assert_array_equal(found[sample_id].layers[2], row.layers[2])


def test_one_of_many_creates_an_object(store: ObjectPath) -> None:
    # More at once, and the client's pauses after a conflict grow.
    with ThreadPoolExecutor(6) as pool:
        created = list(pool.map(lambda number: create_file(store / "lease", b"%d" % number), range(12)))
    assert created.count(True) == 1
    assert (store / "lease").read_bytes() == b"%d" % created.index(True)


def test_sixteen_workers_and_maintenance_in_a_distant_store_lose_and_repeat_nothing(
    local: SyntheticCache, store: ObjectPath, server: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(local.root, store)
    requests = make_requests(16 * PART_CHAINS)
    ended, all_have_a_part = threading.Event(), threading.Barrier(16)
    monkeypatch.setattr("teacher_cache.engine.fake.MAX_IN_FLIGHT", PART_CHAINS)
    monkeypatch.setattr("teacher_cache.workers.joining.LIST_S", 2.0)
    monkeypatch.setattr("teacher_cache.workers.leases.LIST_S", 2.0)

    def start_engine() -> FakeEngine:
        all_have_a_part.wait(60)
        return make_engine(0.1)

    def maintain() -> int:
        """Drops the run that was there, deletes its files, adopts and sweeps, and verifies; returns the rounds."""
        num_rounds = num_dropped = 0
        while not ended.is_set():
            runs = [local.manifests[0].run_id]
            report = gc_cache(store, dry_run=False, grace_s=0.0, drop_runs=runs, delete_removed=True)
            num_dropped += sum(one.num_chains for one in report.dropped)
            assert verify_cache(store).problems == []
            num_rounds += 1
            ended.wait(2.0)
        assert num_dropped == len(local.chains)
        return num_rounds

    with (
        slow_link(server.port, 0.01) as port,
        pytest.MonkeyPatch.context() as distant,
        ThreadPoolExecutor(17) as pool,
    ):
        distant.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        maintenance = pool.submit(maintain)
        try:
            results = list(pool.map(lambda _: join_build(make_config(store), requests, start_engine), range(16)))
        finally:
            ended.set()
        assert maintenance.result() > 0
    assert visible_ids(store) == sorted(request.sample_id for request in requests)
    assert sum(one.recorded.num_committed for one in results) == len(requests)
    report = verify_cache(store)
    assert (report.ok, report.orphans) == (True, [])
    assert [path for folder in (store / "runs").glob("*.leases") for path in folder.iterdir()] == []


def test_what_killed_workers_leave_the_next_ones_finish(server: ObjectStore, store: ObjectPath) -> None:
    def worker(share: str, step_s: str) -> Program:
        return Program(
            ["tests.helpers.fake_builds", str(store), share, "80", step_s], environ=os.environ | server.environment
        )

    first = [worker("0/2", "0.5"), worker("1/2", "0.5")]
    deadline_s = time.monotonic() + 120
    while not any((store / "chains").rglob("*.parquet")):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    for process in first:
        process.kill()
    assert len(visible_ids(store)) < 80
    for process in [worker("0/2", "0"), worker("1/2", "0")]:
        process.wait(expect=0)
    assert visible_ids(store) == sorted(request.sample_id for request in make_requests(80))
    report = verify_cache(store)
    assert report.ok
    gc_cache(store, dry_run=False, grace_s=0.0)
    assert verify_cache(store).orphans == []
    assert len(visible_ids(store)) == 80


def test_copies_go_to_the_store_and_back(local: SyntheticCache, store: ObjectPath, tmp_path: Path) -> None:
    assert copy_caches([local.root], store).num_chains == 60
    assert verify_cache(store).ok
    assert copy_caches([store], tmp_path / "back").num_chains == 60
    assert visible_ids(tmp_path / "back") == visible_ids(local.root)
    with pytest.raises(ConfigError, match="same folder or contain each other"):
        copy_caches([store], store / "inside")


def test_of_two_commits_to_one_version_one_fails(local: SyntheticCache, store: ObjectPath) -> None:
    upload(local.root, store)
    files = [DataFile(f"extra/{name}.parquet", 1, 1) for name in "ab"]
    tables = [Table(store / "chains") for _ in files]
    for table, file in zip(tables, files, strict=True):
        table.path_of(file).write_bytes(b"x")

    def commit(number: int) -> bool:
        try:
            tables[number].commit([files[number]], f"stillroom/extra/{number}", 0)
        except CacheConflict:
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(commit, range(2))) == [False, True]
    found = Table(store / "chains").files()
    assert sum(file in found for file in files) == 1


def test_a_killed_upload_leaves_nothing(store: ObjectPath, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(os.urandom(1 << 20) * 24)
    program = (
        "import sys, time; from pathlib import Path; from stillroom.storage import paths\n"
        "class Slow(type(Path())):\n"
        "    def open(self, *args):\n"
        "        stream = super().open(*args)\n"
        "        read = stream.read\n"
        "        return type('S', (), {'read': lambda s, n: (print('part', flush=True), time.sleep(.2), read(n))[2],\n"
        "            '__enter__': lambda s: s, '__exit__': lambda s, *a: stream.close()})()\n"
        "paths.location(sys.argv[1]).upload(Slow(sys.argv[2]))\n"
    )
    target = store / "big"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(target), str(big)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as killed:
        assert killed.stdout is not None
        for _ in range(3):
            assert killed.stdout.readline() == "part\n"
        killed.send_signal(signal.SIGKILL)
    assert not target.exists()
    target.upload(big)
    assert target.stat().st_size == big.stat().st_size


def test_an_upload_that_cannot_read_its_file_leaves_nothing(store: ObjectPath) -> None:
    with pytest.raises(OSError, match="Input/output error"):
        (store / "x").upload(Path("/proc/self/mem"))
    assert not (store / "x").exists()


# Told at once, not after minutes of patience.
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, DataError, "refuses access: check the key"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, DataError, "refuses access: check the key"),
        ({"AWS_ENDPOINT_URL": "http://me:pass@127.0.0.1:1"}, StillroomError, "http://127.0.0.1:1 cannot be reached"),
        ({}, DataError, "there is no bucket 'nowhere'"),
    ],
)
def test_a_store_that_cannot_be_used_is_one_line(
    server: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    changes: dict[str, str],
    error: type[StillroomError],
    said: str,
) -> None:
    server.use(monkeypatch)
    for name, value in changes.items():
        if value:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    root = location(f"s3://{BUCKET if changes else 'nowhere'}/cache")
    for attempt in (lambda: Catalog(root), lambda: verify_cache(root), lambda: Catalog.create(root)):
        with pytest.raises(error) as caught:
            attempt()
        assert type(caught.value) is error
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not {ACCESS_KEY, SECRET_KEY, "wrong", "pass@"} & set(str(caught.value).split())
        assert "pass@" not in str(caught.value)


def test_a_file_that_is_gone_is_damage_and_a_store_that_is_gone_is_not(
    local: SyntheticCache, store: ObjectPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(local.root, store)
    selection = freeze(tmp_path / "selection.parquet", SelectionRequest([CacheSource(store)]))
    with open_cache(store) as cache:
        path = store / "chains" / Catalog(store).chains.files()[-1].path
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(CorruptError, match=path.name):
            cache.sql("SELECT sum(entropy) FROM tokens").arrow()
        path.write_bytes(content[:-9])
        with pytest.raises(CorruptError, match=path.name):
            open_shard(path)
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        monkeypatch.setattr(objects, "PATIENT_ATTEMPTS", 2)
        for ask in (
            lambda: cache.sql("SELECT sum(tail_mass) FROM tokens").arrow(),
            lambda: open_shard(path),
            lambda: read_rows(selection, 0, np.array([0]), with_signals=True),
        ):
            with pytest.raises(StillroomError, match="cannot be reached") as caught:
                ask()
            assert (type(caught.value), "\n" in str(caught.value)) == (StillroomError, False)


def test_a_prefix_without_a_cache_says_so(store: ObjectPath) -> None:
    with pytest.raises(DataError, match="is not a cache"):
        Catalog(store)
