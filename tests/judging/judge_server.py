"""A real OpenAI-style HTTP server on loopback whose replies are scripted."""

import contextlib
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Reply:
    """What goes over the wire. `cut` sends only half of the body, `silence` waits first, `pause` after each byte.

    What is `paid` is answered the same to a request with the same idempotency key.
    """

    body: bytes
    status: int = 200
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
    cut: bool = False
    silence: float = 0.0
    pause: float = 0.0
    paid: bool = False


def completion(text="", top=None, *, tokens=None, finish="stop", refusal=None, model=None, **choice) -> Reply:
    """A chat completion; `top` gives the first token's alternatives as {token: probability}."""
    message = {"role": "assistant", "content": text, "refusal": refusal}
    made = {"index": 0, "message": message, "finish_reason": finish, **choice}
    if top is not None:
        alternatives = [{"token": token, "logprob": math.log(mass)} for token, mass in top.items()]
        first = {"token": tokens[0] if tokens else text, "logprob": -0.1, "top_logprobs": alternatives}
        rest = [{"token": token, "logprob": -0.1, "top_logprobs": []} for token in (tokens or [])[1:]]
        made["logprobs"] = {"content": [first, *rest]}
    usage = {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11}
    body = {"id": "x", "object": "chat.completion", "choices": [made], "usage": usage}
    return Reply(json.dumps(body | ({"model": model} if model else {})).encode(), paid=True)


def number(value: int) -> Reply:
    """A completion that is sure of one number."""
    return completion(str(value), {str(value): 0.99})


def status(code: int, message: str = "scripted", *, error_code: str | None = None, **headers: str) -> Reply:
    """An error in OpenAI's form; `retry_after="1"` becomes a header."""
    body = json.dumps({"error": {"message": message, "type": "scripted", "code": error_code}}).encode()
    return Reply(body, code, headers=tuple((name.replace("_", "-"), value) for name, value in headers.items()))


@dataclass(frozen=True)
class Asked:
    """One request as it arrived, and how many with the same prompt came before it."""

    prompt: str
    body: dict
    headers: dict
    before: int
    time: float


def lower(headers) -> dict[str, str]:
    """Headers by name in small letters."""
    return {name.lower(): value for name, value in headers.items()}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # By default five may wait to be taken in: of sixteen that come at once, one is refused now and then.
    request_queue_size = 128


class JudgeServer:
    """Serves until the context ends. A request whose idempotency key was answered before costs nothing again."""

    def __init__(self, script: Callable[[Asked], Reply]) -> None:
        self.script = script
        self.asked: list[Asked] = []
        self.paid: Counter = Counter()
        self._answered: dict[str, Reply] = {}
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    @property
    def prompts(self) -> list[str]:
        return [asked.prompt for asked in self.asked]

    def reply(self, body: dict, headers: dict) -> Reply:
        key = headers.get("idempotency-key", "")
        prompt = body["messages"][0]["content"]
        with self._lock:
            before = sum(one.prompt == prompt for one in self.asked)
            asked = Asked(prompt, body, headers, before, time.monotonic())
            self.asked.append(asked)
            if key in self._answered:
                return self._answered[key]
        made = self.script(asked)
        with self._lock:
            if made.paid and key not in self._answered:
                self._answered[key] = made
                self.paid[key] += 1
        return made

    def _handler(server):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Else a reply's body waits until the client has owned to its head, which takes it 40 ms.
            disable_nagle_algorithm = True

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                reply = (
                    server.reply(body, lower(self.headers))
                    if self.path.endswith("/v1/chat/completions")
                    else status(404)
                )
                time.sleep(reply.silence)
                self.send_response(reply.status)
                for name, value in (("Content-Type", reply.content_type), *reply.headers):
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                body = reply.body[: len(reply.body) // 2] if reply.cut else reply.body
                for part in [body[n : n + 1] for n in range(len(body))] if reply.pause else [body]:
                    self.wfile.write(part)
                    time.sleep(reply.pause)
                self.close_connection = reply.cut

            def handle(self):
                # A client that is killed or gives up is part of the script.
                with contextlib.suppress(OSError):
                    super().handle()

            def log_message(self, *_):
                pass

        return Handler
