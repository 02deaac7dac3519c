"""docs/python.md: each of its blocks runs, one after the other, as a reader would run them."""

import pathlib
import re

import pytest

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "python.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """The variables of the blocks so far, and the folder in which they run: some write files."""
    made = dict(folder=tmp_path_factory.mktemp("page"))
    yield made
    made["llm"].close()


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_a_block_runs(block, names, capsys, monkeypatch):
    monkeypatch.chdir(names["folder"])
    if block and "llm" not in names:
        pytest.skip("the first block did not run")
    exec(compile(BLOCKS[block], f"docs/python.md, block {block}", "exec"), names)
    if "print(" in BLOCKS[block]:
        assert capsys.readouterr().out.strip()


def test_the_blocks_leave_nothing_in_the_repository():
    assert not (PAGE.parents[1] / "answer.receipt").exists()


def test_the_page_has_its_blocks():
    assert len(BLOCKS) >= 8 and BLOCKS[0].startswith("from lockstep import LLM, SamplingParams\n")
