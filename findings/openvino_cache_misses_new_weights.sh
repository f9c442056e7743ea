#!/usr/bin/env bash
# openvino 2026.4.1: compile_model(path) with CACHE_DIR keeps the old weights when only the .bin file changes.
#
# The weights of an IR model are in the .bin file. The cache checks path, time and size of the .xml file only. A model
# that was trained further has the same graph and so a byte-identical .xml, and tools that copy only what changed (git,
# DVC, rsync --checksum) replace the .bin and leave the .xml alone. The next start loads the previous model from the
# cache, without a message and faster than ever. read_model followed by compile_model hashes the weights and is right.
# Do that, touch the .xml, or put a hash into the path.
# Seen, weights of 1 replaced by weights of 2, same .xml: by path 4.0, from the cache, where the new model gives 8.0;
# with read_model first 8.0; by path after touching the .xml 8.0.
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 numpy==2.3.5
cat > "$folder/export.py" <<'PY'
import sys

import numpy as np
import openvino as ov
from openvino import opset13 as ops

path, scale = sys.argv[1:]
row = ops.parameter([1, 4], np.float32, name="x")
product = ops.matmul(row, ops.constant(np.full((4, 4), float(scale), np.float32)), False, False)
ov.save_model(ov.Model([ops.result(product)], [row], "model"), path, compress_to_fp16=False)
PY
cat > "$folder/check.py" <<'PY'
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import openvino as ov

folder = Path(sys.argv[1])
path = str(folder / "now/model.xml")


def answer(cache: str, read_first: bool = False) -> tuple[float, bool]:
    core = ov.Core()
    core.set_property({"CACHE_DIR": str(folder / cache)})
    compiled = core.compile_model(core.read_model(path) if read_first else path, "CPU")
    return compiled(np.ones((1, 4), np.float32))[0][0, 0].item(), compiled.get_property("LOADED_FROM_CACHE")


is_same_graph = (folder / "now/model.xml").read_bytes() == (folder / "next/model.xml").read_bytes()
before = answer("by_path"), answer("by_model", read_first=True)
shutil.copy(folder / "next/model.bin", folder / "now/model.bin")
found = {"by path": answer("by_path"), "read_model first": answer("by_model", read_first=True)}
os.utime(path, (1, 1))
found["by path, .xml touched"] = answer("by_path")
print(f"same .xml: {is_same_graph}, before: {before}")
for name, (value, is_cached) in found.items():
    print(f"{name}: {value}, {'from the cache' if is_cached else 'compiled'}")
as_seen = before == ((4.0, False), (4.0, False)) and list(found.values()) == [(4.0, True), (8.0, False), (8.0, False)]
sys.exit(0 if is_same_graph and as_seen else 1)
PY
mkdir "$folder/now" "$folder/next"
"$folder/venv/bin/python" "$folder/export.py" "$folder/now/model.xml" 1
"$folder/venv/bin/python" "$folder/export.py" "$folder/next/model.xml" 2
"$folder/venv/bin/python" "$folder/check.py" "$folder"
