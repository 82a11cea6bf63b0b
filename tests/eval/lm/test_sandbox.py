"""Generated programs are contained, and what they do beside answering right does not count."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from dare_eval.errors import SandboxUnavailableError
from dare_eval.lm.sandbox.run import Checks, Limits, Outcome, require_sandbox, run_tests

if sys.platform != "linux":
    pytest.skip("programs are contained on Linux only", allow_module_level=True)

QUICK = Limits(cpu_seconds=1, wall_seconds=3.0)
ADDITION = Checks("assert add(2, 3) == 5\nassert add(-1, 1) == 0")
RIGHT = "def add(a, b):\n    return a + b\n"


def judge(program: str, tests: Checks = ADDITION, limits: Limits | None = None) -> Outcome:
    return run_tests(textwrap.dedent(program), tests, limits)


def test_a_right_program_passes_and_a_wrong_one_fails() -> None:
    assert judge(RIGHT).passed
    outcome = judge("def add(a, b):\n    return a - b\n")
    assert not outcome.passed
    assert "AssertionError" in outcome.reason


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("def add(a, b:", "SyntaxError"),
        ("raise ValueError('no')", "ValueError: no"),
        ("x = 1", "'add' is not defined"),
        ("def add(a, b):\n    return b", "AssertionError"),
        ("import no_such_module", "No module named"),
        ("", "'add' is not defined"),
    ],
)
def test_a_failure_says_why(program: str, why: str) -> None:
    outcome = judge(program)
    assert not outcome.passed
    assert why in outcome.reason


# To pass without answering right.
TRICKS = {
    "printing": 'print(\'passed\'); print(\'{"passed": true, "reason": ""}\')',
    "exit before the tests": "import sys; sys.exit(0)",
    "hard exit before the tests": "import os; os._exit(0)",
    "exit inside": "import sys\ndef add(a, b): sys.exit(0)",
    "hard exit inside": "import os\ndef add(a, b): os._exit(0)",
    "always equal": """
        class Same(int):
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            __hash__ = int.__hash__
        def add(a, b): return Same(7)
        """,
    "always equal object": """
        class Same:
            def __eq__(self, other): return True
        def add(a, b): return Same()
        """,
    "no assertions": "import builtins\nbuiltins.AssertionError = type('A', (BaseException,), {})",
    "no comparisons": "import operator\noperator.eq = lambda a, b: True\ndef add(a, b): return 0",
    "a verdict on every descriptor": r"""
        import os
        for descriptor in range(64):
            for verdict in (b'{"passed": true, "reason": ""}\n', b'\x00' * 64):
                try: os.write(descriptor, verdict)
                except OSError: pass
        """,
    "an answer of its own": r"""
        import os, struct, json
        for descriptor in range(64):
            for reply in (["value", True], ["value", 5], {"passed": True}, "confined"):
                text = json.dumps(reply).encode()
                try: os.write(descriptor, struct.pack("<Q", len(text)) + text)
                except OSError: pass
        def add(a, b): return 0
        """,
    "a huge answer": "def add(a, b): return 'x' * (100 << 20)",
    "an endless answer": """
        class Endless(list):
            def __iter__(self):
                while True: yield 0
        def add(a, b): return Endless([1])
        """,
    "a nested answer": """
        def add(a, b):
            answer = []
            for _ in range(10**5): answer = [answer]
            return answer
        """,
    "a longer number than may be read": "def add(a, b): return 1 << 10**8",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_tricks_do_not_pass(trick: str) -> None:
    assert not judge(TRICKS[trick], limits=QUICK).passed


def test_the_expected_answers_are_not_in_reach_of_a_program() -> None:
    secret = "expected-" + os.urandom(8).hex()
    outcome = judge(
        """
        import gc, glob, sys
        def found():
            marker, places = "expected" + "-", []
            frame = sys._getframe(1)
            while frame:
                known = {**frame.f_globals, **frame.f_locals}
                places += [name for name, value in known.items() if marker in repr(value)]
                frame = frame.f_back
            for thing in gc.get_objects():
                if type(thing) in (list, dict, tuple) and marker in repr(thing)[:10**5]:
                    if thing is not found.__code__.co_consts: places.append(type(thing).__name__)
            for pattern in ("/proc/*/mem", "/proc/*/fd/*", "/tmp/dare-eval-*/*"):
                places += glob.glob(pattern)
            return places
        """,
        Checks(f"got = found()\nassert got == [], got\nsecret = {secret!r}"),
    )
    assert outcome.passed, outcome.reason


# To harm the machine, each with proof that it did not.
def test_an_endless_loop_ends() -> None:
    for program in ("while True: pass", "def add(a, b):\n    while True: pass"):
        outcome = judge(program, limits=Limits(cpu_seconds=1))  # however busy the machine is
        assert outcome == Outcome(False, "over 1 seconds of processor time")


def test_an_endless_sleep_ends() -> None:
    started = time.monotonic()
    outcome = judge("import time\ntime.sleep(10**6)", limits=QUICK)
    assert outcome == Outcome(False, "no answer within 3 seconds")
    assert time.monotonic() - started < 30


def test_ignoring_the_signal_of_the_time_limit_does_not_help() -> None:
    program = """
        import signal
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: pass
        """
    assert not judge(program, limits=QUICK).passed


def test_a_fork_bomb_makes_no_process() -> None:
    program = """
        import os
        def add(a, b):
            while True:
                try: os.fork()
                except BlockingIOError: pass
        """
    before = len(psutil.pids())
    outcome = judge(program)
    assert not outcome.passed
    assert "PermissionError" in outcome.reason
    assert len(psutil.pids()) < before + 100


@pytest.mark.parametrize("means", ["os.spawnlp(0, 'sh', 'sh')", "os.system('true') or 5"])
def test_no_other_program_is_started(means: str) -> None:
    outcome = judge(f"import os\ndef add(a, b): return {means} and a + b")
    assert not outcome.passed


def test_threads_are_refused() -> None:
    program = "import threading\ndef add(a, b): threading.Thread(target=print).start()"
    assert "RuntimeError" in judge(program).reason


def test_a_hundred_gigabytes_are_not_allocated() -> None:
    for size in ("bytearray(100 << 30)", "b'x' * (100 << 30)", "[0] * (10**11)"):
        outcome = judge(f"def add(a, b):\n    return len({size})")
        assert "MemoryError" in outcome.reason
    program = """
        import mmap
        def add(a, b):
            return [mmap.mmap(-1, 1 << 30) for _ in range(100)]
        """
    assert not judge(program, limits=QUICK).passed


def test_files_are_neither_removed_nor_changed_nor_made(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("here")
    victim.chmod(0o666)
    tmp_path.chmod(0o777)
    program = f"""
        import os, shutil, pathlib
        def harm():
            victim, folder = {str(victim)!r}, {str(tmp_path)!r}
            done = []
            for name, act in {{
                "remove": lambda: os.remove(victim),
                "rmtree": lambda: shutil.rmtree(folder),
                "rename": lambda: os.rename(victim, folder + "/other"),
                "write": lambda: open(victim, "w"),
                "append": lambda: open(victim, "a"),
                "truncate": lambda: os.truncate(victim, 0),
                "chmod": lambda: os.chmod(victim, 0),
                "utime": lambda: os.utime(victim),
                "link": lambda: os.link(victim, folder + "/other"),
                "symlink": lambda: os.symlink(victim, folder + "/other"),
                "mkdir": lambda: os.mkdir(folder + "/other"),
                "mkfifo": lambda: os.mkfifo(folder + "/other"),
                "here": lambda: open("file", "w"),
                "tmp": lambda: open("/tmp/other", "x"),
                "memory": lambda: os.memfd_create("x"),
                "root": lambda: os.chroot(folder),
                "chdir": lambda: pathlib.Path(folder).read_text(),
                "read": lambda: open(victim).read(),
                "list": lambda: os.listdir(folder),
            }}.items():
                try:
                    act()
                except OSError:
                    continue
                done.append(name)
            return done
        """
    outcome = judge(program, Checks("assert harm() == [], harm()"))
    assert outcome.passed, outcome.reason
    assert [entry.name for entry in tmp_path.iterdir()] == ["victim"]
    assert victim.read_text() == "here"


def test_nobody_is_reached_over_a_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind("\0dare-eval-test")
        local.listen()
        server.settimeout(0.2)
        local.settimeout(0.2)
        program = f"""
            import socket
            def reached():
                done = []
                for name, act in {{
                    "tcp": lambda: socket.create_connection({server.getsockname()}),
                    "udp": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
                    "unix": lambda: socket.socket(socket.AF_UNIX).connect("\\0dare-eval-test"),
                    "names": lambda: socket.getaddrinfo("localhost.example", 80),
                }}.items():
                    try: act()
                    except OSError: continue
                    done.append(name)
                return done
            """
        outcome = judge(program, Checks("assert reached() == [], reached()"))
        assert outcome.passed, outcome.reason
        for listener in (server, local):
            with pytest.raises(TimeoutError):
                listener.accept()


def test_other_processes_are_not_signalled_read_or_limited() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        program = f"""
            import ctypes, os, resource, signal
            libc = ctypes.CDLL(None, use_errno=True)
            def harm():
                done = []
                for pid in ({other.pid}, {os.getpid()}, os.getppid(), 1, -1):
                    for name, act in {{
                        "kill": lambda: os.kill(pid, signal.SIGTERM),
                        "limit": lambda: resource.prlimit(pid, resource.RLIMIT_CPU, (0, 0)),
                        "priority": lambda: os.setpriority(os.PRIO_PROCESS, pid, 19),
                        "affinity": lambda: os.sched_setaffinity(pid, [0]),
                        "memory": lambda: open(f"/proc/{{pid}}/mem", "rb"),
                        "pidfd": lambda: os.pidfd_open(pid),
                    }}.items():
                        try: act()
                        except OSError: continue
                        done.append((name, pid))
                    if libc.ptrace(16, pid, 0, 0) != -1: done.append(("ptrace", pid))
                return done
            """
        outcome = judge(program, Checks("assert harm() == [], harm()"))
        assert outcome.passed, outcome.reason
        assert other.poll() is None
        other.kill()


def test_nothing_is_left_behind_when_the_scorer_is_killed(tmp_path: Path) -> None:
    program = "import ctypes, time\nctypes.CDLL(None).prctl(1, 0)\ntime.sleep(60)"
    scorer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from dare_eval.lm.sandbox.run import *\n"
            f"require_sandbox(); print(flush=True); run_tests({program!r}, Checks('x'))",
        ],
        stdout=subprocess.PIPE,
    )
    assert scorer.stdout is not None
    scorer.stdout.readline()
    family: list[psutil.Process] = []
    while len(family) < 3:  # the supervisor, the program, its tests
        family = psutil.Process(scorer.pid).children(recursive=True)
        time.sleep(0.05)
    scorer.kill()
    scorer.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    scorer.stdout.close()


def test_a_program_reads_what_it_prints_to_nobody(capfd: pytest.CaptureFixture[str]) -> None:
    assert judge("print('x' * 10**6, flush=True)\n" + RIGHT).passed
    assert capfd.readouterr() == ("", "")


def test_nothing_of_the_callers_environment_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "token")
    program = "import os\ndef secrets(): return 'SECRET_TOKEN' in os.environ"
    assert judge(program, Checks("assert secrets() is False")).passed


def test_no_privileges_are_needed() -> None:
    code = """
from dare_eval.lm.sandbox.system import drop_capabilities, prctl
from dare_eval.lm.sandbox.run import Checks, run_tests
prctl(38, 1, 0, 0, 0)
drop_capabilities()
print(run_tests("def f(): return 1", Checks("assert f() == 1")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "passed=True" in done.stdout, done.stderr


def test_without_a_protection_nothing_runs_and_it_is_named() -> None:
    code = """
from dare_eval.lm.sandbox import seccomp
from dare_eval.lm.sandbox.system import prctl
from dare_eval.lm.sandbox.run import Checks, run_tests
seccomp._NEWEST = 1000
seccomp._CONDITIONAL.clear()
seccomp.CALLS.clear()
seccomp.CALLS["landlock_create_ruleset"] = (444, 444)
prctl(38, 1, 0, 0, 0)
seccomp.forbid_calls()
run_tests("def f(): return 1", Checks("assert f() == 1"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "SandboxUnavailableError" in done.stderr
    assert "the kernel has no Landlock" in done.stderr


def test_the_sandbox_holds_here() -> None:
    try:
        require_sandbox()
    except SandboxUnavailableError as error:
        pytest.fail(str(error))
