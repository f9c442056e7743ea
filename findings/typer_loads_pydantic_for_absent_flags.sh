#!/usr/bin/env bash
# typer 0.29.2 beside pydantic 2.12.5: every command imports pydantic, also for --help, because of an absent flag.
#
# Typer converts parameter values through a pydantic TypeAdapter where pydantic is installed, and exempts values that
# are already right. A flag that was not given is processed once as None, which is not exempt. --help of a command is
# such a flag, so every command pays: 50 to 65 ms of imports at each start of a program that has pydantic for other
# reasons.
# The top-level --help does not. Seen: program --help: no; command --help, command, command without options: yes.
# Fails if that pattern changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet typer==0.29.2 pydantic==2.12.5
cat > "$folder/check.py" <<'PY'
import subprocess
import sys

PROGRAM = """
import sys, typer
app = typer.Typer()
@app.command()
def flag(loud: bool = False): pass
@app.command()
def nothing(): pass
try: app({arguments!r}, standalone_mode=False)
except SystemExit: pass
print("pydantic" in sys.modules)
"""
EXPECTED = {("--help",): "False", ("flag", "--help"): "True", ("flag",): "True", ("nothing",): "True"}
found = {}
for arguments in EXPECTED:
    program = PROGRAM.format(arguments=list(arguments))
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found[arguments] = ended.stdout.splitlines()[-1]
    print(" ".join(arguments), "imports pydantic:", found[arguments])
sys.exit(0 if found == EXPECTED else 1)
PY
"$folder/venv/bin/python" "$folder/check.py"
