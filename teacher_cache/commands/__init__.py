"""The commands of `teacher-cache`: their options and what they call. Each imports what it needs when it runs."""
