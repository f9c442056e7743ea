"""Distributions of a real teacher on varied prompts, as the file that `python -m benchmarks.codec --input` reads.

    python -m benchmarks.codec_data OUT.npz [--teacher FOLDER] [--max-tokens T]

Fifty topics in sixteen templates, asked in shuffled order through `teacher-cache build` and vLLM: 800 chains of at most
T tokens at temperature 0.6, and of every token the 64 most probable ones in float32. The demo's prompts come from six
templates and flatter every codec that learns what follows what; these do not.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.codec import MAX_SUPPORT, load_cache
from stillroom.errors import StillroomError
from stillroom.log import note
from stillroom.storage.paths import atomic_path

DEMO_TEACHER = Path("runs/demo/teacher")

TOPICS = (
    *("photosynthesis", "the French Revolution", "prime numbers", "sourdough bread", "black holes", "jazz music"),
    *("supply and demand", "the human heart", "climate change", "chess openings", "Shakespeare's plays", "volcanoes"),
    *("machine learning", "the Great Wall of China", "vaccines", "basketball", "origami", "the water cycle"),
    *("Roman roads", "electric cars", "coffee brewing", "dinosaurs", "the stock market", "gardening in small spaces"),
    *("DNA", "the Moon landing", "Buddhism", "public speaking", "Python programming", "coral reefs"),
    *("the printing press", "insomnia", "bicycles", "the Cold War", "cheese making", "probability", "beekeeping"),
    *("opera", "solar panels", "the Sahara desert", "time management", "whales", "medieval castles", "cryptography"),
    *("tea ceremonies", "migration of birds", "nutrition labels", "architecture of bridges", "stoicism"),
    "video game design",
)
TEMPLATES = (
    "Explain {} to a ten-year-old.",
    "Write a short poem about {}.",
    "List five surprising facts about {}.",
    "What are common misconceptions about {}?",
    "Write a dialogue between two friends about {}.",
    "Give a step-by-step introduction to {}.",
    "Write a news headline and first paragraph about {}.",
    "Compare {} with something similar and say how they differ.",
    "Tell a short story in which {} plays a role.",
    "What questions would an expert ask about {}?",
    "Summarise the history of {} in three sentences.",
    "Write a Python dictionary that describes {}.",
    "Write an email to a colleague about {}.",
    "Argue for and against the importance of {}.",
    "Make a quiz question with four options about {} and give the answer.",
    "Translate into simple words: what is the main idea behind {}?",
)


def main() -> None:
    """Builds the cache in a temporary folder and writes the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codec_data")
    parser.add_argument("out", type=Path, metavar="OUT.npz")
    parser.add_argument("--teacher", type=Path, default=DEMO_TEACHER, help="Hugging Face folder; default: the demo's")
    parser.add_argument("--max-tokens", type=int, default=56, help="of each chain")
    options = parser.parse_args()
    if not options.teacher.is_dir():
        parser.error(f"{options.teacher} does not exist: run `make demo` once, or use a Hugging Face folder")
    try:
        with tempfile.TemporaryDirectory(prefix="stillroom-codec-data-") as folder:
            num_tokens = write(Path(folder), options.teacher, options.max_tokens, options.out)
    except StillroomError as error:
        parser.exit(error.exit_code, f"{error}\n")
    note(f"{num_tokens} tokens in {options.out}")


def write(folder: Path, teacher: Path, max_tokens: int, out: Path) -> int:
    """Generates in `folder` and writes `out`; completion tokens."""
    from teacher_cache.building.commands import build_cache
    from teacher_cache.config import BuildConfig
    from teacher_cache.prompts.prompts import parse_worker

    prompts = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": template.format(topic)}) for topic in TOPICS for template in TEMPLATES]
    prompts.write_text("\n".join(lines), encoding="utf-8")
    config = BuildConfig.model_validate(
        {
            "cache": folder / "cache",
            "run": "codec_data",
            "teacher": {"model": str(teacher)},
            "prompts": {"sources": [{"kind": "jsonl", "name": "varied", "path": prompts, "prompt_field": "prompt"}]},
            "sampling": {"temperature": 0.6, "top_p": 1.0, "max_tokens": max_tokens},
            "capture": {"codec": "topk-f32", "max_support": MAX_SUPPORT, "nucleus": None, "draws": 0},
            "engine": {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 32, "kv_cache_gb": 1},
        }
    )
    build_cache(config, parse_worker("0/1"), retry_failures=False)
    data = load_cache(folder / "cache")
    rows = [one.signals() for one in data.chains]
    with atomic_path(out) as temp, temp.open("wb") as stream:
        np.savez_compressed(
            stream,
            ids=data.naive_ids_N.reshape(-1, MAX_SUPPORT),
            logprobs=data.naive_logprobs_N.reshape(-1, MAX_SUPPORT),
            sampled=np.concatenate([one.token_ids_T for one in data.chains]),
            lengths=np.array([len(one.token_ids_T) for one in data.chains], np.int32),
            vocab_size=np.int64(data.vocab_size),
            rank=np.concatenate([one.sampled_rank_T for one in rows]),
            sampled_logprob=np.concatenate([one.sampled_logprob_T for one in rows]),
            entropy=np.concatenate([one.entropy_T for one in rows]),
        )
    return data.num_tokens


if __name__ == "__main__":
    main()
