"""SIGKILL at the worst moments. scripts/soak.sh kills at random moments for any length of time, also one rank of two
(which tests/mains/test_resume.py::test_elastic_restart checks, too)."""

import pytest
from helpers.killed import WHERE
from helpers.kills import EVENTS, Killed


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    run = Killed(tmp_path_factory.mktemp("kills") / "reference", command=False)
    code, output = run.start()
    assert code == 0, output
    return run


def test_killed_everywhere(reference, tmp_path):
    """A run that is killed once in each way resumes bit-identically, and repeats few steps."""
    run = Killed(tmp_path / "run", command=False)
    for where, number in zip(WHERE, (4, 2, 1, 1, 1, 130)):
        code, output = run.start(where, number)
        assert code != 0, (where, output)
    assert run.kills == len(WHERE) == len(EVENTS)
    code, output = run.start()
    assert code == 0 and "resumed" in output, output
    run.check_end(reference)
