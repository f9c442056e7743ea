"""`run --hosts`: which hosts a run has, and an agent on each of them that starts its ranks.

A FILE has lines `HOST slots=N`, as DeepSpeed's: this program starts an agent on each, through ssh unless it is this
machine, forwards signals to it and takes its exit code. Under SLURM every task of `srun --ntasks-per-node 1` is the
agent of its node. Agents run `student-train run` like `--nproc`, with the same exit codes and messages.
"""

import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from stillroom.errors import ConfigError, DataError, StillroomError
from stillroom.log import note
from stillroom.program import INTERRUPTED, SIGNALS, StopRequest
from student_train.runtime.launching import GRACE_S, POLL_S, find_cause, launch
from student_train.runtime.peers import LEAVE_S, Meeting, meet

MEETING_VARIABLE = "STUDENT_TRAIN_MEETING"
"""In the agents of a FILE's hosts: their Meeting, as JSON."""
FIRST_PORT, NUM_PORTS = 29400, 1000
EXPORTED = ("NCCL_", "UCX_", "GLOO_", "PYTHON", "OMP_", "DS_", "TORCH", "HF_HOME", "LD_LIBRARY_PATH", "MASTER_PORT")
"""Beginnings of variables that ssh would not take along. No credentials: command lines are visible to all."""
SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15")
SSH_FAILED = 255
LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names by which only a machine itself is reached."""
STDIN = 0
_LINE = re.compile(r"^(?P<name>\S+)\s+slots=(?P<slots>[1-9]\d*)$")


@dataclass(frozen=True)
class Host:
    """A name that ssh and the other hosts know, and how many ranks it gets."""

    name: str
    slots: int


def read_hosts(path: Path) -> list[Host]:
    """The hosts of a file. Raises DataError for a line that is not `HOST slots=N`, or a host that is listed twice."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--hosts {path}: cannot be read: use a file of lines HOST slots=N, or slurm") from error
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.match(text)
        if match is None:
            raise DataError(f"{path}, line {number}: {text!r} is not HOST slots=N")
        if match["name"].startswith("-"):
            raise DataError(f"{path}, line {number}: {match['name']} is an option, not a host")
        if match["name"] in hosts:
            raise DataError(f"{path}, line {number}: {match['name']} is listed twice: put all its slots in one line")
        hosts[match["name"]] = Host(match["name"], int(match["slots"]))
    if not hosts:
        raise DataError(f"{path} lists no host: write lines HOST slots=N")
    return [*hosts.values()]


def run_on_hosts(path: Path, program: Sequence[str]) -> int:
    """Runs `python PROGRAM` on all hosts of a file, each to call `be_agent`; returns the exit code.

    Raises DataError for a wrong file, ConfigError without ssh, which this machine alone does not need.
    """
    hosts = read_hosts(path)
    here = {host.name for host in hosts if _is_here(host.name)}
    if len(hosts) == 1 and here:
        return launch(hosts[0].slots, [sys.executable, *program])
    # Of USER@HOST, which ssh understands, the others can reach HOST.
    first = hosts[0].name.rpartition("@")[2]
    _require_ways(path, first, [host.name for host in hosts if host.name not in here])
    run_id = secrets.token_hex(8)
    agents: list[subprocess.Popen[bytes]] = []
    was_asked = False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal was_asked
        was_asked = True
        for agent in agents:
            _tell(agent, number)

    handlers = {one: signal.signal(one, forward) for one in SIGNALS}
    try:
        for index, host in enumerate(hosts):
            meeting = Meeting(run_id, first, _port_of(run_id), len(hosts), index, host.slots)
            agents.append(_start_agent(meeting, None if host.name in here else host.name, program))
        codes = _wait(agents)
    finally:
        for agent in agents:
            # Where the connection ends, an agent ends with its ranks.
            agent.kill()
            agent.wait()
            assert agent.stdin is not None
            agent.stdin.close()
        for one, handler in handlers.items():
            signal.signal(one, handler)
    for index, code in codes.items():
        if code == SSH_FAILED:
            note(f"{hosts[index].name}: the connection failed or was lost: try `ssh {hosts[index].name} true`")
    cause = find_cause(codes)
    if cause is None:
        return 0
    code = codes[cause]
    if was_asked and code in (INTERRUPTED, SSH_FAILED):
        return INTERRUPTED
    return code if 0 < code < SSH_FAILED else StillroomError.exit_code


def slurm_meeting(environ: Mapping[str, str], nproc: int | None) -> Meeting:
    """The meeting of a task of srun. Raises ConfigError outside of srun, or with several tasks on a node."""
    if "SLURM_STEP_ID" not in environ or "SLURM_NODEID" not in environ:
        raise ConfigError(
            "--hosts slurm must run under srun: srun --ntasks-per-node 1 student-train run CONFIG --hosts slurm"
        )
    num_hosts, num_tasks = int(environ["SLURM_STEP_NUM_NODES"]), int(environ["SLURM_STEP_NUM_TASKS"])
    if num_tasks != num_hosts:
        raise ConfigError(f"srun started {num_tasks} tasks on {num_hosts} nodes: use --ntasks-per-node 1")
    run_id = f"{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}"
    num_ranks = nproc or int(environ.get("SLURM_GPUS_ON_NODE") or 0) or _num_gpus() or 1
    first = _first_host(environ["SLURM_STEP_NODELIST"])
    return Meeting(run_id, first, _port_of(run_id), num_hosts, int(environ["SLURM_NODEID"]), num_ranks)


def given_meeting() -> Meeting | None:
    """The meeting of an agent on a host of a FILE; None in other processes, such as its ranks."""
    text = os.environ.pop(MEETING_VARIABLE, None)
    return None if text is None else Meeting(**json.loads(text))


def be_agent(meeting: Meeting, command: Sequence[str], *, by_ssh: bool) -> int:
    """Runs `command` as this host's ranks; returns the exit code, the same on all hosts."""
    if by_ssh:
        threading.Thread(target=_obey_launcher, daemon=True).start()
    with StopRequest(at_once=True):
        return launch(meeting.num_ranks, command, meet(meeting))


def _require_ways(path: Path, first: str, others: Sequence[str]) -> None:
    """Raises ConfigError if the other hosts cannot be reached without ssh, DataError if they cannot reach the first."""
    if others and shutil.which(SSH[0]) is None:
        raise ConfigError("--hosts FILE starts the ranks through ssh, which is not installed: install it, or use slurm")
    remote = [name for name in others if name.rpartition("@")[2] not in LOOPBACK]
    if remote and first in LOOPBACK:
        raise DataError(f"{path}: {remote[0]} cannot reach {first}, the first host: write the name that all hosts know")


def _start_agent(meeting: Meeting, host: str | None, program: Sequence[str]) -> "subprocess.Popen[bytes]":
    """Through ssh; None is this machine."""
    command = [sys.executable, *program] if host is None else [*SSH, host, _remote_command(meeting, program)]
    environ = {**os.environ, MEETING_VARIABLE: json.dumps(asdict(meeting))}
    # A session of its own: Ctrl-C reaches the agent as a line, not by the end of its connection. Unbuffered: a second
    # signal may come while the first one's handler writes.
    return subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, start_new_session=True, env=environ)


def _wait(agents: Sequence[subprocess.Popen[bytes]]) -> dict[int, int]:
    """Exit codes by host, in the order in which agents ended; without those that a failure leaves hanging."""
    codes: dict[int, int] = {}
    deadline_s = float("inf")
    while len(codes) < len(agents) and time.monotonic() < deadline_s:
        for number, agent in enumerate(agents):
            code = agent.poll()
            if code is not None:
                codes.setdefault(number, code)
        if any(codes.values()):
            # They tell each other which rank failed, and give their own ranks time to end.
            deadline_s = min(deadline_s, time.monotonic() + GRACE_S + LEAVE_S)
        time.sleep(POLL_S)
    return codes


def _tell(agent: subprocess.Popen[bytes], number: int) -> None:
    assert agent.stdin is not None
    try:
        agent.stdin.write(b"%d\n" % number)
    except OSError:
        # It has ended.
        return


def _obey_launcher() -> None:
    """Signals come as lines. At the end of the connection the launcher is gone, and nobody could stop this agent."""
    # Not sys.stdin: Python cannot end while a thread waits in one of its readers.
    while said := os.read(STDIN, 64):
        for line in said.split():
            os.kill(os.getpid(), int(line))
    os.kill(os.getpid(), signal.SIGKILL)


def _is_here(name: str) -> bool:
    """Whether a name is this machine's, and no other user's on it."""
    if "@" in name or name in (*LOOPBACK, socket.gethostname()):
        return "@" not in name
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        # A name that ssh alone knows, or no name at all.
        return False
    for family, *_, address in found:
        with contextlib.suppress(OSError), socket.socket(family) as probe:
            # Only addresses of this machine can be bound.
            probe.bind(address)
            return True
    return False


def _remote_command(meeting: Meeting, program: Sequence[str]) -> str:
    exported = {name: value for name, value in os.environ.items() if name.startswith(EXPORTED)}
    variables = {**exported, MEETING_VARIABLE: json.dumps(asdict(meeting))}
    words = ["env", *(f"{name}={value}" for name, value in variables.items())]
    line = shlex.join([*words, sys.executable, *program])
    return f"cd {shlex.quote(str(Path.cwd()))} && exec {line}"


def _port_of(run_id: str) -> int:
    # Differs by run: of two that share their first host, one would meet in a store that ends with the other.
    if "MASTER_PORT" in os.environ:
        return int(os.environ["MASTER_PORT"])
    return FIRST_PORT + int(re.sub(r"\D", "", run_id) or 0) % NUM_PORTS


def _first_host(nodes: str) -> str:
    """node[03-05,9],gpu1 → node03."""
    if (scontrol := shutil.which("scontrol")) is not None:
        shown = subprocess.run([scontrol, "show", "hostnames", nodes], capture_output=True, text=True, check=False)
        if shown.returncode == 0 and shown.stdout.strip():
            return shown.stdout.split()[0]
    match = re.match(r"([^\[,]+)(?:\[(\w+))?", nodes)
    assert match is not None
    return f"{match[1]}{match[2] or ''}"


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()
