"""GSM8K problems and prompts."""

from __future__ import annotations

import json

import pytest
from conftest import SHARED

from data import gsm8k
from data.gsm8k import Problem, build_prompts, final_answer, problem_file, read_problems
from data.text import load_tokenizer
from data.word_problems import train_tokenizer

QWEN = SHARED / "qwen2_tokenizer"
needs_shared = pytest.mark.skipif(not QWEN.is_dir(), reason="needs GSM8K and the Qwen2 tokenizer in ../shared/data")
MASK_ID = 511


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18.\n#### 18", "18"),
        ("#### 1,450,000", "1450000"),
        ("#### -3 \n", "-3"),
        ("####0.5", "0.5"),
        ("first #### 4\nthen\n#### 5", "5"),
    ],
)
def test_final_answer(solution, answer):
    assert final_answer(solution) == answer


@pytest.mark.parametrize("solution", ["", "18", "#### ", "#### many", "#### 5\nand more", "#### 5 apples"])
def test_a_solution_without_an_answer_is_refused(solution):
    with pytest.raises(ValueError, match="no number after '####'"):
        final_answer(solution)


def test_problems_of_a_file(tmp_path):
    rows = [{"question": "A\u2028line separator?", "answer": "#### 1,000"}, {"question": "B?", "answer": "x\n#### 2"}]
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(rows[0], ensure_ascii=False) + "\n\n" + json.dumps(rows[1]) + "\n", encoding="utf-8")
    assert problem_file(str(path), tmp_path / "cache") == path
    assert read_problems(path) == [Problem("A\u2028line separator?", "1000"), Problem("B?", "2")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"test.jsonl, line 2 cannot be read \(it is not JSON"),
        ('{"question": "a"}', r"line 2 cannot be read \(must have question and answer, both text"),
        ('{"question": "a", "answer": 5}', r"line 2 cannot be read \(must have question and answer, both text"),
        ("[]", r"line 2 cannot be read \(must be a JSON object, got list"),
        ('{"question": "a", "answer": "five"}', r"line 2 cannot be read \(no number after"),
    ],
)
def test_a_bad_line_is_named(line, message, tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text('{"question": "a", "answer": "#### 1"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_problems(path)


@pytest.mark.parametrize("source", ["nowhere.jsonl", "/nowhere/at/all", "a/b/c", "folder/misspelled"])
def test_a_missing_file_is_named(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        ValueError, match=f"problem file {source} does not exist: set data.test_source to a .jsonl file"
    ):
        problem_file(source, tmp_path)


def test_a_folder_of_problems_is_not_called_missing(tmp_path):
    with pytest.raises(ValueError, match=f"problem file {tmp_path} is a folder: set data.test_source"):
        problem_file(str(tmp_path), tmp_path)


def test_a_downloaded_split_is_kept(tmp_path, monkeypatch):
    import datasets

    calls = []

    def load_dataset(name, subset, split, trust_remote_code):
        assert not trust_remote_code
        calls.append((name, subset, split))
        return [{"question": "A?", "answer": "#### 1"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for _ in range(2):
        assert read_problems(problem_file(gsm8k.HUB_NAME, tmp_path / "cache")) == [Problem("A?", "1")]
    assert calls == [("openai/gsm8k", "main", "test")]


def test_an_unreachable_hub_ends_with_one_message(tmp_path, monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ValueError, match=r"'openai/gsm8k' cannot be read \(no network\): set data.test_source to a local"
    ):
        problem_file(gsm8k.HUB_NAME, tmp_path)


def test_a_prompt_is_the_question_a_newline_and_masks(tokenizer):
    problems = [Problem("Anna has 5 books.", "5"), Problem("How many plums are left?", "2")]
    prompts = build_prompts(problems, tokenizer, MASK_ID, 32)
    assert prompts.xt.shape == (2, 32)
    assert prompts.problems == problems
    assert prompts.n_left_out == 0
    for row, problem in zip(prompts.xt.tolist(), problems, strict=True):
        ids = tokenizer.encode(problem.question) + tokenizer.encode("\n")
        assert row == ids + [MASK_ID] * (32 - len(ids))


def test_white_space_around_a_question_is_stripped(tokenizer):
    question = "Anna has 5 books.\nHow many are left?"
    prompts = build_prompts([Problem(question, "5"), Problem(f"\n {question}\t \n", "5")], tokenizer, MASK_ID, 48)
    assert prompts.xt[1].tolist() == prompts.xt[0].tolist()


def test_questions_that_are_too_long_are_left_out_and_counted(tokenizer):
    question = "Anna has 5 books."
    n_tokens = len(tokenizer.encode(question)) + 1
    problems = [Problem(question, "1"), Problem(question + " " + question, "2"), Problem(question, "3")]
    prompts = build_prompts(problems, tokenizer, MASK_ID, n_tokens + 2)
    assert [problem.answer for problem in prompts.problems] == ["1", "3"]
    assert prompts.n_left_out == 1
    with pytest.raises(ValueError, match=r"none of the 3 questions fits data\.max_len"):
        build_prompts(problems, tokenizer, MASK_ID, n_tokens + 1)
    with pytest.raises(ValueError, match=rf"none of the 3 questions fits --max-len {n_tokens + 1}: raise it"):
        build_prompts(problems, tokenizer, MASK_ID, n_tokens + 1, option="--max-len")


def test_a_mask_token_in_a_question_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"occurs in the question 'Anna has 5 books\.'"):
        build_prompts([Problem("Anna has 5 books.", "5")], tokenizer, tokenizer.encode("5")[0], 32)


@needs_shared
def test_all_of_gsm8k():
    for split, n_problems in (("train", 7473), ("test", 1319)):
        problems = read_problems(SHARED / "gsm8k" / f"{split}.jsonl")
        assert len(problems) == n_problems
        assert all(float(problem.answer) == int(float(problem.answer)) for problem in problems)
    prompts = build_prompts(problems, load_tokenizer(str(QWEN)), 151644, 512)
    assert prompts.n_left_out == 0
    assert prompts.problems == problems
    assert prompts.xt.shape == (1319, 512)
    for ids in prompts.xt.tolist():
        first_mask = ids.index(151644)
        assert ids[first_mask - 1] == 198
        assert set(ids[first_mask:]) == {151644}
