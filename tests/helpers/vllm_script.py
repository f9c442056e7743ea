"""Runs the script that is its argument: for `run_with_vllm`."""

import sys


def main() -> None:
    exec(compile(sys.argv[1], "script", "exec"), {"__name__": "__main__"})
