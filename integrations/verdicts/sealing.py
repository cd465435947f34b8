"""Let Linux itself hold a program: Landlock for files, seccomp for all that leaves a process.

An audit hook lives among the program's own objects, which can replace what it calls.  What the
kernel refuses stays refused, whatever the program does in its process.  ``confined`` loads this
file by its path and calls ``seal``; like that script it imports the standard library alone.

``python -m fused_sd.integrations.verdicts.sealing`` says what the kernel of this machine holds.
"""

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Iterable

# Calls by name, with their numbers on x86-64 and on AArch64; the later ones are the same on both.
# None: the platform has no such call.
NUMBERS: dict[str, tuple[int | None, int | None]] = {
    # other processes and programs, threads
    "fork": (57, None),
    "vfork": (58, None),
    "clone": (56, 220),
    "clone3": (435, 435),
    "execve": (59, 221),
    "execveat": (322, 281),
    # signals to others, their memory and their descriptors
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    # others' share of the machine, and one's own limits
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "setrlimit": (160, 164),
    # networks, and what outlives a process
    "socket": (41, 198),
    "socketpair": (53, 199),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # calls that would go by another way
    "io_uring_setup": (425, 425),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    # namespaces and mounts, owners and attributes of files, which Landlock does not know
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
}
# Calls that are allowed with one value of an argument: the process itself, or no new limit.
TO_ITSELF = {"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131)}
PRLIMIT = (302, 261)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # the column, the audit name

# Classic BPF: load a word of ``struct seccomp_data``, jump, return.
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
NUMBER, ARCHITECTURE = 0, 4
X32 = 0x40000000  # numbers of a second table of x86-64 start here

NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 38, 22, 2
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # Landlock's calls, on all machines
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
REFER, TRUNCATE = 1 << 13, 1 << 14
MAKE_NODES = 1 << 6 | 1 << 9 | 1 << 11  # devices and sockets
READ = READ_FILE | READ_DIR
# where the loader finds what the modules of Python's library are linked with
LOADED = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/urandom")


def seal(folder: str, library: Iterable[str], streams: Iterable[int] = ()) -> list[str]:
    """Leave this process what a solution of a programming task needs; it cannot be undone.

    Files can be read in the folder, Python's library and the system's; written in the folder and
    through descriptors that are open.  No other process can be started, signalled or read, and no
    socket made.

    Args:
        folder: the working directory.
        library: the folders of Python's library.
        streams: descriptors of files that may be opened again by a name such as ``/dev/stdin``.

    Returns:
        What the kernel holds from now on: "files", "calls", both or nothing.
    """
    if sys.platform != "linux":
        return []
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        return []
    held = []
    if _hold_files(libc, folder, library, streams):
        held.append("files")
    if _hold_calls(libc):
        held.append("calls")
    return held


def _hold_files(
    libc: ctypes.CDLL, folder: str, library: Iterable[str], streams: Iterable[int]
) -> bool:
    """Restrict files by Landlock; return whether the kernel could."""
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    every = (1 << (13 if version < 2 else 14 if version < 3 else 15)) - 1
    attributes = struct.pack("Q", every)
    ruleset = libc.syscall(CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        return False

    def allow(descriptor: int, access: int) -> None:
        rule = struct.pack("=Qi", access & every, descriptor)
        libc.syscall(ADD_RULE, ruleset, 1, rule, 0)

    def allow_path(path: str, access: int) -> None:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # this system has none
            return
        if not os.path.isdir(path):
            access &= EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
        allow(descriptor, access)
        os.close(descriptor)

    allow_path(folder, every & ~(EXECUTE | MAKE_NODES))
    for path in (*library, *LOADED):
        allow_path(path, READ)
    for path in DEVICES:
        allow_path(path, READ | WRITE_FILE)
    for descriptor in streams:
        allow(descriptor, READ_FILE | WRITE_FILE)
    restricted = bool(libc.syscall(RESTRICT_SELF, ruleset, 0) == 0)
    os.close(ruleset)
    return restricted


def _hold_calls(libc: ctypes.CDLL) -> bool:
    """Restrict the kernel's calls by a filter; return whether the kernel could."""
    if platform.machine() not in MACHINES or struct.calcsize("P") != 8:
        return False
    column, architecture = MACHINES[platform.machine()]
    known = [pair[column] for pair in NUMBERS.values()]
    refused = [number for number in known if number is not None]
    lines = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (JUMP_AT_LEAST, 0, 1, X32),
        (RETURN, 0, 0, REFUSE),
    ]
    for number in refused:
        lines += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE)]
    own = os.getpid()
    for numbers in TO_ITSELF.values():
        lines += _unless_argument(numbers[column], 0, own)
    lines += _unless_argument(PRLIMIT[column], 2, 0)
    lines += [(RETURN, 0, 0, ALLOW)]
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *x) for x in lines))
    # struct sock_fprog: how many, and where
    program = struct.pack("HP", len(lines), ctypes.addressof(instructions))
    return bool(libc.prctl(SET_SECCOMP, FILTER, program, 0, 0) == 0)


def _unless_argument(number: int, position: int, allowed: int) -> list[tuple[int, int, int, int]]:
    """Return instructions that refuse a call unless an argument, below 2**32, has a value."""
    low = 16 + 8 * position  # in ``struct seccomp_data``, on little-endian machines
    return [
        (JUMP_EQUAL, 0, 6, number),
        (LOAD, 0, 0, low),
        (JUMP_EQUAL, 0, 3, allowed),
        (LOAD, 0, 0, low + 4),
        (JUMP_EQUAL, 0, 1, 0),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, REFUSE),
    ]


if __name__ == "__main__":
    print(", ".join(seal(os.getcwd(), sys.path)) or "nothing")
