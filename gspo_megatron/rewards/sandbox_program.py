"""Program that runs code of a response: `python -I sandbox_program.py DIRECTORY MEMORY SECONDS FILE READY`.

The code comes on standard input. Before it runs a line of it, it gives up for good: capabilities; every file but those
of Python and its own directory (Landlock); other processes, programs, sockets, shared memory, and the owners, modes and
times of files (seccomp); memory, processor time and large files (limits of the kernel). Threads stay. Then it writes a
byte to the pipe READY and closes it. It imports the standard library only, and ends with UNCONFINED where the kernel
cannot do this.
"""

import ctypes
import errno
import os
import platform
import resource
import sys
import types

UNCONFINED = 97
"""Exit code where the kernel lacks Landlock or seccomp."""
READABLE = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/zero", "/dev/urandom")
"""What code may read beside Python's own files and its directory."""
_libc = ctypes.CDLL(None, use_errno=True)
_REFUSED = """
fork 57 -, vfork 58 -, execve 59 221, execveat 322 281, socket 41 198, socketpair 53 199, kill 62 129, tkill 200 130
tgkill 234 131, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, ptrace 101 117, process_vm_readv 310 270
process_vm_writev 311 271, process_madvise 440 440, process_mrelease 448 448, move_pages 279 239, migrate_pages 256 238
kcmp 312 272, pidfd_send_signal 424 424, pidfd_open 434 434, pidfd_getfd 438 438, io_uring_setup 425 425, bpf 321 280
perf_event_open 298 241, unshare 272 97, setns 308 268, mount 165 40, shmget 29 194, shmat 30 196, shmctl 31 195
semget 64 190, semop 65 193, semctl 66 191, semtimedop 220 192, msgget 68 186, msgsnd 69 189, msgrcv 70 188
msgctl 71 187, mq_open 240 180, mq_unlink 241 181, add_key 248 217, request_key 249 218, keyctl 250 219
memfd_create 319 279, memfd_secret 447 447, userfaultfd 323 282, syslog 103 116, setpriority 141 140, ioprio_set 251 30
sched_setparam 142 118, sched_setscheduler 144 119, sched_setaffinity 203 122, sched_setattr 314 274, chmod 90 -
fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, chown 92 -, lchown 94 -, fchown 93 55, fchownat 260 54, utime 132 -
utimes 235 -, futimesat 261 -, utimensat 280 88, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, setxattrat 463 463
removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16, removexattrat 466 466
"""
"""System calls that are refused, with their numbers on x86_64 and aarch64: they reach other processes, or change files
in ways that Landlock does not see."""
_OWN_LIMITS, _FILE_CONTROL = {"x86_64": 302, "aarch64": 261}, {"x86_64": 72, "aarch64": 25}
"""`prlimit64`, which is left for the process itself, and `fcntl`, which is left without _OWNERS."""
_OWNERS = (8, 10, 15)
"""F_SETOWN, F_SETSIG, F_SETOWN_EX: a pipe could send a signal to any process."""
# What seccomp calls an architecture, and its number of `clone`.
_ARCHITECTURES = {"x86_64": (0xC000003E, 56), "aarch64": (0xC00000B7, 220)}
_CLONE3, _CLONE_THREAD = 435, 0x10000
_LOAD, _EQUAL, _AT_LEAST, _HAS_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
_NO_NEW_PRIVILEGES, _SECCOMP, _DUMPABLE = 38, 22, 4
_CREATE_RULES, _ADD_RULE, _RESTRICT, _CAPSET = 444, 445, 446, {"x86_64": 126, "aarch64": 91}
_READ_FILE, _READ = 0b100, 0b1100
_WRITE = _READ | 1 << 1 | 1 << 5 | 1 << 8 | 1 << 14  # and write, remove, make and cut files; no directories, no links
_ACCESS = (0, 13, 14, 15, 15, 16, 16, 16)
"""Kinds of access to files that each version of Landlock knows, by bits."""


def limit_resources(memory: int, seconds: int, file_bytes: int) -> None:
    """Set hard limits. SIGXCPU ends the process at the limit of processor time, SIGKILL a second later."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    for what, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def drop_privileges() -> None:
    """Give up all capabilities, now and through any program. Raises OSError."""
    _call(_libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _call(_libc.syscall(_CAPSET[platform.machine()], header, nothing))


def restrict_files(directory: str) -> None:
    """Leave Python's files to read and one directory to write. Raises OSError where there is no Landlock."""
    version = _call(_libc.syscall(_CREATE_RULES, None, ctypes.c_size_t(0), 1))
    every = (1 << _ACCESS[min(version, len(_ACCESS) - 1)]) - 1
    rules = _call(_libc.syscall(_CREATE_RULES, ctypes.byref(ctypes.c_uint64(every)), ctypes.c_size_t(8), 0))
    python = {os.path.realpath(path) for path in (sys.prefix, sys.base_prefix)}
    for path, allowed in [*((path, _READ) for path in (*READABLE, *python)), (directory, every & _WRITE)]:
        if os.path.exists(path):
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
            bits = allowed if os.path.isdir(path) else _READ_FILE
            rule = bits.to_bytes(8, sys.byteorder) + opened.to_bytes(4, sys.byteorder)
            _call(_libc.syscall(_ADD_RULE, rules, 1, rule, 0))
            os.close(opened)
    _call(_libc.syscall(_RESTRICT, rules, 0))
    os.close(rules)


def restrict_calls() -> None:
    """Refuse the system calls of _NAMES, and every `clone` but of a thread. Raises OSError."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no list of system calls for {machine}")
    audit, clone = _ARCHITECTURES[machine]
    rows = [row.split() for row in _REFUSED.replace("\n", ",").split(",") if row.strip()]
    refused = [row[1 + list(_ARCHITECTURES).index(machine)] for row in rows]
    lines = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, audit), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    if machine == "x86_64":  # a second table of numbers
        lines += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]
    for number in (int(text) for text in refused if text != "-"):
        lines += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE | errno.EPERM)]
    # The first argument is at 16, the second at 24; what is loaded replaces the number of the call.
    lines += [(_EQUAL, 0, 4, _OWN_LIMITS[machine]), (_LOAD, 0, 0, 16), (_EQUAL, 0, 1, 0), (_RETURN, 0, 0, _ALLOW)]
    lines += [(_RETURN, 0, 0, _REFUSE | errno.EPERM), (_EQUAL, 0, 3 + len(_OWNERS), _FILE_CONTROL[machine])]
    lines += [(_LOAD, 0, 0, 24), *((_EQUAL, len(_OWNERS) - place, 0, code) for place, code in enumerate(_OWNERS))]
    lines += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE | errno.EPERM)]
    lines += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _REFUSE | errno.ENOSYS)]
    lines += [(_EQUAL, 0, 3, clone), (_LOAD, 0, 0, 16), (_HAS_BITS, 1, 0, _CLONE_THREAD)]
    lines += [(_RETURN, 0, 0, _REFUSE | errno.EPERM), (_RETURN, 0, 0, _ALLOW)]
    code = b"".join(a.to_bytes(2, sys.byteorder) + bytes((b, c)) + d.to_bytes(4, sys.byteorder) for a, b, c, d in lines)
    text = ctypes.create_string_buffer(code, len(code))

    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    program = Filter(len(lines), ctypes.addressof(text))
    _call(_libc.prctl(_SECCOMP, 2, ctypes.byref(program), 0, 0))


def _call(result: int) -> int:
    """Return what a call returned. Raises OSError if it failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def main() -> None:
    """Confine this process, then run the code."""
    directory, memory, seconds, file_bytes, ready = sys.argv[1], *map(int, sys.argv[2:6])
    code = sys.stdin.read()
    os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), 0)  # the file of the code has no name, and ends here
    try:
        drop_privileges()
        restrict_files(directory)
        limit_resources(memory, seconds, file_bytes)
        restrict_calls()
    except OSError as error:
        print(error, flush=True)
        os._exit(UNCONFINED)
    # What follows may exit with any code: only this says that it was confined.
    os.write(ready, b"1")
    os.close(ready)
    sys.argv[:] = ["response.py"]
    # Libraries look for the program by this name: unittest, pickle, dataclasses.
    program = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(code, "response.py", "exec"), vars(program))


if __name__ == "__main__":
    main()
