"""Where generated programs run: :mod:`.run` is the way in.

A program and its tests are in two processes. The *program* never sees its tests: the *examiner*
runs them and asks it for one value after another over a pipe, in plain data (:mod:`.wire`). So it
does not matter what the program prints, when it exits, how it patches its interpreter or what it
finds in its memory: to pass, it must answer right.

Both processes, before either runs a line from outside, give up for good (:mod:`.confine`)

    the network         no sockets (seccomp), no interfaces (an empty network namespace, if allowed)
    files               nothing can be written, made, removed or changed (Landlock, seccomp, a file
                        size limit of 0); nothing can be read but the Python installation (Landlock)
    processes           no forks, threads, programs or signals (seccomp), no other's memory (both)
    the kernel's doors  mounts, namespaces, modules, keys, BPF, io_uring, … (seccomp), capabilities
    memory              a limit on the address space
    time                a limit on processor time, and on the clock, which kills both

Where one of these cannot be had nothing runs, and the error names it. Nothing needs to be installed
and nobody needs to be root.
"""
