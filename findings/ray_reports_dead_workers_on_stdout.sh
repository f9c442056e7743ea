#!/usr/bin/env bash
# ray 2.60.0: log_to_driver=False and logging_level="ERROR" still print a worker's death, and print it to stdout.
#
# log_to_driver=False keeps the output of workers away, and logging_level that of Ray's loggers, so a program whose
# stdout is its result (JSON for another program) looks safe, until a worker is killed. Reports of the raylet take
# another way: a thread of the driver prints them, colour codes included, even when the program catches the error. They
# end up before, after or inside the result. Write results to a file, or keep a copy of file descriptor 1 and redirect
# stdout to stderr before ray.init.
# Seen, a driver that catches the error and prints one JSON line: stdout has that line and "(raylet) A worker died or
# was killed", stderr is empty. If no worker dies, stdout is the JSON line alone, without what the worker printed.
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ray==2.60.0
cat > "$folder/driver.py" <<'PY'
import json
import os
import signal
import sys
import time

import ray

ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)


@ray.remote(max_retries=0)
def work(dies: bool) -> int:
    print("a worker's own output", flush=True)
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)
    return 1


try:
    result = ray.get(work.remote(sys.argv[1] == "dies"))
except ray.exceptions.WorkerCrashedError:
    result = None
time.sleep(3)  # reports arrive a little later
print(json.dumps({"result": result}))
PY
cat > "$folder/check.py" <<'PY'
import subprocess
import sys


def outcome(way: str) -> tuple[list[str], str]:
    ended = subprocess.run([sys.executable, sys.argv[1], way], capture_output=True, text=True, check=True)
    report = "(raylet)", "A worker died or was killed"
    lines = [line for line in ended.stdout.splitlines() if line.strip()]
    return ["report" if all(part in line for part in report) else line for line in lines], ended.stderr


found = {way: outcome(way) for way in ("lives", "dies")}
for way, (lines, errors) in found.items():
    print(f"a worker that {way}: stdout {lines}, stderr {errors!r}")
sys.exit(found != {"lives": (['{"result": 1}'], ""), "dies": (["report", '{"result": null}'], "")})
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder/driver.py"
