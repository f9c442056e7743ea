"""On-policy rounds: a student writes, its teacher scores, the student learns; two programs meet in one folder."""
