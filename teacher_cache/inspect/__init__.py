"""What people ask a cache: SQL, one chain on the screen, numbers, a report."""
