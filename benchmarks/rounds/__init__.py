"""On-policy rounds and wrong chains against off-policy distillation, on a task with a checker."""
