"""What a checkpoint must share with a run: what came later only where it is used."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from eagle3_ray.config import TrainSettings
from eagle3_ray.data.packing import BinSchedule, plan_bins
from eagle3_ray.jobs.decide import run_identity
from tests.unit.training.world import load_config, load_mapping

FROM_THE_BEGINNING = {
    *("draft", "verifier", "vocabulary", "plan", "bins_per_step", "seed", "data_format_version", "ttt_steps"),
}


def identify(changes: Mapping[str, object], *, embed_requires_grad: bool = False) -> Mapping[str, Any]:
    settings = TrainSettings.model_validate({"verifier_name_or_path": "v", **changes})
    plan = plan_bins(np.array([8, 9]), np.array([4, 4]), 16, 0)
    config = replace(load_config(), embed_requires_grad=embed_requires_grad)
    return run_identity(settings, config, load_mapping(), plan, BinSchedule(2, 1, 1, 1))


@pytest.mark.parametrize(
    ("changes", "added"),
    [
        ({}, {}),
        ({"optimizer": "muon"}, {"optimizer": "muon"}),
        ({"ema_decay": 0.5}, {"ema_decay": 0.5}),
        ({"mask_out_of_vocab_targets": True}, {"mask_out_of_vocab_targets": True}),
        ({"freeze_lm_head": True}, {"freeze_lm_head": True}),
        ({"gradient_checkpointing": True, "early_stop_epochs": 2}, {}),
    ],
)
def test_a_setting_that_came_later_counts_only_where_it_is_used(
    changes: dict[str, object], added: dict[str, object]
) -> None:
    identity = identify(changes)
    assert identity.keys() == FROM_THE_BEGINNING | added.keys()
    assert {name: identity[name] for name in added} == added


def test_a_run_that_trains_the_embedding_is_another_by_its_draft_alone() -> None:
    frozen, trained = identify({}), identify({}, embed_requires_grad=True)
    assert {name for name in frozen if frozen[name] != trained[name]} == {"draft"}
    assert trained["draft"] == {**frozen["draft"], "embed_requires_grad": True}
