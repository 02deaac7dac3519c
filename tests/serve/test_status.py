"""Models, tokenizer, health, readiness, metrics, keys and CORS."""

import threading
from types import SimpleNamespace

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lockstep import LLM
from lockstep.serve.limits import Limits
from lockstep.serve.service import Service, system_fingerprint
from tests.serve.chatting import HELLO
from tests.serve.raw import exchange, head
from tests.serve.server import SIZES, running, wait_until


def metrics(server):
    """{name and labels: value} of /metrics."""
    text = httpx.get(f"{server.url}/metrics").text
    return {
        (s.name, *s.labels.values()): s.value for family in text_string_to_metric_families(text) for s in family.samples
    }


# ---------------------------------------------------------------- models and tokenizer


def test_the_model_is_listed_and_found_by_its_name(client, server, llm):
    [listed] = client.models.list().data
    assert listed == client.models.retrieve("lockstep") and (listed.id, listed.object) == ("lockstep", "model")
    assert listed.max_model_len == 1024 and listed.system_fingerprint == system_fingerprint(llm)
    with pytest.raises(openai.NotFoundError, match="there is no 'other/model' here"):
        client.models.retrieve("other/model")


def test_a_model_answers_to_each_of_its_names_and_repeats_the_one_that_was_used():
    fields = {
        "/v1/completions": dict(prompt="x", max_tokens=1),
        "/v1/embeddings": dict(input="x"),
        "/v1/chat/completions": dict(messages=HELLO, max_tokens=1),
        "/v1/messages": dict(messages=HELLO, max_tokens=1),
        "/v1/responses": dict(input="x", max_output_tokens=1),
    }
    with running(names=["gpt-4"]) as made, httpx.Client(base_url=made.url, timeout=60) as http:
        assert [each["id"] for each in http.get("/v1/models").json()["data"]] == ["lockstep", "gpt-4"]
        for path, body in fields.items():
            for asked, said in (("gpt-4", "gpt-4"), (None, "lockstep"), ("", "lockstep"), ("lockstep", "lockstep")):
                assert http.post(path, json=body | dict(model=asked)).json()["model"] == said, path
            other = http.post(path, json=body | dict(model="gpt-5"))
            assert other.status_code == 404 and "only 'lockstep', 'gpt-4'" in other.json()["error"]["message"]
        made.service.names = None  # --any-model
        for path, body in fields.items():
            assert http.post(path, json=body | dict(model="whatever")).json()["model"] == "whatever"
        assert http.get("/v1/models/what/ever").json()["id"] == "what/ever"
        assert [each["id"] for each in http.get("/v1/models").json()["data"]] == ["lockstep"]


def test_the_fingerprint_is_on_answers_and_names_the_arithmetic(client, llm):
    made = client.completions.create(model="lockstep", prompt="x", max_tokens=1)
    assert made.system_fingerprint == system_fingerprint(llm)
    other = LLM(**SIZES, weights="f32")
    assert system_fingerprint(other) != system_fingerprint(llm)
    other.close()


def test_as_long_as_the_content_of_a_model_is_not_known_answers_carry_no_fingerprint(llm, monkeypatch):
    content, early = llm.content, SimpleNamespace(known=None)
    monkeypatch.setattr(LLM, "content", early)
    service = Service("m")
    assert service.fingerprint_field == {}, "nothing is loaded"
    service.llm = llm
    assert service.fingerprint_field == {}
    early.known, early.wait = content.wait(), content.wait
    assert service.fingerprint_field == {"system_fingerprint": system_fingerprint(llm)}


def test_a_model_whose_file_changed_while_it_was_loaded_is_never_named(llm, monkeypatch):
    class Failed:
        @property
        def known(self):
            raise ValueError("m.safetensors: the file changed")

    monkeypatch.setattr(LLM, "content", Failed())
    service = Service("m")
    service.llm = llm
    assert service.fingerprint_field == {}


@pytest.mark.parametrize("text", ["def f(x):\n    return x", "x = '\N{SNOWMAN}'", ""])
def test_text_becomes_tokens_and_text_again(server, llm, text):
    found = httpx.post(f"{server.url}/tokenize", json=dict(prompt=text, return_token_strs=True)).json()
    assert found["tokens"] == llm.encode(text) and found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 1024
    assert httpx.post(f"{server.url}/detokenize", json=dict(tokens=found["tokens"])).json() == dict(prompt=text)


def test_a_conversation_has_the_tokens_of_its_prompt(thinker):
    """/tokenize counts a conversation's tokens as an answer's usage does, whatever the form of its messages."""
    tools = [dict(type="function", function=dict(name="now"))]
    body = dict(
        messages=[
            dict(role="developer", content="Be brief."),
            dict(role="user", content=[dict(type="text", text="hello")]),
        ],
        tools=tools,
        chat_template_kwargs=dict(enable_thinking=False),
    )
    found = httpx.post(f"{thinker.url}/tokenize", json=body).json()
    answer = httpx.post(f"{thinker.url}/v1/chat/completions", json=body | dict(max_tokens=1, return_token_ids=True))
    assert found["tokens"] == answer.json()["prompt_token_ids"]
    shorter = httpx.post(f"{thinker.url}/tokenize", json=body | dict(add_generation_prompt=False)).json()["tokens"]
    assert shorter == found["tokens"][: len(shorter)] and len(shorter) < len(found["tokens"])


def test_tokenizer_info_has_what_lm_eval_asks_for(server, llm):
    info = httpx.get(f"{server.url}/tokenizer_info").json()
    assert info["eos_token"] == llm.tokenizer.special_tokens["eos_token"] and info["eos_token_id"] in llm.engine.eos_ids
    assert {"bos_token", "pad_token", "chat_template", "tokenizer_class"} <= set(info)


@pytest.mark.parametrize(
    "path, body",
    [
        ("/tokenize", {}),
        ("/tokenize", dict(prompt="x", messages=[])),
        ("/tokenize", dict(prompt=5)),
        ("/detokenize", {}),
        ("/detokenize", dict(tokens=[-1])),
        ("/detokenize", dict(tokens=[1 << 40])),
        ("/detokenize", dict(tokens="x")),
    ],
    ids=str,
)
def test_what_cannot_be_tokenized_is_refused(server, path, body):
    got = httpx.post(server.url + path, json=body)
    assert got.status_code == 400 and got.json()["error"]["param"] in ("prompt", "tokens", "tokens[0]")


# ---------------------------------------------------------------- health and metrics


def test_an_unknown_path_and_method_have_error_objects(server):
    for got, status in ((httpx.get(f"{server.url}/v2/models"), 404), (httpx.get(f"{server.url}/v1/completions"), 405)):
        assert got.status_code == status and set(got.json()["error"]) == {"message", "type", "param", "code"}
    assert got.headers["allow"] == "POST" and "takes POST, got GET" in got.json()["error"]["message"]


@pytest.mark.parametrize("path", ["//v1/models", "/v1//models", "///v1/models"])
def test_slashes_in_a_row_are_one(server, path):
    assert exchange(server, head(path, "GET", Connection="close"))[0] == 200
    with running(api_keys=["right"]) as made:
        assert exchange(made, head(path, "GET", Connection="close"))[0] == 401


def test_metrics_count_tokens_answers_and_times(server, client):
    before = metrics(server)
    answer = client.completions.create(
        model="lockstep", prompt="def f(", max_tokens=9, temperature=0, extra_body=dict(ignore_eos=True), n=2
    )
    # so many tokens that the client reads several pieces, even on a busy machine
    long = dict(max_tokens=900, stream=True, extra_body=dict(ignore_eos=True))
    list(client.completions.create(model="lockstep", prompt="def f(", **long))
    httpx.post(f"{server.url}/v1/completions", content=b"{")
    after = metrics(server)
    moved = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    assert moved[("lockstep_prompt_tokens_total",)] == 2 * answer.usage.prompt_tokens
    assert moved[("lockstep_generated_tokens_total",)] == 2 * 9 + 900
    assert moved[("lockstep_responses_total", "200")] == 3 and moved[("lockstep_responses_total", "400")] == 1
    for name in ("time_to_first_token", "request"):
        assert moved[(f"lockstep_{name}_seconds_count",)] == moved[(f"lockstep_{name}_seconds_bucket", "+Inf")] == 2
    assert moved[("lockstep_inter_token_seconds_count",)] > 0 and moved[("lockstep_inter_token_seconds_sum",)] > 0
    assert after[("lockstep_open_requests",)] == after[("lockstep_running",)] == after[("lockstep_waiting",)] == 0


def test_health_and_readiness_follow_the_engine(caplog):
    service = Service("lockstep")
    assert service.state == "loading"
    with running(max_requests=2) as made:
        health, ready = f"{made.url}/health", f"{made.url}/ready"
        assert httpx.get(health).status_code == httpx.get(ready).status_code == 200
        step, hold, failing = made.service.engine.engine.step, threading.Event(), []

        def slow_step():
            hold.wait(60)
            if failing:
                raise RuntimeError("secret detail")
            return step()

        made.service.engine.engine.step = slow_step
        answers = []

        def ask():
            answers.append(httpx.post(f"{made.url}/v1/completions", json=dict(prompt="x", max_tokens=2), timeout=60))

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: made.service.engine.seconds_in_step > 0.2)
        assert httpx.get(health).status_code == 200
        object.__setattr__(made.service.limits, "stuck_seconds", 0.2)
        stuck = httpx.get(health)
        assert stuck.status_code == httpx.get(ready).status_code == 503 and "stuck" in stuck.json()["reason"]
        refused = httpx.post(f"{made.url}/v1/completions", json=dict(prompt="x"))
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "engine"
        failing.append(True)
        hold.set()
        asking.join(60)
        dead = httpx.get(health)
        assert dead.status_code == 503 and dead.json()["reason"] == "the engine stopped, the log says why"
        assert answers[0].status_code == 503 and "secret" not in answers[0].text
        assert answers[0].json()["error"]["type"] == "server_error"
        [logged] = [record for record in caplog.records if record.message == "the engine stopped"]
        assert "secret detail" in str(logged.exc_info[1])


def test_a_fault_of_the_server_says_nothing_about_itself(caplog):
    with running() as made:
        made.service.tokenizer = None.__class__  # any object that is no tokenizer
        got = httpx.post(f"{made.url}/v1/completions", json=dict(prompt="x"))
    assert got.status_code == 500 and set(got.json()["error"]) == {"message", "type", "param", "code"}
    assert "NoneType" not in got.text and "encode" not in got.text and "encode" in caplog.text


def test_an_engine_that_is_stuck_does_not_keep_a_server_from_ending(monkeypatch):
    monkeypatch.setattr("lockstep.serve.service.CLOSE_SECONDS", 0.2)
    hold = threading.Event()
    with running(limits=Limits(drain_seconds=0.1)) as made:
        made.service.engine.engine.step = lambda: hold.wait(60) and []
        answers = []
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{made.url}/v1/completions", json=dict(prompt="x"), timeout=60))
        )
        asking.start()
        wait_until(lambda: made.service.engine.seconds_in_step > 0)
        made.server.handle_exit(15, None)
        wait_until(lambda: made.service.state == "closed")
        asking.join(60)
        assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "shutting_down")
        hold.set()


# ---------------------------------------------------------------- API keys and CORS


def test_a_key_opens_everything_and_only_health_and_the_page_s_files_are_open_without():
    with running(api_keys=["right", "other"]) as made:
        paths = [
            "/health",
            "/ready",
            "/",
            "/metrics",
            "/v1/models",
            "/tokenizer_info",
            "/nowhere",
            "/page/figures",
            "/v1/completions",
        ]
        status = {path: httpx.get(made.url + path).status_code for path in paths}
        assert status == {path: 401 for path in paths} | {"/health": 200, "/ready": 200, "/": 200}
        wrong = [
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Bearer"},
            {"Authorization": "Basic right"},
            {"Authorization": "right"},
            {"x-api-key": "righ"},
            {"Authorization": "Bearer right2"},
        ]
        assert {httpx.get(f"{made.url}/v1/models", headers=h).status_code for h in wrong} == {401}
        right = [{"Authorization": "Bearer right"}, {"Authorization": "bearer other"}, {"x-api-key": "right"}]
        assert {httpx.get(f"{made.url}/v1/models", headers=h).status_code for h in right} == {200}
        with pytest.raises(openai.AuthenticationError) as caught:
            openai.OpenAI(base_url=f"{made.url}/v1", api_key="wrong").models.list()
        assert caught.value.code == "invalid_api_key"
        assert httpx.get(f"{made.url}/v1/messages").json()["type"] == "error"


def test_other_pages_may_call_only_where_they_are_allowed(server):
    asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in httpx.options(f"{server.url}/v1/completions", headers=asked).headers
    assert "access-control-allow-origin" not in httpx.get(f"{server.url}/health", headers=asked).headers
    with running(cors_origins=["https://example.org"]) as made:
        got = httpx.options(f"{made.url}/v1/completions", headers=asked)
        assert got.headers["access-control-allow-origin"] == "https://example.org" and got.status_code == 200
        other = httpx.options(f"{made.url}/v1/completions", headers=asked | {"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        granted = "access-control-allow-private-network"
        assert granted not in got.headers
        asked_more = asked | {"Access-Control-Request-Private-Network": "true"}
        got = httpx.options(f"{made.url}/v1/completions", headers=asked_more)
        assert got.status_code == 200 and got.headers[granted] == "true"
        for other in ("false", "", "0"):
            not_asked = asked_more | {"Access-Control-Request-Private-Network": other}
            got = httpx.options(f"{made.url}/v1/completions", headers=not_asked)
            assert got.status_code == 200 and granted not in got.headers
        other = httpx.options(f"{made.url}/v1/completions", headers=asked_more | {"Origin": "https://evil.example"})
        assert other.status_code == 400 and granted not in other.headers
        assert granted not in httpx.options(f"{server.url}/v1/completions", headers=asked_more).headers
        sent = dict(json=dict(prompt="x", max_tokens=1))
        assert httpx.post(f"{made.url}/v1/completions", headers=asked, **sent).status_code == 200
