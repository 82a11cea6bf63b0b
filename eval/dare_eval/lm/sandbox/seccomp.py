"""Which system calls a generated program may not make: a seccomp filter, without libseccomp.

Calls fail with EPERM, so that a program that tries one sees an exception. The filter stays for as
long as the process lives (seccomp(2); the program format is that of classic BPF).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

from dare_eval.lm.sandbox.system import ConfinementError, prctl

__all__ = ["CALLS", "forbid_calls"]

# By what they open a way to: the numbers of x86_64 and of Linux's generic table (aarch64, riscv64),
# None where a table lacks a call. Calls newer than `_NEWEST` do not exist for a program.
CALLS: dict[str, tuple[int | None, int | None]] = {
    # the network; socketpair(2) stays, which reaches nobody else
    **{"socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201)},
    **{"accept": (43, 202), "accept4": (288, 242)},
    # processes and threads
    **{"fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435)},
    **{"execve": (59, 221), "execveat": (322, 281), "setsid": (112, 157), "setpgid": (109, 154)},
    # other processes: signals, memory, scheduling
    **{"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131)},
    **{"rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434)},
    **{"pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "ptrace": (101, 117)},
    **{"process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272)},
    # and what a process has been told to do when its parent ends
    **{"prctl": (157, 167), "seccomp": (317, 277)},
    **{"process_madvise": (440, 440), "process_mrelease": (448, 448), "setpriority": (141, 140)},
    **{"ioprio_set": (251, 30), "sched_setaffinity": (203, 122), "sched_setattr": (314, 274)},
    **{"sched_setparam": (142, 118), "sched_setscheduler": (144, 119)},
    **{"move_pages": (279, 239), "migrate_pages": (256, 238)},
    # files: no names change, and nothing is written (open and openat: see `_CONDITIONAL`)
    **{"creat": (85, None), "truncate": (76, 45), "openat2": (437, 437)},
    **{"open_by_handle_at": (304, 265), "unlink": (87, None), "unlinkat": (263, 35)},
    **{"rmdir": (84, None), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276)},
    **{"mkdir": (83, None), "mkdirat": (258, 34), "link": (86, None), "linkat": (265, 37)},
    **{"symlink": (88, None), "symlinkat": (266, 36), "mknod": (133, None), "mknodat": (259, 33)},
    **{"chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None)},
    **{"fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None)},
    **{"utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88)},
    **{"setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7)},
    **{"removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16)},
    # memory that no limit on an address space counts
    **{"memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194)},
    **{"shmat": (30, 196), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180)},
    # the system's
    **{"mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51)},
    **{"unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428)},
    **{"move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431)},
    **{"fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442)},
    **{"swapon": (167, 224), "swapoff": (168, 225), "quotactl": (179, 60), "acct": (163, 89)},
    **{"quotactl_fd": (443, 443), "bpf": (321, 280), "perf_event_open": (298, 241)},
    **{"userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426)},
    **{"io_uring_register": (427, 427), "fanotify_init": (300, 262), "add_key": (248, 217)},
    **{"request_key": (249, 218), "keyctl": (250, 219), "init_module": (175, 105)},
    **{"finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104)},
    **{"kexec_file_load": (320, 294), "reboot": (169, 142), "syslog": (103, 116)},
    **{"personality": (135, 92), "settimeofday": (164, 170), "clock_settime": (227, 112)},
    **{"adjtimex": (159, 171), "clock_adjtime": (305, 266), "sethostname": (170, 161)},
    **{"setdomainname": (171, 162), "iopl": (172, None), "ioperm": (173, None)},
    **{"modify_ldt": (154, None), "vhangup": (153, 58)},
}
_NEWEST = 450

# Forbidden where argument `index` has a bit of `mask`: any writing; limits of other processes.
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CONDITIONAL: dict[str, tuple[tuple[int | None, int | None], int, int]] = {
    "open": ((2, None), 1, _WRITING),
    "openat": ((257, 56), 2, _WRITING),
    "prlimit64": ((302, 261), 0, 0xFFFFFFFF),
}

# The column of CALLS and AUDIT_ARCH_* of <linux/audit.h>.
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7), "riscv64": (1, 0xC00000F3)}

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_LOAD, _JUMP_EQUAL, _JUMP_ABOVE, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL, _ALLOW, _REFUSE = 0x80000000, 0x7FFF0000, 0x00050000


def forbid_calls() -> None:
    """Filter this process's system calls from now on.

    Raises:
        ConfinementError: the kernel has no seccomp filters, or its calls' numbers are not known.
    """
    machine = platform.machine()
    if machine not in _MACHINES or sys.byteorder != "little" or ctypes.sizeof(ctypes.c_void_p) != 8:
        known = ", ".join(_MACHINES)
        raise ConfinementError(f"no seccomp filter is known for {machine}; known are {known}")
    program = _program(*_MACHINES[machine])
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
    if prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.create_string_buffer(header)):
        raise ConfinementError("the kernel accepts no seccomp filter (CONFIG_SECCOMP_FILTER)")


def _program(column: int, architecture: int) -> bytes:
    """The filter: struct sock_filter {u16 code; u8 if_true; u8 if_false; u32 k}, one after another.

    Offsets in struct seccomp_data: number 0, architecture 4, arguments 16, 24, … (low half first).
    """

    def step(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, k)

    def refuse(error: int) -> bytes:
        return step(_RETURN, _REFUSE | error)

    steps = [
        step(_LOAD, 4),
        step(_JUMP_EQUAL, architecture, if_true=1),
        step(_RETURN, _KILL),  # 32-bit calls have other numbers
        step(_LOAD, 0),
        step(_JUMP_ABOVE, _NEWEST, if_false=1),  # and so have those of x32, from 1 << 30
        refuse(errno.ENOSYS),
    ]
    for numbers in CALLS.values():
        if (number := numbers[column]) is not None:
            steps += [step(_JUMP_EQUAL, number, if_false=1), refuse(errno.EPERM)]
    for numbers, index, mask in _CONDITIONAL.values():
        if (number := numbers[column]) is not None:
            steps += [
                step(_JUMP_EQUAL, number, if_false=4),
                step(_LOAD, 16 + 8 * index),
                step(_JUMP_ANY_BIT, mask, if_false=1),
                refuse(errno.EPERM),
                step(_RETURN, _ALLOW),
            ]
    return b"".join([*steps, step(_RETURN, _ALLOW)])
