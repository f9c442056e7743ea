"""`student-train export` and `bench`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from stillroom.errors import ConfigError
from stillroom.program import AsJson, StopRequest, print_result
from student_train.commands.options import OptionalConfigPath, Overrides, WhichCheckpoint, load_train_config
from student_train.commands.result_lines import bench_lines, export_lines, format_lines


def export(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    config_path: OptionalConfigPath = None,
    overrides: Overrides = None,
    checkpoint: WhichCheckpoint = "last",
    format_name: Annotated[
        str,
        typer.Option(
            "--format",
            help="hf, onnx-int8, onnx-fp32, gguf-q8_0, gguf-f16, openvino-int8, w8a8, gptq or awq. All but hf are "
            "compared with the float student on held-out chains.",
        ),
    ] = "hf",
    model: Annotated[Path | None, typer.Option(help="Export this Hugging Face folder instead of a run's.")] = None,
    cache: Annotated[list[Path] | None, typer.Option(help="With --model: cache to check on. Repeatable.")] = None,
    where: Annotated[
        str | None,
        typer.Option(help="With --model: SQL condition of the chains to check on; default: split = 'heldout'."),
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Minimum top-1 agreement with the float student. Default: 0.9."),
    ] = None,
    allow_disagreement: Annotated[
        bool, typer.Option("--allow-disagreement", help="Keep an export below --min-agreement.")
    ] = False,
    check_chains: Annotated[int | None, typer.Option(min=1, help="Held-out chains to check on. Default: 64.")] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Write the LoRA adapter without merging it.")
    ] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder with the cache's tokenizer, if neither student nor teacher has it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder, or in another format that is checked against it."""
    from student_train.export.writing import Check, export_folder, export_run
    from student_train.exporting import export as export_checkpoint
    from student_train.runtime.checkpoint import find_state
    from student_train.runtime.run_folder import RunFolder

    if format_name == "hf":
        if (model, cache, where, min_agreement, check_chains) != (None,) * 5 or allow_disagreement:
            raise ConfigError("--model, --cache, --where and the options of the check need a --format other than hf")
    elif adapter_only:
        raise ConfigError("--adapter-only writes --format hf only")
    check = Check(check_chains or Check.max_chains, Check.min_agreement, allow_disagreement)
    if min_agreement is not None:
        check = replace(check, min_agreement=min_agreement)
    # A signal would end Python in the middle: this way temporary folders are removed and foreign tools end too.
    with StopRequest(at_once=True):
        if config_path is None:
            if model is None or not cache:
                raise ConfigError("pass a CONFIG, or --model, --cache and --format")
            if checkpoint != "last" or overrides or tokenizer is not None:
                raise ConfigError("--checkpoint, --set and --tokenizer need a CONFIG")
            result = export_folder(model, cache, where, out, format_name, check)
        else:
            if (model, cache, where) != (None, None, None):
                raise ConfigError("CONFIG already names model and caches: remove it, or --model, --cache and --where")
            config = load_train_config(config_path, overrides)
            state = find_state(RunFolder(config.run).checkpoints, checkpoint)
            if format_name == "hf":
                result = export_checkpoint(config, state, out, adapter_only=adapter_only, tokenizer=tokenizer)
            else:
                result = export_run(config, state, out, format_name, check, tokenizer)
    print_result(result, export_lines(result) if format_name == "hf" else format_lines(result), as_json)


def bench_formats(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="FOLDER", help="Exports of one student; RUNTIME:FOLDER runs one in another runtime."),
    ],
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens per prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate per prompt.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Times each folder is measured, in turns.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads per runtime. Default: its own.")] = None,
    eager: Annotated[
        bool, typer.Option("--eager", help="vLLM without compiling, which takes minutes on a CPU.")
    ] = False,
    max_ms: Annotated[
        float | None, typer.Option(min=0, help="Choose the format that answers one such request within this time.")
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option(min=0, max=1, help="With --max-ms: minimum top-1 agreement. Default: 0.9.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="HTML page to write.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the speed of one student's formats: prefill, decoding, first token, memory, size, energy."""
    from stillroom.storage.paths import check_out
    from student_train.export.bench import Load, bench, choose, contestant
    from student_train.export.bench_page import write_bench_page

    if out is not None:
        check_out("--out", out)
    if min_agreement is not None and max_ms is None:
        raise ConfigError("--min-agreement has no effect without --max-ms")
    with StopRequest(at_once=True):
        result = bench([contestant(one) for one in folders], Load(prompt_tokens, new_tokens, rounds, threads, eager))
    if max_ms is not None:
        least = 0.9 if min_agreement is None else min_agreement
        result |= {"max_ms": max_ms, "chosen": choose(result, max_ms, least)}
    if out is not None:
        write_bench_page(out, result)
    print_result(result, bench_lines(result), as_json)
    if max_ms is not None and result["chosen"] is None:
        raise typer.Exit(1)
