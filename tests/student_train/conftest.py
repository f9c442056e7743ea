"""Fixtures of the student's tests: a cache, a student, and trainings inside the test process."""

from tests.helpers.training import cache, references, student, trainer

__all__ = ["cache", "references", "student", "trainer"]
