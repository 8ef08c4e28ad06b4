"""Recipes: what is wrong is said exactly, all at once; the digest is of the meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as some

from registry.errors import RecipeError
from registry.recipe import LoraRank, digest, expand, load_recipe
from registry.recipe_kinds import recipe_schema

ROOT = Path(__file__).parents[2]
SHIPPED = [*ROOT.glob("recipes/*.yaml"), *ROOT.glob("cli/templates/**/recipes/*.yaml")]
GOOD = """\
kind: finetune
base: org/model
data:
  path: datasets/tickets
evaluate:
  task: label
"""
CHECK = "`ft recipe schema` lists every key; then `ft recipe check {path}`"

KIND_FIX = "\n  -> `ft run` takes what trains (finetune), `ft serve up` what answers (serve)"
# What is added to GOOD (or stands for it), and the message, where {path} is the file.
ADDED = [
    ("xyz: 1\n", "{path}:7: xyz: unknown key; there are: kind, name, model, description, use, base, data, train, "
     "evaluate, gate, promote, approval, rollout, retries, timeouts, serve, card, cloud, budget, escalate, tracking, "
     "on"),
    ("trian: {}\n", "{path}:7: trian: unknown key; did you mean 'train'?"),
    ("finetune: {}\n", "{path}:7: finetune: unknown key; there are: kind, name, model, description, use, base, data, "
     "train, evaluate, gate, promote, approval, rollout, retries, timeouts, serve, card, cloud, budget, escalate, "
     "tracking, on"),
    ("train:\n  learnin_rate: 1\n", "{path}:8: train.learnin_rate: unknown key; did you mean 'learning_rate'?"),
    ("train:\n  lora:\n    rnak: 8\n", "{path}:9: train.lora.rnak: unknown key; did you mean 'rank'?"),
    ("train:\n  lora: {rank: 12}\n",
     "{path}:8: train.lora.rank: input should be 1, 8, 16, 32, 64, 128, 256, 320 or 512 (given: 12)"),
    ("train:\n  batch: many\n",
     "{path}:8: train.batch: batch is a whole number of at least 1, or auto (given: 'many')"),
    ("train: 3\n", "{path}:7: train: input should be a valid dictionary or instance of Train (given: 3)"),
    ("train:\n  epochs: .inf\n", "{path}:8: train.epochs: input should be a finite number (given: inf)"),
    ("gate:\n  min: .nan\n", "{path}:8: gate.min: input should be a finite number (given: nan)"),
    ("name: 'Not A Name'\n",
     "{path}:7: name: string should match pattern '^[a-z0-9][a-z0-9._-]{{0,62}}$' (given: 'Not A Name')"),
    ("use: selling\n", "{path}:7: use: input should be 'research' or 'commercial' (given: 'selling')"),
    ("card: ${CARD}\n",
     "{path}:7: card: an environment variable belongs only where a secret or an address does (given: '${{CARD}}')"),
    ("train:\n  lora:\n    targets: [q_proj, '${MODULE}']\n",
     "{path}:9: train.lora.targets: input should be 'all-linear'\n"
     "{path}:9: train.lora.targets.1: an environment variable belongs only where a secret or an address does "
     "(given: '${{MODULE}}')"),
    ("1: one\n", "{path}:7: 1: keys should be strings (given: 1)"),
]  # fmt: skip
WHOLE = [
    ("", "{path}: a recipe is a mapping of keys to values\n  -> start with `kind: finetune`"),
    ("# nothing yet\n", "{path}: a recipe is a mapping of keys to values\n  -> start with `kind: finetune`"),
    ("- kind: finetune\n", "{path}: a recipe is a mapping of keys to values\n  -> start with `kind: finetune`"),
    ("name: x\n", "{path}:1: kind is None, and must be one of: finetune" + KIND_FIX),
    ("name: x\nkind: finetuna\n", "{path}:2: kind is 'finetuna', and must be one of: finetune" + KIND_FIX),
    ("kind: [finetune]\n", "{path}:1: kind is ['finetune'], and must be one of: finetune" + KIND_FIX),
    ("kind: finetune\n\tbase: x\n",
     "{path}:2: not valid YAML: found character '\\t' that cannot start any token"),
    ("kind: finetune\nbase: [x\n", "{path}:3: not valid YAML: expected ',' or ']', but got '<stream end>'"),
    ("kind: finetune\nbase: &b {model: x/y}\ndata: *b\n",
     "{path}:3: YAML aliases (*name) are not allowed in recipes"),
    ("kind: finetune\ndata:\n  path: a\n  path: b\nkind: finetune\n",
     "{path}:4: path: given twice\n{path}:5: kind: given twice"),
    ("kind: finetune\n? [a, b]\n: c\n", "{path}:2: not valid YAML: found unhashable key"),
    ("kind: !!python/name:os.system x\n", "{path}:1: not valid YAML: could not determine a constructor for the tag "
     "'tag:yaml.org,2002:python/name:os.system'"),
    ("kind: finetune\n---\nkind: finetune\n", "{path}:2: not valid YAML: but found another document"),
]  # fmt: skip


def message_of(path: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return str(caught.value)


def written(folder: Path, text: str) -> Path:
    path = folder / "support.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(("added", "message"), ADDED, ids=[added.strip() for added, _ in ADDED])
def test_a_wrong_key_or_value_is_named_with_its_line(added: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, GOOD + added)
    assert message_of(path) == f"{message}\n  -> {CHECK}".format(path=path)


@pytest.mark.parametrize(("text", "message"), WHOLE, ids=[repr(text[:30]) for text, _ in WHOLE])
def test_a_file_that_is_no_recipe_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    assert message_of(path) == message.format(path=path)


def test_all_errors_of_a_file_come_at_once(tmp_path: Path) -> None:
    text = "kind: finetune\nbase: {modle: x}\ntrain:\n  batch: 0\n  seed: x\nevaluate: {task: json}\nserv: 1\n"
    path = written(tmp_path, text)
    assert message_of(path).splitlines() == [
        f"{path}:2: base.model: field required",
        f"{path}:2: base.modle: unknown key; did you mean 'model'?",
        f"{path}:1: data: field required",
        f"{path}:4: train.batch: batch is a whole number of at least 1, or auto (given: 0)",
        f"{path}:5: train.seed: input should be a valid integer, unable to parse string as an integer (given: 'x')",
        f"{path}:6: evaluate: task json needs json_schema",
        f"{path}:7: serv: unknown key; did you mean 'serve'?",
        f"  -> {CHECK.format(path=path)}",
    ]


def test_bytes_that_are_no_text_and_files_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "support.yaml"
    path.write_bytes(b"kind: finetune\ndescription: caf\xe9\n")
    assert message_of(path) == f"{path}: not UTF-8 text (invalid continuation byte at byte 31)"
    assert message_of(tmp_path / "suport.yaml") == (
        f"{tmp_path}/suport.yaml: no such recipe\n  -> did you mean {path}?"
    )
    assert message_of(tmp_path) == f"{tmp_path}: a recipe is a file, and this is none\n  -> did you mean {path}?"


def test_the_files_name_stands_in_for_name_and_model(tmp_path: Path) -> None:
    loaded = load_recipe(written(tmp_path, GOOD))
    assert (loaded.name, loaded.model, loaded.base.model) == ("support", "support", "org/model")
    strange = tmp_path / "My Recipe.yaml"
    strange.write_text(GOOD, encoding="utf-8")
    assert message_of(strange).count("string should match pattern") == 1  # name; model only follows it


def test_variables_stand_where_a_secret_or_an_address_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = GOOD.replace("base: org/model", "base: {model: org/model, token: '${FT_T}'}")
    loaded = load_recipe(written(tmp_path, text + "tracking: {uri: 'http://${FT_HOST}:5000'}\n"))
    assert expand(loaded.base.token, "base.token") is None  # not set: the model may need no token
    with pytest.raises(RecipeError, match=r"tracking\.uri: not set: FT_HOST"):
        expand(loaded.tracking.uri, "tracking.uri")
    before = digest(loaded)
    monkeypatch.setenv("FT_T", "hf_secret")
    monkeypatch.setenv("FT_HOST", "tracker")
    assert expand(loaded.base.token, "base.token") == "hf_secret"
    assert expand(loaded.tracking.uri, "tracking.uri") == "http://tracker:5000"
    assert digest(loaded) == before


def test_the_digest_is_of_the_meaning(tmp_path: Path) -> None:
    first = digest(load_recipe(written(tmp_path, GOOD)))
    keys = "evaluate: {task: label}   # so\n\nbase:\n  model: org/model\nkind: finetune\ndata: {path: datasets/tickets}"
    assert digest(load_recipe(written(tmp_path, keys))) == first
    assert digest(load_recipe(written(tmp_path, GOOD + "train: {learning_rate: 2e-4, epochs: 1}\n"))) == first
    assert digest(load_recipe(written(tmp_path, GOOD + "train: {learning_rate: 3e-4}\n"))) != first
    assert digest(load_recipe(written(tmp_path, GOOD + "name: other\nmodel: support\n"))) != first


def test_the_order_of_a_json_schemas_keys_means_nothing(tmp_path: Path) -> None:
    schemas = ("{type: object, properties: {a: {}, b: {}}}", "{properties: {b: {}, a: {}}, type: object}")
    texts = [GOOD.replace("task: label", f"task: json\n  json_schema: {schema}") for schema in schemas]
    assert len({digest(load_recipe(written(tmp_path, text))) for text in texts}) == 1


def test_shipped_recipes_load_and_are_valid_by_the_schema() -> None:
    assert SHIPPED
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for path in SHIPPED:
        load_recipe(path)
        jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), schema)
        assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema="), path


@pytest.mark.parametrize(
    "added", ["speed: 1\n", "train: {batch: 0}\n", "use: selling\n", "train: {lora: {rank: 12}}\n"]
)
def test_the_schema_refuses_what_the_loader_refuses(added: str) -> None:
    jsonschema.validate(yaml.safe_load(GOOD), recipe_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(GOOD + added), recipe_schema())


def rarely(values: some.SearchStrategy[Any]) -> some.SearchStrategy[Any]:
    return some.none() | values


def given_keys(**keys: some.SearchStrategy[Any]) -> some.SearchStrategy[dict[str, Any]]:
    return some.fixed_dictionaries({}, optional=keys)


words = some.text(some.characters(exclude_categories=["Cs"]), max_size=30).filter(lambda text: "${" not in text)
names = some.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True)
shares = some.floats(0, 1)
counts = some.integers(1, 10_000)
ranks = some.sampled_from(get_args(LoraRank))
loras = given_keys(
    rank=ranks, alpha=counts, dropout=some.floats(0, 0.99), targets=some.just("all-linear") | some.lists(words)
)
trains = given_keys(
    quantize=some.sampled_from(["nf4", "none"]), lora=loras, epochs=some.floats(1e-9, 1e9), max_steps=rarely(counts),
    batch=counts, learning_rate=some.floats(1e-12, 10), warmup=some.floats(0, 0.99), seed=some.integers(),
)  # fmt: skip
tasks = some.one_of(
    some.fixed_dictionaries({"task": some.just("label")}, optional={"labels": rarely(some.lists(words))}),
    some.fixed_dictionaries(
        {
            "task": some.just("json"),
            "json_schema": some.just({"type": "object", "properties": {"größe": {"minimum": 0.1}}}),
        }
    ),
    some.fixed_dictionaries({"task": some.just("text")}, optional={"probes": some.lists(words)}),
)
gates = given_keys(min=rarely(shares), beat_base_by=rarely(some.floats(-1, 1)), may_lose=shares)
recipes = some.fixed_dictionaries(
    {"kind": some.just("finetune"), "base": words, "data": some.fixed_dictionaries({"path": words}), "evaluate": tasks},
    optional={
        "name": names,
        "model": names,
        "description": words,
        "use": some.sampled_from(["research", "commercial"]),
        "train": trains,
        "gate": gates,
        "promote": some.sampled_from(["auto", "manual"]),
        "tracking": given_keys(uri=rarely(words), experiment=rarely(words)),
    },
)


@settings(max_examples=120, deadline=None)
@given(plain=recipes)
def test_any_recipe_written_out_and_read_again_is_the_same(plain: dict[str, Any], tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("round")
    loaded = load_recipe(written(folder, yaml.safe_dump(plain, allow_unicode=True)))
    again = load_recipe(written(folder, yaml.safe_dump(loaded.model_dump(mode="json"), sort_keys=False)))
    assert again == loaded
    assert digest(again) == digest(loaded)
    jsonschema.validate(plain, recipe_schema())


def test_on_is_a_key_and_yes_a_word_as_in_yaml_1_2(tmp_path: Path) -> None:
    path = tmp_path / "support.yaml"
    path.write_text(
        "kind: finetune\nbase: x/y\ndata: {path: d}\nevaluate: {task: label, labels: [yes, no, on]}\n"
        "on:\n  dataset: true\n  event:\n    - type: external.go\n      where: {dry: false, who: off}\n"
    )
    loaded = load_recipe(path)
    assert loaded.evaluate.labels == ["yes", "no", "on"]
    assert loaded.on is not None
    assert (loaded.on.dataset, loaded.on.event[0].where) == (True, {"dry": False, "who": "off"})


def test_a_wrong_trigger_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "support.yaml"
    path.write_text(
        "kind: finetune\nbase: x/y\ndata: {path: d}\nevaluate: {task: label}\non:\n  datset: true\n"
        "  schedule:\n    - 0 0 30 2 *\n  if_running: wait\n"
    )
    said = message_of(path)
    assert f"{path}:6: on.datset: unknown key; did you mean 'dataset'?" in said
    assert f"{path}:8: on.schedule.0: never fires: '0 0 30 2 *'" in said
    assert f"{path}:9: on.if_running: " in said
