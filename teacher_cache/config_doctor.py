"""What a configuration needs and whether it is there: `teacher-cache doctor CONFIG`. Loads no model."""

from shared.doctor import Finding
from shared.errors import StillroomError
from teacher_cache.config import BuildConfig
from teacher_cache.engine_config import ServerConfig
from teacher_cache.score_config import ScoreConfig
from teacher_cache.teacher import identify_teacher


def find_configured(config: BuildConfig | ScoreConfig) -> list[Finding]:
    """The teacher's files, and the endpoints of a server engine as a build would meet them."""
    try:
        teacher = identify_teacher(config.teacher, config.engine)
    except StillroomError as error:
        return [Finding("teacher", "missing", str(error))]
    name = f"{config.teacher.model}, vocabulary {teacher.record.vocab_size}, {teacher.record.fingerprint[:8]}"
    findings = [Finding("teacher", "ok", name)]
    if isinstance(config.engine, ServerConfig):
        from teacher_cache.http_engine.endpoint_look import look_at_endpoints

        try:
            looks = look_at_endpoints(config.engine, teacher, config.capture)
        except StillroomError as error:
            return [*findings, Finding("server", "missing", str(error))]
        fits = {True: "ok", False: "missing"}
        findings += [Finding("server", fits[one.max_model_len is not None], f"{one.url} {one.told}") for one in looks]
    return findings
