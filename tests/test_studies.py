"""The texts and the model of the quantization studies are what their cards say."""

import hashlib
import re
from pathlib import Path

import pytest

STUDIES = Path(__file__).parents[1] / "studies"
TEXTS = ("calibration", "evaluation")
# the longest run of characters that both texts may have
MAX_SHARED_RUN = 99


def read(name):
    return (STUDIES / "texts" / f"{name}.txt").read_bytes()


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
