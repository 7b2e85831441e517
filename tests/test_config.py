"""Settings: shipped files, overrides, and one message that names everything that is wrong."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from conftest import PUMA, ROOT, UNIFORM, tiny_settings
from helpers import project_trees

from config import BlockPumaSettings, Config, PumaSettings, SamplingRule, Settings, UniformSettings
from runtime.config_file import (
    ABSENT,
    changed_settings,
    dump_config,
    flatten,
    format_changes,
    parse_config,
    read_config,
    setting_name,
    settings_table,
)

SHIPPED = sorted((ROOT / "yaml_files").glob("*.yaml"))


def write(path: Path, settings: Any) -> Path:
    path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
    return path


@pytest.fixture
def tiny(tmp_path):
    """A correct config file."""
    return write(tmp_path / "tiny.yaml", tiny_settings(PUMA, tmp_path))


def problems(path: Path, *overrides: str) -> list[str]:
    """The lines of the message that reading ends with; the first says how many problems there are."""
    with pytest.raises(ValueError) as error:
        read_config(path, overrides)
    return str(error.value).splitlines()


# What is shipped


def test_there_are_shipped_files():
    assert {path.stem for path in SHIPPED} >= {"sudoku_puma", "sudoku_baseline", "sudoku_mini_puma"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_file_loads(path):
    config = read_config(path)
    assert config.training.max_steps or config.training.num_epochs


def test_the_paper_experiment_has_the_papers_settings():
    config = read_config(ROOT / "yaml_files" / "sudoku_puma.yaml")
    model, training = config.model, config.training
    assert (model.hidden_size, model.intermediate_size, model.num_hidden_layers) == (256, 768, 8)
    assert model.num_attention_heads == 8
    assert training.batch_size == 32
    assert (config.data.layout, model.learned_positions) == ("two_halves", 162)
    assert training.num_epochs == 2
    assert isinstance(config.objective, PumaSettings)
    assert config.objective.n_stages_at(0) == 8
    assert config.validation.confidence == ("top_prob", "top_prob_margin")
    assert config.validation.tokens_per_step == (1, 2, 3)


@pytest.mark.parametrize("name", ["puma", "puma_from_arm"])
def test_tinygsm_has_the_published_schedule_of_k(name):
    """12 until update 60,000, then 3 more every 30,000 up to 42 from 330,000 on."""
    objective = read_config(ROOT / "yaml_files" / f"tinygsm_{name}.yaml").objective
    assert isinstance(objective, PumaSettings)
    for step, n_stages in (
        (0, 12),
        (59_999, 12),
        (60_000, 15),
        (89_999, 15),
        (90_000, 18),
        (329_999, 39),
        (330_000, 42),
    ):
        assert objective.n_stages_at(step) == n_stages
    assert objective.n_stages_at(10**7) == 42


@pytest.mark.parametrize(
    "name", ["sudoku", "sudoku_mini", "tinygsm_mini", "tinygsm_mini_medium", "tinygsm_mini_hard", "addition"]
)
def test_a_baseline_differs_in_the_objective_alone(name):
    puma, baseline = (flatten(read_config(ROOT / "yaml_files" / f"{name}_{arm}.yaml")) for arm in ("puma", "baseline"))
    different = {key for key in puma.keys() | baseline.keys() if puma.get(key) != baseline.get(key)}
    assert {key.split(".")[0] for key in different} == {"objective"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_dumped_config_reads_back_the_same(path, tmp_path):
    config = read_config(path)
    again = read_config(write(tmp_path / "again.yaml", dump_config(config)))
    assert again == config
    assert not changed_settings(config, again)


# Settings and code


def settings_classes() -> dict[type[Settings], str]:
    """All classes that hold settings, with the section of a config that they are."""
    found: dict[type[Settings], str] = {}

    def add(annotation: Any, section: str) -> None:
        for part in get_args(annotation):
            add(part, section)
        if isinstance(annotation, type) and issubclass(annotation, Settings):
            own = [base for base in annotation.__mro__ if issubclass(base, Settings) and base is not Settings]
            found.update(dict.fromkeys(own, section))

    for section, field in Config.model_fields.items():
        add(field.rebuild_annotation(), section)
    assert {*found, Config, SamplingRule} == {*all_subclasses(Settings)}
    return found


def all_subclasses(cls: type) -> list[type]:
    found: list[type] = []
    child: type
    for child in cls.__subclasses__():
        found += [child, *all_subclasses(child)]
    return found


def attributes(tree: ast.AST, owners: set[str]) -> set[str]:
    """What is read of the things that are called so: `seed` where code says `config.training.seed`, of `training`."""
    read = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            if getattr(owner, "id", getattr(owner, "attr", None)) in owners:
                read.add(node.attr)
    return read


# `ValidationSettings.rules` passes its options on to rules.
OTHER_OWNERS = {"validation": {"rule"}}


def names_read(cls: type[Settings], section: str) -> set[str]:
    """Settings that the program reads, itself or by those properties and methods of the class that it uses.

    Methods of subclasses count too. Validators only compare settings with each other, so what they read does not count.
    """
    read: set[str] = set()
    for path, tree in project_trees().items():
        if path.parts[0] not in ("tests", "config.py", "bench", "results"):
            read |= attributes(tree, {"settings", section} | OTHER_OWNERS.get(section, set()))
    for base in (*cls.__mro__, *all_subclasses(cls)):
        if issubclass(base, Settings):
            for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
                if isinstance(node, ast.FunctionDef) and node.name in read and not is_validator(node):
                    read |= attributes(node, {"self"})
    return read


def is_validator(function: ast.FunctionDef) -> bool:
    return any("validator" in ast.unparse(decorator) for decorator in function.decorator_list)


# Settings that the program need not read: tags choose the class.
UNREAD = {"data": {"dataset"}, "objective": {"name"}}


def test_every_setting_is_read_by_the_program():
    for cls, section in settings_classes().items():
        unread = cls.model_fields.keys() - names_read(cls, section)
        assert unread <= UNREAD.get(section, set()), cls.__name__


def test_what_validators_read_does_not_count():
    validator = "@model_validator(mode='after')\ndef check(self): return self.dead and self.alive"
    (function,) = ast.parse(validator).body
    assert is_validator(function)
    assert attributes(function, {"self"}) == {"dead", "alive"}, "it would count if it were no validator"
    assert "compile" not in attributes(ast.parse("re.compile(text)"), {"settings", "training"})
    assert attributes(ast.parse("run.config.training.seed"), {"settings", "training"}) == {"seed"}


def test_every_setting_is_described():
    table = settings_table()
    for section in settings_classes():
        for key, field in section.model_fields.items():
            if (section.__name__.endswith("Settings") and key in ("dataset", "name")) and field.is_required():
                continue  # the tag that chooses the class
            assert field.description, f"{section.__name__}.{key}"
            assert f"`{key}`" in table, key


# Values


@pytest.mark.parametrize(
    ("text", "value"), [("3e-4", 3e-4), ("3.0e-4", 3e-4), ("1E-3", 1e-3), ("+2e-3", 2e-3), ("1.", 1.0)]
)
def test_exponents_are_numbers(text, value, tiny):
    content = tiny.read_text()
    tiny.write_text(re.sub(r"learning_rate: .*", f"learning_rate: {text}", content))
    assert read_config(tiny).training.learning_rate == value
    assert read_config(tiny, [f"training.learning_rate={text}"]).training.learning_rate == value


def test_overrides_change_what_they_name_and_nothing_else(tiny):
    before = flatten(read_config(tiny))
    overrides = {
        "training.seed=7": 7,
        "training.ema_decay=null": None,
        "validation.confidence=[random, neg_entropy]": ["random", "neg_entropy"],
        "objective.k_schedule=[[2, 0], [4, 100]]": [[2, 0], [4, 100]],
        "wandb.name=a=b": "a=b",
        "wandb.mode=offline": "offline",
    }
    after = flatten(read_config(tiny, list(overrides)))
    assert {key: value for key, value in after.items() if before[key] != value} == {
        override.partition("=")[0]: value for override, value in overrides.items()
    }


def test_a_default_that_is_written_out_is_no_key_of_another_source(tiny):
    data = (
        "{dataset: sudoku, size: 4, source: files, train_file: a, test_file: b, n_train: 1000000, train_split: train}"
    )
    assert read_config(tiny, [f"data={data}"]).data.source == "files"


def test_an_override_of_text_is_text_whatever_it_looks_like(tiny):
    """Without the quotes that YAML asks for, which shells remove."""
    own = [
        "data.dataset=text",
        "data.source=a.jsonl",
        "data.tokenizer=a",
        "data.max_len=16",
        "model.learned_positions=16",
    ]
    for given, expected in {"[SEP]": "[SEP]", '"[SEP]"': "[SEP]", "7": "7", "</s>": "</s>", "null": None}.items():
        data = read_config(tiny, [*own, f"data.eos_token={given}", "model.vocab_size=600"]).data.model_dump()
        assert data["eos_token"] == expected, given
    with pytest.raises(ValueError, match=r"data.max_len = \[16\]"):
        read_config(tiny, [*own, "data.max_len=[16]"])


def test_the_last_override_wins(tiny):
    assert read_config(tiny, ["training.seed=1", "training.seed=2"]).training.seed == 2


def test_the_objective_can_be_exchanged_as_a_whole(tiny):
    assert read_config(tiny, ["objective={name: uniform}"]).objective.name == "uniform"


def test_an_override_switches_the_objective(tiny):
    """Settings that the new objective has too are kept, those of the old one alone are dropped."""
    assert read_config(tiny, ["objective.name=uniform"]).objective == UniformSettings(name="uniform")
    before = read_config(tiny).objective
    assert isinstance(before, PumaSettings)
    block = ["objective.block_size=4", "objective.block_attention=prefix", "objective.name=block_puma"]  # in any order
    after = read_config(tiny, block).objective
    assert isinstance(after, BlockPumaSettings)
    assert (after.k_schedule, after.collapse_threshold) == (before.k_schedule, before.collapse_threshold)
    assert after.block_size == 4


def test_an_override_switches_the_data_set(tiny):
    """Nothing is kept: a folder or a number of rows means something else there."""
    chosen = ["data.source=word_problems", "data.n_train=2000", "data.n_test=5", "data.seed=1", "data.max_len=32"]
    data = read_config(tiny, ["data.dataset=tiny_gsm", *chosen]).data
    assert (data.dataset, data.data_dir) == ("tiny_gsm", "data/tiny_gsm")
    lines = problems(tiny, "data.dataset=tiny_gsm", "data.source=word_problems")
    assert lines[1:] == ["  data: source 'word_problems' needs n_train, n_test, seed"]


def test_a_switch_to_an_unknown_objective_is_refused(tiny):
    assert "'uniform', 'puma'" in problems(tiny, "objective.name=unifrom")[1]


def test_settings_cannot_be_changed_after_reading(tiny):
    config = read_config(tiny)
    with pytest.raises(ValueError, match="frozen"):
        config.training.seed = 3  # type: ignore[misc]


def test_the_schedule_gives_k_at_every_step(tiny):
    config = read_config(tiny, ["objective.k_schedule=[[2, 0], [4, 10], [3, 20]]"])
    assert isinstance(config.objective, PumaSettings)
    assert [config.objective.n_stages_at(step) for step in (0, 9, 10, 19, 20, 1000)] == [2, 2, 4, 4, 3, 3]


def test_key_value_heads_default_to_the_query_heads(tiny):
    assert read_config(tiny).model.n_key_value_heads == 2
    assert read_config(tiny, ["model.num_key_value_heads=1"]).model.n_key_value_heads == 1


# What is refused

BAD = {
    "unknown key": ("training.batch_sise=8", "training.batch_sise = 8: unknown key; did you mean 'batch_size'?"),
    "unknown section": ("trainig={}", "did you mean 'training'?"),
    "section with the name of an objective": ("uniform=0.25", "uniform = 0.25: unknown key; known keys: model, data"),
    "key with the name of an objective": (
        "objective.uniform=0.25", "objective.uniform = 0.25: unknown key; did you mean 'uniform_fraction'?"
    ),
    "key with the name of a data set": ("model.text=1", "model.text = 1: unknown key"),
    "unknown key of an objective": ("objective.n_stage=8", "n_stage = 8: unknown key; did you mean 'n_stages'"),
    "key of another objective": ("objective={name: uniform, n_stages: 4}", "objective.n_stages = 4: unknown key"),
    "unknown objective": ("objective.name=pumma", "name = 'pumma': did you mean 'puma'? it is one of 'uniform'"),
    "objective like no other": ("objective.name=x", "objective.name = 'x': it is one of 'uniform', 'puma'"),
    "no name of the objective": ("objective={n_stages: 4}", "objective.name: missing"),
    "text for a number": ("training.batch_size=many", "training.batch_size = 'many'"),
    "number in quotes": ("training.batch_size='8'", "training.batch_size = '8'"),
    "fraction for an integer": ("training.batch_size=8.5", "training.batch_size = 8.5"),
    "truth value for an integer": ("training.batch_size=true", "training.batch_size = True"),
    "list for a number": ("training.batch_size=[8]", "training.batch_size = [8]"),
    "nothing for a number": ("training.batch_size=null", "training.batch_size = None"),
    "number for a truth value": ("training.compile=1", "training.compile = 1"),
    "section that is none": ("training=fast", "training = 'fast'"),
    "not a number": ("training.learning_rate=.nan", "training.learning_rate"),
    "infinite": ("training.learning_rate=.inf", "training.learning_rate"),
    "learning rate of 0": ("training.learning_rate=0", "training.learning_rate = 0"),
    "negative seed": ("training.seed=-1", "training.seed = -1"),
    "seed too large for the generators": (f"training.seed={10**30}", "training.seed"),
    "batch of 0": ("training.batch_size=0", "training.batch_size = 0"),
    "K of 0": ("objective={name: puma, n_stages: 0}", "objective.n_stages = 0: input should be greater than 0"),
    "K of 0 in a schedule": ("objective.k_schedule=[[0, 0]]", "objective.k_schedule.0.0 = 0"),
    "tau of 1.5": ("objective.collapse_threshold=1.5", "threshold = 1.5: input should be less than or equal to 1"),
    "unsorted schedule": ("objective.k_schedule=[[3, 0], [5, 9], [7, 4]]", "ascend, got [0, 9, 4]"),
    "schedule with a step twice": ("objective.k_schedule=[[3, 0], [5, 0]]", "ascend, got [0, 0]"),
    "schedule that starts late": ("objective.k_schedule=[[3, 5]]", "start at 0"),
    "empty schedule": ("objective.k_schedule=[]", "k_schedule"),
    "schedule of single numbers": ("objective.k_schedule=[3]", "objective.k_schedule.0 = 3"),
    "two schedules": ("objective.n_stages=4", "exactly one of n_stages and k_schedule"),
    "no schedule": ("objective={name: puma}", "exactly one of n_stages and k_schedule"),
    "unknown order": ("objective.reveal_order=confidence", "reveal_order = 'confidence': input should be 'top_prob'"),
    "redrawn masks with a threshold": (
        "objective={name: puma, n_stages: 4, reveal_order: redrawn, collapse_threshold: 0.9}",
        "set collapse_threshold to null",
    ),
    "all rows uniform": ("objective.uniform_fraction=1.0", "objective.uniform_fraction = 1.0"),
    "heads do not divide the width": ("model.hidden_size=15", "15 is not a multiple of num_attention_heads 2"),
    "odd head width": ("model.hidden_size=6", "must be even"),
    "key heads do not divide the heads": ("model.num_key_value_heads=3", "num_key_value_heads 3"),
    "vocabulary too small": ("model.vocab_size=5", "model.vocab_size 5 is too small for the data: set at least 6"),
    "table of positions too short": ("model.learned_positions=31", "31 is less than the 32 tokens of a sequence"),
    "no positions": (
        "model={vocab_size: 6, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 1, "
        "rotary: false}",
        "model.learned_positions = None: rotary false needs learned positions",
    ),
    "unknown layout": ("data.layout=side_by_side", "data.layout = 'side_by_side': input should be 'two_halves' or"),
    "full boards in place": ("data={dataset: sudoku, size: 4, source: generated, layout: in_place, max_clues: 16, "
        "min_clues: 4}", "max_clues 16: with layout in_place a full board has nothing"),
    "pool of no batch": ("objective.pool_batches=0", "objective.pool_batches = 0"),
    "microbatches do not divide": ("training.micro_batch_size=3", "8 is not a multiple of micro_batch_size 3"),
    "no length": ("training.max_steps=null", "num_epochs or max_steps"),
    "unknown confidence rule": ("validation.confidence=[top_prop]", "validation.confidence.0 = 'top_prop'"),
    "confidence rule twice": ("validation.confidence=[top_prob, top_prob]", "confidence has an entry twice"),
    "tokens per step twice": ("validation.tokens_per_step=[1, 2, 1]", "tokens_per_step has an entry twice"),
    "neither auto nor a truth value": ("training.cuda_graph=3", "cuda_graph = 3: input should be 'auto', True or"),
    "no confidence rule": ("validation.confidence=[]", "validation.confidence = []"),
    "no accuracy at the end": ("validation.n_final_examples=0", "set n_examples to 0 too"),
    "no tokens per step": ("validation.tokens_per_step=[0]", "validation.tokens_per_step.0 = 0"),
    "stability without a threshold": ("validation.kl_bound=0.01", "kl_bound 0.01 needs a threshold"),
    "passes without revising": ("validation.n_passes=9", "n_passes 9 needs revise"),
    "share of what is not remasked": ("validation.remask_share=0.5", "remask_share 0.5 is only for revise 'remask'"),
    "temperature that overflows": ("validation.temperature=1.0e-308", "temperature 1e-308: set 0, or at least 1e-06"),
    "board of 5": ("data.size=5", "data.size = 5: input should be 4, 6 or 9"),
    "unknown source": ("data.source=internet", "data.source = 'internet'"),
    "published boards of 4x4": ("data.source=published", "has only 9x9 boards"),
    "files that are not named": ("data.source=files", "needs train_file and test_file"),
    "file that nothing reads": ("data.train_file=a.csv", "train_file: only used by source 'files'"),
    "split of boards in files": ("data={dataset: sudoku, source: files, train_file: a, test_file: b, test_split: x}",
                                 "test_split: only used by source 'hub', but source is 'files'"),
    "columns of generated boards": ("data.puzzle_column=quizzes", "puzzle_column: only used by source 'hub'"),
    "moments that never decay": ("training.adam_betas=[0.9, 1.0]", "less than 1"),
    "hub without a name": ("data.source=hub", "source 'hub' needs hub_name"),
    "clues the wrong way round": ("data.min_clues=9", "min_clues 9 is above max_clues 8"),
    "clues that no board has": ("data={dataset: sudoku, size: 4, source: generated}",
        "min_clues 30, max_clues 40: a 4x4 puzzle with one solution has 4 to 16 clues"),
    "unknown wandb mode": ("wandb.mode=maybe", "wandb.mode = 'maybe'"),
    "override without a value": ("training.seed", "(it is not of the form section.key=value)"),
    "override without a key": ("=3", "(it is not of the form section.key=value)"),
    "override that is no YAML": ("training.seed=[1", "override 'training.seed=[1' cannot be read"),
    "override below a value": ("training.batch_size.x=1", "'batch_size' is not a section"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"revise": "plan"}, "revise plan needs n_passes: set both or neither"),
        ({"revise": "plan", "n_passes": 4, "threshold": 0.9}, "threshold 0.9 and revise plan: each says how many"),
        ({"entropy_bound": 0.1, "threshold": 0.9}, "threshold 0.9 and entropy_bound 0.1: each says how many"),
        ({"entropy_bound": 0.1, "tokens_per_step": 2}, "tokens_per_step 2 and entropy_bound 0.1: each says"),
        ({"revise": "remask", "n_passes": 4, "confidence": "random"}, "confidence random: revise remask compares"),
    ],
)
def test_rules_that_do_not_go_together_are_refused(options: dict[str, Any], expected: str, tiny: Path) -> None:
    with pytest.raises(ValueError, match=expected):
        SamplingRule(**options)
    overrides = [
        f"validation.{key}={f'[{value}]' if key in ('confidence', 'tokens_per_step') else value}"
        for key, value in options.items()
    ]
    lines = problems(tiny, *overrides)
    assert any(expected in line for line in lines), lines


def test_shifted_predictions_need_rows_that_begin_with_a_token(tiny: Path) -> None:
    """No position predicts the first."""
    for changes, needing, other in (
        (["objective={name: autoregressive}"], "objective 'autoregressive'", "set another objective"),
        (["model.shifted=true"], "model.shifted true", "set model.shifted: false"),
        (["model.init_from=runs/other"], "model.shifted null with model.init_from", "set model.shifted: false"),
    ):
        (line,) = (line for line in problems(tiny, "data.layout=in_place", *changes) if "needs rows" in line)
        assert f"{needing} needs rows that begin with a given token" in line
        assert line.endswith(f"set data.layout: two_halves, or {other}")
    unshifted = ["data.layout=in_place", "model.learned_positions=16", "model.init_from=runs/other"]
    assert not read_config(tiny, [*unshifted, "model.shifted=false"]).shifted


def test_settings_of_earlier_runs_are_read(tiny: Path) -> None:
    """They have `causal: null`, which is no setting any more."""
    assert read_config(tiny, ["model.causal=null"]) == read_config(tiny)
    assert any("causal" in line for line in problems(tiny, "model.causal=true"))


def test_block_causal_attention_takes_no_shifted_scores(tiny: Path) -> None:
    blocks = "objective={name: block_puma, n_stages: 2, block_size: 8, block_attention: block_causal}"
    lines = problems(tiny, blocks, "model.shifted=true")
    assert any(line.endswith("set block_attention: prefix, or model.shifted: false") for line in lines), lines


def test_a_causal_model_takes_no_rule(tiny: Path) -> None:
    overrides = ["objective={name: autoregressive}", "validation.entropy_bound=0.1"]
    assert any(
        "entropy_bound 0.1: objective 'autoregressive' is sampled left" in line for line in problems(tiny, *overrides)
    )


@pytest.mark.parametrize(("override", "expected"), BAD.values(), ids=BAD.keys())
def test_bad_settings_are_named(override, expected, tiny):
    lines = problems(tiny, override)
    assert any(expected in line for line in lines), lines
    if len(lines) > 1:
        assert str(tiny) in lines[0]
        assert "1 problem" in lines[0], lines


def test_all_problems_are_named_at_once(tiny):
    lines = problems(
        tiny,
        "training.batch_sise=4",
        "training.learning_rate=fast",
        "objective.collapse_threshold=1.5",
        "objective.k_schedule=[[0, 0]]",
        "model.hidden_size=15",
        "data.source=files",
        "validation.n_examples=-1",
        "extra=1",
    )
    assert "8 problems" in lines[0]
    for line in (
        "training.batch_sise",
        "training.learning_rate",
        "objective.collapse_threshold",
        "objective.k_schedule.0.0",
        "hidden_size 15",
        "train_file",
        "validation.n_examples",
        "extra",
    ):
        assert sum(line in text for text in lines[1:]) == 1, (line, lines)


def test_in_place_boards_need_half_the_positions(tiny):
    config = read_config(tiny, ["data.layout=in_place", "model.learned_positions=16"])
    assert config.data.length == config.model.learned_positions == 16
    lines = problems(tiny, "data.layout=in_place", "model.learned_positions=15", "model.vocab_size=5")
    assert any("vocab_size 5 is too small" in line for line in lines)
    assert any("15 is less than the 16 tokens of a sequence" in line for line in lines)


def test_checks_over_several_keys_are_made_even_where_other_keys_are_wrong(tiny):
    lines = problems(
        tiny,
        "model.vocab_size=5",
        "model.num_hidden_layers=0",
        "model.hidden_size=15",
        "objective.k_schedule=[[3, 0], [5, 9], [7, 4]]",
        "objective.collapse_threshold=1.5",
        "training.seed=-1",
        "training.micro_batch_size=3",
    )
    for expected in (
        "vocab_size 5 is too small",
        "num_hidden_layers = 0",
        "hidden_size 15",
        "ascend",
        "collapse_threshold = 1.5",
        "seed = -1",
        "micro_batch_size 3",
    ):
        assert any(expected in line for line in lines[1:]), (expected, lines)


@pytest.mark.parametrize("section", ["model", "data", "objective", "training", "validation"])
def test_a_missing_section_is_named(section, tmp_path):
    settings = tiny_settings(UNIFORM, tmp_path)
    del settings[section]
    assert problems(write(tmp_path / "part.yaml", settings))[1:] == [f"  {section}: missing"]


def test_a_missing_key_is_named(tmp_path):
    settings = tiny_settings(UNIFORM, tmp_path)
    del settings["training"]["batch_size"]
    assert problems(write(tmp_path / "part.yaml", settings))[1:] == ["  training.batch_size: missing"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "must be a mapping"),
        ("just text", "must be a mapping"),
        ("- a\n- list", "must be a mapping"),
        ("a: [unclosed", "cannot be read"),
        ("a: !!python/object/apply:os.getcwd []", "cannot be read"),
        ("a: &loop [*loop]", "loop.yaml"),
        ("2026-01-01: 3", "keys must be"),
        ("? [a, b]\n: 3", "cannot be read"),
        ("1: 2", "unknown key"),
        ("training: {seed: 1, seed: 2}", "duplicate key 'seed'"),
    ],
)
def test_files_that_hold_no_settings_are_refused(text, expected, tmp_path):
    lines = problems(write(tmp_path / "loop.yaml", text))
    assert "loop.yaml" in lines[0]
    assert any(expected in line for line in lines), lines


def test_a_missing_file_a_folder_and_binary_data_are_refused(tmp_path):
    assert "No such file" in problems(tmp_path / "none.yaml")[0]
    assert "it is a folder" in problems(tmp_path)[0]
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(bytes(range(256)))
    assert "binary.yaml" in problems(binary)[0]


# Comparing runs


def test_only_differences_that_change_the_result_count(tiny):
    old = read_config(tiny)
    free = ["validation.n_examples=5", "training.save_every=9", "wandb.mode=offline", "data.data_dir=elsewhere"]
    free += ["training.compile=true", "training.cuda_graph=false", "training.device=cuda"]  # of the machine
    assert not changed_settings(old, read_config(tiny, free))
    changes = changed_settings(old, read_config(tiny, [*free, "training.seed=3"]))
    assert changes == {"training.seed": (0, 3)}
    assert format_changes(changes) == "  training.seed: 0 -> 3"


def test_another_objective_shows_up_key_by_key(tiny):
    changes = changed_settings(read_config(tiny), read_config(tiny, ["objective={name: uniform}"]))
    assert changes["objective.name"] == ("puma", "uniform")
    assert changes["objective.k_schedule"][1] == ABSENT


def test_a_mapping_can_be_checked_without_a_file(tmp_path):
    assert parse_config(tiny_settings(PUMA, tmp_path), "memory").model.vocab_size == 6


FILES = {"dataset": "tiny_gsm", "data_dir": "a", "max_len": 128}
PROBLEMS = FILES | {"source": "word_problems", "n_train": 2000, "n_test": 9, "seed": 0}
TEXT = {"dataset": "text", "data_dir": "a", "source": "pairs.jsonl"}
BOARDS = {"dataset": "sudoku", "data_dir": "a", "size": 9}


@pytest.mark.parametrize(
    ("data", "change", "is_other"),
    [
        (FILES, {"data_dir": "b"}, True),
        (FILES, {"test_source": "test.jsonl"}, True),
        (PROBLEMS, {"data_dir": "b"}, False),
        (TEXT, {"data_dir": "b"}, False),
        (BOARDS | {"source": "published"}, {"data_dir": "b"}, True),
        (BOARDS | {"source": "generated"}, {"data_dir": "b"}, False),
    ],
)
def test_runs_on_other_data_are_of_another_setting(data, change, is_other, tmp_path):
    """A folder counts where it is the source of the data, and not where it keeps what other settings give."""
    settings = tiny_settings(UNIFORM, tmp_path)
    settings["model"] |= {"vocab_size": 600, "learned_positions": None}
    first, second = (parse_config(settings | {"data": values}, "test") for values in (data, data | change))
    assert (setting_name(first) != setting_name(second)) == is_other
    assert not changed_settings(first, second), "a resumed run compares the hashes of its data instead"
