"""What servers answer, read to the letter: order of candidates, ties, numbers that JSON lacks, and answers that lie."""

from typing import Any

import numpy as np
import pytest

from stillroom.schema.records import Capture
from teacher_cache.engine.http.wire import Api, BadAnswer, CompletionsApi, Form, GenerateApi, Rows
from teacher_cache.engine.row_layout import Layout, UnmarkedRows

K = 3
PLAIN = Form(K, 400)
SIGNALS = Form(K, 400, Layout(K, 1, mapped=True))
WAYS = pytest.mark.parametrize("api", [GenerateApi(), CompletionsApi()], ids=["generate", "completions"])
Entries = list[tuple[int, float | None, int]]


def choice_of(api: Api, tokens: list[Entries]) -> dict[str, Any]:
    """A message in which each token's entries are (id, log probability, rank), the sampled one first."""
    ids = [entries[0][0] for entries in tokens]
    if isinstance(api, CompletionsApi):
        tops = [{f"token_id:{one}": value for one, value, _ in entries} for entries in tokens]
        given = [entries[0][1] for entries in tokens]
        return {"token_ids": ids, "logprobs": {"token_logprobs": given, "top_logprobs": tops}}
    content = []
    for entries in tokens:
        listed = [{"token_id": one, "logprob": value, "rank": rank} for one, value, rank in entries]
        content.append({**listed[0], "top_logprobs": listed})
    return {"token_ids": ids, "logprobs": {"content": content}}


def read(api: Api, *tokens: Entries, form: Form = PLAIN) -> Capture:
    rows = Rows(form)
    api.read(choice_of(api, list(tokens)), rows)
    return rows.capture()


@WAYS
@pytest.mark.parametrize(
    ("sampled", "rank", "ids"),
    [(7, 1, [7, 8, 9]), (8, 2, [7, 8, 9]), (9, 3, [7, 8, 9])],
)
def test_a_sampled_token_among_the_candidates_takes_its_place(
    api: Api, sampled: int, rank: int, ids: list[int]
) -> None:
    by_id = {7: -1.0, 8: -2.0, 9: -3.0, 10: -4.0}
    # The better way is asked for one entry more than k.
    num = 4 if isinstance(api, GenerateApi) else 3
    others = [(one, by_id[one], place) for place, one in enumerate(list(by_id)[:num], 1) if one != sampled]
    capture = read(api, [(sampled, by_id[sampled], rank), *others])
    assert capture.topk_ids_TK.tolist() == [ids]
    assert capture.topk_logprobs_TK.tolist() == [[-1.0, -2.0, -3.0]]
    assert capture.sampled_rank_T.tolist() == [rank]
    assert capture.sampled_logprob_T.tolist() == [by_id[sampled]]


@WAYS
def test_a_sampled_token_outside_the_candidates_is_not_one_of_them(api: Api) -> None:
    capture = read(api, [(50, -9.5, 40), (7, -1.0, 1), (8, -2.0, 2), (9, -3.0, 3)])
    assert capture.topk_ids_TK.tolist() == [[7, 8, 9]]
    assert capture.sampled_rank_T.tolist() == [40 if isinstance(api, GenerateApi) else 0], "0: to be asked for"


def test_ties_rank_the_sampled_token_behind_its_equals() -> None:
    capture = read(CompletionsApi(), [(7, -1.0, 0), (8, -1.0, 0), (9, -3.0, 0)])
    assert capture.topk_ids_TK.tolist() == [[8, 7, 9]]
    assert capture.sampled_rank_T.tolist() == [2]


@WAYS
def test_numbers_that_json_lacks_come_back(api: Api) -> None:
    capture = read(api, [(7, 0.0, 1), (8, -9999.0, 2), (9, -9999.0, 3)])
    assert capture.topk_logprobs_TK.tolist() == [[0.0, -np.inf, -np.inf]]
    tokens: Entries = [(7, None, 1), (8, None, 2), (9, None, 3)]
    assert np.isnan(read(api, tokens).topk_logprobs_TK).all()


@WAYS
def test_float32_survives_the_way(api: Api) -> None:
    value = float(np.float32(-0.1))
    assert read(api, [(7, value, 1), (8, -3.0, 2), (9, -4.0, 3)]).sampled_logprob_T[0] == np.float32(-0.1)


@WAYS
def test_an_inconsistent_answer_is_refused(api: Api) -> None:
    with pytest.raises(BadAnswer, match=r"received \d candidates for"):
        read(api, [(7, -1.0, 1), (8, -2.0, 2)])
    shifted = choice_of(api, [[(7, -1.0, 1), (8, -2.0, 2), (9, -3.0, 3)]])
    shifted["token_ids"] = [8]
    with pytest.raises(BadAnswer, match="do not match its tokens"):
        api.read(shifted, Rows(PLAIN))
    with pytest.raises(BadAnswer, match="no token"):
        Rows(PLAIN).capture()


@WAYS
def test_scores_that_belong_to_other_tokens_are_refused(api: Api) -> None:
    scores = [None, {"6": {"logprob": -1.0, "rank": 1}, "7": {"logprob": -2.0, "rank": 2}}]
    answer = {"prompt_logprobs": scores, "choices": [{"prompt_logprobs": scores, "token_ids": [9]}]}
    with pytest.raises(BadAnswer, match="do not match its tokens"):
        api.read_scores(answer, [5, 7, 9] if isinstance(api, GenerateApi) else [5, 7], 1, Rows(Form(1, 400)))
    with pytest.raises(BadAnswer, match="received 2 scores for"):
        api.read_scores(answer, [5, 6, 7, 8, 9], 1, Rows(Form(1, 400)))


NUMBERS: Entries = [(0, 300.0, 1), (1, -9.0, 1), (2, 1.5, 1), (4, 2.0, 1), (5, 2.0, 1)]
"""A draw's id and log probability, the entropy, the sampled token's rank, the mark."""


@WAYS
def test_numbers_stand_behind_the_candidates(api: Api) -> None:
    top: Entries = [(7, -1.0, 1), (8, -2.0, 2), (9, -3.0, 3)]
    # The sampled token is one of the top, and merged with it; or is not.
    within = read(api, [top[1], top[0], top[2], *NUMBERS], form=SIGNALS)
    outside = read(api, [(50, -9.5, 40), *top, *NUMBERS], form=SIGNALS)
    for capture in (within, outside):
        assert capture.topk_ids_TK.tolist() == [[7, 8, 9]]
        assert capture.topk_logprobs_TK.tolist() == [[-1.0, -2.0, -3.0]]
        assert capture.sampled_rank_T.tolist() == [2], "told by the row, whatever the answer says"
        assert capture.draw_ids_TM is not None
        assert capture.draw_ids_TM.tolist() == [[300]]
        assert capture.draw_logprobs_TM is not None
        assert capture.draw_logprobs_TM.tolist() == [[-9.0]]
        assert capture.entropy_T is not None
        assert capture.entropy_T.tolist() == [1.5]
    assert (within.sampled_logprob_T[0], outside.sampled_logprob_T[0]) == (-2.0, -9.5)


@WAYS
def test_a_sampled_token_that_ties_with_the_last_candidate_stays_within(api: Api) -> None:
    top: Entries = [(7, -1.0, 1), (8, -2.0, 2), (9, -2.0, 3)]
    for sampled in (1, 2):
        others = [one for one in top if one != top[sampled]]
        capture = read(api, [top[sampled], *others, *NUMBERS], form=SIGNALS)
        assert sorted(capture.topk_ids_TK[0].tolist()) == [7, 8, 9]
        assert capture.topk_logprobs_TK.tolist() == [[-1.0, -2.0, -2.0]]


@WAYS
def test_rows_that_are_not_the_plugins_are_refused(api: Api) -> None:
    plain: Entries = [(one, -float(one), one) for one in range(1, 10)]
    with pytest.raises(UnmarkedRows):
        read(api, plain, form=SIGNALS)
    with pytest.raises(BadAnswer, match=r"received \d candidates for"):
        read(api, plain[:6], form=SIGNALS)
