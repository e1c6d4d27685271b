"""Seeded random problems. A failure prints one line that can be pasted back:

pytest tests/ops/test_masked_attention_random.py --problem 'Problem(...)'
pytest tests/ops/test_masked_attention_random.py --problems 5000 --first-problem 1000
"""

from __future__ import annotations

import pytest
from backends import BACKENDS, BY_NAME
from problems import check, random_problem

from python_ref.inputs import Problem

PER_TEST = 20


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    cases = []
    for row in BACKENDS:
        mark = pytest.mark.backend(row.name)
        if option("problem"):
            for text in option("problem"):
                cases.append(pytest.param(row.name, [text], marks=mark, id=f"{row.name}-given"))
            continue
        count = option("problems") or row.random_problems * (10 if option("full") else 1)
        first = option("first_problem")
        for start in range(first, first + count, PER_TEST):
            numbers = range(start, min(start + PER_TEST, first + count))
            name = f"{row.name}-{numbers[0]}-{numbers[-1]}"
            cases.append(pytest.param(row.name, numbers, marks=mark, id=name))
    metafunc.parametrize("backend, numbers", cases)


def test_random_problems(backend, numbers):
    failures = []
    for number in numbers:
        problem = Problem.parse(number) if isinstance(number, str) else random_problem(number)
        if problem.dtype not in BY_NAME[backend].dtypes:
            continue
        try:
            check(problem, backend)
        except AssertionError as failure:
            failures.append(str(failure))
        except Exception as error:
            raise AssertionError(
                f"--problem '{problem!r}'\n  {type(error).__name__}: {error}"
            ) from error
    if failures:
        raise AssertionError("\n".join(failures))
