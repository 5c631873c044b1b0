"""An OpenAI-compatible server on loopback that plays scripts: the question says which (``play NAME``)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import sys
import threading
from collections import Counter

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse


def call(name, arguments, identity="c1"):
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments)
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def says(content="", *calls, finish="stop"):
    message = {"role": "assistant", "content": content, **({"tool_calls": list(calls)} if calls else {})}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish}]}


def search(query):
    return says("", call("text_search", {"query": query}))


def answer(text):
    return says(f"<answer>{text}</answer>")


LOOK = says("", call("zoom", {"image": 1, "bbox": [0, 0, 500, 500]}))
TEXT_CALL = says('Let me look.\n<tool_call>\n{"name": "text_search", "arguments": {"query": "fact 7"}}\n</tool_call>')

ZOOMS = "\n".join(
    f'<tool_call>\n{{"name": "zoom", "arguments": {{"image": {image}}}}}\n</tool_call>' for image in (1, 1)
)

# What the model says, turn by turn; the last goes on.
SCRIPTS = {
    "direct": [answer("value 1")],
    "wrong": [answer("nonsense")],
    "plain": [says("value 1")],
    "search": [search("fact 2"), answer("value 2")],
    "zoom": [LOOK, says("", call("zoom", {"image": 2, "bbox": [0, 0, 9, 9]})), search("fact 3"), answer("value 3")],
    "zooms": [says(ZOOMS), answer("value 1")],
    "hermes": [TEXT_CALL, answer("value 7")],
    "malformed": [says("", call("text_search", "{query")), search("fact 4"), answer("value 4")],
    "broken": [says("<tool_call>{'name': 1</tool_call>")],
    "unknown": [says("", call("teleport", {})), answer("value 5")],
    "silly": [search(17), answer("value 6")],
    "two": [
        says("", call("text_search", {"query": "fact 2"}, "a"), call("text_search", {"query": "fact 3"}, "b")),
        answer("value 3"),
    ],
    # Half a surrogate pair as a turn's text, a tool's name, and an argument.
    "halves": [
        says("\ud83d", call("\ud83d", {})),
        says("\ud83d", call("text_search", {"query": "\ud83d"}), call("text_search", '{"query": "\ud83d"}', "c2")),
        says('<tool_call>{"name": "text_search", "arguments": {"query": "\\ud83d"}}</tool_call>'),
        answer("value 1 \ud83d"),
    ],
    # And as a call's id; as the name of a malformed call and of one whose arguments are no object.
    "ids": [
        says("", call("text_search", {"query": "fact 2"}, "functions.\ud83d:0")),
        says("", call("\ud83d", "{query", "\ud83d"), call("sea\ud83drch", "[1]", "c2"), call("zoom", "{", "c3")),
        says('<tool_call>{"name": \ud83d</tool_call>\n<tool_call>{"name": "\\ud83d", "arguments": 1}</tool_call>'),
        answer("value 1"),
    ],
    "names": [says("", call("text_search", {"query": "fact 1"}), call("teleport", {}, "c2"))],
    "endless": [search("fact 1")],
    "cut": [says("I thought about", finish="length")],
    "long": [search("fact 1"), 400],
    "outage": [search("down"), answer("value 8")],
    "500": [500],
    "flaky": [500, answer("value 9")],
    "hang": ["hang"],
    "403": [403],
    "no_number": [{**answer("value 1"), "usage": {"prompt_tokens": "many"}}],
    "parts": [{**says([{"type": "text", "text": "value 1"}])}],
    "refuses": [says("", call("text_search", {"query": "fact 1"})), 422],
}
ERRORS = {
    400: {"error": {"message": "This model's maximum context length is 4096 tokens. However, you requested 9000."}},
    403: {"error": {"message": "no access"}},
    422: {"error": {"message": "strange tool message"}},
    500: {"error": {"message": "engine died"}},
}


def make_app(requests, headers, delay_s=0.0, dead=frozenset()):
    app = FastAPI()
    asked = Counter()

    @app.get("/health")
    async def health():
        return {}

    @app.get("/v1/models")
    async def models():
        return {"data": [{"id": "player"}]}

    @app.post("/v1/chat/completions")
    async def complete(request: Request):
        body = await request.json()
        requests.append(body)
        headers.append(dict(request.headers))
        text = json.dumps([message for message in body["messages"] if message["role"] == "user"][:1])
        name = re.search(r"play (\w+)", text)[1]
        await asyncio.sleep(delay_s)
        script = SCRIPTS[name]
        turn = sum(message["role"] == "assistant" for message in body["messages"])
        if name == "flaky":
            turn = asked[text]
            asked[text] += 1
        act = script[min(turn, len(script) - 1)]
        if name in dead:
            act = 500
        if act == "hang":
            await asyncio.sleep(20)
        if isinstance(act, int):
            return JSONResponse(ERRORS[act], act)
        usage = {"prompt_tokens": 100 * (turn + 1), "completion_tokens": 10}
        return Response(json.dumps({"usage": usage, **act}), media_type="application/json")

    return app


class Server:
    """In a thread; ``requests`` are those that came, ``headers`` theirs."""

    def __init__(self, **settings):
        self.requests, self.headers = [], []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        config = uvicorn.Config(make_app(self.requests, self.headers, **settings), log_level="error", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(10)


if __name__ == "__main__":  # as `vllm serve`
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.run(make_app([], []), host="127.0.0.1", port=int(sys.argv[sys.argv.index("--port") + 1]))
