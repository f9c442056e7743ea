#!/usr/bin/env bash
# math-verify 0.9.0: "2t" equals "2", and 0.0000001 equals 0.0000002.
#
# parse() strips what looks like a unit after a number, and single letters count as units, so the variable of "2t" or
# "3c" is lost: answers that differ by a variable verify as equal. verify() compares floats rounded to six decimals, so
# all numbers below 5e-7 are equal to each other and to 0. Both are silent, and both make wrong answers right in a
# dataset filtered by this check: type the reference first, and compare small numbers by ratio.
# Fails if either changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0
cat > "$folder/check.py" <<'PY'
import sys

from math_verify import parse, verify

PAIRS = [("$2t$", "$2$", True), ("$3c$", "$3$", True), ("$2t$", "$3t$", False),
         ("$0.0000001$", "$0.0000002$", True), ("$0.001$", "$0.002$", False)]
found = [(gold, answer, verify(parse(gold), parse(answer))) for gold, answer, _ in PAIRS]
for gold, answer, equal in found:
    print(f"{gold} against {answer}: {'equal' if equal else 'different'}")
sys.exit(0 if found == PAIRS else 1)
PY
"$folder/venv/bin/python" "$folder/check.py"
