"""One peer's trainer on the prepared rows: `python worker.py SIDE FOLDER ROWS_A_STEP`, in the environment of the peers.

Prints one JSON object. Nothing of the project is imported.
"""

import importlib
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

datasets: Any = importlib.import_module("datasets")
transformers: Any = importlib.import_module("transformers")
trl: Any = importlib.import_module("trl")


class Clock(transformers.TrainerCallback):  # type: ignore[misc, name-defined, unused-ignore]
    """CPU and wall seconds at the ends of steps."""

    def __init__(self) -> None:
        self.cpu_s: list[float] = []
        self.wall_s: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        """Called by the trainer after each optimizer step."""
        self.cpu_s.append(time.process_time())
        self.wall_s.append(time.monotonic())


def main() -> None:
    """Trains and prints."""
    side, root, rows_a_step = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    columns = dict(np.load(root / "rows.npz"))
    clock = Clock()
    trainer = _trainer(side, root, columns, _settings(root / f"out-{side}", rows_a_step))
    trainer.add_callback(clock)
    trainer.train()
    tokens = rows_a_step * columns["input_ids"].shape[1]
    cpu_s, wall_s = (np.diff(times).tolist() for times in (clock.cpu_s, clock.wall_s))
    print(
        json.dumps(
            {
                "tokens_per_cpu_s": tokens / statistics.median(cpu_s),
                "tokens_per_s": tokens / statistics.median(wall_s),
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "versions": {one.__name__: one.__version__ for one in (trl, transformers, torch)},
            }
        )
    )


def _settings(folder: Path, rows_a_step: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": rows_a_step,
        "learning_rate": 1e-4,
        "num_train_epochs": 1,
        "optim": "adamw_torch_fused",
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
    }


def _trainer(side: str, root: Path, columns: dict[str, Any], settings: dict[str, Any]) -> Any:
    def model(name: str) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(root / name, torch_dtype=torch.float32)

    length = columns["input_ids"].shape[1]
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "student")
    if side == "distillkit":
        distill: Any = importlib.import_module("distillkit.main")
        rows = datasets.Dataset.from_dict({key: list(array) for key, array in columns.items()})
        rows.save_to_disk(root / "rows")
        found: dict[str, Any] = {}

        # Its command has no hook for a callback.
        class Kept(distill.DistillationTrainer):  # type: ignore[misc, name-defined, unused-ignore]
            def train(self, **_: object) -> None:
                found["trainer"] = self

            def save_model(self, *_: object) -> None:
                pass

        distill.DistillationTrainer = Kept
        dataset_kwargs = settings.pop("dataset_kwargs")
        settings.pop("output_dir")
        distill.do_distill(
            importlib.import_module("distillkit.configuration").DistillationRunConfig.model_validate(
                {
                    "model": str(root / "student"),
                    "output_path": str(root / "out-distillkit"),
                    "sequence_length": length,
                    "use_flash_attention": False,
                    "model_kwargs": {"torch_dtype": "float32"},
                    "dataset": {"train_dataset": {"disk_path": str(root / "rows")}, "prepacked": True, "seed": None},
                    "teacher": {
                        "kind": "dataset",
                        "logprob_compressor": {
                            "d": columns["token_ids"].max().item() + 1,
                            "k": columns["token_ids"].shape[2],
                            "exact_k": columns["token_ids"].shape[2],
                            "exact_dtype": "float32",
                            "polynomial_terms": [],
                            "residual_bins": [],
                        },
                    },
                    "loss_functions": [
                        {"function": "cross_entropy", "weight": 0.1},
                        {
                            "function": "kl",
                            "weight": 0.9,
                            "temperature": 1.0,
                            "missing_probability_handling": "zero",
                            "sparse_chunk_length": 1024,
                        },
                    ],
                    "training_args": {**settings, "dataset_kwargs": dataset_kwargs},
                }
            )
        )
        trainer = found["trainer"]
        trainer.train = lambda: super(Kept, trainer).train()
        return trainer
    rows = datasets.Dataset.from_dict({key: list(columns[key]) for key in ("input_ids", "labels")})
    rows = rows.add_column("attention_mask", [[1] * length] * len(rows))
    collate = transformers.default_data_collator
    if side == "trl_sft":
        return trl.SFTTrainer(
            model("student"),
            args=trl.SFTConfig(max_length=length, **settings),
            train_dataset=rows,
            data_collator=collate,
            processing_class=tokenizer,
        )
    # Its loss asks for the prompt's length, the same for all rows of a batch: rows hold several chains, so none is cut.
    rows = rows.add_column("prompts", [[0]] * len(rows))
    return trl.GKDTrainer(
        model("student"),
        teacher_model=model("teacher"),
        args=trl.GKDConfig(max_length=length, lmbda=0.0, beta=0.0, **settings),
        train_dataset=rows,
        data_collator=collate,
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    main()
