"""SIGKILL at the worst moments. scripts/soak.sh kills at random moments for any length of time, also one rank of two
(which tests/mains/test_resume.py::test_elastic_restart checks, too)."""

import pytest
from helpers.killed import WHERE
from helpers.kills import DENSE_EVENTS, EVENTS, Killed

# The moments of the kills, and how often each has come by then.
DENSE = {"step": 4, "write": 1, "evaluation": 2, "results": 1}
KILLS = {
    "mae": {"step": 4, "accumulation": 2, "write": 1, "rename": 1, "evaluation": 1, "worker": 130, "results": 1},
    "segment": DENSE,
    "detect": DENSE,
}


@pytest.fixture(scope="module", params=KILLS)
def reference(request, tmp_path_factory):
    """The name of a run and the undisturbed run."""
    run = Killed(tmp_path_factory.mktemp("kills") / "reference", request.param, command=False)
    code, output = run.start()
    assert code == 0, output
    return request.param, run


def test_killed_everywhere(reference, tmp_path):
    """A run that is killed once in each way resumes bit-identically, and repeats few steps."""
    name, undisturbed = reference
    run = Killed(tmp_path / "run", name, command=False)
    for where, number in KILLS[name].items():
        code, output = run.start(where, number)
        assert code != 0, (where, output)
    assert run.kills == len(KILLS[name])
    code, output = run.start()
    assert code == 0 and "resumed" in output, output
    run.check_end(undisturbed)


def test_every_moment_is_tried():
    assert set(KILLS["mae"]) == set(WHERE) == set(EVENTS) == set(DENSE_EVENTS)
