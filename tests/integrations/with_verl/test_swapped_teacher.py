"""The teacher whose values stand in the student's parameters, on modules of one process."""

import pytest
import torch
from torch import nn


def make_student(dtype=torch.float32):
    """A frozen base layer and a trained one."""
    student = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False)).to(dtype)
    student[0].requires_grad_(False)
    return student


def make_teacher(student, **settings):
    from fused_sd.integrations.verl.adapter_teacher import SwappedTeacher

    return SwappedTeacher(student, **settings)


def fill(student, value):
    student[1].weight.data.fill_(value)


def taught(teacher):
    with teacher.acting() as module:
        return module[1].weight.detach().clone()


def test_small_steps_of_a_16_bit_average_add_up():
    """bf16 has no number between 1 and 1 + 1/128: there each step alone would round to nothing."""
    student = make_student(torch.bfloat16)
    fill(student, 1.0)
    teacher = make_teacher(student, kind="ema", rate=0.001)
    fill(student, 2.0)
    for _ in range(20):
        teacher.update()
    expected = torch.tensor(1 + (1 - 0.999**20), dtype=torch.bfloat16)
    assert 1 < float(expected) < 1.03
    assert (taught(teacher) == expected).all()
    assert (student[1].weight == 2).all()


def test_a_teacher_that_fails_leaves_the_student_its_values():
    student = make_student()
    fill(student, 1.0)
    teacher = make_teacher(student, kind="frozen")
    fill(student, 3.0)
    student[0].eval()

    def run():
        with teacher.acting() as module:
            assert module is student
            assert not torch.is_grad_enabled()
            assert (module[1].weight == 1).all()
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run()
    assert (student[1].weight == 3).all()
    assert student[1].weight.requires_grad
    assert (student[0].training, student[1].training) == (False, True)


def test_a_frozen_base_is_shared():
    student = make_student()
    held = make_teacher(student, kind="synced").state_dict()["weights"]
    assert held.keys() == {"1.weight"}
    assert held["1.weight"].data_ptr() != student[1].weight.data_ptr()


def test_a_student_that_trains_nothing_is_refused():
    with pytest.raises(ValueError, match="student must train an adapter, got nothing trained"):
        make_teacher(make_student().requires_grad_(False))


def test_a_student_whose_adapter_was_replaced_is_refused():
    student = make_student()
    teacher = make_teacher(student)
    student[1] = nn.Linear(2, 3, bias=False)
    with pytest.raises(ValueError, match=r"1\.weight \(3, 2\) and \(2, 2\)"):
        taught(teacher)
    student[1] = nn.Identity()
    with pytest.raises(ValueError, match=r"1\.weight on one side only"):
        teacher.update()
