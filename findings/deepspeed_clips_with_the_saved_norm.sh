#!/usr/bin/env bash
# deepspeed 0.19.8 (torch 2.13.0, CPU): under ZeRO 1 and 2 load_checkpoint also restores gradient_clipping.
#
# Who resumes a run after a spike of the loss often lowers gradient_clipping. Under ZeRO 1 and 2 that changes nothing:
# the partitioned optimizer's state carries clip_grad, and loading puts it in the place of the configured one, without a
# message; engine.gradient_clipping() keeps naming the configured value. ZeRO 0 and 3 clip with the configured value, and
# so do 1 and 2 with load_optimizer_states=False. Set engine.optimizer.clip_grad after load_checkpoint.
# Seen, saved with 1.0, resumed with 0.01, length of an update by SGD of rate 1: ZeRO 0 and 3 0.01; ZeRO 1 and 2 1.0;
# these two without the optimizer's states, or with clip_grad set, 0.01.
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5 setuptools wheel
"$folder/venv/bin/pip" install --quiet --no-build-isolation deepspeed==0.19.8
cat > "$folder/check.py" <<'PY'
import os
import sys

import deepspeed
import torch

SAVED, CONFIGURED = 1.0, 0.01
folder = sys.argv[1]


def engine_of(stage: int, clipping: float) -> deepspeed.DeepSpeedEngine:
    model = torch.nn.Linear(4, 1, bias=False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": clipping,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def weights(engine: deepspeed.DeepSpeedEngine) -> torch.Tensor:
    weight = engine.module.weight
    with deepspeed.zero.GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
        return weight.detach().clone()


def update(engine: deepspeed.DeepSpeedEngine) -> float:
    before = weights(engine)
    engine.backward(engine(torch.full((1, 4), 50.0)).sum())
    engine.step()
    return round((weights(engine) - before).norm().item(), 4)


def resumed(stage: int, **options: bool) -> deepspeed.DeepSpeedEngine:
    engine = engine_of(stage, CONFIGURED)
    engine.load_checkpoint(f"{folder}/zero{stage}", **options)
    return engine


deepspeed.init_distributed("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
found = {}
for stage in range(4):
    first = engine_of(stage, SAVED)
    assert update(first) == SAVED
    first.save_checkpoint(f"{folder}/zero{stage}")
    engine = resumed(stage)
    found[f"ZeRO {stage}"] = update(engine)
    assert engine.gradient_clipping() == CONFIGURED
for stage in (1, 2):
    found[f"ZeRO {stage}, weights only"] = update(resumed(stage, load_optimizer_states=False))
    engine = resumed(stage)
    engine.optimizer.clip_grad = CONFIGURED
    found[f"ZeRO {stage}, clip_grad set"] = update(engine)
for name, length in found.items():
    print(f"{name}: update of length {length}, configured {CONFIGURED}, saved {SAVED}", flush=True)
as_seen = all(length == (SAVED if name in ("ZeRO 1", "ZeRO 2") else CONFIGURED) for name, length in found.items())
os._exit(0 if as_seen else 1)
PY
export DS_ACCELERATOR=cpu LOCAL_RANK=0 RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29511
"$folder/venv/bin/python" "$folder/check.py" "$folder"
