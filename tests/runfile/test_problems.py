"""Which of the problems of a file are shown, and in which order."""

from __future__ import annotations

from pathlib import Path

from distill_protocols import Problem, below
from distill_runfile.problems import LocatedProblem, in_order, independent


def test_a_problem_is_left_out_if_what_it_follows_from_is_one():
    cause = Problem("models.teacher.precision", "wrong")
    follows = Problem("models.student.base", "not there", follows_from="models.teacher")
    other = Problem("models.critic.base", "not there", follows_from="models.teacher_2")
    assert independent([follows, cause, other]) == [cause, other]
    assert independent([follows, other]) == [follows, other]
    full = Problem("models", "no mapping")
    assert independent([full, follows]) == [full]


def test_a_problem_is_no_cause_of_itself():
    problem = Problem("callbacks.report", "wrong", follows_from="callbacks.report")
    assert independent([problem]) == [problem]


def test_causes_follow_their_problems_into_sections():
    (problem,) = below([Problem("a", "x", follows_from="b.c")], "method_config")
    assert problem.follows_from == ("method_config", "b", "c")


def test_problems_are_sorted_by_file_and_line_and_reported_once():
    run, other = Path("z/run.yaml"), Path("a/models.json")
    late, early = (LocatedProblem(run, line, (), "m") for line in (9, 3))
    elsewhere = LocatedProblem(other, 1, ("critic", "path"), "m")
    assert in_order([elsewhere, late, early, late], run) == [early, late, elsewhere]
    assert str(elsewhere) == "models.json:1: critic.path: m"
