"""`student-train export --format`: a checkpoint or a folder in another format, checked before it becomes visible.

The float student comes first, as a Hugging Face folder; a writer converts it, in its own environment; then both answer
the same held-out chains, each in its own runtime. Below the threshold nothing is left, unless the user insists. The
folder carries the tokenizer, a model card with the figures, and the same as `export.json`.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stillroom.config import Json
from stillroom.errors import ConfigError, DataError, Disagreement, naming
from stillroom.log import format_bytes, note
from stillroom.models import model_settings, public_name
from stillroom.storage.paths import write_text_atomic
from student_train.config.data import CacheConfig, DataConfig
from student_train.config.run import HELDOUT, EvalConfig, StudentConfig, TrainConfig
from student_train.data.open import eval_request, kept_or_temporary, open_data
from student_train.data.selection import load_selection
from student_train.data.tokenizer_check import check_vocabulary
from student_train.export.agreement import MAX_CHAIN_TOKENS, Chain, compare, read_chains
from student_train.export.environments import python_of
from student_train.export.formats import RUNTIMES, Format, find_format
from student_train.export.worker import RuntimeWorker, Worker
from student_train.exporting import export
from student_train.model.folder import atomic_folder, refuse_existing
from student_train.model.shape import tensor_shapes
from student_train.runtime.checkpoint import CheckpointState
from student_train.runtime.run_folder import RunFolder

RECORD = "export.json"
CALIBRATION_CHAINS = 128
TRAIN = "split = 'train'"
CARRIED = ("tokenizer*", "chat_template*", "special_tokens_map.json", "vocab*", "merges.txt", "generation_config.json")
"""Files that runtimes and servers read beside the weights."""


@dataclass(frozen=True)
class Source:
    """A float student as a folder, the chains that check an export of it, and those that calibrate it."""

    folder: Path
    name: str
    heldout: Sequence[Chain]
    calibration: Sequence[Chain]


@dataclass(frozen=True)
class Check:
    """How an export is judged: on how many chains, from which top-1 agreement on, and whether failing is accepted."""

    max_chains: int = 64
    min_agreement: float = 0.9
    allow_disagreement: bool = False


def export_run(
    config: TrainConfig, state: CheckpointState, out: Path, name: str, check: Check, tokenizer: str | None
) -> Json:
    """Exports a checkpoint of a run, checked on its held-out chains and calibrated on those that it learnt from.

    Raises ConfigError, DataError, CorruptError, Disagreement, StillroomError.
    """
    name, made = _checked(out, name)
    run = RunFolder(config.run)
    with tempfile.TemporaryDirectory(prefix="student-train-export-") as temp:
        request = eval_request(config.data, config.eval or EvalConfig())
        path = kept_or_temporary(run.heldout_path, request, Path(temp))
        heldout = read_chains(open_data(path, request, config.data, config.student), check.max_chains)
    calibration: list[Chain] = []
    if made.is_calibrated:
        trained = load_selection(run.selection_path(config.stages[state.stage].name))
        calibration = read_chains(trained, CALIBRATION_CHAINS)
    _ensure_environments(made)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temp:
        folder = Path(temp) / "float"
        export(config, state, folder, adapter_only=False, tokenizer=tokenizer)
        source = Source(folder, f"checkpoint {state.tag} of {config.run.name}", heldout, calibration)
        return _export(source, out, name, made, check)


def export_folder(model: Path, caches: Sequence[Path], where: str | None, out: Path, name: str, check: Check) -> Json:
    """Exports a Hugging Face folder, checked on held-out chains of the caches (`where`) and calibrated on others.

    Raises ConfigError, DataError, CorruptError, Disagreement, StillroomError.
    """
    with naming("--model"):
        settings = model_settings(model)
        tensor_shapes(model)
    if "quantization_config" in settings:
        raise DataError(f"--model {model} is quantised already: pass the float folder that it was made from")
    name, made = _checked(out, name)
    heldout = _cached_chains(model, caches, where or HELDOUT, check.max_chains)
    # Chains that calibrated an export would flatter it in its check.
    others = TRAIN if where is None else f"{TRAIN} and not ({where})"
    calibration = _cached_chains(model, caches, others, CALIBRATION_CHAINS) if made.is_calibrated else []
    _ensure_environments(made)
    return _export(Source(model, str(model), heldout, calibration), out, name, made, check)


def _checked(out: Path, name: str) -> tuple[str, Format]:
    """The format, after what can be refused before any chain is read."""
    name, made = find_format(name)
    refuse_existing(out)
    if made.needs_gpu and not torch.cuda.is_available():
        raise ConfigError(f"--format {name} needs a GPU: its search takes hours on a CPU. Use gptq, or w8a8")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Tried, as the rights of a folder say nothing of /proc or of a read-only disk.
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent):
            pass
    except OSError as error:
        raise DataError(f"{out} cannot be written ({error.strerror}): use a folder you can write to") from error
    return name, made


def _ensure_environments(made: Format) -> None:
    """Makes those of the writer and the runtime: gigabytes, so after all that can be refused, but before any export."""
    for environment in (made.environment, RUNTIMES[made.runtime].environment):
        python_of(environment)


def _cached_chains(model: Path, caches: Sequence[Path], where: str, max_chains: int) -> list[Chain]:
    data = DataConfig(caches=[CacheConfig(path=path) for path in caches])
    request = eval_request(data, EvalConfig(where=where, max_chains=max_chains), "--where")
    with tempfile.TemporaryDirectory(prefix="student-train-export-") as temp:
        student = StudentConfig(model=str(model))
        selection = open_data(Path(temp) / "chains.selection.parquet", request, data, student)
        check_vocabulary(student, selection, caches)
        return read_chains(selection, max_chains)


def _export(source: Source, out: Path, name: str, made: Format, check: Check) -> Json:
    heldout = _fitting(source.heldout, source.folder)
    with atomic_folder(out) as temp:
        note(f"writing {made.label}")
        versions = _write(source, temp, made)
        _carry_tokenizer(source.folder, temp)
        note(f"running it in {made.runtime} against the float student, on {len(heldout)} held-out chains")
        with (
            RuntimeWorker("transformers", source.folder, None, is_quick=True) as reference,
            RuntimeWorker(made.runtime, temp, None, is_quick=True) as candidate,
        ):
            agreement = compare(reference, candidate, heldout)
            versions |= candidate.versions
        is_same = agreement.top1_agreement >= check.min_agreement
        record = {
            "format": name,
            "runtime": made.runtime,
            "source": source.name,
            "size_bytes": weight_bytes(temp),
            "float_size_bytes": weight_bytes(source.folder),
            "agreement": agreement.model_dump(),
            "min_agreement": check.min_agreement,
            "is_same_student": is_same,
            "versions": versions,
        }
        if not is_same and not check.allow_disagreement:
            raise Disagreement(
                f"{name} is not the same student: top-1 agreement {agreement.top1_agreement:.1%} on "
                f"{agreement.num_tokens} held-out tokens is below --min-agreement {check.min_agreement:g} (KL "
                f"{agreement.kl:.4f}), and nothing was written. Choose another format, or keep it with "
                "--allow-disagreement"
            )
        write_text_atomic(temp / "README.md", _card(source.folder, record, made))
        write_text_atomic(temp / RECORD, json.dumps(record, indent=2) + "\n")
        # safetensors writes files that only their owner can read, and a server may be another user.
        for path in (one for one in temp.rglob("*") if one.is_file()):
            path.chmod((temp / RECORD).stat().st_mode)
    return {"folder": str(out), **record}


def positions_of(folder: Path) -> int | None:
    """How many tokens the model of a folder has positions for; None where its config.json does not say."""
    config = model_settings(folder)
    config = config.get("text_config", config)
    found = config.get("max_position_embeddings") or config.get("n_positions")
    return found if isinstance(found, int) else None


def _fitting(chains: Sequence[Chain], folder: Path) -> list[Chain]:
    """Chains cut to what the model has positions for, less one: vLLM always generates a token."""
    num_positions = positions_of(folder) or MAX_CHAIN_TOKENS + 1
    fitting = [chain.shortened(num_positions - 1) for chain in chains]
    if not any(chain.positions for chain in fitting):
        raise DataError(f"every prompt of the held-out chains is longer than the model's {num_positions} positions")
    return [chain for chain in fitting if chain.positions]


def _write(source: Source, out: Path, made: Format) -> dict[str, str]:
    """Versions of the tools that wrote the format into `out`."""
    with (
        tempfile.TemporaryDirectory(prefix="student-train-export-") as temp,
        Worker(made.writer, made.environment, temp_folder=temp) as writer,
    ):
        chains = None
        if made.is_calibrated:
            chains = Path(temp) / "chains.json"
            chains.write_text(json.dumps([chain.ids for chain in source.calibration]), encoding="utf-8")
        versions: dict[str, str] = writer.ask(
            "write",
            f"writing {made.label}",
            folder=str(source.folder.absolute()),
            out=str(out.absolute()),
            precision=made.precision,
            chains=None if chains is None else str(chains),
        )
    return versions


def _carry_tokenizer(folder: Path, out: Path) -> None:
    for pattern in CARRIED:
        for path in folder.glob(pattern):
            # Some writers rewrite the tokenizer for another version of its library.
            shutil.copyfile(path, out / path.name)


def weight_bytes(folder: Path) -> int:
    """Size of a folder's files, without the card and the record."""
    own = {"README.md", RECORD}
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name not in own)


def _card(folder: Path, record: Json, made: Format) -> str:
    """The float student's card, or a short one, with a section about the format."""
    path = folder / "README.md"
    head = path.read_text(encoding="utf-8") if path.exists() else f"---\nlibrary_name: -\n---\n\n# {folder.name}\n"
    head = re.sub(r"(?m)^library_name: .*$", f"library_name: {made.library}", head, count=1)
    found = record["agreement"]
    rows: Mapping[str, str] = {
        "top-1 agreement": f"{found['top1_agreement']:.4f}",
        "KL(float, this) (nats per token)": f"{found['kl']:.5f}",
        "Jensen-Shannon divergence (nats per token)": f"{found['js']:.5f}",
        "knowledge retention (1 - JS / log 2)": f"{found['retention']:.4f}",
        "size, float and this": f"{format_bytes(record['float_size_bytes'])}, {format_bytes(record['size_bytes'])}",
    }
    table = "\n".join(["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows.items())])
    verdict = "" if record["is_same_student"] else " **It is not the same student.**"
    tools = ", ".join(f"{tool} {version}" for tool, version in record["versions"].items())
    return (
        f"{head.rstrip()}\n\n## Format\n\n{made.label}, from {public_name(record['source'])}. Run in {made.runtime} on "
        f"{found['num_tokens']} tokens of {found['num_chains']} held-out chains and compared with the float "
        f"student:{verdict}\n\n{table}\n\nWritten and run by {tools}.\n"
    )
