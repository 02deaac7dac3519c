"""The texts and the model of the quantization studies are what their cards say."""

import hashlib
import pathlib
import re

import numpy as np
import pytest

from lockstep.lab.parity import Path, run_path
from lockstep.text.tokenizer.tokenizer import load_tokenizer
from tests.models.running import load

ROOT = pathlib.Path(__file__).parents[1]
STUDIES, BUNDLED = ROOT / "studies", ROOT / "lockstep" / "bundled"
MODEL = STUDIES / "llama-6x256"
WINDOW = 256
TEXTS = ("calibration", "evaluation")
# the longest run of characters that the two texts may share
MAX_SHARED_RUN = 99


def read(name):
    return (STUDIES / "texts" / f"{name}.txt").read_bytes()


def on_the_card(pattern):
    return re.search(pattern, (MODEL / "README.md").read_text(encoding="utf-8")).group(1)


def runs(text, length):
    return {text[i : i + length] for i in range(len(text) - length + 1)}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_the_one_of_the_card(name):
    card = (STUDIES / "texts" / "README.md").read_text(encoding="utf-8")
    size, digest = re.search(rf"`{name}.txt` \| ([\d,]+) \|.*`([0-9a-f]{{64}})`", card).groups()
    assert len(read(name)) == int(size.replace(",", ""))
    assert hashlib.sha256(read(name)).hexdigest() == digest


def test_the_texts_share_no_passage():
    calibration, evaluation = (read(name).decode() for name in TEXTS)
    assert not runs(calibration, MAX_SHARED_RUN + 1) & runs(evaluation, MAX_SHARED_RUN + 1)


def test_the_model_is_the_one_of_the_card():
    weights = (MODEL / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == on_the_card(r"SHA-256 of the weights \| `([0-9a-f]{64})`")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (MODEL / name).read_bytes() == (BUNDLED / name).read_bytes()


def test_the_model_predicts_as_well_as_the_card_says():
    ids = load_tokenizer(MODEL).encode(read("evaluation").decode())[: WINDOW + 1]
    x = run_path(load(MODEL), ids[:-1], Path("whole", (WINDOW,), 2), num_rows=WINDOW).logits.astype(np.float64)
    nats = np.log(np.exp(x).sum(-1)) - x[np.arange(WINDOW), ids[1:]]
    assert nats.mean() == pytest.approx(float(on_the_card(r"first 256 tokens \| 256 \| ([\d.]+) \|")), abs=1e-4)
