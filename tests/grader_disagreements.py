"""Rows of `verdicts/grader_cases.jsonl` (counted from 0) where this grader and the third party differ, and why."""

FLOAT_NOISE = "the value is the gold answer but for rounding in the last place; the third party compared exactly"

DISAGREEMENTS = {
    592: FLOAT_NOISE,
    793: FLOAT_NOISE,
    1203: FLOAT_NOISE,
    1837: "1.98 against 2: outside of 1e-3; the third party allowed more",
    2422: "the function returns a tuple of two numbers; the third party took the first",
}
