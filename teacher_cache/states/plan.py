"""`teacher-cache plan` for a features configuration: bytes per token and in total, before anything runs.

Payloads are not compressed, so their sizes follow from the teacher's shape and the number of tokens; only names and
positions of chains are estimated.
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stillroom.cache.catalog import Catalog
from stillroom.cache.feature_codec import attention_token_bytes
from stillroom.cache.features import SETS_FOLDER, read_sets, set_folder, vector_token_bytes
from stillroom.log import format_bytes, format_count, format_plural
from stillroom.storage.paths import matching
from teacher_cache.config import EmbeddedConfig
from teacher_cache.engine.teacher import identify_teacher
from teacher_cache.states.config import FeaturesConfig
from teacher_cache.states.engine import Shape, Wanted
from teacher_cache.states.model import head_bytes_of, shape_of, wanted_of
from teacher_cache.states.selection import Unit, choose, num_stored
from teacher_cache.states.sets import rank_of, set_id_of
from teacher_cache.writer.commit import VisibleSamples

ROW_BYTES = 54.0
"""Ids, lengths and offsets of a chain, compressed."""
POSITION_BYTES = 1.0
"""Per token, where a chain's tokens are not all stored."""
GROUP_BYTES = 1500.0
"""Footer and page headers of a row group."""


@dataclass(frozen=True, slots=True)
class FeaturesPlan:
    """What a pass would store. Bytes per token are over stored tokens; `total_bytes` is of the whole set, done and
    left, with its constants; `constant_bytes` are those not written yet.
    """

    set_id: str
    cache: str
    num_chains: int
    num_done: int
    num_left: int
    num_tokens: int
    tokens_left: int
    layers: tuple[int, ...]
    num_heads: int
    hidden_bytes_per_token: int
    layers_bytes_per_token: int
    attention_bytes_per_token: int
    bytes_per_token: float
    constant_bytes: float
    total_bytes: float
    left_bytes: float
    max_bytes: int | None
    disk_free_bytes: int | None

    @property
    def fits(self) -> bool:
        """Whether limit and disk are large enough."""
        within = self.max_bytes is None or self.total_bytes <= self.max_bytes
        return within and (self.disk_free_bytes is None or self.left_bytes < self.disk_free_bytes)


def plan_features(config: FeaturesConfig) -> FeaturesPlan:
    """Raises DataError or ConfigError as the pass would before it starts, except for a set that is too large."""
    teacher = identify_teacher(config.teacher.as_teacher, EmbeddedConfig()).record
    shape = shape_of(teacher, config.teacher.trust_remote_code)
    wanted = wanted_of(config, shape)
    catalog = Catalog(config.cache)
    units = choose(catalog, config.chains, teacher)
    return plan_units(catalog, config, wanted, shape, set_id_of(config, teacher, wanted), units)


def plan_units(
    catalog: Catalog, config: FeaturesConfig, wanted: Wanted, shape: Shape, set_id: str, units: Sequence[Unit]
) -> FeaturesPlan:
    """The plan of chains that are chosen already."""
    visible = None
    if catalog.features is not None:
        visible = VisibleSamples(catalog.features, set_id)
        visible.refresh()
    hidden, layers, attention = config.last_hidden, config.layers, config.attention
    hidden_bytes = 0 if hidden is None else vector_token_bytes(shape.hidden_size, hidden.rank, hidden.bits)
    layers_bytes = 0
    if layers is not None:
        layers_bytes = len(wanted.layers) * vector_token_bytes(shape.hidden_size, layers.rank, layers.bits)
    num_heads = 0
    if attention is not None:
        # Rounded like the heads that sets.py chooses.
        num_heads = len(wanted.attention) * max(1, math.ceil(attention.keep_frac * shape.num_heads - 1e-9))
    frac = config.tokens.entropy_frac
    vector_bytes = hidden_bytes + layers_bytes + (0.0 if frac is None else POSITION_BYTES)
    num_done = num_tokens = tokens_left = attention_tokens = 0
    payload = left = 0.0
    for unit in units:
        for place in unit.places:
            num = num_stored(place.num_tokens, frac)
            attended = attention_token_bytes(num_heads, wanted.num_keys, place.num_prompt + place.num_tokens)
            size = num * (vector_bytes + attended) + ROW_BYTES
            num_tokens += num
            attention_tokens += num * attended
            payload += size
            if visible is not None and place.sample_id in visible:
                num_done += 1
            else:
                tokens_left += num
                left += size
    num_chains = sum(len(unit.places) for unit in units)
    # One row group a unit: pages and footer cost the same however few rows they hold.
    overhead = GROUP_BYTES * len(units)
    constants = _constant_bytes(catalog, config, wanted, shape, set_id)
    left += overhead * (num_chains - num_done) / num_chains + constants
    return FeaturesPlan(
        set_id=set_id,
        cache=str(config.cache),
        num_chains=num_chains,
        num_done=num_done,
        num_left=num_chains - num_done,
        num_tokens=num_tokens,
        tokens_left=tokens_left,
        layers=wanted.layers,
        num_heads=num_heads,
        hidden_bytes_per_token=hidden_bytes,
        layers_bytes_per_token=layers_bytes,
        attention_bytes_per_token=round(attention_tokens / num_tokens),
        bytes_per_token=(payload + overhead) / num_tokens,
        constant_bytes=constants,
        total_bytes=_written_bytes(catalog, set_id) + left,
        left_bytes=left,
        max_bytes=config.max_bytes,
        disk_free_bytes=shutil.disk_usage(config.cache).free if isinstance(config.cache, Path) else None,
    )


def plan_lines(plan: FeaturesPlan) -> list[str]:
    """The plan for a person."""
    parts = [
        ("last hidden state", plan.hidden_bytes_per_token),
        (f"{format_plural(len(plan.layers), 'layer')} {list(plan.layers)}", plan.layers_bytes_per_token),
        (format_plural(plan.num_heads, "attention head"), plan.attention_bytes_per_token),
    ]
    lines = [f"set      {plan.set_id}: {plan.num_chains:,} chains, {plan.num_done:,} done, {plan.num_left:,} left"]
    lines += [f"store    {name}: {size} B/token" for name, size in parts if size]
    lines.append(f"tokens   {format_count(plan.num_tokens)}, {format_count(plan.tokens_left)} left")
    lines.append(
        f"disk     {format_bytes(plan.total_bytes)} in all ({plan.bytes_per_token:.1f} B/token, and "
        f"{format_bytes(plan.constant_bytes)} of constants), {format_bytes(plan.left_bytes)} left"
    )
    if plan.disk_free_bytes is not None:
        lines.append(f"         {format_bytes(plan.disk_free_bytes)} free at {plan.cache}")
    return lines


def plan_warning(plan: FeaturesPlan) -> str | None:
    """A warning if limit or disk are too small."""
    if plan.max_bytes is not None and plan.total_bytes > plan.max_bytes:
        return f"the set would take {plan.total_bytes:.0f} bytes, max_bytes={plan.max_bytes}: the pass would refuse it"
    if not plan.fits:
        return f"{plan.cache} does not have enough space: choose a larger disk, or store fewer chains, tokens or layers"
    return None


def _written_bytes(catalog: Catalog, set_id: str) -> float:
    """Size of the set so far: also of chains that this configuration does not select."""
    files = [] if catalog.features is None else catalog.features.files()
    size = sum(file.size_bytes for file in files if file.path.startswith(f"{set_id}/"))
    manifest = read_sets(catalog.root).get(set_id)
    if manifest is None:
        return size
    constants = [set_folder(catalog.root, set_id) / f"constants-{manifest.constants}.safetensors"]
    constants += [] if manifest.head is None else [catalog.root / SETS_FOLDER / manifest.head.file]
    return size + sum(path.stat().st_size for path in constants if path.exists())


def _constant_bytes(catalog: Catalog, config: FeaturesConfig, wanted: Wanted, shape: Shape, set_id: str) -> float:
    """Head and bases, float32 but for the head, as far as they are not written yet."""
    width, size = shape.hidden_size, 0.0
    for block, num in ((config.last_hidden, 1), (config.layers, len(wanted.layers))):
        if block is not None:
            # Scales; with a basis its vectors, their encoder and the mean.
            rank = rank_of(block, width)
            size += 4.0 * num * (width if rank is None else rank + width + 2 * rank * width)
    # Written last: where it is, the constants are too.
    if (catalog.root / SETS_FOLDER / set_id / "manifest.json").exists():
        size = 0.0
    if wanted.hidden and not matching(catalog.root / SETS_FOLDER, "head-*.safetensors"):
        size += head_bytes_of(config, shape)
    return size
