"""`generate` from end to end: real Ray, a real verifier folder, files compared with plain forward passes."""

import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle3_ray import cli
from eagle3_ray.errors import ClusterError, DataError, Eagle3RayError, VerifierError
from eagle3_ray.generation.output_folder import read_data_config
from tests.unit.generation.world import (
    HIDDEN_SIZE,
    MAX_SEQ_LEN,
    UNTRAINABLE_LINE,
    VOCAB_SIZE,
    World,
    make_line,
    make_tokenizer,
    trainable,
    write_verifier,
)

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> World:
    """Generated once; tests leave it as they find it."""
    world = World(tmp_path_factory.mktemp("world"))
    world.run()
    return world


@pytest.fixture
def small(tmp_path: Path) -> World:
    """Of a test's own, not generated yet."""
    return World(tmp_path)


def test_every_trainable_line_has_the_file_of_its_number_and_nothing_is_left_over(world: World) -> None:
    expected = {f"data_{number}.pt" for number in trainable()} | {"token_freq.pt", "data_config.json"}
    assert {path.name for path in world.output_path.iterdir()} == expected


@torch.no_grad()
def test_samples_hold_what_plain_forward_passes_compute(world: World) -> None:
    decoder = world.model.model
    for number in trainable():
        sample = world.read(number)  # refuses normed last states, wrong shapes and keys
        hidden_states = decoder(sample.input_ids[None], output_hidden_states=True).hidden_states
        norm, decoder.norm = decoder.norm, torch.nn.Identity()
        last_state = decoder(sample.input_ids[None]).last_hidden_state
        decoder.norm = norm
        # Default layers of 7: 2, n//2, n-3. Stored in bf16: half a unit in the last place, and ties that tip over.
        for state, other in zip(
            (*sample.aux_states, sample.last_state), (*(hidden_states[k] for k in (2, 3, 4)), last_state), strict=True
        ):
            assert state.dtype == torch.bfloat16
            torch.testing.assert_close(state.float(), other[0], rtol=2**-8, atol=1e-4)


def test_ids_are_those_of_the_chat_template_cut_at_the_limit(world: World) -> None:
    lengths = []
    for number in trainable():
        record, tokenizer = json.loads(make_line(number + 1)), make_tokenizer()
        if "text" in record:
            ids: Any = tokenizer(record["text"])["input_ids"]
        else:
            roles = {"human": "user", "gpt": "assistant"}
            messages = [{"role": roles[t["from"]], "content": t["value"]} for t in record["conversations"]]
            tokens: Any = tokenizer.apply_chat_template(messages, return_dict=True)
            ids = tokens["input_ids"]
        lengths.append(len(ids))
        assert world.read(number).input_ids.tolist() == ids[:MAX_SEQ_LEN]
    assert max(lengths) > MAX_SEQ_LEN > min(lengths)


def test_token_frequencies_count_the_supervised_tokens_of_all_files(world: World) -> None:
    expected: Counter[int] = Counter()
    for number in trainable():
        sample = world.read(number)
        expected.update(sample.input_ids[sample.loss_mask].tolist())
    assert torch.load(world.output_path / "token_freq.pt", weights_only=True) == expected


def test_file_sizes_are_those_of_their_own_tensors(world: World) -> None:
    for number in trainable():
        num_tokens = len(world.read(number).input_ids)
        num_bytes = num_tokens * (4 * HIDDEN_SIZE * 2 + 2 * 8)
        # At most 6 tensors with their padding to 64 bytes, and the zip's own records.
        assert (world.output_path / f"data_{number}.pt").stat().st_size < num_bytes + 6000


def test_data_config_says_what_the_samples_were_made_from(world: World) -> None:
    config = read_data_config(world.output_path)
    assert config is not None
    assert config.aux_layer_ids == (2, 3, 4) and config.aux_layer_numbering == "serving"
    assert config.producer == "eagle3_ray generate" and config.data_format_version == 1
    assert config.verifier_name_or_path == str(world.verifier_path)
    assert (config.states_dtype, config.verifier_dtype) == ("bfloat16", "float32")
    assert (config.hidden_size, config.vocab_size) == (HIDDEN_SIZE, VOCAB_SIZE)


def test_second_run_writes_no_sample_and_loads_no_verifier(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    times, frequencies = world.times(), torch.load(world.output_path / "token_freq.pt", weights_only=True)
    (world.output_path / "token_freq.pt").unlink()
    world.run(batch_tokens=77, num_workers=1)
    assert world.times() == times
    assert torch.load(world.output_path / "token_freq.pt", weights_only=True) == frequencies
    assert f"samples       0 to generate, {len(trainable())} there already" in capsys.readouterr().out


def test_code_of_others_is_said_aloud_and_off_unless_asked_for(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.run()
    assert "runs with your rights" not in capsys.readouterr().out
    world.run(trust_remote_code=True)
    assert (
        f"warning: --trust-remote-code: Python code that comes with {world.folder / 'verifier'}"
        in capsys.readouterr().out
    )


def test_missing_and_damaged_files_are_generated_again_and_only_they(world: World) -> None:
    names = [f"data_{number}.pt" for number in trainable()]
    missing, cut, empty, other = (world.output_path / name for name in names[:4])
    before, times = world.files(), world.times()
    missing.unlink()
    cut.write_bytes(cut.read_bytes()[:-400])
    empty.write_bytes(b"")
    torch.save({"input_ids": torch.ones(3, dtype=torch.int64)}, other)
    (world.output_path / "token_freq.pt").unlink()
    (world.output_path / ".data_3.pt.tmp").write_bytes(b"half")  # as a killed run leaves it
    world.run()
    assert {name: time for name, time in world.times().items() if name not in names[:4]} == {
        name: time for name, time in times.items() if name not in names[:4]
    }
    after = world.files()
    assert after.keys() == before.keys()
    assert after["token_freq.pt"] == before["token_freq.pt"]
    for name in names[:4]:
        old, new = (torch.load(io.BytesIO(files[name]), weights_only=True) for files in (before, after))
        assert torch.equal(old["input_ids"], new["input_ids"]) and torch.equal(old["loss_mask"], new["loss_mask"])
        for state, other_state in zip(old["hidden_states"], new["hidden_states"], strict=True):
            # Batched with other samples now: equal to the rounding of fp32, then stored in bf16.
            torch.testing.assert_close(state, other_state, rtol=2**-7, atol=1e-4)


def test_run_that_breaks_off_is_finished_by_the_same_command(small: World, world: World) -> None:
    obstacle = small.output_path / f"data_{trainable()[-1]}.pt"
    obstacle.mkdir(parents=True)
    shutil.copy(world.output_path / "data_config.json", small.output_path)
    with pytest.raises(DataError, match=r"data_23.pt: cannot be written \(Is a directory\). Samples .* stay"):
        small.run(num_workers=1)
    written = small.times()
    assert not (small.output_path / "token_freq.pt").exists()
    obstacle.rmdir()
    small.run(num_workers=1)
    frequencies = [torch.load(w.output_path / "token_freq.pt", weights_only=True) for w in (small, world)]
    assert frequencies[0] == frequencies[1]
    assert small.times().keys() == world.times().keys()
    del written[obstacle.name]
    assert written.items() <= small.times().items()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("verifier", "verifier_digest: "),
        ("layers", "aux_layer_ids: (2, 3, 4) there, (1, 2, 4) now"),
        ("conversations", "conversations_sha256: "),
        ("max_seq_len", "max_seq_len: 60 there, 59 now"),
    ],
)
def test_samples_of_something_else_are_refused_and_stay(
    world: World, change: str, message: str, tmp_path: Path
) -> None:
    before, times = world.files(), world.times()
    changes: dict[str, Any] = {}
    if change == "layers":
        changes = {"aux_layer_ids": (1, 2, 4)}
    if change == "max_seq_len":
        changes = {"max_seq_len": 59}
    if change == "verifier":
        write_verifier(tmp_path / "other", seed=1)
        changes = {"verifier_name_or_path": str(tmp_path / "other")}
    if change == "conversations":
        (tmp_path / "c.jsonl").write_text(world.conversations_path.read_text() + "\n" + make_line(1))
        changes = {"conversations_path": tmp_path / "c.jsonl"}
    with pytest.raises(DataError) as error:
        world.run(**changes)
    assert "the samples there were made from something else" in str(error.value)
    assert message in str(error.value)
    assert world.files() == before and world.times() == times


def test_verifier_and_conversations_may_move(world: World, tmp_path: Path) -> None:
    moved = {"verifier_name_or_path": tmp_path / "verifier", "conversations_path": tmp_path / "moved.jsonl"}
    shutil.copytree(world.verifier_path, moved["verifier_name_or_path"])
    shutil.copy(world.conversations_path, moved["conversations_path"])
    times = world.times()
    world.run(**{name: str(path) for name, path in moved.items()})
    assert world.times() == times
    world.run(num_workers=1)  # as it was, for the tests that follow


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data_7.pt": b"x", "token_freq.pt": b"y"}, "holds 2 .pt files (data_7.pt, token_freq.pt) but no data_config"),
        ({"data_config.json": b'{"version": "2.0"}'}, "not a file that eagle3_ray generate wrote"),
        ({"data_config.json": b'{"vers'}, "not a file that eagle3_ray generate wrote (wrong: the JSON itself)"),
    ],
)
def test_folder_of_another_generator_is_refused_and_stays(
    small: World, content: dict[str, bytes], message: str
) -> None:
    small.output_path.mkdir()
    for name, data in content.items():
        (small.output_path / name).write_bytes(data)
    with pytest.raises(DataError) as error:
        small.run()
    assert message in str(error.value)
    assert small.files() == content


def test_bad_lines_are_listed_before_anything_is_written(small: World, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [make_line(1), "{", *['{"prompt": "x"}'] * 24, make_line(2)]
    small.conversations_path.write_text("\n".join(lines))
    flags = {
        "--verifier-name-or-path": small.verifier_path,
        "--conversations-path": small.conversations_path,
        "--output-path": small.output_path,
    }
    code = cli.main(["generate", *(str(word) for pair in flags.items() for word in pair)])
    text = capsys.readouterr().err
    assert code == 3
    assert f"{small.conversations_path}: 25 lines cannot be used:" in text
    assert "c.jsonl:2: not JSON (Expecting property name enclosed in double quotes at column 2)" in text
    assert "c.jsonl:21: expected exactly one of the keys" in text and "c.jsonl:22" not in text
    assert "... and 5 more" in text
    assert not small.output_path.exists()


def test_error_of_a_worker_arrives_as_it_was_raised(small: World) -> None:
    small.model.model.embed_tokens.weight.data.fill_(float("nan"))
    small.model.save_pretrained(small.verifier_path)
    with pytest.raises(VerifierError, match=r"c.jsonl:\d+: .* computes NaN or Inf in state 2 at token 0") as error:
        small.run(num_workers=1)
    assert type(error.value) is VerifierError
    assert small.times() == {}


def test_chats_without_a_chat_template_are_refused(small: World) -> None:
    make_tokenizer(None).save_pretrained(small.verifier_path)
    (small.verifier_path / "chat_template.jinja").unlink()
    with pytest.raises(VerifierError, match="its tokenizer has no chat template"):
        small.run()
    assert not small.output_path.exists()


def test_conversations_that_train_nothing_are_refused(small: World) -> None:
    small.conversations_path.write_text(make_line(UNTRAINABLE_LINE) + "\n")
    with pytest.raises(DataError, match="none of its 1 conversations has a supervised token among the first 60"):
        small.run()


@pytest.mark.parametrize(
    ("changes", "error_class", "message"),
    [
        ({"conversations_path": Path("/nowhere/c.jsonl")}, DataError, "/nowhere/c.jsonl: no such file"),
        ({"verifier_name_or_path": "/nowhere/verifier"}, VerifierError, "/nowhere/verifier: "),
        ({"aux_layer_ids": (1, 2, 8)}, VerifierError, "[8]; ids of "),
        ({"num_workers": 9}, ClusterError, "Pass --num-workers 3 or fewer"),
        ({"use_gpu": True}, ClusterError, "Pass --no-use-gpu"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    small: World, changes: dict[str, Any], error_class: type[Eagle3RayError], message: str
) -> None:
    with pytest.raises(error_class) as error:
        small.run(**({"num_workers": None} | changes))
    assert message in str(error.value)
    assert not small.output_path.exists()


def test_small_verifier_needs_explicit_layers(small: World) -> None:
    write_verifier(small.verifier_path, num_layers=4)
    with pytest.raises(VerifierError, match=r"has 4 layers; .* Name them with --aux-layer-ids"):
        small.run()


def test_verifier_without_a_tokenizer_is_refused(small: World) -> None:
    for path in small.verifier_path.glob("*tok*"):
        path.unlink()
    with pytest.raises(VerifierError, match="no tokenizer can be read"):
        small.run()
