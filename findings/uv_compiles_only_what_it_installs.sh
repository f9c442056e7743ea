#!/usr/bin/env bash
# uv 0.13.8: `uv pip install --compile-bytecode` leaves packages that are already there uncompiled.
#
# The option is documented as compiling "Python files to bytecode after installation". A set-up that installs once without
# it and is run again with it changes nothing: uv finds every requirement satisfied, installs nothing, compiles nothing;
# with one new package, only that one is compiled. Where bytecode cannot be written later (PYTHONDONTWRITEBYTECODE,
# read-only image layers) every start then compiles again: 1.5 CPU s for torch.
# Seen: six installed without the option: no; the same with it: no; with it and attrs: six no, attrs yes.
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export PYTHONDONTWRITEBYTECODE=1
python3 -m venv "$folder/tool"
"$folder/tool/bin/pip" install --quiet --no-compile uv==0.13.8
uv="$folder/tool/bin/uv"
"$uv" venv --quiet "$folder/venv"
install() { "$uv" pip install --quiet --python "$folder/venv/bin/python" "$@"; }
compiled() { find "$folder/venv" -path '*site-packages*' -name "$1.*.pyc" | grep -q . && echo yes || echo no; }
install six==1.17.0
first=$(compiled six)
install --compile-bytecode six==1.17.0
again=$(compiled six)
install --compile-bytecode six==1.17.0 attrs==25.4.0
last="$(compiled six), attrs: $(compiled _make)"
echo "six, without the option: $first; again with it: $again; with it and attrs: $last"
[ "$first $again $last" = "no no no, attrs: yes" ]
