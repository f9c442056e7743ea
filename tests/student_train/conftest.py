"""Fixtures of the student's tests: a cache, a student, and trainings inside the test process."""

from tests.helpers.training import asked_once, cache, references, student, trainer

__all__ = ["asked_once", "cache", "references", "student", "trainer"]
