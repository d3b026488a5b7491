"""A writer of a trajectory file that is killed again and again, and goes on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time

from lede_env.data.trajectory_file import read_trajectories

# Forks for every line it reads, so that imports and models are paid for once.
SERVER = """
import os, sys
{setup}
for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        {write}
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def episodes_in(path):
    return read_trajectories(path, columns=()).n_episodes if path.exists() else 0


def kill_again_and_again(path, setup, write, kills, check):
    """Kill a writer `kills` times, every other time in the middle of its work, then let it finish.

    setup: lines of code, which also have the file commit every few episodes. write: one line, which goes on with
    `path`. check: called with `path` after each kill that left a file, and tells how many episodes it holds.
    Returns those numbers, from 0 on.
    """
    rng, counts = random.Random(kills), [0]
    program = SERVER.format(setup=textwrap.dedent(setup), write=write)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as server:

        def run():
            server.stdin.write("go\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        for number in range(kills):
            child = run()
            deadline = time.monotonic() + 60
            while number % 2 == 0 and episodes_in(path) == counts[-1]:  # else at any moment, start-up too
                assert time.monotonic() < deadline
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)
            assert int(server.stdout.readline()) == -signal.SIGKILL
            counts.append(check(path) if path.exists() else 0)
        run()
        assert int(server.stdout.readline()) == 0
        server.stdin.close()
    assert counts == sorted(counts), counts  # nothing was lost
    return counts
