"""The script for a machine with a graphics card, in miniature on the CPU: nothing there but torch and the packed volumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from Testing.engine.conftest import tiny_card

from progidiff.model.folder import save_model
from progidiff.synthesis.labelmaps import make_volume, pack
from progidiff.synthesis.tissues import INDEX
from progidiff.training import small

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "experiments" / "gpu" / "gpu.py"
TARGETS = ["liver", "spleen", "right kidney"]
#: Readers of files that such a machine does not have.
BLOCKED = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("SimpleITK", "nibabel", "monai"):
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Missing())
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model laid on the body, and packed volumes."""
    folder = tmp_path_factory.mktemp("gpu")
    torch.manual_seed(0)
    card = tiny_card(vocabulary=TARGETS, image_size=48, spacing_mm=6.0, body_grids={"axial": (32, 48)})
    save_model(small.make_model(48, small.make_tokenizer(TARGETS), card), folder / "model", torch.float32)
    tissues = np.zeros((8, 40, 60), np.uint8)
    tissues[:, 8:25, 8:28], tissues[:, 12:22, 42:54] = INDEX["liver"], INDEX["spleen"]
    volume = make_volume("toy", "CT", tissues, (5.0, 5.0, 5.0), "none", body=np.ones_like(tissues, dtype=bool))
    pack([volume], folder / "volumes.npz")
    return folder


def run(folder: Path, mode: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED, str(SCRIPT), mode, str(folder), str(folder / mode), "--device", "cpu"]
    return subprocess.run(
        [*command, "--model", str(folder / "model"), "--proposals", "2", "--steps", "4", "--seed", "1", *more],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        timeout=600,
        check=False,
    )


def facts(folder: Path, mode: str) -> dict[str, object]:
    found = json.loads((folder / mode / f"{mode}.json").read_text())
    assert isinstance(found, dict)
    return found


@pytest.mark.slow
def test_check(folder: Path) -> None:
    done = run(folder, "check")
    found = facts(folder, "check")
    assert {"proposals: mean Dice to the CPU's", "cancel", "training: loss, CPU and device", "tuning: steps"} <= set(found)
    judged = {name: value["right"] for name, value in found.items() if isinstance(value, dict)}
    # fresh weights draw nothing that could be compared, and learn nothing in four steps: all else has to be right
    judged.pop("proposals: voxels in them"), judged.pop("tuning: Dice before and best")
    assert all(judged.values()), done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["encoder", "control"])
def test_train(folder: Path, stage: str) -> None:
    done = run(folder, "train", "--stage", stage, "--images", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    written = sorted(path.name for path in (folder / "train").glob("*.safetensors"))
    assert written == (
        ["image_encoder.safetensors"] if stage == "encoder" else ["controlnet.safetensors", "image_encoder.safetensors"]
    )
    weights = load_file(folder / "train" / "image_encoder.safetensors")
    before = load_file(next((folder / "model" / "image_encoder").glob("*.safetensors")))
    assert set(weights) == set(before)
    assert any(not torch.equal(weights[key].float(), before[key].float().half().float()) for key in weights)
    assert facts(folder, "train")["images per step"] == 2


@pytest.mark.slow
def test_bench(folder: Path) -> None:
    done = run(folder, "bench")
    assert done.returncode == 0, done.stdout + done.stderr
    report = facts(folder, "bench")["report"]
    assert report["models"][0]["model_id"] == "tiny"
