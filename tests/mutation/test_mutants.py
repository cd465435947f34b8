"""What the trials of mutants stand on: which faults are made, and that a process takes them up."""

import importlib.util

import pytest
from mutants import functions_of, mutants_of, put_in_place
from try_mutants import interval

SOURCE = '''
def bounded(value, low=0):
    """Raise a value to a bound."""
    if value < low:
        return max(low, value)
    return value * 2 + 1


def registered(function):
    return function


@registered
def shifted(values):
    moved = [each - 1 for each in values]
    moved.append(abs(-3))
    return sorted(moved, reverse=True)
'''


@pytest.fixture
def module(tmp_path):
    path = tmp_path / "patient.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("patient", path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_every_kind_of_fault_is_made_once_in_bodies_alone(tmp_path, module):
    made = {str(mutant).split(": ", 1)[1] for mutant in mutants_of(tmp_path, "patient.py")}
    assert made == {
        "if value < low -> if True",
        "if value < low -> if False",
        "value < low -> value <= low",
        "max(low, value) -> min(low, value)",
        "value * 2 + 1 -> value * 2 - 1",
        "value * 2 -> value / 2",
        "2 -> 3",
        "1 -> 2",
        "each - 1 -> each + 1",
        "moved.append(abs(-3)) -> pass",
        "-3 -> 3",
        "3 -> 4",
        "sorted(moved, reverse=True) -> sorted(moved)",
        "True -> False",
    }


def test_a_running_process_takes_a_mutant_up(tmp_path, module):
    held = module.shifted  # as a registry or an importing module holds it

    def outcome():
        return [*map(module.bounded, (-1, 0, 5)), held([1, 9])]

    ends = {}
    originals = [(each, each.__code__) for each in (module.bounded, module.shifted)]
    for mutant in mutants_of(tmp_path, "patient.py"):
        functions = functions_of({str(tmp_path / "patient.py")})
        assert put_in_place(tmp_path, mutant, functions)
        ends[str(mutant)] = outcome()
        for each, code in originals:
            each.__code__ = code
    right = outcome()
    assert right == [0, 1, 11, [8, 3, 0]]
    same = [name.split(": ", 1)[1] for name, end in ends.items() if end == right]
    # the one that no test could notice: an absolute value has no sign
    assert sorted(same) == ["-3 -> 3"]


def test_a_score_has_wilsons_interval():
    low, high = interval(90, 100)
    assert (round(low, 3), round(high, 3)) == (0.826, 0.945)  # as tables have it
    assert interval(40, 40)[1] == 1


def test_a_judged_mutant_is_known_wherever_its_line_stands(tmp_path):
    names = []
    for above in ("", "\n# a comment\n"):
        (tmp_path / "patient.py").write_text(above + SOURCE)
        names.append([mutant.lasting_name for mutant in mutants_of(tmp_path, "patient.py")])
    assert names[0] == names[1]
    assert "patient.py: 2 -> 3, in: return value * 2 + 1" in names[0]
