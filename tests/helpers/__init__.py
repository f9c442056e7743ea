"""What several test files share: caches, students, servers and programs."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
