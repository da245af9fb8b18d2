"""`demo` through the real verbs, with a verifier of a few dozen steps."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from eagle3_ray.demo.tiny_verifier import VerifierRecipe
from eagle3_ray.errors import Eagle3RayError, UsageError
from eagle3_ray.jobs import demo
from eagle3_ray.verbs import DemoSettings

PLAN = replace(
    demo.SHORT,
    verifier=VerifierRecipe(
        hidden_size=64,
        intermediate_size=64,
        num_train_tokens=60 * 4 * 128,
        window_tokens=128,
        vocab_size=400,
    ),
    num_prompts=48,
    max_new_tokens=24,
    draft_vocab_size=300,
    total_seq_len=256,
    epochs=2,
    least_first_accuracy=0.0,
)
UNTRAINED = {"val/loss": 6.0, "val/cond_acc_0": 0.01, "val/cond_acc_1": 0.0, "val/expected_tokens": 1.01}
FIRST = {**UNTRAINED, "val/loss": 3.0, "val/cond_acc_0": 0.4, "val/cond_acc_1": 0.5, "val/expected_tokens": 1.6}
LAST = {**FIRST, "val/loss": 2.0, "val/cond_acc_0": 0.6, "val/expected_tokens": 2.1}
REAL = {"tokens_per_verification": 1.5, "speedup": 0.9}


def payload_of(folder: Path) -> dict[Path, int]:
    """What is dear to make, each file with the time of its last change."""
    patterns = (
        "verifier/*",
        "conversations.jsonl",
        "data/**/data_*.pt",
        "run/*/model.safetensors",
        "run/*/evaluation.json",
    )
    return {path: path.stat().st_mtime_ns for pattern in patterns for path in folder.glob(pattern)}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_demo_ends_in_a_draft_that_beats_the_untrained_one_and_a_second_run_reuses_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "SHORT", PLAN)
    settings = DemoSettings(output_path=tmp_path / "demo", short=True)
    demo.run(settings)
    printed = capsys.readouterr().out
    folder = tmp_path / "demo"

    results = demo.read_results(folder / "run")
    assert len(results) == 3
    assert results[-1]["val/loss"] < results[0]["val/loss"]
    assert results[-1]["val/expected_tokens"] > results[0]["val/expected_tokens"]
    first, best = results[1], max(results[1:], key=lambda metrics: metrics["val/expected_tokens"])
    for metrics in (first, best):
        assert 1 <= metrics["tokens_per_verification"] <= 1 + demo.TTT_STEPS and metrics["speedup"] > 0
    assert best is first or best["tokens_per_verification"] > first["tokens_per_verification"]
    assert "of 4 in 4" in printed  # with each draft the verifier's own output
    assert demo.describe_results(results) in printed
    assert f"vllm serve {folder / 'verifier'} --speculative-config" in printed

    draft = load_file(folder / "run" / "best" / "model.safetensors")
    assert draft["d2t"].shape == (300,) and draft["t2d"].shape == (400,)
    config = json.loads((folder / "run" / "best" / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == str(folder / "verifier")
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert any((folder / "logs").rglob("events.out.tfevents*"))

    before = payload_of(folder)
    assert len(before) > 48
    demo.run(settings)
    again = capsys.readouterr().out
    assert "there already" in again and demo.describe_results(results) in again
    assert payload_of(folder) == before

    with pytest.raises(UsageError, match="was made with other settings"):
        demo.run(DemoSettings(output_path=tmp_path / "demo", short=True, seed=1))


def test_trained_draft_that_is_good_enough_is_accepted() -> None:
    demo.check_gain([UNTRAINED, FIRST, LAST], demo.FULL)


def test_draft_that_does_not_beat_the_untrained_one_is_an_error_with_every_number() -> None:
    with pytest.raises(Eagle3RayError) as caught:
        demo.check_gain([UNTRAINED, UNTRAINED, UNTRAINED], demo.FULL)
    text = str(caught.value)
    assert caught.value.exit_code != 0
    assert "loss 6.000, untrained 6.000: it should be lower" in text
    assert "tokens per verification 1.010, untrained 1.010" in text
    assert "first drafted token right 1.0%, untrained 1.0%; expected twice that and at least 50%" in text
    assert "not more than after epoch 1" in text


def test_draft_that_gets_worse_over_the_epochs_is_an_error() -> None:
    with pytest.raises(Eagle3RayError, match=r"right 60\.0%, not more than after epoch 1"):
        demo.check_gain([UNTRAINED, {**LAST, "val/cond_acc_0": 0.7}, LAST], demo.FULL)


def test_draft_that_decodes_no_better_after_more_training_is_an_error() -> None:
    demo.check_gain([UNTRAINED, FIRST | REAL, LAST | REAL | {"tokens_per_verification": 1.6}], demo.FULL)
    with pytest.raises(Eagle3RayError, match=r"real decoding 1\.500 tokens per verification, 1\.500 after epoch 1"):
        demo.check_gain([UNTRAINED, FIRST | REAL, LAST | REAL], demo.FULL)


def test_table_shows_what_was_measured_and_a_dash_for_what_was_not() -> None:
    lines = demo.describe_results([UNTRAINED, FIRST, LAST | REAL]).splitlines()
    assert [line.split() for line in lines[1:5]] == [
        ["draft", "loss", "step", "1", "step", "2", "step", "3", "tokens", "real", "speed"],
        ["untrained", "6.00", "1.0%", "0.0%", "-", "1.01", "-", "-"],
        ["epoch", "1", "3.00", "40.0%", "50.0%", "-", "1.60", "-", "-"],
        ["epoch", "2", "2.00", "60.0%", "50.0%", "-", "2.10", "1.50", "0.90x"],
    ]
