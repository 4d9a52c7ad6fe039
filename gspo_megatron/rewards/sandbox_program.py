"""Program that runs code of a response: `python -I sandbox_program.py DIRECTORY MEMORY SECONDS FILE`, code on stdin.

Before it runs a line of it, it gives up for good: capabilities; every file but those of Python and its own directory
(Landlock); other processes, programs, sockets and shared memory (seccomp); memory, processor time and large files
(limits of the kernel). Threads stay. It imports the standard library only, and ends with UNCONFINED where the kernel
cannot do this.
"""

import ctypes
import errno
import os
import platform
import resource
import sys

UNCONFINED = 97
"""Exit code where the kernel lacks Landlock or seccomp."""
READABLE = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/zero", "/dev/urandom")
"""What code may read beside Python's own files and its directory."""
_libc = ctypes.CDLL(None, use_errno=True)
_NAMES = (
    "fork vfork execve execveat socket socketpair kill tkill tgkill ptrace process_vm_readv process_vm_writev "
    "pidfd_send_signal pidfd_open io_uring_setup bpf perf_event_open unshare setns mount shmget semget msgget mq_open "
    "add_key request_key keyctl memfd_secret userfaultfd"
)
"""System calls that are refused; _NUMBERS in the same order."""
_NUMBERS = {
    "x86_64": "57 58 59 322 41 53 62 200 234 101 310 311 424 434 425 321 298 272 308 165 29 64 68 240 248 249 250 447 "
    "323",
    "aarch64": "- - 221 281 198 199 129 130 131 117 270 271 424 434 425 280 241 97 268 40 194 190 186 180 217 218 219 "
    "447 282",
}
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
    refused = dict(zip(_NAMES.split(), _NUMBERS[machine].split(), strict=True))
    lines = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, audit), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    if machine == "x86_64":  # a second table of numbers
        lines += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]
    for number in (int(text) for text in refused.values() if text != "-"):
        lines += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE | errno.EPERM)]
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
    directory, memory, seconds, file_bytes = sys.argv[1], *map(int, sys.argv[2:5])
    code = sys.stdin.read()
    try:
        drop_privileges()
        restrict_files(directory)
        limit_resources(memory, seconds, file_bytes)
        restrict_calls()
    except OSError as error:
        print(error, flush=True)
        os._exit(UNCONFINED)
    sys.argv[:] = ["response.py"]
    exec(compile(code, "response.py", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})


if __name__ == "__main__":
    main()
