"""The methods that benchmarks.cross_vocabulary compares with."""

import pytest
import torch

from benchmarks.cross_vocabulary.online import AlignedChain, cross_entropy, groups_between, uld


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ([b"a", b"bc", b"d"], [b"ab", b"c", b"d"], [(0, 2, 0, 2), (2, 3, 2, 3)]),
        ([b"ab", b""], [b"a", b"b", b""], [(0, 1, 0, 2), (1, 2, 2, 3)]),
        ([b"a", "\ufffd".encode()], [b"a", b"\xf0"], [(0, 1, 0, 1)]),
    ],
    ids=["split", "end", "half-character"],
)
def test_groups_lie_between_common_boundaries(
    student: list[bytes], teacher: list[bytes], expected: list[tuple[int, int, int, int]]
) -> None:
    assert groups_between(student, teacher) == expected


def test_sorted_probabilities_do_not_see_which_token_is_which() -> None:
    teacher_TV = torch.randn(3, 6).log_softmax(dim=1)
    student_SV = torch.cat([teacher_TV.flip(1), torch.full((3, 2), -torch.inf)], dim=1)
    ids = torch.tensor([0, 1, 2])
    chain = AlignedChain(student_SV, teacher_TV, ids, ids, [])
    torch.testing.assert_close(uld(5.0)(chain), cross_entropy(chain))
