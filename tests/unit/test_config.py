"""The schema: defaults a run can count on, what each field refuses, and the way through YAML and back."""

import pickle
from datetime import date
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from eagle3_ray.config import ModelSettings, TrainSettings
from eagle3_ray.errors import UsageError
from eagle3_ray.schema import Settings, alternatives_of
from eagle3_ray.settings_file import dump_settings, read_settings_file, write_run_yaml
from eagle3_ray.storage import ObjectPath
from eagle3_ray.verbs import VERBS, DemoSettings, ExportSettings, GenerateSettings, VocabMappingSettings

TRAIN: dict[str, Any] = {"verifier_name_or_path": "verifier"}
SMALLEST: dict[str, dict[str, Any]] = {
    "generate": {"verifier_name_or_path": "verifier", "conversations_path": "talk.jsonl"},
    "vocab-mapping": {"target_vocab_size": 64000},
    "train": TRAIN,
    "doctor": TRAIN,
    "evaluate": {"draft_path": "checkpoints/best", "prompts_path": "p.jsonl"},
    "export": {"checkpoint_path": "checkpoints/0", "output_path": "served"},
    "report": {"run_paths": ["checkpoints"]},
    "demo": {},
}


def problems_of(settings_class: type[Settings], **values: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        settings_class.model_validate(values)
    return "\n".join(str(detail.get("ctx", {}).get("error", detail["msg"])) for detail in caught.value.errors())


def test_train_has_the_defaults_of_the_architecture() -> None:
    expected = {
        "data_path": Path("./data"),
        "save_path": Path("./checkpoints"),
        "epochs": 20,
        "lr": 1e-4,
        "resume_from_checkpoint": True,
        "logger": "",
        "total_seq_len": 8192,
        "data_format_version": 1,
        "log_dir": Path("./logs"),
        "run_name": None,
        "num_layers": 1,
        "d2t_path": Path("d2t.npy"),
        "t2d_path": Path("t2d.npy"),
        "ttt_steps": 3,
        "ttt_step_loss_decay": 1.0,
        "noise_std": 0.05,
        "warmup_frac": 0.01,
        "max_grad_norm": 1.0,
        "train_frac": 0.9,
        "norm_before_residual": True,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
    }
    train = TrainSettings(**TRAIN)
    assert {name: value for name, value in train if name in expected} == expected


def test_only_the_verifier_is_required_to_train() -> None:
    assert [name for name, field in TrainSettings.model_fields.items() if field.is_required()] == [
        "verifier_name_or_path"
    ]


def test_vocab_mapping_reads_token_freq_in_the_working_folder_by_default() -> None:
    mapping = VocabMappingSettings(target_vocab_size=64000)
    assert (mapping.token_freq_path, mapping.output_path) == (Path("token_freq.pt"), Path("."))


@pytest.mark.parametrize("verb", VERBS)
def test_every_field_says_what_it_means_and_what_none_stands_for(verb: str) -> None:
    for name, field in VERBS[verb].model_fields.items():
        assert field.description is not None and field.description.endswith("."), name
        if not field.is_required() and field.default is None:
            assert "Default: " in field.description, name
        else:
            assert "Default: " not in field.description, name


def test_settings_cannot_be_changed_or_extended() -> None:
    train = TrainSettings(**TRAIN)
    with pytest.raises(ValidationError, match="frozen"):
        train.epochs = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        TrainSettings.model_validate({**TRAIN, "epohcs": 3})


def test_code_can_ask_for_the_model_section_alone() -> None:
    assert isinstance(TrainSettings(**TRAIN, num_layers=2), ModelSettings)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("max_steps", 0),
        ("checkpoint_every_minutes", 0),
        ("keep_last", 0),
        ("optimizer", "sgd"),
        ("early_stop_epochs", 0),
        ("ema_decay", 1),
        ("ema_decay", -0.1),
        ("gradient_checkpointing", "maybe"),
        ("lr", 0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("weight_decay", -0.1),
        ("warmup_frac", 1),
        ("warmup_steps", -1),
        ("lr_schedule", "constant"),
        ("decay_frac", 0),
        ("adam_beta1", 1),
        ("adam_beta2", -0.1),
        ("noise_std", -0.05),
        ("train_frac", 0),
        ("train_frac", 1.1),
        ("total_seq_len", 1),
        ("ttt_steps", 0),
        ("ttt_step_loss_decay", 0),
        ("bins_per_step", 0),
        ("num_workers", 0),
        ("max_failures", -2),
        ("seed", 2**32),
        ("data_format_version", 2),
        ("precision", "fp16"),
        ("pack_in", "rank"),
        ("run_name", ""),
        ("verifier_name_or_path", ""),
        ("num_layers", 1.5),
        ("draft_vocab_size", 0),
        ("draft_vocab_size", 1.5),
        ("draft_vocab_size", True),
        ("draft_vocab_size", "all"),
    ],
)
def test_train_refuses_a_value_out_of_range(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainSettings.model_validate({**TRAIN, field: value})
    assert [detail["loc"][0] for detail in caught.value.errors()] == [field]


def test_no_warm_up_and_no_validation_are_allowed() -> None:
    train = TrainSettings(**TRAIN, warmup_frac=0, train_frac=1)
    assert (train.warmup_frac, train.train_frac) == (0.0, 1.0)


@pytest.mark.parametrize("field", ["epochs", "lr"])
def test_a_truth_value_is_no_number(field: str) -> None:
    assert problems_of(TrainSettings, **TRAIN, **{field: True}) == "must be a number"


def test_text_is_read_as_the_field_needs_it() -> None:
    train = TrainSettings.model_validate(
        {
            **TRAIN,
            "lr": "1e-5",
            "epochs": "3",
            "data_format_version": "0",
            "aux_layer_ids": ["2", "4"],
            "max_steps": None,
        }
    )
    assert (train.lr, train.epochs, train.data_format_version, train.aux_layer_ids) == (1e-5, 3, 0, (2, 4))


def test_a_home_folder_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert TrainSettings.model_validate({**TRAIN, "save_path": "~/run"}).save_path == Path("/home/someone/run")


def test_paths_may_lie_on_an_object_store_and_travel_through_a_file() -> None:
    train = TrainSettings.model_validate({**TRAIN, "save_path": "s3://bucket/run/", "data_path": "gs://bucket"})
    assert (train.save_path, train.data_path) == (ObjectPath("s3://bucket/run"), ObjectPath("gs://bucket"))
    values = train.model_dump(mode="json")
    assert (values["save_path"], values["data_path"]) == ("s3://bucket/run", "gs://bucket")
    assert TrainSettings.model_validate(values) == train


@pytest.mark.parametrize(
    ("field", "url", "problem"),
    [
        # Path("s3://bucket/run") would be a local folder "s3:".
        ("log_dir", "s3://bucket/logs", "is a URL; a path of this machine, or of a mount, is needed here"),
        ("data_path", "https://host/data", "is a URL of a kind that is not known; expected s3:// or gs://"),
        ("data_path", "s3://", "expected s3://bucket/key"),
        ("data_path", "s3://bucket//a", "expected s3://bucket/key"),
        ("save_path", "s3://bucket", "expected a folder in the bucket, such as s3://bucket/run"),
        ("data_path", 5, "must be a path"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused(field: str, url: object, problem: str) -> None:
    assert problem in problems_of(TrainSettings, **{**TRAIN, field: url})


def test_an_empty_path_is_refused() -> None:
    # Path("") would be the working folder.
    assert problems_of(TrainSettings, **TRAIN, save_path="") == "must not be empty"


@pytest.mark.parametrize("settings_class", [TrainSettings, GenerateSettings])
@pytest.mark.parametrize("ids", [(), (2, 2, 5), (5, 2)])
def test_layer_ids_must_rise(settings_class: type[Settings], ids: tuple[int, ...]) -> None:
    values = {**SMALLEST["generate" if settings_class is GenerateSettings else "train"], "aux_layer_ids": ids}
    assert problems_of(settings_class, **values) == "must rise from one layer to the next, none twice"


def test_a_layer_id_is_not_negative() -> None:
    assert "greater than or equal to 0" in problems_of(TrainSettings, **TRAIN, aux_layer_ids=(-1, 2))


def test_contradictions_in_train_are_told_together() -> None:
    text = problems_of(TrainSettings, **TRAIN, norm_before_fc=True, fc_norm=True, d2t_path="x.npy", t2d_path="x.npy")
    assert text.split("\n") == [
        "--norm-before-fc and --fc-norm exclude each other: choose one",
        "--d2t-path and --t2d-path are both x.npy: they are two files",
    ]


@pytest.mark.parametrize(("given", "read"), [("full", "full"), ("320", 320), (320, 320), (None, None)])
def test_the_draft_vocabulary_is_a_number_or_all_of_it(given: object, read: object) -> None:
    assert TrainSettings(**TRAIN, draft_vocab_size=given).draft_vocab_size == read
    text = problems_of(TrainSettings, **TRAIN, draft_vocab_size="-3")
    assert text == "must be full, or a whole number of at least 1"


def test_a_full_vocabulary_is_not_chosen_by_counts() -> None:
    text = problems_of(TrainSettings, **TRAIN, draft_vocab_size="full", token_freq_path="counts.pt")
    assert text == "--draft-vocab-size full and --token-freq-path exclude each other: nothing is chosen by counts"


def test_a_run_that_may_stop_early_needs_validation() -> None:
    text = problems_of(TrainSettings, **TRAIN, early_stop_epochs=2, train_frac=1)
    assert text == "--early-stop-epochs 2 goes by validation, of which --train-frac 1 leaves none"
    assert TrainSettings(**TRAIN, early_stop_epochs=2).early_stop_epochs == 2


def test_a_window_holds_a_chain() -> None:
    text = problems_of(TrainSettings, **TRAIN, sliding_window=4, ttt_steps=5)
    assert text == "--sliding-window 4 is shorter than a chain of --ttt-steps 5"
    assert TrainSettings(**TRAIN, sliding_window=5, ttt_steps=5).sliding_window == 5


def test_loggers_are_split_at_commas() -> None:
    assert TrainSettings(**TRAIN, logger=" wandb, tensorboard ,").logger_names == ("wandb", "tensorboard")
    assert TrainSettings(**TRAIN).logger_names == ()


def test_unknown_and_repeated_loggers_are_refused() -> None:
    assert problems_of(TrainSettings, **TRAIN, logger="wandb,mlflow") == (
        "no logger is called mlflow; choose from tensorboard, wandb, trackio"
    )
    assert problems_of(TrainSettings, **TRAIN, logger="wandb,wandb") == "names a logger twice"


def test_a_loss_is_a_name_or_weights_of_several() -> None:
    assert TrainSettings(**TRAIN).losses == (("kl", 1.0),)
    assert TrainSettings(**TRAIN, loss="lk").losses == (("lk", 1.0),)
    assert TrainSettings(**TRAIN, loss='{"ce": 0.1, "tv": 1}').losses == (("ce", 0.1), ("tv", 1.0))
    as_in_a_file = TrainSettings.model_validate({**TRAIN, "loss": {"ce": 0.1, "tv": 1}})
    assert as_in_a_file.losses == (("ce", 0.1), ("tv", 1.0))
    assert "expected a number above 0" in problems_of(TrainSettings, **TRAIN, loss={"ce": date(2026, 1, 2)})


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("mse", "no loss is called 'mse'; choose from kl, reverse_kl, jsd, ce, tv, nla, lk"),
        ("", "no loss is called ''; choose from"),
        ("{}", "choose from kl"),
        ('{"ce": 0.1, "hinge": 1}', "no loss is called 'hinge'; choose from"),
        ('{"ce": "much"}', 'the weight of ce is "much", expected a number above 0'),
        ('{"ce": true}', "the weight of ce is true, expected a number above 0"),
        ('{"ce": NaN}', "the weight of ce is NaN, expected a number above 0"),
        ('{"ce": Infinity}', "the weight of ce is Infinity, expected a number above 0"),
        ('{"ce": 0}', "the weight of ce is 0, expected a number above 0"),
        ('{"ce": -1}', "the weight of ce is -1, expected a number above 0"),
        ('{"ce": 0.1', "is no JSON ("),
        ('{"ce": 1, "ce": 2}', "names a loss twice"),
        ('{"ce": 1' + "0" * 400 + "}", "the weight of ce is 1000"),
    ],
)
def test_another_loss_is_refused(loss: str, expected: str) -> None:
    assert problems_of(TrainSettings, **TRAIN, loss=loss).startswith(expected)


def test_workers_are_a_number_or_two_bounds() -> None:
    def bounds(given: object) -> tuple[bool, int | None, int | None]:
        train = TrainSettings.model_validate({**TRAIN, "num_workers": given})
        return train.is_elastic, train.min_workers, train.max_workers

    assert bounds(None) == (False, None, None)
    assert bounds(3) == bounds("3") == bounds("3:3") == (False, 3, None)
    assert bounds("2:8") == (True, 2, 8)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("0", "must be at least 1"),
        ("0:4", "must be at least 1"),
        ("8:2", "2 is less than 8"),
        ("2:", "expected a whole number, or two of them as in 2:8"),
        ("2:4:8", "expected a whole number, or two of them as in 2:8"),
        ("-1", "expected a whole number, or two of them as in 2:8"),
        ("all", "expected a whole number, or two of them as in 2:8"),
    ],
)
def test_other_numbers_of_workers_are_refused(given: str, expected: str) -> None:
    assert problems_of(TrainSettings, **TRAIN, num_workers=given) == expected


def test_a_dry_run_removes_no_training() -> None:
    text = problems_of(TrainSettings, **TRAIN, dry_run=True, resume_from_checkpoint=False)
    assert text == "--dry-run and --no-resume-from-checkpoint exclude each other: a dry run removes no training"


def test_an_elastic_run_packs_in_its_workers() -> None:
    text = problems_of(TrainSettings, **TRAIN, num_workers="1:4", pack_in="task")
    assert text.startswith("--num-workers 1:4 and --pack-in task exclude each other")


@pytest.mark.parametrize(
    ("values", "found"), [({}, "neither"), ({"target_vocab_size": 64000, "target_model_path": "verifier"}, "both")]
)
def test_vocab_mapping_needs_exactly_one_source_of_the_vocabulary_size(values: dict[str, Any], found: str) -> None:
    expected = f"give one of --target-vocab-size and --target-model-path; found {found}"
    assert problems_of(VocabMappingSettings, **values) == expected


def test_the_draft_cannot_say_more_tokens_than_the_verifier() -> None:
    text = problems_of(VocabMappingSettings, target_vocab_size=100, draft_vocab_size=101)
    assert text == "--draft-vocab-size 101 is more than --target-vocab-size 100"
    assert VocabMappingSettings(target_vocab_size=100, draft_vocab_size=100).draft_vocab_size == 100


def test_generate_must_leave_tokens_to_supervise() -> None:
    text = problems_of(GenerateSettings, **SMALLEST["generate"], max_seq_len=8, skip_first_tokens=8)
    assert text == "--skip-first-tokens 8 leaves nothing of --max-seq-len 8"


def test_settings_travel_between_processes() -> None:
    train = TrainSettings(**TRAIN, aux_layer_ids=(1, 2, 3))
    assert pickle.loads(pickle.dumps(train)) == train


def read_back(settings_class: type[Settings], path: Path) -> Settings:
    return settings_class.model_validate(read_settings_file(path))


@pytest.mark.parametrize("verb", VERBS)
def test_defaults_survive_yaml(verb: str, tmp_path: Path) -> None:
    before = VERBS[verb].model_validate(SMALLEST[verb])
    write_run_yaml(before, tmp_path / "run.yaml")
    assert read_back(VERBS[verb], tmp_path / "run.yaml") == before


def any_value(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type, in ranges that every field of the schema allows."""
    *others, kind = alternatives_of(annotation)
    words = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="~/:,\0"), min_size=1, max_size=9)
    if get_origin(kind) is Literal:
        values: st.SearchStrategy[Any] = st.one_of(st.sampled_from(get_args(kind)), *map(any_value, others))
    elif get_origin(kind) is tuple and Path in alternatives_of(get_args(kind)[0]):
        values = st.lists(any_value(Path | ObjectPath), min_size=1, unique_by=str).map(tuple)
    elif get_origin(kind) is tuple:
        values = st.sets(st.integers(0, 100), min_size=1).map(lambda ids: tuple(sorted(ids)))
    elif kind is Path:
        values = words.map(Path)
    elif kind is ObjectPath:
        values = words.map(Path) | words.map(lambda word: ObjectPath(f"s3://bucket/{word}"))
    else:
        values = {
            bool: st.booleans(),
            int: st.integers(2, 10**6),
            float: st.floats(1e-12, 0.999),
            str: words | st.sampled_from(["none", "null", "yes", "1e3", "07", "2024-01-01", "- a", "#x", "a: b", "'"]),
        }[kind]
    return values | st.none() if NoneType in get_args(annotation) else values


# What a cross-field check would often refuse is left at one value; those checks have tests of their own.
FIXED_TRAIN = {
    "logger": "wandb,tensorboard",
    "fc_norm": False,
    "num_workers": 3,
    "dry_run": False,
    "sliding_window": 10**7,
    "ttt_steps": 3,
    "loss": "kl",
    "token_freq_path": None,
    "d2t_path": Path("a"),
    "t2d_path": Path("b"),
}
FIXED: dict[str, dict[str, Any]] = {
    "generate": {"skip_first_tokens": 0},
    "vocab-mapping": {"target_vocab_size": 10**7, "target_model_path": None},
    "train": FIXED_TRAIN,
    "doctor": FIXED_TRAIN,
    "evaluate": {"data_path": Path("data")},
    "export": {},
    "report": {},
    "demo": {},
}


@pytest.mark.parametrize("verb", VERBS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_settings_survive_yaml(verb: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    fields = VERBS[verb].model_fields
    values = {name: data.draw(any_value(field.annotation), name) for name, field in fields.items() if name != "config"}
    before = VERBS[verb].model_validate({**values, **FIXED[verb]})
    path = tmp_path_factory.mktemp("yaml") / "run.yaml"
    write_run_yaml(before, path)
    after = read_back(VERBS[verb], path)
    assert after == before
    assert all(type(left) is type(right) for (_, left), (_, right) in zip(after, before, strict=True))


def test_bounds_of_the_workers_survive_yaml_and_are_no_minutes_and_seconds(tmp_path: Path) -> None:
    before = TrainSettings(**TRAIN, num_workers="2:8")
    write_run_yaml(before, tmp_path / "run.yaml")
    assert read_back(TrainSettings, tmp_path / "run.yaml") == before
    (tmp_path / "mine.yaml").write_text("verifier_name_or_path: v\nnum_workers: 2:8\nlr: 1e-3\nseed: 7\n")
    mine = read_back(TrainSettings, tmp_path / "mine.yaml")
    assert isinstance(mine, TrainSettings)
    assert (mine.num_workers, mine.seed) == ("2:8", 7)


def test_run_yaml_names_every_setting_but_the_file_it_may_come_from(tmp_path: Path) -> None:
    values = yaml.safe_load(dump_settings(TrainSettings(**TRAIN, config=Path("old.yaml"))))
    assert set(values) == set(TrainSettings.model_fields) - {"config"}


def test_run_yaml_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("old: line\n" * 1000)
    write_run_yaml(DemoSettings(seed=7), path)
    assert yaml.safe_load(path.read_text())["seed"] == 7
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_may_use_hyphens_and_leave_things_out(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("checkpoint-path: a\noutput_path: b\n")
    assert read_back(ExportSettings, path) == ExportSettings(checkpoint_path=Path("a"), output_path=Path("b"))


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing yet\n")
    assert read_settings_file(path) == {}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("epochs: 3\nepochs: 4\n", "sets epochs more than once"),
        ("max-steps: 3\nmax_steps: 4\n", "sets max_steps more than once"),
        ("config: other.yaml\n", "sets config, but a file cannot name another file"),
        ("- epochs\n", "expected lines of the form `name: value`"),
        ("3: 4\n", "expected lines of the form `name: value`"),
        ("epochs: [3\n", "is not YAML"),
        ("just text", "expected lines of the form `name: value`"),
        ("a: 1\n---\nb: 2\n", "is not YAML"),
        ("a: !!python/object:os.system {}\n", "is not YAML"),
    ],
)
def test_a_file_that_is_no_list_of_settings_is_refused(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_settings_file(path)
    assert str(caught.value).startswith(f"--config {path}: {told}")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.yaml: cannot be read \(No such file or directory\)"):
        read_settings_file(tmp_path / "nowhere.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"binary\.yaml: is not YAML"):
        read_settings_file(tmp_path / "binary.yaml")
