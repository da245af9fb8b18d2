"""`evaluate` from end to end: a real verifier, its samples, trained drafts of each preset, real Ray."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eagle3_ray import cli
from eagle3_ray.config import TrainSettings
from eagle3_ray.jobs import evaluate, export, train
from eagle3_ray.training.run_folder import remove_run
from eagle3_ray.verbs import EvaluateSettings, ExportSettings
from tests.unit.generation.world import World, write_verifier

pytestmark = pytest.mark.usefixtures("ray_cluster", "text_for_people")
NUM_NEW = 24
PRESETS: dict[str, dict[str, Any]] = {
    "eagle3": {},
    "eagle3.1": {},
    "eagle3.1-fc-norm": {
        "fc_norm": True,
        "num_layers": 2,
        "layer_type": "qwen3",
        "sliding_window": 16,
        "draft_vocab_size": "full",
        "train_embedding": True,
        "freeze_lm_head": True,
    },
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> World:
    """Samples, and a draft of each shape for their verifier, whose training was stopped and went on."""
    world = World(tmp_path_factory.mktemp("world"))
    world.run()
    for name, shape in PRESETS.items():
        settings: dict[str, Any] = {
            "verifier_name_or_path": str(world.verifier_path),
            "data_path": world.output_path,
            "save_path": world.folder / name,
            "log_dir": world.folder / "logs",
            "d2t_path": world.folder / f"{name}-d2t.npy",
            "t2d_path": world.folder / f"{name}-t2d.npy",
            "draft_vocab_size": 200,
            "total_seq_len": 128,
            "train_frac": 0.7,
            "epochs": 6,
            "lr": 1e-2,
            "num_workers": 1,
            "use_gpu": False,
            "preset": name[:8] if "." in name else name,
            **shape,
        }
        train.run(TrainSettings(**settings, max_steps=9))
        train.run(TrainSettings(**settings))
    (world.folder / "p.jsonl").write_text('{"prompt": "Hello there"}\n{"text": "Why do you ask"}\n')
    return world


def evaluate_draft(world: World, **changes: Any) -> dict[str, Any]:
    """Evaluate, and return what was written."""
    output = world.folder / "out.json"
    settings: dict[str, Any] = {
        "draft_path": world.folder / "eagle3" / "best",
        "prompts_path": world.folder / "p.jsonl",
        "max_new_tokens": NUM_NEW,
        "output_path": output,
    }
    evaluate.run(EvaluateSettings(**(settings | changes)))
    result: dict[str, Any] = json.loads(output.read_text())
    return result


@pytest.mark.parametrize("name", PRESETS)
def test_a_draft_of_each_preset_is_exported_and_decodes_the_verifiers_own_output(
    name: str, world: World, tmp_path: Path
) -> None:
    run_dir = world.folder / name
    export.run(ExportSettings(checkpoint_path=run_dir / "best", output_path=tmp_path / "served"))
    found = evaluate_draft(world, draft_path=run_dir / "best", data_path=world.output_path, num_workers=2)
    exported = evaluate_draft(world, draft_path=tmp_path / "served")
    assert [prompt["tie"] for prompt in found["prompts"]] == [None, None]
    assert [prompt["name"] for prompt in found["prompts"]] == ["line 1", "line 2"]
    assert all(prompt["num_tokens"] == NUM_NEW for prompt in found["prompts"])
    for key in ("tokens_per_verification", "acceptance"):
        assert found[key] == exported[key]
    num_held_out = round(0.3 * len(list(world.output_path.glob("data_*.pt"))))
    assert found["estimate"]["num_samples"] == num_held_out and "estimate" not in exported
    # Of what the draft can say, validation counts the same guesses right; here it can say nearly all.
    metrics = json.loads((run_dir / "best" / "run.json").read_text())["metrics"]
    estimated = found["estimate"]["tokens_per_verification"]["value"]
    assert 1 < estimated <= metrics["val/expected_tokens"] + 0.02


def test_a_full_vocabulary_has_no_mapping_anywhere_and_a_frozen_head_is_the_verifiers(world: World) -> None:
    name = "eagle3.1-fc-norm"
    assert sorted(path.name for path in world.folder.glob("*-d2t.npy")) == ["eagle3-d2t.npy", "eagle3.1-d2t.npy"]
    draft, verifier = (
        load_file(path / "model.safetensors") for path in (world.folder / name / "best", world.verifier_path)
    )
    assert not draft.keys() & {"d2t", "t2d"}
    assert torch.equal(draft["lm_head.weight"], verifier["lm_head.weight"].bfloat16())
    assert not torch.equal(draft["embed_tokens.weight"], verifier["model.embed_tokens.weight"].bfloat16())
    assert json.loads((world.folder / name / "best" / "config.json").read_text())["embed_requires_grad"]


def test_prompts_come_from_the_samples_not_trained_on_and_the_result_lies_in_the_checkpoint(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(world.folder / "eagle3", run_dir, symlinks=True)
    arguments = ["--draft-path", str(run_dir / "best"), "--data-path", str(world.output_path), "--num-prompts", "3"]
    assert cli.main(["evaluate", *arguments, "--max-new-tokens", "8", "--num-speculative-tokens", "5"]) == 0
    out = capsys.readouterr().out
    for part in ("guess 5", "1 is no gain", "real decoding", "estimate", "3 in 3", "evaluation.json"):
        assert part in out
    result = json.loads((run_dir / "best" / "evaluation.json").read_text())
    assert len(result["prompts"]) == 3 and len(result["acceptance"]) == 5
    # It is a part of the run like all others.
    checkpoint = (run_dir / "best").resolve()
    remove_run(run_dir)
    assert not checkpoint.exists()


def test_what_was_trained_on_stays_out_whatever_came_to_the_folder_since(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    from_samples = {"prompts_path": None, "data_path": world.output_path, "max_new_tokens": 2}

    def held_out() -> set[str]:
        return {Path(prompt["name"]).name for prompt in evaluate_draft(world, **from_samples)["prompts"]}

    before, sample = held_out(), next(world.output_path.glob("data_*.pt"))
    new = [world.output_path / name for name in ("a.pt", "b.pt", "data_1x.pt", "z.pt")]
    try:
        for path in new:
            shutil.copy(sample, path)
        (world.output_path / "cut.pt").write_bytes(sample.read_bytes()[:100])
        capsys.readouterr()
        assert held_out() == before | {path.name for path in new}
        assert "1 of " in capsys.readouterr().out
    finally:
        for path in (*new, world.output_path / "cut.pt"):
            path.unlink(missing_ok=True)


def test_another_folder_of_samples_is_held_out_as_a_whole_and_an_unknown_origin_is_told(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world.output_path, tmp_path / "other")
    num_samples = len(list((tmp_path / "other").glob("data_*.pt")))
    other = {"prompts_path": None, "data_path": tmp_path / "other", "max_new_tokens": 2}
    assert evaluate_draft(world, **other)["estimate"]["num_samples"] == num_samples
    served = tmp_path / "served"
    export.run(ExportSettings(checkpoint_path=world.folder / "eagle3" / "best", output_path=served))
    capsys.readouterr()
    assert evaluate_draft(world, **other, draft_path=served)["estimate"]["num_samples"] == num_samples
    assert "does not tell what it was trained on" in capsys.readouterr().out


def test_what_cannot_be_evaluated_is_refused_with_its_reason(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "a b c d " * 300}) + "\n")
    write_verifier(tmp_path / "small", num_layers=4)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    (tmp_path / "small" / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))
    best = ["--draft-path", str(world.folder / "eagle3" / "best")]
    prompts = ["--prompts-path", str(world.folder / "p.jsonl")]
    for words, exit_code, reason in (
        ([*best, "--prompts-path", str(tmp_path / "empty.jsonl")], 3, "holds no lines"),
        ([*best, "--prompts-path", str(tmp_path / "long.jsonl")], 3, "more than the verifier's context of 512"),
        ([*best, *prompts, "--verifier-name-or-path", str(tmp_path / "small")], 3, "the draft does not fit"),
        (["--draft-path", str(world.folder), *prompts], 4, "no draft (config.json is missing)"),
        (best, 2, "give --prompts-path, --data-path, or both"),
    ):
        assert cli.main(["evaluate", *words]) == exit_code
        assert reason in capsys.readouterr().err
    assert not (world.folder / "eagle3" / "best" / "evaluation.json").exists()
