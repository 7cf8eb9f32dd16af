"""How the threads of a step wait for each other on a CPU. Imported before torch, which reads this
once, when it loads its threads (OpenMP's, of GNU: on Linux).

Left alone, a thread that has nothing to do yet spins for milliseconds. That is fastest on a quiet
machine. But beside another process it may spin on the very core that the thread it waits for needs,
until the system takes it off: at each of the thousand waits in a step. So it spins shortly, then
sleeps. `benchmarks/busy_speed.py` measures both."""

import os

SPINS = "10000"  # chosen by reasoning; busy_speed.py has not been run on a quiet machine yet

if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:  # the user's own come first
    os.environ["GOMP_SPINCOUNT"] = SPINS
