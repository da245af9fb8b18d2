"""Fixtures of the unit tests: a checkpoint that can be broken in every way."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor


@pytest.fixture
def make_checkpoint(parity: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that copies a draft, lets its config and tensors be changed, and commits it."""

    def make(
        draft: str,
        edit_config: Callable[[dict[str, Any]], Any] = lambda config: None,
        edit_tensors: Callable[[dict[str, Tensor]], Any] = lambda tensors: None,
    ) -> Path:
        folder = tmp_path / "run" / "3"
        shutil.copytree(parity / "drafts" / draft, folder)
        config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
        edit_config(config)
        edit_tensors(tensors)
        for name in ("config.json", "model.safetensors"):
            (folder / name).unlink()
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "model.safetensors")
        (folder / "COMMITTED").write_text('{"step": 3}\n')
        return folder

    return make
