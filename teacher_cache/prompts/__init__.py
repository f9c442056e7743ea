"""What the teacher is asked or made to read: files, datasets, task generators, other caches."""
