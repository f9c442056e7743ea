"""What a student has learnt, in more than means: by group, under noise, against forgetting, on public tasks."""
