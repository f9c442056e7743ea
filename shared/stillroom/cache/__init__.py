"""The cache on disk: which files count, how they are encoded, and how they are read."""
