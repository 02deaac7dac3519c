"""The sampling that a model's makers recommend: read from either file, checked by name, and only a default."""

import json
import shutil

import httpx
import numpy as np
import pytest

from lockstep import LLM, SamplingParams
from lockstep.cli import main
from lockstep.commands.chat import first_settings
from lockstep.commands.generate import ignored_sampling
from lockstep.commands.serve import ready_lines
from lockstep.commands.terminal.conversation import Conversation
from lockstep.engine.generation_config import described, for_talking, sampling_defaults
from lockstep.serve.service import system_fingerprint
from lockstep.weights.gguf import file as gguf
from lockstep.weights.hub import resolve_model
from tests.commands.test_cli import Output
from tests.serve.server import SIZES, running
from tests.weights.files import gguf_bytes, write

VOCABULARY = 100
INT32, FLOAT32, STRING = 5, 6, 8  # types of a GGUF file's keys
QWEN = dict(
    do_sample=True,
    temperature=0.6,
    top_k=20,
    top_p=0.95,
    repetition_penalty=1.05,
    eos_token_id=[1],
    transformers_version="5.0",
)


GOOD = dict(top_k=9, min_p=0.1)


def of_folder(**config):
    return sampling_defaults("auto", config, {}, VOCABULARY)


def of_gguf(**sampling):
    return sampling_defaults("auto", {}, {f"general.sampling.{name}": v for name, v in sampling.items()}, VOCABULARY)


def f32(value):
    """A number as a GGUF file stores it."""
    return float(np.float32(value))


def test_fields_are_taken_and_others_left(caplog):
    assert of_folder(**QWEN) == dict(temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.05)
    assert of_folder(eos_token_id=2) == {} and of_folder(temperature=None, top_k=-1) == dict(top_k=0)
    assert of_folder(suppress_tokens=[5, 99], min_p=0.1) == dict(min_p=0.1, suppress_tokens=(5, 99))
    assert not caplog.records


def test_a_gguf_file_says_the_same_as_the_folder_it_was_made_of(caplog):
    made = of_gguf(
        temp=f32(0.6),
        top_k=20,
        top_p=f32(0.95),
        penalty_repeat=f32(1.05),
        penalty_last_n=-1,
        xtc_probability=0.0,
        mirostat=0,
        mirostat_tau=5.0,
    )
    assert made == of_folder(**QWEN) and not caplog.records
    assert of_gguf(temp=0, penalty_repeat=1.5, penalty_last_n=0) == dict(temperature=0)


def test_the_keys_of_a_file(tmp_path, caplog):
    keys = dict(
        temp=(FLOAT32, 0.6),
        top_k=(INT32, 20),
        top_p=(FLOAT32, 0.95),
        min_p=(FLOAT32, 0.01),
        penalty_repeat=(FLOAT32, 1.05),
        sequence=(STRING, "k;p;t"),
        xtc_probability=(FLOAT32, 0.1),
    )
    content = gguf_bytes({f"general.sampling.{name}": value for name, value in keys.items()}, {})
    metadata = gguf.open_file(write(tmp_path / "m.gguf", content)).metadata
    assert sampling_defaults("auto", {}, metadata, VOCABULARY) == dict(
        temperature=0.6, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.05
    )
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "xtc_probability 0.1 is not supported; ignored",
        "sequence 'k;p;t' is not supported; ignored",
    ]


def test_without_sampling_the_most_probable_token_is_taken():
    assert of_folder(**QWEN | dict(do_sample=False)) == dict(temperature=0.0, repetition_penalty=1.05)
    assert of_folder(do_sample=False) == dict(temperature=0.0)


def test_a_temperature_that_is_nearly_0_is_the_least_that_there_is():
    assert of_folder(temperature=1e-6) == dict(temperature=0.001)


@pytest.mark.parametrize(
    "bad, says",
    [
        (dict(temperature=-1), "temperature: expected a number from 0"),
        (dict(temperature="hot"), "temperature: expected"),
        (dict(top_k=2.5), "top_k: expected an integer"),
        (dict(top_k=-7), "top_k: expected"),
        (dict(top_p=1.5), "top_p: expected a number from"),
        (dict(top_p=float("inf")), "top_p: expected"),
        (dict(top_k=float("nan")), "top_k: expected"),
        (dict(min_p=True), "min_p: expected"),
        (dict(repetition_penalty=0), "repetition_penalty: expected a number from 0.01"),
        (dict(suppress_tokens=[5, 100]), "suppress_tokens: token ids must be 0 to 99, got 100"),
        (dict(suppress_tokens=7), "suppress_tokens: expected a list"),
        (dict(do_sample="no"), "do_sample: expected true"),
        (dict(typical_p=0.9), "typical_p 0.9 is not supported"),
        (dict(num_beams=4), "num_beams 4 is not supported"),
        (dict(bad_words_ids=[[1]]), "bad_words_ids"),
    ],
    ids=str,
)
def test_what_cannot_be_is_ignored_by_name(bad, says, caplog):
    assert of_folder(**dict(min_p=0.1, top_k=9.0) | bad) == {k: v for k, v in GOOD.items() if k not in bad}
    [record] = caplog.records
    assert record.getMessage().startswith("generation_config.json: ") and says in record.getMessage()
    assert record.getMessage().endswith("; ignored")


@pytest.mark.parametrize(
    "bad, says",
    [
        (dict(mirostat=2), "mirostat 2 is not supported; ignored"),
        (dict(sequence="k;p"), "sequence 'k;p'"),
        (dict(xtc_probability=0.5), "xtc_probability 0.5"),
        (dict(temp=-1.0), "temperature: expected a number from 0"),
        (dict(temp=np.zeros(2)), "temperature: expected"),
        (dict(mirostat=np.zeros(2)), "mirostat"),
        (dict(penalty_last_n=64, penalty_repeat=1.5), "penalty_last_n 64 is ignored"),
    ],
    ids=str,
)
def test_the_same_of_a_gguf_file(bad, says, caplog):
    assert of_gguf(top_k=4, **bad).pop("top_k") == 4
    [record] = caplog.records
    assert record.getMessage().startswith("the GGUF file's general.sampling: ") and says in record.getMessage()


@pytest.mark.parametrize("name", ["top_k", "temp", "top_p", "min_p", "penalty_repeat", "penalty_last_n", "mirostat"])
@pytest.mark.parametrize("value", [np.array([20, 40], np.int32), np.zeros(0, np.float32), "k", 1e300, True], ids=str)
def test_a_key_of_another_type_is_named(name, value, caplog, recwarn):
    found = of_gguf(**dict(penalty_repeat=1.5, min_p=0.1) | {name: value})
    assert (found.get("min_p"), found.get("repetition_penalty")) in ((0.1, 1.5), (0.1, None), (None, 1.5))
    shown = {"temp": "temperature", "penalty_repeat": "repetition_penalty"}.get(name, name)
    said = [record.getMessage() for record in caplog.records]
    assert all(f"sampling: {shown}" in line and "truth value" not in line for line in said) and not recwarn
    assert len(said) == 1


def test_another_source(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(dict(top_k=3)))
    config = dict(temperature=0.5)
    assert sampling_defaults("none", config, {}, 9) == {} and sampling_defaults("auto", config, {}, 9) == config
    for source in (tmp_path, tmp_path / "generation_config.json"):
        assert sampling_defaults(str(source), config, {}, 9) == dict(top_k=3)
    with pytest.raises(ValueError, match=r"generation_config: expected auto, none or a folder with .*, got 'vlmm'"):
        sampling_defaults("vlmm", config, {}, 9)


def test_defaults_in_words():
    assert (
        described(dict(temperature=0.6, top_k=20, top_p=1.0, suppress_tokens=(1, 2)))
        == "temperature 0.6, top_k 20, 2 tokens suppressed"
    )
    assert described(dict(temperature=1.0, min_p=0.0, repetition_penalty=1.0)) == "temperature 1"
    assert described(dict(suppress_tokens=(1,))) == "1 token suppressed"
    assert described({}) == described(dict(top_k=0)) == ""


def test_people_who_talk_get_a_cautious_choice_where_makers_are_silent():
    cautious = dict(temperature=0.7, top_k=0, top_p=0.95, min_p=0.0, repetition_penalty=1.0)
    assert for_talking({}) == cautious
    assert for_talking(dict(repetition_penalty=1.1, suppress_tokens=(3,))) == cautious | dict(repetition_penalty=1.1)
    assert for_talking(dict(top_k=5)) == dict(temperature=1.0, top_k=5, top_p=1.0, min_p=0.0, repetition_penalty=1.0)


# ------------------------------------------------------------ a model with wishes

PROMPT, TALK = "def read_lines(path):\n", [dict(role="user", content="Write a loop.")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The bundled model with another recommended sampling, which suppresses its most frequent tokens."""
    made = tmp_path_factory.mktemp("wishes") / "model"
    shutil.copytree(resolve_model(None), made)
    config = json.loads((made / "generation_config.json").read_text())
    wishes = dict(do_sample=True, temperature=0.8, top_k=7, repetition_penalty=1.2, suppress_tokens=[13, 14])
    (made / "generation_config.json").write_text(json.dumps(config | wishes))
    return made


@pytest.fixture(scope="module")
def server(folder):
    with running(LLM(str(folder), **SIZES)) as made:
        yield made


@pytest.fixture(scope="module")
def llm(folder):
    made = LLM(str(folder), **SIZES)
    yield made
    made.close()


def post(server, path, **body):
    answer = httpx.post(f"{server.url}{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_chat_takes_them_and_generate_does_not(llm, folder):
    ids, room = llm.chat_prompt(TALK), 1024 - len(llm.chat_prompt(TALK))
    wanted = SamplingParams(temperature=0.8, top_k=7, repetition_penalty=1.2, suppress_tokens=(13, 14), max_tokens=room)
    assert llm.chat(TALK) == llm.generate([ids], wanted)[0]
    assert llm.default_params(top_k=0, max_tokens=room) == SamplingParams(**vars(wanted) | dict(top_k=0))
    greedy = llm.generate([PROMPT])[0]
    assert greedy == llm.generate([PROMPT], SamplingParams(temperature=0.0))[0]
    assert llm.chat(TALK, SamplingParams(max_tokens=9)) == llm.generate([ids], SamplingParams(max_tokens=9))[0]


def test_who_does_not_sample_so_hears_of_nothing(folder, tmp_path, caplog, capsys):
    made = shutil.copytree(folder, tmp_path / "model")
    asked = json.loads((made / "generation_config.json").read_text())
    (made / "generation_config.json").write_text(json.dumps(asked | dict(num_beams=4, min_p=7)))
    assert main(["generate", str(made), "-p", PROMPT, "-n", "2"]) == 0
    assert (
        "(greedy, not as the model's makers ask: temperature 0.8, top_k 7, repetition_penalty 1.2, 2 tokens "
        "suppressed)\n" in capsys.readouterr().err
    )
    llm = LLM(str(made), **SIZES)
    llm.generate([PROMPT], SamplingParams(max_tokens=2))
    assert not caplog.records
    llm.chat(TALK), llm.chat(TALK)
    assert [record.getMessage().split()[1] for record in caplog.records] == ["min_p:", "num_beams"]
    llm.close()


@pytest.mark.parametrize(
    "asked, given, says",
    [
        (dict(temperature=0.8), {}, "temperature 0.8"),
        (dict(temperature=0.8), dict(temperature=0.1), ""),
        (dict(temperature=0.0, top_k=5), {}, ""),
        (dict(top_k=5), {}, "top_k 5"),
        ({}, {}, ""),
        (dict(temperature=0.0, repetition_penalty=1.5), {}, "temperature 0, repetition_penalty 1.5"),
        (dict(temperature=0.0, repetition_penalty=1.5), dict(repetition_penalty=1.5), ""),
        (dict(suppress_tokens=(3,)), {}, "1 token suppressed"),
    ],
    ids=str,
)
def test_generate_says_what_it_does_not_do(asked, given, says):
    assert ignored_sampling(asked, SamplingParams(**given)) == says


def test_every_route_takes_them_where_a_request_is_silent(server, llm):
    params = llm.default_params(seed=3, max_tokens=24)
    [text] = [made.text for made in llm.generate([PROMPT], params)]
    talk = llm.chat(TALK, params).text
    asked = dict(seed=3, messages=TALK)
    assert post(server, "/v1/completions", prompt=PROMPT, seed=3, max_tokens=24)["choices"][0]["text"] == text
    assert (
        post(server, "/v1/chat/completions", max_tokens=24, temperature=None, **asked)["choices"][0]["message"][
            "content"
        ]
        == talk
    )
    assert post(server, "/v1/messages", max_tokens=24, **asked)["content"][0]["text"] == talk
    made = post(server, "/v1/responses", input=TALK, seed=3, max_output_tokens=24)
    assert made["output"][0]["content"][0]["text"] == talk and (made["temperature"], made["top_p"]) == (0.8, 1.0)


def test_what_a_request_says_comes_first_field_by_field(server, llm):
    said = dict(temperature=0.5, repetition_penalty=1.0, seed=3, max_tokens=24)
    for more in (dict(), dict(top_k=0, suppress_tokens=[])):
        expected = llm.generate([PROMPT], llm.default_params(**said | more))[0].text
        assert post(server, "/v1/completions", prompt=PROMPT, **said | more)["choices"][0]["text"] == expected
    greedy = post(
        server, "/v1/completions", prompt=PROMPT, temperature=0, repetition_penalty=1, suppress_tokens=[], max_tokens=24
    )["choices"][0]["text"]
    assert greedy == llm.generate([PROMPT], SamplingParams(max_tokens=24))[0].text


@pytest.mark.parametrize(
    "ids, says",
    [
        ([5] * 1025, "suppress_tokens: expected at most 1024, got 1025"),
        (5, "suppress_tokens: expected an array"),
        ([1 << 20], "suppress_tokens: token ids must be 0 to"),
        ([-1], "suppress_tokens[0]: expected"),
    ],
    ids=str,
)
def test_suppressed_tokens_of_a_request_are_checked(server, ids, says):
    answer = httpx.post(f"{server.url}/v1/completions", json=dict(prompt=PROMPT, suppress_tokens=ids), timeout=60)
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(says)


def test_they_can_be_left_out(folder, llm):
    made = LLM(str(folder), generation_config="none", **SIZES)
    assert made.sampling_defaults == {} and made.default_params() == SamplingParams(temperature=1.0)
    assert made.engine.eos_ids == frozenset({0, 2})
    # a request that is silent gets another answer
    assert system_fingerprint(made) != system_fingerprint(llm)
    made.close()


def test_the_server_says_them_and_the_page_shows_them(server):
    [line] = [line for line in ready_lines(server.service, "127.0.0.1", 8000) if line.startswith("  sampling ")]
    assert "temperature 0.8, top_k 7, repetition_penalty 1.2, 2 tokens suppressed" in line
    found = httpx.get(f"{server.url}/page/figures", timeout=60).json()["sampling"]
    assert found == dict(temperature=0.8, top_k=7, top_p=1.0, min_p=0.0, repetition_penalty=1.2)


def test_chat_begins_with_them_and_options_come_first(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", Output(b"/set\n/set temperature 0.5\n/exit\n"))
    assert main(["chat", str(folder), "--top-k", "3"]) == 0
    out, err = capsys.readouterr()
    first = "temperature 0.8, top_k 3, top_p 1.0, min_p 0.0, repetition_penalty 1.2, seed 0, max_tokens 1024"
    assert out.splitlines() == [first, first.replace("0.8", "0.5")]
    assert "temperature 0.8, top_k 3, repetition_penalty 1.2, 2 tokens suppressed)\n" in err
    monkeypatch.setattr("sys.stdin", Output(b"/set\n"))
    assert main(["chat", str(folder), "--generation-config", "none", "--min-p", "0.1"]) == 0
    assert capsys.readouterr().out.startswith("temperature 0.7, top_k 0, top_p 0.95, min_p 0.1, repetition_penalty 1.0")


def test_an_answer_of_chat_never_has_what_is_suppressed(llm):
    talk = Conversation(llm, first_settings(llm.sampling_defaults, dict(seed=4, max_tokens=20)))
    talk.hear(TALK[0]["content"])
    expected = llm.generate([llm.chat_prompt(TALK)], llm.default_params(seed=4, max_tokens=20))[0]
    assert talk.messages[-1]["content"] == expected.text and not {13, 14} & {*expected.token_ids}
