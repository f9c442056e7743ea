"""Loads lm-eval's tasks with their data as a run of them will: MODEL TASKS [FOLDER]. Ends with the reason if it cannot.

MODEL is a folder or hub id: some tasks are made with its tokenizer.
"""

import sys

from lm_eval.config.evaluate_config import EvaluatorConfig


def main(model: str, tasks: str, include_path: str | None = None) -> None:
    config = EvaluatorConfig(tasks=tasks, include_path=include_path)
    # Names, patterns and files of tasks become what `load` takes.
    config.process_tasks({"pretrained": model}).load(config.tasks)


if __name__ == "__main__":
    main(*sys.argv[1:])
