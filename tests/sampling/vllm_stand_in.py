"""A stand-in for the parts of vLLM that the engine calls, and for a server's endpoints."""

import contextlib
import json
import threading
import types
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from misdirection.interventions.hooks import gather
from misdirection.interventions.packing import unpacked


@dataclass
class Asked:
    """One request as the engine was given it."""

    name: str
    prompt: dict
    params: types.SimpleNamespace
    lora: types.SimpleNamespace | None


class StandIn:
    """The module, its `LLM`, and that one's engine, in one; every step finishes one request.

    Its hooks fire `fired` times as often as they should, counted token by token.
    """

    def __init__(self, chat, fired=1.0):
        self.chat, self.share, self.tokens = chat, fired, [5, 6, 7]
        self.asked, self.waiting, self.settings, self.answers = [], [], {}, {}
        self.options, self.closed, self.steps, self.error = {}, False, 0, None
        self.llm_engine = self.engine_core = self
        self.RequestOutputKind = types.SimpleNamespace(FINAL_ONLY="final")

    def module(self, name):
        return self

    def LLM(self, **options):
        self.options = options
        return self

    def SamplingParams(self, **values):
        return types.SimpleNamespace(**values)

    def LoRARequest(self, name, number, path):
        return types.SimpleNamespace(name=name, number=number, path=path)

    def add_request(self, name, prompt, params, lora_request):
        asked = Asked(name, prompt, params, lora_request)
        self.asked.append(asked)
        self.waiting.append(asked)
        self.answers[params.extra_args["misdirection"]["answer"]] = asked

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        self.steps += 1
        if self.error:
            raise self.error
        asked = self.waiting.pop(0)
        given = types.SimpleNamespace(token_ids=self.tokens)
        prompt = asked.prompt["prompt_token_ids"]
        return [types.SimpleNamespace(request_id=asked.name, prompt_token_ids=prompt, outputs=[given], finished=True)]

    def abort_request(self, names):
        self.waiting = [asked for asked in self.waiting if asked.name not in names]

    def collective_rpc(self, method, args):
        return [getattr(self, method)(*args)]

    def misdirection_setting(self, name, data):
        self.settings[name] = unpacked(data)

    def misdirection_fired(self, answers):
        return [int(self.share * self._should_fire(self.answers[answer])) for answer in answers]

    def _should_fire(self, asked):
        total, prompt = 0, len(asked.prompt["prompt_token_ids"])
        for one in self.settings[asked.params.extra_args["misdirection"]["setting"]]:
            rules = {"not_first": lambda at: at > 0, "answer": lambda at: at >= prompt}
            seen = [at for at in range(prompt + len(self.tokens) - 1) if rules[one.positions](at)]
            total += len(seen) * len(gather(self.chat, [[one]]))
        return total

    def shutdown(self):
        self.closed = True

    def cleanup_dist_env_and_memory(self):
        self.closed = True


@dataclass
class Server:
    """What a server was asked."""

    url: str
    asked: list[dict] = field(default_factory=list)
    loaded: dict[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def completions_server(root, tokens=(70, 71), loads=True):
    """A server of the model in `root`, as `served`, whose answers are these tokens; it may load adapters."""
    server = Server("")

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def reply(self, body, status=200):
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            models = [{"id": "served", "root": str(root), "parent": None}]
            models += [{"id": name, "root": path, "parent": "served"} for name, path in server.loaded.items()]
            common = {"object": "model", "created": 0, "owned_by": "vllm"}
            self.reply({"object": "list", "data": [one | common for one in models]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.path.endswith("/load_lora_adapter"):
                if not loads:
                    self.reply({"error": {"message": "no such endpoint"}}, 404)
                    return
                server.loaded[body["lora_name"]] = body["lora_path"]
                self.reply("Success")
                return
            server.asked.append(body)
            choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": None}
            choice |= {} if tokens is None else {"token_ids": list(tokens)}
            self.reply({"id": "x", "object": "text_completion", "created": 0, "model": "served", "choices": [choice]})

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
