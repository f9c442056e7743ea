"""Drawn tails, exact entropy and log-partitions from real vLLM's sampler to a student's loss, against dense
distributions of the teacher.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from stillroom.sql.session import open_session
from student_train.data.epoch_plan import PlanSpec
from student_train.data.freezing import CacheSource, SelectionRequest, freeze
from student_train.data.stream import PackStream
from tests.helpers.line import NUM_CHAINS, Line

pytestmark = pytest.mark.filterwarnings("ignore:::torch", "ignore:::deepspeed", "ignore:::transformers")

CACHE = "runs/demo/hybrid"
SUPPORT, DRAWS, TEMPERATURES = 4, 3, [0.5, 2.0]
CAPTURE = {"codec": "topk-u8", "max_support": SUPPORT, "nucleus": 0.999, "draws": DRAWS, "temperatures": TEMPERATURES}
CODE_TOLERANCE = 0.12
"""Nats between an 8-bit code and what it stands for, at log probabilities of about -6."""


@pytest.fixture(scope="module")
def hybrid(line: Line) -> Line:
    """The line's teacher, asked again for another capture."""
    overrides = ["--set", f"cache={CACHE}", "--set", f"capture={json.dumps(CAPTURE)}"]
    built = json.loads(line.program("teacher-cache", "build", "benchmarks/demo/teacher.yaml", *overrides, "--json"))
    assert built["num_chains"] == NUM_CHAINS
    return line


def test_draws_entropies_and_partitions_are_those_of_the_dense_teacher(hybrid: Line, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(hybrid.folder / "runs/demo/teacher", dtype=torch.float64)
    selection = freeze(tmp_path / "s.parquet", SelectionRequest([CacheSource(hybrid.folder / CACHE)]))
    assert (selection.header.draws, selection.header.temperatures) == (DRAWS, TEMPERATURES)
    chain_of = _chains(selection.header.caches[0].root)
    dense: dict[int, torch.Tensor] = {}
    num_drawn = 0
    with PackStream(selection, PlanSpec(pack_tokens=256, seed=1), packs_per_step=1, num_epochs=1) as stream:
        for pack in stream:
            assert pack.draw_ids_NM is not None
            assert pack.draw_logprobs_NM is not None
            assert pack.draw_weights_NM is not None
            assert pack.log_partitions_NS is not None
            assert pack.entropy_N is not None
            for place, (row, token) in enumerate(zip(pack.row_N.tolist(), pack.token_N.tolist(), strict=True)):
                if row not in dense:
                    dense[row] = _dense(model, *chain_of[int(selection.key_R[row])])
                logp_V = dense[row][token].numpy()
                prob_V = np.exp(logp_V)
                assert pack.entropy_N[place] == pytest.approx(-(prob_V * logp_V).sum(), rel=2e-3, abs=2e-3)
                partitions = [np.log((prob_V ** (1 / tau)).sum()) for tau in TEMPERATURES]
                np.testing.assert_allclose(pack.log_partitions_NS[place], partitions, atol=2e-3)
                support = set(np.argsort(-logp_V)[:SUPPORT].tolist())
                drawn = pack.draw_weights_NM[place] > 0
                assert drawn.sum() in (0, DRAWS)
                tail = 1 - prob_V[list(support)].sum()
                assert drawn.any() == (tail > 0.001)
                for column in np.flatnonzero(drawn):
                    token_id = int(pack.draw_ids_NM[place, column])
                    assert token_id not in support
                    assert pack.draw_logprobs_NM[place, column] == pytest.approx(logp_V[token_id], abs=CODE_TOLERANCE)
                    assert pack.draw_weights_NM[place, column] == pytest.approx(tail / DRAWS, rel=0.15)
                    num_drawn += 1
    assert num_drawn > 500


def test_a_student_learns_from_them_at_a_stored_temperature(hybrid: Line) -> None:
    stage = {"losses": {"forward_kl": 0.9, "cross_entropy": 0.1}, "epochs": 1, "batch_tokens": 1024}
    schedule = {"kind": "linear", "start": 2.0, "end": 1.0}
    stages = json.dumps([{**stage, "learning_rate": 2e-3, "temperature": schedule}])
    overrides = [f"run={CACHE}-run", f'data.caches=["{CACHE}"]', f"stages={stages}"]
    sets = [part for override in overrides for part in ("--set", override)]
    config = "benchmarks/demo/student.yaml"
    planned = json.loads(hybrid.program("student-train", "plan", config, *sets, "--json"))
    assert [temperature for _, temperature in planned["stages"][0]["temperatures"]] == [2.0, 1.0]
    trained = json.loads(hybrid.program("student-train", "run", config, *sets, "--json"))
    records = [json.loads(line) for line in (hybrid.folder / f"{CACHE}-run/metrics.jsonl").read_text().splitlines()]
    assert {record["temperature"] for record in records} == {1.0, 2.0}
    assert trained["heldout_after"]["forward_kl"] < trained["heldout_before"]["forward_kl"]


def test_sql_tells_the_drawn_from_the_ranked(hybrid: Line) -> None:
    from stillroom.cache.catalog import Catalog

    with open_session(Catalog(hybrid.folder / CACHE)) as session:
        query = "SELECT drawn, count(*) AS num, count(rank) AS ranked FROM topk GROUP BY drawn ORDER BY drawn"
        ranked, drawn = session.arrow(query).to_pylist()
    assert ranked["ranked"] == ranked["num"] > 0
    assert drawn["ranked"] == 0 < drawn["num"]


def _chains(root: str) -> dict[int, tuple[list[int], list[int]]]:
    from stillroom.cache.catalog import Catalog

    with open_session(Catalog(Path(root))) as session:
        rows: list[dict[str, Any]] = session.arrow(
            "SELECT sample_id, prompt_token_ids, token_ids FROM shards"
        ).to_pylist()
    return {int(row["sample_id"][:16], 16): (row["prompt_token_ids"], row["token_ids"]) for row in rows}


@torch.no_grad()
def _dense(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    logits_LV: torch.Tensor = model(torch.tensor([prompt + completion])).logits[0]
    return logits_LV[len(prompt) - 1 : -1].log_softmax(-1)
