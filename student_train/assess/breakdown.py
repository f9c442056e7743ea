"""Token metrics of an evaluation in groups: by source, length of prompt and chain, and position in the chain.

In: packs with their metrics, as they are evaluated. Out: means of each group, and the calibration of all tokens. Costs
a copy of eight numbers a token to the CPU.

    N loss tokens of a pack, R rows of the selection, G groups, F fields
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stillroom.cache.catalog import Catalog
from stillroom.config import Json
from stillroom.sql.conditions import in_brackets
from stillroom.sql.session import open_session
from stillroom.storage.paths import Location
from student_train.assess.calibration import CalibrationSums
from student_train.data.pack import Pack
from student_train.data.selection import Selection, keys_of
from student_train.losses.metrics import TokenMetrics

FIRST_LENGTH = 32
"""Lengths are grouped by doubling: up to this many tokens, up to twice as many, ..."""
NUM_PARTS = 5
"""Parts of equal length of each chain, whatever its length."""
PARTS = ("first fifth", "second", "third", "fourth", "last fifth")
COMPARED = ("forward_kl_N", "jsd_N", "agreement_N")
PLAIN = ("cross_entropy_N", "correct_N", "confidence_N")
UNKNOWN = "unknown"

Int64 = npt.NDArray[np.int64]


class Breakdown:
    """Sums by group, filled while a selection is evaluated on one rank."""

    def __init__(self, selection: Selection, sources_R: Sequence[str]) -> None:
        self._selection = selection
        self._source_names = sorted(set(sources_R))
        places = {name: place for place, name in enumerate(self._source_names)}
        self._source_R = np.array([places[name] for name in sources_R], np.int64)
        self._sums: dict[str, npt.NDArray[np.float64]] = {}
        self._calibration = CalibrationSums()

    def add(self, pack: Pack, metrics: TokenMetrics, is_compared_N: npt.NDArray[np.bool_] | None) -> None:
        """Adds a pack; `is_compared_N` says which tokens have a distribution, None that none has."""
        values = {name: value.double().cpu().numpy() for name, value in metrics._asdict().items()}
        known_N = np.zeros(pack.num_loss_tokens, bool) if is_compared_N is None else is_compared_N
        fields_FN = np.stack(
            [
                np.ones(pack.num_loss_tokens),
                known_N,
                *(values[name] for name in PLAIN),
                *(np.where(known_N, values[name], 0.0) for name in COMPARED),
            ]
        )
        for name, group_N in self._groups(pack).items():
            sums_FG = np.stack([np.bincount(group_N, field_N).astype(np.float64) for field_N in fields_FN])
            self._sums[name] = _plus(self._sums.get(name), sums_FG)
        self._calibration.add(values["confidence_N"], values["correct_N"])

    def _groups(self, pack: Pack) -> dict[str, Int64]:
        """The number of each token's group."""
        prompt_N = self._selection.num_prompt_R[pack.row_N]
        length_N = self._selection.num_tokens_R[pack.row_N]
        return {
            "source": self._source_R[pack.row_N],
            "prompt_tokens": doublings(prompt_N),
            "tokens": doublings(length_N),
            "position": doublings(pack.token_N + 1),
            "part": np.minimum(pack.token_N.astype(np.int64) * NUM_PARTS // np.maximum(length_N, 1), NUM_PARTS - 1),
        }

    def result(self) -> Json:
        """Rows of means by group, in nats and shares, without groups that hold no token."""
        names = {"source": self._source_names, "part": list(PARTS)}
        groups = {
            by: [
                _row(names[by][group] if by in names else doubling_name(group), sums_F)
                for group, sums_F in enumerate(sums_FG.T)
                if sums_F[0]
            ]
            for by, sums_FG in self._sums.items()
        }
        calibration = self._calibration.result()
        return {"by": groups, "calibration": None if calibration is None else calibration.model_dump()}


def doublings(lengths_N: npt.NDArray[Any]) -> Int64:
    """Which doubling of FIRST_LENGTH holds a length: 0 up to 32, 1 up to 64, 2 up to 128."""
    doubled_N = np.ceil(np.log2(np.maximum(lengths_N, 1) / FIRST_LENGTH))
    number_N: Int64 = np.maximum(doubled_N, 0).astype(np.int64)
    return number_N


def doubling_name(number: int) -> str:
    """`33 to 64` of 1."""
    return f"{FIRST_LENGTH * 2 ** (number - 1) + 1 if number else 1} to {FIRST_LENGTH * 2**number}"


def retention_of(js: float) -> float:
    """Knowledge retention: 1 - JS / log 2, 1 for a student that predicts as its teacher does."""
    return 1.0 - js / math.log(2.0)


def sources_of_rows(selection: Selection, roots: Sequence[Location]) -> list[str]:
    """The source of each of the selection's chains, whose caches lie at `roots`."""
    cache_R = selection.cache_G[selection.group_R]
    found = np.full(selection.num_chains, UNKNOWN, object)
    where = in_brackets(selection.header.where) if selection.header.where is not None else "true"
    for number, (cache, root) in enumerate(zip(selection.header.caches, roots, strict=True)):
        with open_session(Catalog(root, cache.chains_version, cache.verdicts_version)) as session:
            table = session.arrow(f"SELECT sample_id, source FROM chains WHERE {where}")
        if not len(table):
            continue
        keys_C, sources_C = keys_of(table.column("sample_id"), str(root)), np.array(table.column("source"), object)
        order_C = np.argsort(keys_C)
        rows = np.flatnonzero(cache_R == number)
        place = np.minimum(np.searchsorted(keys_C[order_C], selection.key_R[rows]), len(keys_C) - 1)
        is_there = keys_C[order_C][place] == selection.key_R[rows]
        found[rows[is_there]] = sources_C[order_C][place[is_there]]
    return [str(one) for one in found]


def _plus(one: npt.NDArray[np.float64] | None, other: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The sum of two [F, G] with different numbers of groups."""
    if one is None:
        return other
    total = np.zeros((len(other), max(one.shape[1], other.shape[1])))
    total[:, : one.shape[1]] += one
    total[:, : other.shape[1]] += other
    return total


def _row(name: str, sums_F: npt.NDArray[np.float64]) -> Json:
    num, num_compared, cross_entropy, correct, confidence, kl, js, agreement = sums_F.tolist()
    has_teacher = num_compared > 0
    return {
        "group": name,
        "num_tokens": int(num),
        "cross_entropy": cross_entropy / num,
        "accuracy": correct / num,
        "confidence_minus_accuracy": (confidence - correct) / num,
        "forward_kl": kl / num_compared if has_teacher else None,
        "js": js / num_compared if has_teacher else None,
        "retention": retention_of(js / num_compared) if has_teacher else None,
        "top1_agreement": agreement / num_compared if has_teacher else None,
    }
