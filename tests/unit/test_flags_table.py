"""The README's tables of flags are the schema's, word for word."""

import re
from pathlib import Path

import pytest

from eagle3_ray.errors import UsageError
from eagle3_ray.flags import extended_verb, flag_groups, flags_of, flags_table, main, write_flags_tables
from eagle3_ray.verbs import VERBS

README = Path(__file__).parents[2] / "README.md"


def rows_of(table: str) -> list[list[str]]:
    """The cells of a Markdown table's rows, escaped bars put back."""
    lines = [line for line in table.split("\n") if line.startswith("| `")]
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


@pytest.mark.skipif(not README.exists(), reason="the README has not been written yet")
def test_the_readme_tells_what_the_schema_tells() -> None:
    text = README.read_text(encoding="utf-8")
    assert {*re.findall(r"<!-- flags:(\S+) -->", text)} >= {"train"}
    assert write_flags_tables(text) == text, "the schema has changed: run `make flags`"


@pytest.mark.parametrize("verb", VERBS)
def test_a_table_has_a_row_for_each_field_and_no_other(verb: str) -> None:
    names = [re.findall(r"--[a-z0-9-]+|^`RUN", row[0])[0].strip("`") for row in rows_of(flags_table(verb))]
    extended = extended_verb(verb)
    fields = VERBS[verb].model_fields.keys() - (VERBS[extended].model_fields.keys() if extended else set())
    without_flag = {"run_paths": "RUN"}
    assert sorted(names) == sorted(without_flag.get(field, "--" + field.replace("_", "-")) for field in fields)


def test_a_verb_that_extends_another_tells_only_what_it_adds() -> None:
    assert extended_verb("doctor") == "train" and extended_verb("train") is None
    assert [row[0] for row in rows_of(flags_table("doctor"))] == ["`--time-steps INT`"]


def test_words_without_a_flag_have_a_row_of_their_own() -> None:
    row = rows_of(flags_table("report"))[0]
    assert row == ["`RUN [RUN ...]`", "required", "Run folders: what --save-path of train named."]


def test_rows_tell_flag_default_and_meaning() -> None:
    rows = {row[0]: row[1:] for row in rows_of(flags_table("train"))}
    assert rows["`--epochs INT`"] == ["20", "Passes over the training samples."]
    assert rows["`--verifier-name-or-path TEXT`"][0] == "required"
    assert rows["`--use-gpu`, `--no-use-gpu`"] == ["if the cluster has any", "Train on GPUs."]
    assert rows["`--norm-before-fc`, `--no-norm-before-fc`"][0] == "off"
    assert rows["`--precision {auto,fp32,bf16}`"][0] == "auto"
    assert rows["`--draft-vocab-size INT|full`"][0] == "32000, or the verifier's vocabulary if smaller"
    assert rows["`--lr FLOAT`"][0] == "0.0001"
    assert rows["`--logger TEXT`"][0] == "none"


@pytest.mark.parametrize("verb", VERBS)
def test_groups_hold_each_flag_once_and_the_verbs_own_come_first(verb: str) -> None:
    groups = flag_groups(VERBS[verb])
    assert groups[0].title == "" and groups[0].flags[-1].name == "--config"
    assert all(group.title and group.flags and group.meaning.endswith(".") for group in groups[1:])
    assert sum(len(group.flags) for group in groups) == len(flags_of(VERBS[verb])) == len(VERBS[verb].model_fields)


def test_what_stands_between_the_markers_is_replaced_and_the_rest_stays() -> None:
    old = "# Title\n<!-- flags:demo -->\nold | table\n<!-- /flags:demo -->\n\nafter\n"
    new = write_flags_tables(old)
    assert new == f"# Title\n<!-- flags:demo -->\n{flags_table('demo')}\n<!-- /flags:demo -->\n\nafter\n"
    assert write_flags_tables(new) == new


def test_several_tables_are_each_replaced() -> None:
    text = "<!-- flags:demo -->\n<!-- /flags:demo -->\n<!-- flags:export -->\n<!-- /flags:export -->\n"
    new = write_flags_tables(text)
    assert flags_table("demo") in new and flags_table("export") in new


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<!-- flags:trian -->", "<!-- flags:trian -->: no verb is called trian"),
        ("<!-- flags:train -->\n", "<!-- flags:train -->: expected <!-- /flags:train --> after it"),
        ("<!-- flags:demo --><!-- flags:train --><!-- /flags:demo -->", "<!-- flags:demo -->: expected"),
    ],
)
def test_markers_that_do_not_pair_are_refused(text: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        write_flags_tables(text)
    assert str(caught.value).startswith(told)


def test_the_file_named_is_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("<!-- flags:demo -->\n<!-- /flags:demo -->\n")
    main([str(path)])
    assert path.read_text() == f"<!-- flags:demo -->\n{flags_table('demo')}\n<!-- /flags:demo -->\n"
