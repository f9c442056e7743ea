#!/usr/bin/env bash
# pyap 0.3.1: match_start and match_end are positions in a rewritten text that parse() does not return.
#
# parse(text) rewrites the text first: line breaks become ", ", runs of white space become one space, commas lose and
# gain spaces. The offsets count in that text. They agree with the input on tidy one-line texts, which is what tests
# use, and drift by a character or more with each line break before the address. Cutting or masking the input by them
# removes what stands next to the address and keeps part of it. Search for full_address, or slice parser.clean_text.
# Seen: after "Ship to: " the slice is the address; after "Dear all,\n\n\n    ship to:   " it starts and ends too
# early.
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pyap==0.3.1
cat > "$folder/check.py" <<'PY'
import sys

import pyap

ADDRESS = "225 E. John Carpenter Freeway, Suite 1500 Irving, Texas 75062"
found = []
for before in ("Ship to: ", "Dear all,\n\n\n    ship to:   "):
    text = f"{before}{ADDRESS} before noon"
    (address,) = pyap.parse(text, country="US")
    found.append(text[address.match_start : address.match_end])
    print(f"after {before!r}: {found[-1]!r}")
sys.exit(found[0].strip() != ADDRESS or ADDRESS in found[1] or not found[1])
PY
"$folder/venv/bin/python" "$folder/check.py"
