"""A study file is checked completely: every problem at once, each with its file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.config import Workers, load_study_file, parse_study
from evomerge.errors import ConfigError

GOOD = """\
name: tiny
base: base
experts: {red: red, green: green}
space:
  method: task_arithmetic
  genes: {weight: {low: 0.0, high: 1.0, per_expert: true}}
objectives:
  - {name: pick, kind: lm_eval, file: pick.yaml}
"""


def found(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        parse_study(text, "study.yaml", overrides)
    return [str(p) for p in raised.value.problems]


def test_defaults() -> None:
    config = parse_study(GOOD, "study.yaml")
    assert config.budget.evaluations == 100
    assert config.storage == "sqlite:///runs/tiny/ledger.db"
    assert config.workers == Workers(local=1)
    assert (config.seed, config.optimizer) == (0, None)
    assert list(config.experts) == ["red", "green"]


def test_every_problem_is_reported_at_once_with_its_line() -> None:
    text = GOOD.replace("name: tiny", "name: ti ny") + (
        "buget: {evaluations: 3}\n"
        "budget: {evaluations: -3, days: 2}\n"
        "optimizer: annealing\n"
        "storage: journal.log\n"
        "workers: 0\n"
        "seed: -1\n"
        "objectives2: []\n"
    )
    problems = found(text)
    expected = [
        ("study.yaml:1", "name"),
        ("study.yaml:9", "unknown key `buget`"),
        ("study.yaml:10", "budget.evaluations"),
        ("study.yaml:10", "unknown key `budget.days`"),
        ("study.yaml:11", "unknown optimizer 'annealing'"),
        ("study.yaml:12", "journals are not supported"),
        ("study.yaml:13", "workers"),
        ("study.yaml:14", "seed"),
        ("study.yaml:15", "unknown key `objectives2`"),
    ]
    for place, message in expected:
        assert any(p.startswith(place + ":") and message in p for p in problems), (place, message, problems)
    assert len(problems) == len(expected), problems


@pytest.mark.parametrize("key", ["name", "base", "experts", "space", "objectives"])
def test_missing_keys_are_named(key: str) -> None:
    kept = "".join(block for block in __import__("re").split(r"(?m)^(?=\w)", GOOD) if not block.startswith(key + ":"))
    assert any(f"`{key}` is missing" in p for p in found(kept))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budget.evaluations=0", "budget.evaluations"),
        ("budget.hours=-1", "budget.hours"),
        ("budget.hours=.nan", "nan"),
        ("budget.evaluations=true", "budget.evaluations"),
        ("budget.evaluations=2.5", "budget.evaluations"),
        ("workers={local: 1, ray: 2}", "`local:` and `ray:`"),
        ("workers={cpus: 2}", "workers.cpus"),
        ("workers={local: 2, device: tpu}", "workers.device"),
        ("experts={}", "experts"),
        ("objectives=[]", "objectives"),
        ("objectives=[nowhere]", "no objective 'nowhere'"),
        ("objectives=[{kind: bleu}]", "unknown objective kind 'bleu'"),
        ("objectives=[{kind: lm_eval, name: 'a b'}]", "must be a word"),
        ("objectives=[{kind: lm_eval, name: a}, {kind: lm_eval, name: a}]", "two objectives"),
        ("space=nowhere", "no search space 'nowhere'"),
        ("space=3", "space"),
        ("optimizer={sigma0: 0.1}", "unknown optimizer None"),
        ("workers={local: 3, address: auto}", "`local:` and `address:`, which is for Ray"),
        ("workers={per_gpu: 0.7}", "`per_gpu: 0.7` is neither"),
        ("workers={ray: many}", "workers.ray"),
        ("storage=redis://localhost/1", "not supported"),
    ],
)
def test_bad_values_are_refused(override: str, message: str) -> None:
    assert any(message in p for p in found(GOOD, override)), found(GOOD, override)


def test_overrides_reach_nested_keys_and_are_yaml() -> None:
    config = parse_study(GOOD, "s", ("budget.evaluations=7", "workers={ray: 2}", "seed=5"))
    assert config.budget.evaluations == 7
    assert config.workers.ray == 2
    assert config.seed == 5
    with pytest.raises(ConfigError, match="key=value"):
        parse_study(GOOD, "s", ("seed",))


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "name: [", "a: &x 1\nb: *x\n", "name: a\nname: b\n", "x: !!python/object:os.x {}\n"]
)
def test_yaml_that_is_no_study_is_one_clear_error(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_study(text, "study.yaml")


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_study_file(str(tmp_path / "none.yaml"))


def test_storage_comes_from_the_environment_when_the_file_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTUNA_STORAGE", "sqlite:///a.db")
    assert parse_study(GOOD, "s").storage == "sqlite:///a.db"
    monkeypatch.setenv("EVOMERGE_STORAGE", "sqlite:///b.db")
    assert parse_study(GOOD, "s").storage == "sqlite:///b.db"
    assert parse_study(GOOD + "storage: sqlite:///c.db\n", "s").storage == "sqlite:///c.db"


def test_named_files_resolve_their_paths_from_their_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "obj.yaml").write_text("kind: lm_eval\nfile: task.yaml\ndescription: text\n")
    config = parse_study(GOOD, "s", ("objectives=[mine/obj.yaml]",))
    (spec,) = config.objectives
    assert (spec.name, spec.folder, dict(spec.options)) == ("obj", "mine", {"file": "task.yaml"})
    assert not spec.allow_code


GENOME = """\
genome:
  models: [base, red, green]
  merge_method: dare_ties
  base_model: base
  tokenizer_source: union
  layer_granularity: 1
  allow_negative_weights: false
  filters: [self_attn, mlp]
  smooth: true
tasks:
  - {name: pick, weight: 2.0, metric: "acc,none"}
  - say
limit: 100
num_fewshot: 2
shuffle: true
random_init: true
"""


def test_a_mergekit_evolve_file_is_a_study_file_with_messages(work: Path) -> None:
    config = parse_study(GENOME, "my genome.yml")
    assert config.name == "my-genome"
    assert (config.base, config.experts) == ("base", {"red": "red", "green": "green"})
    assert config.space["method"] == "dare_ties"
    assert config.space["layer_groups"] == 2
    assert config.space["fixed"] == {"normalize": True}
    assert set(config.space["genes"]) == {"weight", "density"}
    assert [o.name for o in config.objectives] == ["pick", "say"]
    assert config.objectives[0].options == {
        "task": "pick", "metric": "acc,none", "limit": 100, "num_fewshot": 2, "apply_chat_template": False,
    }  # fmt: skip
    assert (config.optimizer, config.optimizer_options) == ("cma_es", {"weights": {"pick": 2.0, "say": 1.0}})
    keys = ("base among the models", "smooth", "tokenizer_source", "shuffle", "random_init", "bfloat16")
    for key in (*keys, "apply_chat_template"):
        assert any(key in note for note in config.notes), (key, config.notes)


def test_a_genome_files_mistakes_are_found_together() -> None:
    text = GENOME.replace("dare_ties", "breadcrumbs").replace("limit:", "limt:").replace("weight: 2.0", "wieght: 2.0")
    problems = found(text)
    for message in ("breadcrumbs", "`limt`", "`tasks[0].wieght`"):
        assert any(message in p for p in problems), (message, problems)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("40GB", 40 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("512MB", 512 * 10**6),
        ("3kB", 3000),
        ("2KiB", 2048),
        ("7B", 7),
        ("0", 0),
        ("2TB", 2 * 10**12),
    ],
)
def test_memory_budgets_are_sizes_with_their_unit(text: str, size: int) -> None:
    workers = parse_study(GOOD, "s", (f"workers={{local: 1, gpu_memory: {text}, tables: 1MB}}",)).workers
    assert (workers.gpu_memory, workers.host_memory, workers.tables) == (size, None, 10**6)


@pytest.mark.parametrize(
    "text",
    ["40", "40gb", "-1GB", "GB", "1e9GB", "true", ".inf", "1.GB", "40 G", "'40  GB'", "''", "[1GB]", "99999999999GB"],
)
def test_other_sizes_are_refused_once_and_in_place(text: str) -> None:
    study = GOOD + f"workers:\n  local: 1\n  host_memory: {text}\n"
    (problem,) = found(study)
    assert problem.startswith("study.yaml:11: `workers.host_memory`: a size is a number with its unit, as in 40GB"), (
        problem
    )


def test_a_mapping_is_not_also_told_that_it_is_no_number() -> None:
    (problem,) = found(GOOD + "workers: {local: 1, cpus: 2}\n")
    assert problem.startswith("study.yaml:9: unknown key `workers.cpus`")


def test_places_are_lines_of_the_file_that_says_so(tmp_path: Path) -> None:
    text = GOOD.replace("{red: red, green: green}", "\n  red.1: red\n  red: green\n")
    config = parse_study(text, "study.yaml")
    assert config.where("experts", "red.1") == "study.yaml:4"
    assert config.where("storage") == "study.yaml: storage"  # a default: no line says it
    assert config.where_in_space("experts.red.1") == "study.yaml:4: experts.red.1"
    assert config.where_in_space("genes.weight.high") == "study.yaml:9: genes.weight.high"
    assert config.where_in_space("genes.weight.nothing") == "study.yaml:9: genes.weight.nothing"
    assert config.where_in_space("") == "study.yaml:7"
    space = tmp_path / "space.yaml"
    space.write_text("method: ties\ngenes:\n  a.b:\n    low: 1\n")
    own = parse_study(GOOD, "s", (f"space={space}",))
    assert own.where_in_space("genes.a.b.low") == f"{space}:4: genes.a.b.low"
    assert own.where_in_space("layer_groups") == f"{space}:1: layer_groups"
    assert own.where_in_space("experts") == "s:3: experts"


def test_a_genome_file_has_places_too(work: Path) -> None:
    config = parse_study(GENOME, "g.yml")
    assert config.where("experts", "red") == "g.yml: experts.red"
    assert config.where_in_space("genes.weight") == "g.yml:1: genes.weight"


def test_workers_on_a_cluster_are_as_many_as_it_has_room_for_unless_a_number_is_given() -> None:
    def workers(*overrides: str) -> Workers:
        return parse_study(GOOD, "s", overrides).workers

    # What `--ray-address` adds to a study with local workers.
    moved = workers("workers={local: 3, threads: 2}", 'workers.address="10.0.0.1:6379"', "workers.local=null")
    assert (moved.local, moved.ray, moved.address, moved.threads) == (None, "auto", "10.0.0.1:6379", 2)
    assert moved.count == 1 and moved.pool_options()["ray"] == "auto" and moved.pool_options(3)["ray"] == 3
    shared = workers("workers={per_gpu: 2}")
    assert shared.ray == "auto" and shared.address is None and shared.pool_options()["per_gpu"] == 2.0
    given = workers("workers={ray: 4, address: auto, per_gpu: 0.5, patience_s: 60}")
    assert given.count == 4 and given.pool_options(9)["ray"] == 4 and given.pool_options()["patience_s"] == 60.0
    assert workers("workers=5").pool_options(2) == {
        "local": 2, "ray": None, "address": None, "per_gpu": 1.0, "patience_s": 600.0
    }  # fmt: skip


def test_workers_without_a_number_are_one_local_process() -> None:
    workers = parse_study(GOOD, "s", ("workers={tables: 1MB}",)).workers
    assert (workers.local, workers.ray, workers.tables) == (1, None, 10**6)
