"""Names of metrics: those of today, and those that had another."""

import pytest

from fused_sd.terms.metrics import current_names


def test_an_old_name_stands_for_the_new_one_where_the_loss_has_it():
    legal = ("student_log_prob", "student_entropy")
    with pytest.warns(DeprecationWarning, match="'entropy' is now called 'student_entropy'"):
        found = current_names("metrics", ["student_log_prob", "entropy"], legal)
    assert found == {"student_log_prob": "student_log_prob", "entropy": "student_entropy"}
    with pytest.raises(ValueError, match=r"metrics must be one of .* got 'ratio'"):
        current_names("metrics", ["ratio"], legal)
