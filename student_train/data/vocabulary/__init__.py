"""Students with another vocabulary than the teacher's."""
