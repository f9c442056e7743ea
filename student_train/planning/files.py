"""Files of a run that its first rank writes and the others read: selections, and what is known of their chains."""

import functools
import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from stillroom.errors import ConfigError
from stillroom.storage.paths import atomic_path
from student_train.config.data import DataConfig
from student_train.config.run import StudentConfig, TrainConfig
from student_train.data.attached import NOTHING_ATTACHED, Attached
from student_train.data.freezing import OpenCaches, SelectionRequest, open_selection
from student_train.data.open import (
    at_versions_of,
    is_paired,
    kept_or_temporary,
    negatives_request,
    open_data,
    open_heldout,
    reopen_data,
    right_request,
    train_request,
)
from student_train.data.prepared import Pairing
from student_train.data.selection import Selection
from student_train.data.steps import examples_path, with_examples, write_examples
from student_train.data.terms import MarkedTerms, terms_path, write_terms
from student_train.data.token_numbers import TokenNumbers, numbers_path, write_behaviour
from student_train.losses.mix import LossMix
from student_train.runtime.run_folder import RunFolder

Opener = Callable[[Path, SelectionRequest, DataConfig, StudentConfig], Selection]


@dataclass(frozen=True)
class RunFiles:
    """Files of a run that its first rank writes and the others read after the barrier."""

    config: TrainConfig
    run: RunFolder
    is_first: bool
    barrier: Callable[[], None]
    spare: Path | None
    caches: OpenCaches
    written_for: dict[tuple[str, str], Path] = field(default_factory=dict)
    """Files by what they are and the chains that they are about."""

    def opened(self, path: Path, request: SelectionRequest, open_here: Opener = open_data) -> Selection:
        """A selection."""
        if self.is_first:
            asked = replace(request, opened=self.caches)
            selection = open_here(path, asked, self.config.data, self.config.student)
        self.barrier()
        return selection if self.is_first else reopen_data(path, request)

    def heldout(self, path: Path, request: SelectionRequest) -> Selection:
        """A selection of held-out chains, which `eval` may change."""
        trained = self.run.selection_path(self.config.stages[0].name)
        return self.opened(
            path if self.spare is None else kept_or_temporary(path, request, self.spare),
            request,
            functools.partial(open_heldout, trained=trained),
        )

    def written(self, kind: str, path: Path, selection: Selection, write: Callable[[Path], None]) -> None:
        """A file about each chain of a selection, and what lies beside it under the same stem. Stages often read the
        same chains: these files are copied.
        """
        if self.is_first:
            # Not the header's hash: once chains are split, it has the stage's name in it.
            chains = hashlib.sha256(selection.key_R.tobytes()).hexdigest()
            earlier = self.written_for.setdefault((kind, chains), path)
            if not path.exists() and earlier == path:
                write(path)
            elif not path.exists():
                # .json before .npy, whose presence means that both are whole.
                for source in sorted(earlier.parent.glob(f"{earlier.stem}.*")):
                    with atomic_path(path.with_suffix(source.suffix)) as temp:
                        shutil.copyfile(source, temp)
        self.barrier()

    def stage(self, index: int) -> Selection:
        """The selection of a stage: single chains, pairs, or examples where `data.steps` splits chains."""
        stage, data = self.config.stages[index], self.config.data
        selection = self._chains(index)
        if data.steps is None:
            return selection
        path = examples_path(self.run.root, stage.name, selection, data)
        self.written("steps", path, selection, lambda path: write_examples(path, selection, data))
        return with_examples(path, selection)

    def _chains(self, index: int) -> Selection:
        run, stage, data = self.run, self.config.stages[index], self.config.data
        request = train_request(data, index, stage)
        if stage.negatives is None:
            return self.opened(run.selection_path(stage.name), request)
        # First, so that what is wrong with its SQL alone is said of it alone.
        negatives = self.opened(run.negatives_path(stage.name), negatives_request(data, index, stage), _open_plain)
        path = run.selection_path(stage.name)
        if not path.exists():
            # Caches may grow meanwhile: a wrong chain that only the second selection saw would be imitated.
            request = at_versions_of(request, negatives)
        if not is_paired(stage):
            return self.opened(path, request)
        pairing = Pairing(negatives, data.pack_tokens, data.max_tokens)
        return self.opened(path, request, functools.partial(open_data, pairing=pairing))

    def attached(self, index: int, mix: LossMix, selection: Selection) -> tuple[Attached, Selection | None]:
        """What a stage knows of its tokens besides the stream, and held-out right chains if it has wrong ones."""
        config, run = self.config, self.run
        stage, data, attached = config.stages[index], config.data, NOTHING_ATTACHED
        if mix.reads_behaviour:
            path = numbers_path(run.root, stage.name, "behaviour", selection)
            self.written("behaviour", path, selection, lambda path: write_behaviour(path, selection, data.behaviour))
            attached = Attached(behaviour=TokenNumbers(path, selection))
        if (terms := data.terms) is not None:
            path = terms_path(run.root, stage.name, selection, terms)
            self.written("terms", path, selection, lambda path: write_terms(path, selection, terms))
            attached = replace(attached, terms=MarkedTerms(path, selection, terms))
        if stage.negatives is None:
            return attached, None
        if not is_paired(stage):
            request = negatives_request(data, index, stage)
            negatives = self.opened(run.negatives_path(stage.name), request, _open_plain)
            # By key: this selection holds right chains too, so its row numbers are others.
            is_negative_R = np.isin(selection.key_R, negatives.key_R)
            if not is_negative_R.any():
                raise ConfigError(
                    f"{request.key} {request.where!r} selects none of the chains that data.max_chains leaves"
                )
            attached = replace(attached, is_negative_R=is_negative_R)
        assert config.eval is not None
        right = self.heldout(run.right_path(stage.name), right_request(data, config.eval, index, stage))
        return attached, right


def _open_plain(path: Path, request: SelectionRequest, data: DataConfig, student: StudentConfig) -> Selection:
    """Which chains are wrong: neither their tokens nor their distributions are read here."""
    return open_selection(path, replace(request, any_tokenizer=True))
