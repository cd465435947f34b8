"""A teacher server that fails, asked by TRL's own client over HTTP: what is tried again or said."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("requests")

from tiny_models import tiny_model
from trl_pairs import TOKENIZER, batch, make
from urllib3.util.retry import Retry

from fused_sd.integrations.trl import FusedSDPOTrainer

TOP_K = 3
DRIFT = "self_distillation/server_logprob_abs_diff"


def scores(sequence):
    """vLLM's ``prompt_logprobs``: the sequence's own token first, and two others."""
    found = [None]
    for token in sequence[1:]:
        ids = [token, (token + 1) % len(TOKENIZER), (token + 2) % len(TOKENIZER)]
        found.append({str(i): {"logprob": -1.0 - n, "rank": n + 1} for n, i in enumerate(ids)})
    return found


def answer(prompts):
    return {"choices": [{"prompt_logprobs": scores(sequence)} for sequence in prompts]}


def without_a_choice(prompts):
    return {"choices": answer(prompts)["choices"][:-1]}


def too_short(prompts):
    return {"choices": [{"prompt_logprobs": scores(sequence)[:-1]} for sequence in prompts]}


def with_nan(prompts):
    found = answer(prompts)
    found["choices"][0]["prompt_logprobs"][-1][str(prompts[0][-1])]["logprob"] = float("nan")
    return found


def late(prompts):
    time.sleep(0.3)
    return answer(prompts)


class Handler(BaseHTTPRequestHandler):
    """Answers the requests for scores by the server's ``script``, whose last entry stays."""

    def do_GET(self):
        self.reply(200, {"data": [{"id": "teacher"}]})

    def do_POST(self):
        prompts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        script, self.server.num_asked = self.server.script, self.server.num_asked + 1
        act = script.pop(0) if len(script) > 1 else script[0]
        if act == "breaks":
            self.connection.close()
            self.close_connection = True
        elif isinstance(act, int):
            self.reply(act, {"error": "busy"})
        elif isinstance(act, str):
            self.reply(200, act)
        else:
            self.reply(200, act(prompts))

    def reply(self, status, content):
        body = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """Of a connection that a test breaks."""


@pytest.fixture
def server():
    made = Server(("127.0.0.1", 0), Handler)
    made.num_asked = 0
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def trainer(server, tmp_path, monkeypatch):
    client = pytest.importorskip("trl.generation.vllm_client")
    monkeypatch.setattr(client, "is_vllm_available", lambda: True)
    monkeypatch.setattr(Retry, "get_backoff_time", lambda self: 0.0)  # up to 8 s each
    torch.manual_seed(0)
    settings = {"teacher_model_kind": "live", "distillation_mode": "topk_logits"}
    made = make(
        FusedSDPOTrainer,
        tmp_path,
        model=tiny_model(vocab=len(TOKENIZER), max_position_embeddings=512),
        distillation_topk=TOP_K,
        distillation_add_tail=True,
        distillation_alpha=0.0,
        **settings,
    )
    made.teacher_client = client.VLLMClient(f"http://127.0.0.1:{server.server_address[1]}")
    made._last_loaded_step = made.state.global_step  # the server has the student's weights
    made.model.train()
    return made


def loss_of(trainer):
    return trainer._compute_server_distillation_loss(trainer.model, batch())


SCRIPTS = {
    "late": [late],
    "busy once": [503, answer],
    "fails twice": [500, 500, answer],
    "breaks once": ["breaks", answer],
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_what_comes_late_or_the_second_time_counts_once(script, server, trainer):
    server.script = [answer]
    wanted = loss_of(trainer)
    server.script, server.num_asked, number = list(script), 0, len(script)
    trainer._metrics["train"].clear()
    assert torch.equal(loss_of(trainer), wanted)
    assert server.num_asked == number
    assert len(trainer._metrics["train"][DRIFT]) == 1


FAILURES = {  # by name: what the server does, how often it is asked, and what is said
    "HTTP 500": (500, 4, "gave no scores: .*too many 500 error responses"),
    "connections break": ("breaks", 6, "gave no scores: .*Max retries exceeded"),
    "HTTP 404": (404, 1, "gave no scores: .*Request failed: 404"),
    "no JSON": ("<html>", 1, "gave no scores: JSONDecodeError"),
    "other JSON": ("{}", 1, "gave no scores: KeyError.*choices"),
    "a choice missing": (without_a_choice, 1, "gave no scores: ValueError.*longer"),
    "scores missing": (too_short, 1, "returned no logprob for a required completion token"),
    "NaN": (with_nan, 1, "returned no logprob for a required completion token"),
}


@pytest.mark.parametrize("act, num_asked, message", FAILURES.values(), ids=FAILURES)
def test_a_server_that_fails_ends_the_run_before_a_step(act, num_asked, message, server, trainer):
    server.script = [act]
    with pytest.raises((RuntimeError, ValueError), match=message):
        loss_of(trainer)
    assert server.num_asked == num_asked
    assert not trainer._metrics["train"][DRIFT]
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
