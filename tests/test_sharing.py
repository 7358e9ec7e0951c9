"""One machine trains and pushes, another loads by id: the same photograph gets the same map.

Both are processes of their own, with caches of their own, that meet only on the loopback Hub and do what README.md
and recipes/README.md say.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from loopback_hub import LoopbackHub, environment
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import hf_aha


ROOT = Path(__file__).parent.parent
PHOTOGRAPHS = sorted((Path(hf_aha.__file__).parent / "bundled" / "photographs").glob("*.jpg"))

EXPLAIN = """
import sys
import numpy as np
from hf_aha import AhaExplainer
explainer = AhaExplainer.from_pretrained(sys.argv[1])
np.save(sys.argv[3], explainer.explain(sys.argv[2]).scores)
"""

# The package is hidden; the processor comes from the explainer's repository.
EXPLAIN_WITHOUT_THE_PACKAGE = """
import sys
sys.modules["hf_aha"] = None
import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
explainer = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(sys.argv[1])
pixels = processor(Image.open(sys.argv[2]).convert("RGB"), return_tensors="pt").pixel_values
with torch.no_grad():
    np.save(sys.argv[3], explainer(pixels).scores[0].numpy())
"""


def make_classifier(folder: Path) -> None:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        num_labels=3,
        id2label={0: "cat", 1: "dog", 2: "fish"},
        label2id={"cat": 0, "dog": 1, "fish": 2},
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def make_dataset(folder: Path) -> None:
    for split in ("train", "validation"):
        for index, photograph in enumerate(PHOTOGRAPHS[:4]):
            place = folder / split / f"class-{index % 2}"
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(photograph, place)


def run(words: list[object], folder: Path, variables: dict[str, str]) -> str:
    folder.mkdir(exist_ok=True)
    # The clone's own package, from whatever folder; nothing else of this process's settings for the Hub.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSF"))}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        env={**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("pythons", [(sys.executable, sys.executable)], ids=["same-environment"])
def test_what_one_machine_pushes_another_explains_with(tmp_path, pythons):
    share(tmp_path, *pythons)


def share(tmp_path: Path, trainer: str, user: str) -> None:
    """Train, push and load with two interpreters, which may be of two environments."""
    make_classifier(tmp_path / "classifier")
    make_dataset(tmp_path / "photographs")
    photograph = PHOTOGRAPHS[-1]
    with LoopbackHub() as hub:
        token = hub.add_account("alice")
        hub.commit_folder("alice/tiny-vit", str(tmp_path / "classifier"))
        one = environment(hub, tmp_path / "one") | {"HF_TOKEN": token}
        two = environment(hub, tmp_path / "two")

        settings = "--classifier alice/tiny-vit --output_dir runs/mine --max_steps 2 --per_device_batch_size 2"
        settings += " --dataloader_num_workers 0 --eval_images 2 --mixed_precision no"
        settings += " --push_to_hub true --hub_model_id alice/aha-tiny"
        recipe = [trainer, ROOT / "recipes" / "train_explainer.py", *settings.split()]
        output = run([*recipe, "--dataset", tmp_path / "photographs"], tmp_path / "one", one)
        assert token not in output
        run([trainer, "-c", EXPLAIN, "runs/mine/final", photograph, "map.npy"], tmp_path / "one", one)

        run([user, "-c", EXPLAIN, "alice/aha-tiny", photograph, "map.npy"], tmp_path / "two", two)
        maps = [np.load(tmp_path / machine / "map.npy") for machine in ("one", "two")]
        assert maps[0].shape == maps[1].shape and np.isfinite(maps[0]).any()
        np.testing.assert_allclose(maps[1], maps[0], rtol=0, atol=1e-5)

        run([user, "-c", EXPLAIN_WITHOUT_THE_PACKAGE, "alice/aha-tiny", photograph, "raw.npy"], tmp_path / "two", two)
        raw = np.load(tmp_path / "two" / "raw.npy")
        assert raw.shape == (32, 32) and raw.std() > 0

        run(
            [trainer, "-m", "hf_aha.cli", "push", "runs/mine/final", "alice/again", "--private"],
            tmp_path / "one",
            one,
        )
        assert hub.repository("alice/again").private
        assert "modeling_aha.py" in hub.repository("alice/again").files()
