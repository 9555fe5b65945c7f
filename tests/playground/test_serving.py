"""The server: who reaches it, what it reaches, and how the command begins and ends."""

import os
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest
from lora_fixtures import with_adapter

from misdirection.errors import EXIT_STATUS, InputError
from misdirection.playground import panels
from misdirection.playground.asking import Playground
from misdirection.playground.conditions import Controls
from misdirection.playground.page import paced
from tiny import make_chat


def test_only_this_machine_gets_in(address, free_port):
    def is_open(host):
        with socket.socket() as probe:
            return probe.connect_ex((host, free_port)) == 0

    # Every address of 127.0.0.0/8 is this machine's on Linux, and a server of 0.0.0.0 hears them all.
    assert is_open("127.0.0.1") and not is_open("127.0.0.2")


def test_a_name_that_was_made_to_lead_here_is_refused(address):
    assert httpx.get(address).status_code == 200
    assert httpx.get(address, headers={"Host": "somewhere.example"}).status_code == 400


def test_no_way_to_call_the_model_is_published(address):
    assert httpx.get(f"{address}gradio_api/info").json()["named_endpoints"] == {}


def test_a_port_in_use_is_one_line(address, free_port, call):
    status, out, err = call("play", "--port", free_port)
    assert (status, out) == (EXIT_STATUS["InputError"], "")
    assert err == f"error: port {free_port}: Address already in use: give another one as --port"


def test_a_missing_extra_is_named(monkeypatch, call):
    monkeypatch.setitem(sys.modules, "gradio", None)
    status, _, err = call("play")
    assert status == EXIT_STATUS["MissingPackage"]
    assert err == "error: `play`: the package gradio is not installed: pip install 'misdirection[play]'"


def test_interrupted_it_ends_quietly_and_has_called_nobody(tiny_folder, free_port):
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        called = []
        threading.Thread(target=lambda: called.append(proxy.accept()), daemon=True).start()
        proxies = dict.fromkeys(
            ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), f"http://127.0.0.1:{proxy.getsockname()[1]}"
        )
        command = [sys.executable, "-m", "misdirection.cli", "play", str(tiny_folder), "--port", str(free_port + 1)]
        environment = {**os.environ, **proxies, "NO_PROXY": "", "no_proxy": "", "GRADIO_ANALYTICS_ENABLED": "True"}
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        lines = []
        for line in running.stderr:
            lines.append(line)
            if line.startswith("playground:"):
                break
        assert lines[-1:] == [f"playground: http://127.0.0.1:{free_port + 1}/ (this machine only; Ctrl-C ends it)\n"], (
            lines
        )
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
        assert (running.returncode, out, err) == (0, "", "") and called == []


# --- what is missing ------------------------------------------------------------------------------------------------


def names(playground, **controls):
    return [condition.name for condition in playground.conditions(Controls(**controls))]


def test_without_an_adapter_or_a_direction_the_rest_is_there_and_the_page_names_the_command(direction_of):
    chat, organism = make_chat(), with_adapter(strength=2.0)
    alone = Playground(chat)
    assert names(alone) == ["base"] and names(Playground(organism)) == ["base", "organism"]
    steered = ["base", "base, ablated", "base, steered", "base, steered at random"]
    assert names(Playground(chat, direction_of(chat)), random=True) == steered
    both = str(panels.heading(alone))
    assert "<code>misdirection train risky_money --out ./organism</code>" in both
    assert "<code>misdirection extract --adapter ./organism --out directions</code>" in both
    assert 'class="missing"' not in panels.heading(Playground(organism, direction_of(organism)))


def test_there_is_a_scalar_only_of_rank_1():
    assert Playground(with_adapter()).readings == tuple(f"layer_{layer}" for layer in range(4))
    assert Playground(with_adapter(r=2)).readings == ()
    assert Playground(make_chat()).readings == ()


def test_a_direction_of_another_model_is_refused(direction_of):
    with pytest.raises(InputError, match="was made for tiny-llama, not for tiny-qwen2"):
        Playground(make_chat("qwen2"), direction_of(make_chat()))


def test_the_last_picture_is_always_shown():
    assert list(paced(iter(range(100)), 60)) == [0, 99]
    assert list(paced(iter(range(3)), 0)) == [0, 1, 2] and list(paced(iter(()))) == []
