"""A base model that has learned nothing, for tests that need one and not what it says."""

import pytest


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A working folder that holds the untaught base model of addition's number 0."""
    from benchmarks.methods.tasks import make_task
    from benchmarks.methods.tasks.addition import SCHEDULES
    from benchmarks.methods.tasks.pretrain import Schedule

    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCHEDULES, "0.1M", Schedule(steps=1))
        make_task("addition", 0).load(folder)
    return folder
