"""`LLM` on the bundled model: text, stop strings across token boundaries, and the same results in any batch."""

import contextlib
import copy
import os
import pickle
import shutil
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest

from lockstep import LLM, SamplingParams
from lockstep.engine.cache.size import ContextSize
from lockstep.engine.request import samples
from lockstep.weights.hub import resolve_model
from tests.models import tiny
from tests.models.cases import CASES

PROMPT = "def read_lines(path):\n"
PROMPTS = [PROMPT, "import os\n", "class Queue:\n    ", "x", "for i in range(10):\n    print(i)\n" * 12]


@pytest.fixture(scope="module")
def llm():
    made = LLM(threads=1, max_requests=8, max_context=512)
    yield made
    made.close()


@pytest.fixture(scope="module")
def free(llm):
    """An answer without stop strings."""
    return llm.generate([PROMPT], SamplingParams(max_tokens=60, ignore_eos=True))[0]


def stream(llm, **options):
    """(the Completion, [text of each chunk])"""
    made = llm.stream(PROMPT, SamplingParams(max_tokens=60, ignore_eos=True, **options))
    pieces = [chunk.text for chunk in made]
    return made.completion, pieces


def token_ends(llm, ids):
    """Length of the text after each token."""
    return [len(llm.tokenizer.decode(ids[: n + 1])) for n in range(len(ids))]


def test_every_stretch_of_an_answer_stops_it_at_its_first_end(llm, free):
    text, ends = free.text, token_ends(llm, free.token_ids)
    inside_tokens = 0
    for start, size in [(0, 1), (3, 2), (7, 5), (11, 9), (20, 3), (26, 17), (40, 4), (58, 12), (66, 1)]:
        string = text[start : start + size]
        at = text.index(string)
        made, pieces = stream(llm, stop=(string, "\0never"))
        assert (made.text, made.finish_reason, made.stop_reason) == (text[:at], "stop", string)
        assert "".join(pieces) == made.text  # nothing shown was taken back
        assert len(made.token_ids) == next(n for n, end in enumerate(ends, 1) if end >= at + size)
        inside_tokens += not {at, at + size} & set(ends)
        kept, pieces = stream(llm, stop=string, include_stop_str_in_output=True)
        assert kept.text == "".join(pieces) == text[: at + size]
    assert inside_tokens > 2


def test_text_is_held_back_only_while_it_could_be_cut(llm, free):
    string = free.text[10:30] + "\0never"
    made, pieces = stream(llm, stop=string)
    assert made.text == "".join(pieces) == free.text and made.finish_reason == "length"
    shown = np.cumsum([len(p) for p in pieces])
    ends = np.array(token_ends(llm, free.token_ids))
    assert (shown <= ends).all() and (shown < ends).any() and shown[-1] == len(free.text)


def test_a_stop_string_does_not_count_in_the_first_min_tokens(llm, free):
    ends, text = token_ends(llm, free.token_ids), free.text
    string = next(c for c in text[: ends[5]] if c in text[ends[29] :])
    made, pieces = stream(llm, stop=string, min_tokens=30)
    at = text.index(string, ends[29])
    assert made.text == "".join(pieces) == text[:at] and len(made.token_ids) > 30


def test_a_stop_token_is_not_part_of_the_text_unless_asked_for(llm, free):
    n = next(n for n, t in enumerate(free.token_ids) if n > 10 and t not in free.token_ids[:n])
    token, before = free.token_ids[n], llm.tokenizer.decode(free.token_ids[:n])
    made, _ = stream(llm, stop_token_ids=(token,))
    assert (made.text, made.stop_reason, made.token_ids[-1]) == (before, token, token)
    made, _ = stream(llm, stop_token_ids=(token,), include_stop_str_in_output=True)
    assert made.text == llm.tokenizer.decode(free.token_ids[: n + 1]) != before


def parity_mask(output_ids):
    """A mask that allows only even token ids after an even number of tokens, and odd ids after an odd number."""
    return np.full(128, 0x55555555 << len(output_ids) % 2, np.uint32)


ALL = [
    SamplingParams(
        max_tokens=40,
        temperature=0.9,
        seed=i,
        repetition_penalty=1.2,
        frequency_penalty=0.2,
        presence_penalty=0.1,
        logit_bias={17: 2.0, 300 + i: -100},
        min_tokens=8,
        logprobs=i,
        logits_mask=parity_mask if i % 2 else None,
        prompt_logprobs=4 * i,
        stop=("\n\n", "e\n"),
    )
    for i in range(len(PROMPTS))
]


def test_all_features_at_once_are_the_same_in_any_company(llm):
    together = llm.generate(PROMPTS, ALL)
    assert {a.finish_reason for a in together} == {"stop", "length"} and all(len(a.token_ids) > 8 for a in together)
    assert all(len(a.prompt_logprobs) == len(a.prompt_token_ids) - 1 for a in together)
    assert [llm.generate([p], s)[0] for p, s in zip(PROMPTS, ALL, strict=True)] == together
    for options in (
        dict(threads=1, max_requests=1, max_step_tokens=1),
        dict(threads=3, max_requests=2, max_step_tokens=13),
    ):
        other = LLM(max_context=512, **options)
        assert other.generate(PROMPTS, ALL) == together
        other.close()


def test_an_answer_that_fails_says_why_and_keeps_its_text(llm):
    def mask(output_ids):
        return None if len(output_ids) < 5 else np.zeros(128, np.uint32)

    bad, good = llm.generate([PROMPT, PROMPT], [SamplingParams(logits_mask=mask), SamplingParams(max_tokens=8)])
    assert (bad.finish_reason, bad.text) == ("error", llm.tokenizer.decode(good.token_ids[:5]))
    assert bad.error.startswith("no token is allowed") and good.finish_reason == "length" and good.error is None


def test_samples_of_a_prompt_are_what_their_seeds_give_alone(llm):
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=5, ignore_eos=True, n=3)
    several, single = llm.generate(PROMPTS[:2], [params, SamplingParams(max_tokens=4)])
    alone = [llm.generate([PROMPT], replace(p, n=1))[0] for p in samples(params)]
    assert [c.token_ids for c in several.samples] == [c.token_ids for c in alone]
    assert [c.text for c in several.samples] == [c.text for c in alone] and several.samples[0] is several
    assert len({tuple(c.token_ids) for c in several.samples}) == 3 and single.samples == [single]
    with pytest.raises(ValueError, match="n: expected 1"):
        next(llm.stream(PROMPT, params))


def test_an_answer_from_a_cache_dir_is_the_same(llm, tmp_path):
    prompt = PROMPTS[4] * 2
    cold = llm.generate([prompt], SamplingParams(max_tokens=8))[0]
    for found in (False, True):
        other = LLM(threads=1, max_requests=1, max_context=512, cache_dir=tmp_path)
        warm = other.generate([prompt], SamplingParams(max_tokens=8))[0]
        counts = other.engine.scheduler.prefix.counts
        other.close()
        assert (warm.token_ids, warm.logprobs, bool(counts.hit_tokens)) == (cold.token_ids, cold.logprobs, found)


def test_embeddings_are_the_same_in_any_company(llm):
    together = llm.embed(PROMPTS)
    assert together.shape == (len(PROMPTS), llm.model.config.hidden_size) and together.dtype == np.float32
    assert np.abs(np.linalg.norm(together.astype(np.float64), axis=1) - 1).max() < 1e-6
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert llm.embed(prompt)[0].tobytes() == llm.embed([llm.encode(prompt)])[0].tobytes() == row.tobytes()
    raw, mean = llm.embed(PROMPTS, normalize=False), llm.embed(PROMPTS, pooling="mean")
    lengths = np.linalg.norm(raw.astype(np.float64), axis=1, keepdims=True)
    assert np.abs(raw / lengths - together).max() < 1e-6 and np.abs(mean - together).max() > 0.1
    assert llm.embed([]).shape == (0, together.shape[1])


def test_one_bad_prompt_leaves_no_embedding_behind(llm):
    with pytest.raises(ValueError, match="at least one token"):
        llm.embed([PROMPT, []])
    assert not llm.engine.has_work


def test_ends_of_a_generation_config_that_are_no_token_ids(tmp_path):
    folder = tiny.write(tmp_path, CASES["llama"], tiny.tensors(CASES["llama"], 3))
    (folder / "generation_config.json").write_text('{"eos_token_id": [[2]]}')
    with pytest.raises(ValueError, match=r"generation_config\.json key 'eos_token_id': expected token ids"):
        LLM(str(folder))


def test_ends_out_of_range_are_warned_about_and_ignored(tmp_path, caplog):
    folder = tiny.write(tmp_path, {**CASES["llama"], "eos_token_id": [2, -1]}, tiny.tensors(CASES["llama"], 3))
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 96]}')
    llm = LLM(str(folder), threads=1, max_requests=1)
    llm.close()
    assert llm.engine.eos_ids == {2, 5}
    assert "end tokens [-1, 96] are ignored: the model has 96 tokens" in caplog.text


def test_the_ends_of_a_config_and_of_its_text_part_are_both_ends(tmp_path):
    config = CASES["qwen3_5_nested"]
    config = {**config, "eos_token_id": [3, 4], "text_config": {**config["text_config"], "eos_token_id": 5}}
    llm = LLM(str(tiny.write(tmp_path, config, tiny.tensors(CASES["qwen3_5_nested"], 3))), threads=1, max_requests=1)
    llm.close()
    assert llm.engine.eos_ids == {3, 4, 5}


SHORT, LONG = SamplingParams(max_tokens=4, ignore_eos=True), SamplingParams(max_tokens=30, ignore_eos=True)


def test_an_open_stream_and_other_calls_do_not_disturb_each_other(llm):
    expected = [answer.token_ids for answer in llm.generate([PROMPT, "x"], [LONG, SHORT])]
    opened = llm.stream(PROMPT, LONG)
    next(opened)
    assert llm.generate(["x"], SHORT)[0].token_ids == expected[1] and llm.engine.has_work
    rest = list(opened)
    assert opened.completion.token_ids == expected[0] and rest[-1].finish_reason == "length"
    opened = llm.stream("x", SHORT)
    [first] = next(opened).token_ids
    llm.generate([PROMPT], LONG)
    [rest] = opened  # its last tokens came with the other call's steps
    assert [first, *rest.token_ids] == opened.completion.token_ids == expected[1]


def test_an_interrupted_call_leaves_nothing_behind(llm):
    def interrupts(output_ids):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT, "x"], [LONG, replace(SHORT, logits_mask=interrupts)])
    assert not llm.engine.has_work
    llm.generate(["x"], SHORT)


def test_threads_share_an_llm(llm):
    expected, found = llm.generate(PROMPTS[:2], [LONG, SHORT]), []

    def ask():
        found.append(llm.generate(PROMPTS[:2], [LONG, SHORT]))
        stream = llm.stream(PROMPT, LONG)
        found.append([token for chunk in stream for token in chunk.token_ids])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found.count(expected) == found.count(expected[0].token_ids) == 4 and not llm.engine.has_work


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_llm_is_not_copied(llm, make):
    with pytest.raises(TypeError, match="LLM has threads and memory"):
        make(llm)
    with pytest.raises(TypeError, match="a CompletionStream cannot be copied"):
        make(llm.stream("x"))


@pytest.mark.parametrize("call", ["generate", "stream"])
def test_ctrl_c_ends_a_call_after_its_step(llm, call):
    expected, pages = llm.generate(["x"], SHORT)[0].token_ids, llm.engine.counts()["pages"]

    def press(output_ids):
        if len(output_ids) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    params = replace(LONG, logits_mask=press)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT, "x"], [LONG, params]) if call == "generate" else list(llm.stream("x", params))
    counts = llm.engine.counts()
    assert not llm.engine.has_work and counts["pages_free"] + counts["pages_idle"] == pages
    assert llm.generate(["x"], SHORT)[0].token_ids == expected


def test_progress_counts_the_answers(llm):
    told, params = [], [replace(SHORT, n=2, temperature=1.0), SHORT, SHORT]
    llm.generate([PROMPT, "x", "y"], params, progress=lambda *report: told.append(report))
    assert told[0] == ("generating", 0, 4) and told[-1] == ("generating", 4, 4)
    assert [done for _, done, _ in told] == sorted({done for _, done, _ in told})
    with pytest.raises(ValueError, match="progress: expected True, False or a function"):
        llm.generate(["x", "y"], SHORT, progress="yes")
    assert not llm.engine.has_work


@pytest.mark.parametrize(
    "prompts, params, message",
    [
        ([1, 2, 3], SHORT, "prompt: expected text or a list of token ids, got 1"),
        ([[1.0]], SHORT, "prompt: expected text or a list of token ids"),
        (["x", None], SHORT, "prompt: expected text or a list of token ids, got None"),
        ([b"text"], SHORT, "prompt: expected text or a list of token ids, got b'text'"),
        (None, SHORT, "prompts: expected text or a list of prompts, got None"),
        (b"text", SHORT, "prompts: expected text or a list of prompts, got b'text'"),
        (["x"], None, "params: expected SamplingParams, got None"),
        (["x"], {"max_tokens": 3}, "params: expected SamplingParams, got {'max_tokens': 3}"),
    ],
    ids=str,
)
def test_what_is_no_prompt_or_params_is_named(llm, prompts, params, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, params)
    assert not llm.engine.has_work


def test_what_is_no_model_or_conversation_is_named(llm):
    with pytest.raises(ValueError, match="model: expected a name or a path, got 5"):
        LLM(5)
    with pytest.raises(ValueError, match="messages: expected at least one message, got none"):
        llm.chat([])


@pytest.mark.parametrize(
    "prediction, message",
    [
        (5, "prediction: expected text or a list of token ids, got 5"),
        (b"text", "prediction: expected text or a list of token ids, got b'text'"),
        ([5, 6], "prediction: expected one text or a list of 1, got 2"),
        ([["x"]], "prediction: expected text or a list of token ids"),
        ([[1 << 20]], "prediction: token ids must be 0 to 4095, got 1048576"),
        ([[1] * 5000], "prediction: expected at most [0-9]+ tokens, as many as the context, got 5000"),
        ("x " * 200000, "prediction: the text has 400000 characters"),
    ],
    ids=lambda each: str(each)[:40],
)
def test_what_is_no_prediction_is_named(llm, prediction, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(["x"], SHORT, prediction)
    assert not llm.engine.has_work


def test_predictions_are_of_their_prompts(llm):
    prompts, params = ["def f(", "class A"], SamplingParams(max_tokens=40, temperature=1.0, ignore_eos=True)
    plain = [answer.token_ids for answer in llm.generate(prompts, params)]
    with contextlib.closing(LLM(threads=1, max_context=512, speculate="lookup", draft=5)) as guessing:
        assert [answer.token_ids for answer in guessing.generate(prompts, params, plain)] == plain
        assert guessing.engine.num_accepted > 50
        for given in (list(reversed(plain)), "def f(): pass", [None, "class A:"]):
            assert [answer.token_ids for answer in guessing.generate(prompts, params, given)] == plain
        chunks = list(guessing.stream(prompts[0], params, plain[0]))
        assert [token for chunk in chunks for token in chunk.token_ids] == plain[0] and len(chunks) < 15


def test_a_closed_llm_says_so():
    closed = LLM(threads=2, max_context=64)
    closed.close()
    with pytest.raises(RuntimeError, match="closed"):
        closed.generate(["x"], SHORT)


def test_a_conversation_ends_with_the_kv_cache_where_that_is_smaller_than_the_context():
    made = LLM(threads=1, max_requests=1, max_context=4096, kv_tokens=100)
    assert made.context == ContextSize(128, "kv_tokens") and made.model.max_context == 128
    answer = made.chat([dict(role="user", content="Write a loop.")])
    assert len(answer.prompt_token_ids) + len(answer.token_ids) <= 128 and answer.finish_reason in ("stop", "length")
    with pytest.raises(ValueError, match="is more than the context of 128 tokens"):
        made.generate([[5] * 100], SamplingParams(max_tokens=29))
    made.close()


@pytest.mark.parametrize("is_damaged", [False, True], ids=["whole", "damaged"])
def test_the_tokenizer_is_read_before_weights_are_packed(is_damaged, tmp_path, monkeypatch):
    folder, found = shutil.copytree(resolve_model(None), tmp_path / "model"), []
    if is_damaged:
        (folder / "tokenizer.json").write_text("{")
    monkeypatch.setattr("lockstep.weights.store.PackedStore.__init__", lambda *_: pytest.fail("packs"))
    with pytest.raises((pytest.fail.Exception, ValueError), match="tokenizer.json" if is_damaged else "packs"):
        LLM(str(folder), on_tokenizer=found.append)
    assert len(found) == 0 if is_damaged else found[0].encode("x")


@pytest.mark.parametrize("threads", ["4", 0, 2.5, 10**30])
def test_a_number_of_threads_that_is_none(threads):
    with pytest.raises(ValueError, match="threads"):
        LLM(threads=threads)
