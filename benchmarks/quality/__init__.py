"""Which stored targets teach a student how much, small and whole: teacher, caches, training and evaluation."""
