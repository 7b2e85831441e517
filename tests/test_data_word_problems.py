"""Word problems: what they are, and the whole path from data to graded programs on them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, run_python, run_ranks

import sampling
import train
from data import word_problems
from data.gsm8k import read_problems
from data.text import decode_completions, encode_texts, load_tokenizer
from data.tiny_gsm import TinyGsmSettings
from data.token_files import open_token_files
from data.word_problems import (
    LEVELS,
    NAMES,
    THINGS,
    Difficulty,
    WordProblem,
    cached_word_problems,
    generate_problems,
    train_tokenizer,
)
from eval import evaluate
from grader.grade import grade
from model import hub
from runtime.metrics import read_metrics

MINI = ROOT / "yaml_files" / "tinygsm_mini_puma.yaml"
LINE = re.compile(r"    (\w+) = (.+)")


def test_every_program_returns_the_answer():
    problems = generate_problems(1500, seed=3)
    for problem in problems:
        names: dict = {}
        exec(problem.code, names)
        assert names["simple_math_problem"]() == problem.answer, problem
        assert isinstance(problem.answer, int)
        assert problem.answer > 0
    operations = [len(re.findall(r"[-+*]|//", problem.code.split("result =")[1])) for problem in problems]
    assert set(operations) == {1, 2}


def test_numbers_of_the_program_stand_in_the_question():
    for problem in generate_problems(500, seed=4):
        assert set(re.findall(r"\d+", problem.code)) == set(re.findall(r"\d+", problem.question))


def test_problems_are_distinct_and_depend_on_the_seed_alone():
    problems = generate_problems(3000, seed=0)
    assert len({problem.question for problem in problems}) == 3000
    assert generate_problems(100, seed=0) == problems[:100]
    assert generate_problems(100, seed=1) != problems[:100]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_word_problems(tmp_path_factory.mktemp("data"), n_train=3000, n_test=40, seed=0, max_len=72)


def test_rows_and_test_problems_are_disjoint(folder):
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    data = open_token_files(folder, 72, LEVELS["easy"].vocab_size - 1, LEVELS["easy"].vocab_size)
    tokens, prompt_mask = data.rows(np.arange(3000))
    questions = {tokenizer.decode(row[given][:-1]) for row, given in zip(tokens, prompt_mask, strict=True)}
    problems = generate_problems(3040, seed=0)
    assert questions == {problem.question for problem in problems[:3000]}
    assert decode_completions(tokenizer, tokens, prompt_mask) == [problem.code for problem in problems[:3000]]
    test = read_problems(folder / "test.jsonl")
    assert [problem.question for problem in test] == [problem.question for problem in problems[3000:]]
    assert not questions & {problem.question for problem in test}
    verdicts = grade([problem.code for problem in problems[3000:]], [problem.answer for problem in test], n_workers=1)
    assert all(verdict.right for verdict in verdicts)


def test_a_number_is_one_token_and_any_text_is_kept(folder):
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    assert len(tokenizer) == LEVELS["easy"].vocab_size
    assert tokenizer.mask_token_id == LEVELS["easy"].vocab_size - 1
    assert {len(tokenizer.encode(str(number))) for number in range(1, 31)} == {1}, "one token, so easy to copy"
    for text in ("Émile bought 12 kiwis,\n\n  didn't he?\t£5", generate_problems(1, 9)[0].code):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_tokenizer_is_the_same_every_time(folder):
    again = train_tokenizer()
    assert again.get_vocab() == load_tokenizer(str(folder / "tokenizer")).get_vocab()


def test_files_of_easy_problems_are_those_of_recorded_results(folder):
    digests = [hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16] for name in ("labels.bin", "test.jsonl")]
    assert digests == ["695829c821d8a861", "3d4e83ab6d946efd"]
    assert folder.name == "word_problems_v3_3000_40_seed0_len72"


# Medium and hard problems: stories


@pytest.fixture(scope="module", params=["medium", "hard"])
def level(request: pytest.FixtureRequest) -> Difficulty:
    return request.param


@pytest.fixture(scope="module")
def stories(level: Difficulty) -> list[WordProblem]:
    return generate_problems(3000, seed=0, difficulty=level)


@pytest.fixture(scope="module")
def story_folder(level: Difficulty, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_word_problems(tmp_path_factory.mktemp(level), 2900, 100, seed=0, max_len=112, difficulty=level)


def test_programs_of_stories_compute_exactly_and_stay_in_bounds(stories):
    n_operations: Counter[int] = Counter()
    for problem in stories:
        values: dict = {}
        lines = LINE.findall(problem.code)
        for variable, expression in lines:
            assert variable not in values, "each line has its own variable"
            assert eval(expression.replace("//", "/"), {}, values) == eval(expression, {}, values), "exact"
            values[variable] = eval(expression, {}, values)
            assert 2 <= values[variable] <= 9999
        assert values[problem.code.split()[-1]] == problem.answer
        n_operations[len(lines) - 1] += 1
    assert n_operations.keys() == {2, 3, 4}
    assert min(n_operations.values()) > 900, "equally likely"


def test_the_grader_finds_the_answers_of_stories(stories):
    sample = stories[:100]
    verdicts = grade([each.code for each in sample], [str(each.answer) for each in sample], n_workers=1)
    assert all(verdict.right for verdict in verdicts)


def test_stories_have_the_numbers_of_the_program_in_their_own_order(stories, level):
    n_same_order, highest = 0, 0
    for problem in stories:
        asked, used = (re.findall(r"\d+", text) for text in (problem.question, problem.code))
        assert Counter(asked) == Counter(used)
        highest = max(highest, *map(int, used))
        n_same_order += asked == used
    assert highest == LEVELS[level].max_number
    assert 0.5 < n_same_order / len(stories) < 0.9


def test_stories_are_grammatical(stories):
    texts = [problem.question for problem in stories]
    assert not [text for text in texts if re.search(r"[{}]|\bThey \w+s\b|\bdo [A-Z]|does they", text)]
    one_person = "|".join(["He", "She", *NAMES])
    assert not [text for text in texts if re.search(rf"\b(?:{one_person}) \w+[^s] \d", text)]
    for text in texts:
        persons = list(dict.fromkeys(re.findall("|".join(NAMES), text)))
        assert len(persons) in (1, 2)
        pronouns = [*re.finditer(r"\b(?:He|She|his|her)\b", text)]
        if len(persons) == 2:  # a pronoun could mean either
            assert all(pronoun.start() < text.index(persons[1]) for pronoun in pronouns), text
        own = {"he": {"He", "his"}, "she": {"She", "her"}}[NAMES[persons[0]]]
        assert {pronoun.group() for pronoun in pronouns} <= own, text
    assert {name for text in texts for name in re.findall("|".join(NAMES), text)} == NAMES.keys()
    assert {thing for text in texts for thing in re.findall("|".join(THINGS), text)} == {*THINGS}
    kinds = Counter(re.findall(r" = \w+ (\S+) (?:\d|(\w))", "".join(problem.code for problem in stories)))
    assert {sign for sign, _ in kinds} == {"+", "-", "*", "//"}
    assert any(variable for _, variable in kinds), "some add what two persons have"


def test_stories_have_a_token_per_word_and_per_number_or_digit(story_folder, stories, level):
    tokenizer = load_tokenizer(str(story_folder / "tokenizer")).backend_tokenizer
    for problem in stories[:300]:
        asked, used = encode_texts(tokenizer, [problem.question, problem.code])
        texts = [[tokenizer.decode([token]).strip() for token in tokens] for tokens in (asked, used)]
        numbers = [[text for text in each if text.isdigit()] for each in texts]
        assert numbers[0] == re.findall({"medium": r"\d+", "hard": r"\d"}[level], problem.question)
        assert Counter(numbers[0]) == Counter(numbers[1]), "the same tokens in both"
        assert [text for text in texts[0] if text.isalpha()] == re.findall(r"[A-Za-z]+", problem.question)
    assert tokenizer.get_vocab_size() == LEVELS[level].vocab_size
    for config in (ROOT / "yaml_files").glob(f"tinygsm_mini_{level}_*.yaml"):
        assert yaml.safe_load(config.read_text())["model"]["vocab_size"] == LEVELS[level].vocab_size


def test_difficulty_is_the_number_of_operations(story_folder, stories, level):
    settings = {"dataset": "tiny_gsm", "source": "word_problems", "n_train": 2900, "n_test": 100, "seed": 0}
    settings |= {"data_dir": str(story_folder.parent), "max_len": 112, "difficulty": level}
    data = TinyGsmSettings(**settings).open(LEVELS[level].vocab_size)
    expected = [len(LINE.findall(problem.code)) - 1 for problem in stories[2900:]]
    assert data.difficulty(np.arange(100))["operations"].tolist() == expected
    assert data.difficulty(np.array([7, 3]))["operations"].tolist() == [expected[7], expected[3]]
    assert TinyGsmSettings(dataset="tiny_gsm").open(512).difficulty(np.arange(3)) == {}


# Files, training and evaluation


def test_problems_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"max_len 40 is too short for the word problems: set it to \d+"):
        cached_word_problems(tmp_path, n_train=2000, n_test=10, seed=0, max_len=40)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_a_second_call_reads_what_the_first_wrote(folder, monkeypatch):
    monkeypatch.setattr(word_problems, "generate_problems", lambda *_: pytest.fail("generated again"))
    assert cached_word_problems(folder.parent, 3000, 40, 0, 72) == folder


def test_runs_that_start_together_write_the_problems_once(folder, tmp_path, monkeypatch):
    @contextmanager
    def wait(path: Path, remedy: str):
        """Stands for `alone`, which returns when another process has written the folder."""
        shutil.copytree(folder, path)
        yield

    monkeypatch.setattr("base.files.alone", wait)
    monkeypatch.setattr(word_problems, "generate_problems", lambda *_: pytest.fail("generated again"))
    assert cached_word_problems(tmp_path, 3000, 40, 0, 72) == tmp_path / folder.name


def tiny_run(folder: Path, path: Path, **data: object) -> Path:
    """The mini experiment with a model and a length of seconds, as a config file."""
    settings = yaml.safe_load(MINI.read_text())
    settings["model"] |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings["data"] |= {"data_dir": str(folder.parent), "n_train": 3000, "n_test": 40, "n_held_out": 50} | data
    settings["training"] |= {"batch_size": 8, "max_steps": 4, "eval_every": 2, "save_every": 4, "log_every": 1}
    settings["training"] |= {"precision": "float32", "device": "cpu"}
    settings["validation"] = {"tokens_per_step": [8, 16], "n_examples": 6, "n_table_rows": 4, "n_loss_rows": 20}
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def run_dir(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    path = tmp_path_factory.mktemp("run")
    config = tiny_run(folder, path / "tiny.yaml")
    train.main(["--config", str(config), "--run-dir", str(path / "run")])
    return path / "run"


def test_a_packed_model_is_sampled_without_its_problems_and_evaluated_on_them(run_dir, tmp_path, monkeypatch):
    packed = tmp_path / "packed"
    hub.pack_run(str(run_dir), packed)
    with monkeypatch.context() as patch:
        patch.setattr(word_problems, "generate_problems", lambda *_: pytest.fail("generated again"))
        for source in (run_dir, packed):
            config = hub.load_model(str(source), [f"data.data_dir={tmp_path / 'elsewhere'}"]).config
            assert (config.open_data().encode("How many apples?") == config.mask_id).any()
    for source in (run_dir, packed):
        evaluate.main([str(source), "--json", str(tmp_path / f"{source.name}.json")])
    of_run, of_packed = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("run", "packed"))
    assert [each["n"] for each in of_packed["samplers"]] == [each["n"] for each in of_run["samplers"]] == [6, 6]
    assert of_packed["loss"] == pytest.approx(of_run["loss"], rel=0.01), "weights are packed in bfloat16"


def test_word_problems_of_another_tokenizer_are_refused(folder, tmp_path):
    train_tokenizer("hard").save_pretrained(tmp_path)
    settings = {"dataset": "tiny_gsm", "source": "word_problems", "n_train": 3000, "n_test": 40, "seed": 0}
    settings |= {"data_dir": str(folder.parent), "max_len": 72, "n_held_out": 50}
    for own in (None, str(folder / "tokenizer")):
        assert len(TinyGsmSettings(tokenizer=own, **settings).open(512).validation) == 50
    with pytest.raises(ValueError, match=r"another tokenizer than .*: leave data\.tokenizer out of a new run"):
        _ = TinyGsmSettings(tokenizer=str(tmp_path), **settings).open(512).validation


def test_training_records_accuracy_and_samples(run_dir, capsys):
    train.main(["--config", str(run_dir.parent / "tiny.yaml"), "--run-dir", str(run_dir)])
    assert re.fullmatch(r"solved \d+\.\d% of 6 test problems", capsys.readouterr().out.splitlines()[-2])
    row = list(read_metrics(run_dir))[-1]
    for name in ("accuracy", "accuracy_low", "accuracy_high", "fails_to_parse", "fails_to_run", "out_of_time", "nfe"):
        assert f"validation/{name}/top_prob_8" in row
    assert row["validation/accuracy_low/top_prob_8"] <= row["validation/accuracy/top_prob_8"]
    assert row["validation/fails_to_parse/top_prob_8"] > 0.5, "an untrained model writes no programs"
    for step in (2, 4):
        samples = [json.loads(line) for line in (run_dir / f"samples_{step:08d}.jsonl").read_text().splitlines()]
        assert [(s["tokens_per_step"], s["row"]) for s in samples] == [(t, r) for t in (8, 16) for r in range(4)]
        assert samples[0].keys() >= {"question", "program", "value", "answer", "verdict", "confidence"}
        assert "How" in samples[0]["question"]


def test_a_checkpoint_writes_a_program(run_dir, capsys):
    sampling.main(["--checkpoint", str(run_dir), "--prompt", "Anna has 5 books.", "--tokens-per-step", "8"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "8 network forward evaluations", "57 masked positions, 8 at a time"
    sampling.main(["--checkpoint", str(run_dir), "--prompt", "\n Anna has 5 books.  \n", "--tokens-per-step", "8"])
    assert capsys.readouterr().out.splitlines() == lines, "white space around the prompt is stripped"
    for arguments, message in ((["--puzzle", "1" * 81], "--prompt"), (["--prompt", "Anna " * 80], "at most 62 fit")):
        with pytest.raises(SystemExit) as stop:
            sampling.main(["--checkpoint", str(run_dir), *arguments])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_evaluation_on_two_processes_finds_the_same(run_dir, tmp_path):
    command = ["-m", "eval.evaluate", run_dir, "validation.n_examples=7", "--json", tmp_path / "1.json"]
    assert run_python(*command, "--samples", tmp_path / "1.jsonl").returncode == 0
    result = run_ranks(2, *command[:-1], tmp_path / "2.json", "--samples", tmp_path / "2.jsonl")
    assert result.returncode == 0, result.stderr
    alone, together = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    assert together["samplers"] == alone["samplers"]
    groups = alone["samplers"][0]["groups"]
    assert [(group["by"], group["value"]) for group in groups] == [("operations", 1), ("operations", 2)]
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert (tmp_path / "2.jsonl").read_text() == (tmp_path / "1.jsonl").read_text()
    assert len((tmp_path / "1.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"n_train": None}, "source 'word_problems' needs n_train"),
        ({"n_held_out": 3000}, "n_held_out 3000 must be less than n_train 3000"),
        ({"max_len": 70}, "multiple of 8"),
        ({"mask_id": 512}, "model.vocab_size 512 is too small"),
        ({"mask_id": 0}, "contains the mask token 0"),
        ({"source": "files", "n_train": None, "n_test": None, "seed": None}, "meta.json is missing"),
        ({"source": "files", "difficulty": "easy"}, "difficulty: only used by source 'word_problems'"),
        ({"difficulty": "extreme"}, "difficulty"),
    ],
)
def test_wrong_settings_end_with_one_message(data, message, folder, tmp_path, capsys):
    config = tiny_run(folder, tmp_path / "wrong.yaml", **data)
    with pytest.raises(SystemExit) as stop:
        train.main(["--config", str(config), "--run-dir", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
