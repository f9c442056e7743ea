"""What an answer of HTTP means: to come back later, never, or at once."""

import datetime
import email.utils

import httpx2
import pytest

from teacher_cache.engine.http.client import Refused, Unavailable, _answer


@pytest.mark.parametrize(
    ("status", "is_busy"),
    [(429, True), (503, True), (529, True), (500, False), (502, False), (401, False), (404, False)],
)
def test_busy_is_what_asks_to_come_back(status: int, is_busy: bool) -> None:
    with pytest.raises(Unavailable, match=f"answers {status}: too much") as caught:
        _answer(httpx2.Response(status), b'{"error": {"message": "too\\n much"}}')
    assert (caught.value.is_busy, caught.value.status, caught.value.was_sent) == (is_busy, status, True)


@pytest.mark.parametrize(
    ("header", "pause_s"),
    [
        ("7", 7.0),
        ("0.5", 0.5),
        ("0", 0.0),
        ("", 0.0),
        ("-3", 0.0),
        ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0),
        ("³", 0.0),
        ("nan", 0.0),
    ],
)
def test_a_pause_that_is_asked_for_is_kept(header: str, pause_s: float) -> None:
    headers = [(b"retry-after", header.encode())] if header else []
    with pytest.raises(Unavailable) as caught:
        _answer(httpx2.Response(429, headers=headers), b"")
    assert caught.value.retry_after_s == pause_s


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (
            httpx2.Response(404, content=b"<html><title>404\nNot Found</title>"),
            "answers 404: 404 Not Found",
        ),
        (httpx2.Response(301, headers={"location": "https://x/v1"}), "answers 301 and redirects to https://x/v1"),
    ],
)
def test_pages_and_redirects_are_one_line(response: httpx2.Response, message: str) -> None:
    with pytest.raises(Unavailable) as caught:
        _answer(response, response.content)
    assert str(caught.value) == message


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_is_refused_is_not_asked_again(status: int) -> None:
    with pytest.raises(Refused, match=f"refused with status {status}|no"):
        _answer(httpx2.Response(status), b'{"detail": "no"}')


def test_a_pause_until_a_date_is_kept() -> None:
    date = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=90)
    with pytest.raises(Unavailable) as caught:
        _answer(httpx2.Response(429, headers={"retry-after": email.utils.format_datetime(date, usegmt=True)}), b"")
    assert 80 < caught.value.retry_after_s <= 90


@pytest.mark.parametrize(("code", "status"), [("429", 429), ("502", 502), ('"server_error"', 500), ("null", 500)])
def test_an_error_with_status_200_is_the_error_that_it_names(code: str, status: int) -> None:
    with pytest.raises(Unavailable, match=f"answers {status}: no room") as caught:
        _answer(httpx2.Response(200), f'{{"error": {{"message": "no room", "code": {code}}}}}'.encode())
    assert caught.value.status == status
    with pytest.raises(Refused, match="too long"):
        _answer(httpx2.Response(200), b'{"error": {"message": "too long", "code": 400}}')
