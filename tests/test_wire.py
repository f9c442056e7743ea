"""What servers answer, read to the letter: order of candidates, ties, numbers that JSON lacks, and answers that lie."""

from typing import Any

import numpy as np
import pytest

from schemas.records import Capture
from teacher_cache.http_engine.wire import Api, BadAnswer, CompletionsApi, GenerateApi, Rows

K = 3
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


def read(api: Api, *tokens: Entries) -> Capture:
    rows = Rows(K)
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
def test_an_answer_that_lies_is_no_capture(api: Api) -> None:
    with pytest.raises(BadAnswer, match="candidates came"):
        read(api, [(7, -1.0, 1), (8, -2.0, 2)])
    shifted = choice_of(api, [[(7, -1.0, 1), (8, -2.0, 2), (9, -3.0, 3)]])
    shifted["token_ids"] = [8]
    with pytest.raises(BadAnswer, match="do not belong to its tokens"):
        api.read(shifted, Rows(K))
    with pytest.raises(BadAnswer, match="no token"):
        Rows(K).capture()


@WAYS
def test_scores_that_belong_to_other_tokens_are_refused(api: Api) -> None:
    scores = [None, {"6": {"logprob": -1.0, "rank": 1}, "7": {"logprob": -2.0, "rank": 2}}]
    answer = {"prompt_logprobs": scores, "choices": [{"prompt_logprobs": scores, "token_ids": [9]}]}
    with pytest.raises(BadAnswer, match="do not belong to the tokens"):
        api.read_scores(answer, [5, 7, 9] if isinstance(api, GenerateApi) else [5, 7], 1, Rows(1))
    with pytest.raises(BadAnswer, match="2 scores came for"):
        api.read_scores(answer, [5, 6, 7, 8, 9], 1, Rows(1))
