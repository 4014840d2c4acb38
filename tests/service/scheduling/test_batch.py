import os

import numpy as np

from model_store.policy import Policy, Theta, draw_theta
from service.scheduling.batch import SYSTEM_RNG

METHOD = Policy.over(["a"] * 10 + ["b"] * 10 + ["c"] * 10 + ["d"] * 10)
DRAWS = 20


def draws() -> list[Theta]:
    return [draw_theta(METHOD, SYSTEM_RNG) for _ in range(DRAWS)]


def test_two_processes_forked_from_one_draw_apart() -> None:
    """A generator with a state would be copied by the fork, and both would draw the same. By chance they are equal with
    probability below 1e-100."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # nothing of pytest's may run here
        os.write(writing, repr(draws()).encode())
        os._exit(0)
    os.close(writing)
    ours = repr(draws())
    with os.fdopen(reading) as pipe:
        theirs = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    assert theirs.startswith("[Theta(")
    assert theirs != ours


def test_the_draws_in_use_follow_the_law_of_n() -> None:
    """Chi-square over n = 1 to 6 and 7 or 8, 6 degrees of freedom: beyond 45 once in 2e7 runs."""
    law = np.array([0.173, 0.262, 0.255, 0.179, 0.089, 0.032, 0.008])
    sizes = np.array([len(draw_theta(METHOD, SYSTEM_RNG).members) for _ in range(4000)])
    counts = np.bincount(np.minimum(sizes, 7), minlength=8)[1:]
    expected = 4000 * law / law.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 45
