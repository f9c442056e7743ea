#!/usr/bin/env bash
# ray 2.60.0: tasks and actors run with SIGINT blocked, and so does every program that they start.
#
# A signal mask is inherited through fork and exec. A server that stops cleanly on Ctrl-C or SIGINT (inference servers,
# `subprocess` tests, notebooks' interrupts) never sees it when a Ray worker has started it: the signal stays pending,
# Popen.send_signal(SIGINT) reports nothing, and whoever waits for the clean stop waits for ever or kills. Handlers set in
# the child do not help, since the signal is not delivered. Send SIGTERM, or unblock SIGINT before starting a program and
# block it again afterwards.
# Seen: a child of the driver is interrupted; children of an actor and of a task sleep on; with SIGINT unblocked around
# the start, the child of an actor is interrupted.
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ray==2.60.0
cat > "$folder/check.py" <<'PY'
import signal
import subprocess
import sys

import ray

CHILD = """
import time
try:
    print("ready", flush=True)
    time.sleep(3)
    print("slept")
except KeyboardInterrupt:
    print("interrupted")
"""


def start_and_interrupt(unblock: bool = False) -> str:
    if unblock:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
    if unblock:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    return child.stdout.read().strip()


@ray.remote
class Actor:
    def ask(self, unblock: bool) -> str:
        return start_and_interrupt(unblock)


ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
actor = Actor.remote()
found = {
    "driver": start_and_interrupt(),
    "actor": ray.get(actor.ask.remote(False)),
    "task": ray.get(ray.remote(start_and_interrupt).remote()),
    "actor, unblocked": ray.get(actor.ask.remote(True)),
}
for where, outcome in found.items():
    print(f"child of {where}: {outcome}")
ray.shutdown()
sys.exit(list(found.values()) != ["interrupted", "slept", "slept", "interrupted"])
PY
"$folder/venv/bin/python" "$folder/check.py"
