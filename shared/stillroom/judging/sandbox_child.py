"""Runs one untrusted Python program inside limits that it cannot lift again. Linux on x86-64 and arm64.

    python -I sandbox_child.py PROGRAM TESTS NONCE MEMORY_BYTES CPU_S FILE_BYTES

PROGRAM and TESTS are files; TESTS may be `-`. The program runs as __main__, the tests behind it in the same namespace,
and only if both come to their end is NONCE written to stdout: a program that leaves early has not passed.

Limits: memory, processor time and file size (setrlimit); no new processes, no sockets, no signals to others, no
tracing (seccomp filter); no writing outside the working folder (Landlock, where the kernel has it). Files can be read.
Where the filter cannot be set, nothing is run and the exit code is NOT_ISOLATED.

This file stands alone, so that it starts in a few milliseconds and the program finds nothing of ours in its namespace.
"""

import ctypes
import os
import platform
import resource
import struct
import sys

NOT_ISOLATED = 97

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS = 1, 38
CLONE_THREAD = 0x10000

# Classic BPF: load a word of seccomp_data, compare, return. Offsets: nr 0, arch 4, low half of args[0] 16.
LOAD, JUMP_EQUAL, JUMP_GREATER_EQUAL, JUMP_SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06

# Audit architecture, number of clone, and numbers of the calls that are refused: socket, socketpair, fork, vfork,
# execve, execveat, kill, tkill, tgkill, pidfd_send_signal, rt_sigqueueinfo, ptrace, process_vm_writev, io_uring_setup,
# unshare, setns (arm64 has no fork and vfork).
MACHINES = {
    "x86_64": (
        0xC000003E,
        56,
        (41, 53, 57, 58, 59, 322, 62, 200, 234, 424, 129, 101, 311, 425, 272, 308),
    ),
    "aarch64": (
        0xC00000B7,
        220,
        (198, 199, 221, 281, 129, 130, 131, 424, 138, 117, 271, 425, 97, 268),
    ),
}
CLONE3 = 435
X32_BIT = 0x40000000

# Landlock rights of ABI 1: everything that changes the file system.
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
WRITE_RIGHTS = (1 << 1) | sum(1 << bit for bit in range(4, 13))


def main(arguments: list[str]) -> None:
    program_path, tests_path, nonce, memory_bytes, cpu_s, file_bytes = arguments
    with open(program_path, encoding="utf-8") as stream:  # noqa: PTH123 - pathlib would triple the start-up time
        program = stream.read()
    tests = ""
    if tests_path != "-":
        with open(tests_path, encoding="utf-8") as stream:  # noqa: PTH123
            tests = stream.read()
    set_limits(int(memory_bytes), int(cpu_s), int(file_bytes))
    libc = ctypes.CDLL(None, use_errno=True)
    # The kernel lets an unprivileged process install a filter only after this.
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        os._exit(NOT_ISOLATED)
    confine_writes(libc)
    if not filter_system_calls(libc):
        os._exit(NOT_ISOLATED)
    sys.argv = ["program.py"]
    namespace = {"__name__": "__main__"}
    exec(compile(program, "program.py", "exec"), namespace)
    exec(compile(tests, "tests.py", "exec"), namespace)
    sys.stdout.write(nonce)
    sys.stdout.flush()


def set_limits(memory_bytes: int, cpu_s: int, file_bytes: int) -> None:
    """Hard limits: the program cannot raise them."""
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (most, most))


def filter_system_calls(libc: ctypes.CDLL) -> bool:
    """Installs the seccomp filter; False where this machine or kernel has none."""
    machine = MACHINES.get(platform.machine())
    if machine is None:
        return False
    architecture, clone, refused = machine
    steps = [
        (LOAD, 0, 0, 4),
        # Numbers of system calls differ between architectures: without this the list below would mean others.
        (JUMP_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, 0),
        # The x32 numbers of x86-64 would slip past the comparisons below.
        (JUMP_GREATER_EQUAL, 0, 1, X32_BIT),
        (RETURN, 0, 0, KILL),
    ]
    for number in refused:
        steps += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE | EPERM)]
    # Threads are made by clone; clone3 hides its flags from filters, without it the C library falls back on clone.
    steps += [(JUMP_EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, REFUSE | ENOSYS)]
    steps += [
        (JUMP_EQUAL, 0, 3, clone),
        # clone's first argument holds its flags: threads may be made, processes not.
        (LOAD, 0, 0, 16),
        (JUMP_SET, 1, 0, CLONE_THREAD),
        (RETURN, 0, 0, REFUSE | EPERM),
        (RETURN, 0, 0, ALLOW),
    ]
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HL", len(steps), ctypes.addressof(buffer))
    return bool(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0) == 0)


def confine_writes(libc: ctypes.CDLL) -> None:
    """Allows changes to files below the working folder only. Older kernels lack Landlock: there it does nothing."""
    attributes = struct.pack("Q", WRITE_RIGHTS)
    ruleset = libc.syscall(LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return
    folder = os.open(".", os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", WRITE_RIGHTS, folder)
    if libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, rule, 0) == 0:
        libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(folder)
    os.close(ruleset)


if __name__ == "__main__":
    main(sys.argv[1:])
