"""Golden shards of format version 1 read as they always did, and FORMAT.md's worked examples hold."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.cache.features import RowDecoder, codecs_of, open_features
from stillroom.cache.shards import header_of, open_shard, read_signals
from stillroom.cache.tensors import read_tensors
from stillroom.errors import CorruptError, DataError
from stillroom.schema.features import PAYLOADS, SetManifest
from stillroom.schema.records import Message, prompt_id_of
from stillroom.schema.tables import CODECS
from teacher_cache.writer.rows import support_of
from tests.helpers import ROOT, golden_features
from tests.helpers.golden import captures, golden_header, golden_table

GOLDEN = ROOT / "schemas" / "golden"
HASHES = {
    "v1-topk-u8": "f380104962c868331d3d80f475c4b4c3b9a6324e4ae9cffa0ff1f6a699b6480b",
    "v1-topk-f32": "f78c9e35d351cb509f7b95e00a6a01b054be4486cafb923e5b9b2211d480626f",
    "v2-topk-u8": "0c68799e57c827368d5d9d0360ea386bdd2e1e836d580cafc83dee14c8c3157c",
    "v2-topk-f32": "7e18ff057449316979c4433e3742ccc260daa112f0fd19c1ead427bab61e65f1",
    "features-v1": "88f8e4fb26654d2a3ebcf8c072ce22518fbe94d7685be734fa5d77a2db359915",
    "features-v1.safetensors": "3f5d95c85eb44d84f56d939702e322e688a68b3ae9109b0f015aa7132bae8544",
}
SAMPLE_IDS = ["bfdef3aeb594a39fbff79daae30acd5f", "ee4de6f57127653d59892aa563f9c0b6"]


@pytest.mark.parametrize("name", HASHES)
def test_golden_bytes_are_untouched(name: str) -> None:
    path = GOLDEN / (name if "." in name else f"{name}.parquet")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == HASHES[name]


def test_the_golden_feature_set_decodes_to_its_numbers() -> None:
    manifest = SetManifest.model_validate_json((GOLDEN / "features-v1.json").read_bytes())
    assert manifest == golden_features.MANIFEST
    file, header = open_features(GOLDEN / "features-v1.parquet")
    assert header == golden_features.HEADER
    (row,) = file.read().to_pylist()
    made = golden_features.golden_values()
    assert (row["sample_id"], row["num_context"], row["positions"]) == (made.sample_id, 6, [0, 2])
    payloads = {name: row[name] for name in PAYLOADS}
    assert payloads == {"hidden": made.hidden, "layers": made.layers, "attention": made.attention}
    # float16 2/127 = 0.01575, then codes: 1, -2 and 0.5 over that step; as in FORMAT.md's layout.
    assert row["hidden"].hex() == "0824" + "4081" + "2000" + "0824" + "1040" + "e07f"
    codecs = codecs_of(manifest, read_tensors(GOLDEN / "features-v1.safetensors"), "golden")
    decoded = RowDecoder(manifest, codecs).row(row, np.array(row["positions"], np.int32), payloads, "golden").decode()
    assert decoded.hidden_PD is not None
    np.testing.assert_allclose(decoded.hidden_PD, golden_features.HIDDEN_PD, atol=0.8)
    np.testing.assert_allclose(decoded.layers[2], golden_features.LAYER_PD, atol=0.3)
    attention = decoded.attention[1, 3]
    assert attention.keys_PM.tolist() == [[0, 4], [5, 0]]
    np.testing.assert_allclose(attention.weights_PM, [[0.64, 0.25], [1.0, 0.0]], atol=4e-3)
    np.testing.assert_allclose(attention.rest_P, [0.11, 0.0], atol=4e-3)


@pytest.mark.parametrize("codec", CODECS)
def test_golden_shards_hold_what_this_version_would_write(codec: str) -> None:
    file, header = open_shard(GOLDEN / f"v2-{codec}.parquet")
    assert header == golden_header(codec)
    assert file.read().equals(golden_table(codec))
    assert file.read(["sample_id"]).column(0).to_pylist() == SAMPLE_IDS


@pytest.mark.parametrize("version", [1, 2])
def test_golden_u8_decodes_to_the_numbers_in_the_format(version: int) -> None:
    file, header = open_shard(GOLDEN / f"v{version}-topk-u8.parquet")
    assert header.format_version == version
    table, signals, offsets = read_signals(file, header, 0, ["topk_codes", "tail_codes", "topk_n"], "golden")
    assert offsets.tolist() == [0, 3, 5]
    drawn = [115, 115] if version == 2 else []
    assert table["topk_codes"].to_pylist() == [[32, 49, 68, 1, 43, 49, 68, *drawn], [0, 38, 53, 65, *drawn]]
    assert table["topk_n"].to_pylist() == [[3, 1, 3], [1, 3]]
    assert table["tail_codes"].to_pylist() == [[137, 118, 57], [254, 65]]
    np.testing.assert_allclose(np.exp(signals.slice(0, 1).topk_logprobs_N), [0.595938, 0.302623, 0.101343], atol=2e-6)
    assert signals.sampled_rank_T.tolist() == [1, 1, 3, 1, 70_000]
    assert signals.sampled_logprob_T[4] == -14.25


@pytest.mark.parametrize("version", [1, 2])
def test_golden_f32_decodes_exactly(version: int) -> None:
    file, header = open_shard(GOLDEN / f"v{version}-topk-f32.parquet")
    _, signals, _ = read_signals(file, header, 0, [], "golden")
    written = [support_of(capture, 3, 0.999) for capture in captures()]
    np.testing.assert_array_equal(signals.topk_logprobs_N, np.concatenate([w.topk_logprobs_N for w in written]))
    np.testing.assert_array_equal(signals.tail_logmass_T, np.concatenate([w.tail_logmass_T for w in written]))


@pytest.mark.parametrize("codec", CODECS)
def test_version_2_holds_draws_and_log_partitions(codec: str) -> None:
    file, header = open_shard(GOLDEN / f"v2-{codec}.parquet")
    _, signals, _ = read_signals(file, header, 0, [], "golden")
    assert signals.draws is not None
    assert signals.draws.n_T.tolist() == [0, 0, 2, 0, 2]
    assert signals.draws.ids_D.tolist() == [150_000] * 4
    np.testing.assert_allclose(signals.draws.logprobs_D, -6.5, atol=0 if codec == "topk-f32" else 0.08)
    assert header.temperatures == [0.5, 2.0]
    assert signals.log_partitions_TS is not None
    np.testing.assert_allclose(signals.log_partitions_TS, [[-0.4, 1.7]] * 5, atol=1e-4)


def test_version_1_has_neither() -> None:
    file, header = open_shard(GOLDEN / "v1-topk-u8.parquet")
    _, signals, _ = read_signals(file, header, 0, [], "golden")
    assert (signals.draws, signals.log_partitions_TS, header.draws, header.temperatures) == (None, None, 0, [])


def test_the_worked_identity_of_the_format() -> None:
    digest = hashlib.blake2b(b'["prompt",[["user","2+3?"]]]', digest_size=16).hexdigest()
    assert prompt_id_of([Message("user", "2+3?")]) == digest


def test_newer_formats_and_unknown_codecs_are_refused_with_the_remedy() -> None:
    for change, message in (({"format_version": 3}, "format version 3"), ({"codec": "topk-u4"}, "codec 'topk-u4'")):
        raw = json.dumps({**golden_header("topk-u8").model_dump(), **change}).encode()
        with pytest.raises(DataError, match=f"shard.*{message}.*upgrade"):
            header_of({b"stillroom": raw}, "shard")


@pytest.mark.parametrize("codec", CODECS)
def test_a_footer_that_lies_about_columns_is_damage(codec: str, tmp_path: Path) -> None:
    good = pq.read_table(GOLDEN / f"v2-{codec}.parquet")
    place = good.schema.get_field_index("sampled_rank")
    no_list = good.set_column(place, "sampled_rank", pa.array([1, 2], pa.int32()))
    missing = good.drop_columns(["text"])
    for table, message in ((no_list, "column sampled_rank holds int32"), (missing, "column text is missing")):
        pq.write_table(table, tmp_path / "shard.parquet")
        file, header = open_shard(tmp_path / "shard.parquet")
        with file, pytest.raises(CorruptError, match=message):
            read_signals(file, header, 0, ["text"], "shard")


def test_a_footer_whose_names_are_not_text_is_damage(tmp_path: Path) -> None:
    data = (GOLDEN / "v2-topk-u8.parquet").read_bytes()
    (tmp_path / "shard.parquet").write_bytes(data.replace(b"tail_codes", b"tail_code\xf3"))
    with pytest.raises(CorruptError, match="not text"):
        open_shard(tmp_path / "shard.parquet")


def test_unknown_header_keys_of_later_writers_are_ignored() -> None:
    raw = json.dumps({**golden_header("topk-u8").model_dump(), "colour": "blue"}).encode()
    assert header_of({b"stillroom": raw}, "shard") == golden_header("topk-u8")
