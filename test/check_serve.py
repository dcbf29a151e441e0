"""What a server answers:

    python3 test/check_serve.py RUN MODEL PARROT FOLDER
"""
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

from serve_client import (CHAT, CHAT_CHUNK, ERROR, PLAIN, PLAIN_CHUNK,
                          Connection, Server, fits)
from tally import finish, holds

run, model, parrot, folder = sys.argv[1:5]
CHAT_PATH, PLAIN_PATH = "/v1/chat/completions", "/v1/completions"
QUESTION = [{"role": "user", "content": "What is a short convolution?"}]
LONG = {"prompt": "Once upon a time", "max_tokens": 3000, "stream": True,
        "temperature": 1, "logit_bias": {"7": -1000, "2": -1000}}


def chat(**more):
    return {"messages": QUESTION, "max_tokens": 16, "temperature": 0, **more}


def plain(**more):
    return {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0,
            **more}


def path_in(name, data=""):
    path = os.path.join(folder, name)
    with open(path, "w") as f:
        f.write(data)
    return path


def refused(what, answer, status, word=""):
    """An error is an object that OpenAI's clients understand."""
    found = answer.body.decode()
    holds(what, answer.status == status and fits(answer.json(), ERROR) and
          word in found, answer)


def raw(server, data, seconds=30):
    """All answers to these bytes, until the server closes."""
    c = server.connect(seconds)
    c.send(data)
    said = b""
    try:
        while piece := c.socket.recv(1 << 16):
            said += piece
    except ConnectionResetError:
        pass
    c.close()
    return said


def statuses(said):
    return [int(x) for x in re.findall(rb"HTTP/1\.1 (\d{3}) ", said)]


# ------------------------------------------------------------------- endpoints

def check_endpoints(server):
    a = server.ask("GET", "/health")
    holds("health", a.status == 200 and a.json() == {"status": "ok"}, a)
    holds("its head", {"date", "x-request-id", "content-length", "connection",
                       "content-type"} == set(a.fields), a)
    a = server.ask("GET", "/v1/health?x=1")
    holds("a query is no part of a path", a.status == 200, a)
    a = server.ask("GET", "/v1/models")
    one = {"id": str, "object": "model", "created": int, "owned_by": str,
           "max_model_len": int}
    holds("models", fits(a.json(), {"object": "list", "data": [one]}), a)
    name = a.json()["data"][0]["id"]
    a = server.ask("GET", "/v1/models/" + name)
    holds("a model", fits(a.json(), one) and a.json()["id"] == name, a)
    refused("another model", server.ask("GET", "/v1/models/gpt-4"), 404,
            "model")
    for path in ("/", "/v2", "/v1/embeddings", "/v1/models/../../etc/passwd",
                 "/%2e%2e/health", "/health%00", "//health", "/health/"):
        refused(path, server.ask("GET", path), 404)
    for method, path, allowed in (
            ("GET", CHAT_PATH, "POST, OPTIONS"),
            ("POST", "/health", "GET, HEAD, OPTIONS"),
            ("DELETE", "/v1/models", "GET, HEAD, OPTIONS"),
            ("BREW", "/metrics", "GET, HEAD, OPTIONS"),
            ("get", "/health", "GET, HEAD, OPTIONS"),
            ("GET,", "/health", "GET, HEAD, OPTIONS"),
            ("PUT", "/tokenize", "POST, OPTIONS")):
        a = server.ask(method, path)
        refused(method + " " + path, a, 405)
        holds("what is allowed", a.fields.get("allow") == allowed, a)
    for path in "/health", "/metrics", "/v1/models":
        a, b = server.ask("HEAD", path), server.ask("GET", path)
        holds("HEAD " + path, a.status == 200 and "content-length" in a.fields
              and a.fields["content-type"] == b.fields["content-type"], a)
    for path in "/health", CHAT_PATH, "/tokenize":
        a = server.ask("OPTIONS", path)
        holds("OPTIONS " + path, a.status == 204 and "allow" in a.fields, a)
    metrics = server.ask("GET", "/metrics").body.decode()
    line = r"(# (HELP|TYPE) lfm2_\w+ .+|lfm2_\w+(\{\w+=\"[^\"]+\"\})? \S+)"
    holds("metrics", all(re.fullmatch(line, x) for x in metrics.splitlines())
          and "lfm2_first_token_seconds_bucket" in metrics, metrics)


def check_words(server):
    for text in "What is LFM2?", "", "a\n\u00e9\U0001f40d <|im_end|>":
        a = server.post("/tokenize", {"content": text})
        holds("tokenize", fits(a.json(), {"tokens": [int], "count": int}) and
              a.json()["count"] == len(a.json()["tokens"]), a)
        b = server.post("/detokenize", {"tokens": a.json()["tokens"]})
        holds("detokenize", b.json() == {"content": text}, b)
    said = subprocess.run([run, "--tokenize", "--bos", model, "A short one"],
                          capture_output=True, text=True).stdout.split()
    a = server.post("/tokenize", {"content": "A short one",
                                  "add_special": True})
    holds("as --tokenize does", [str(x) for x in a.json()["tokens"]] == said, a)
    a = server.post("/tokenize", {"content": "<|im_end|>",
                                  "parse_special": True})
    holds("a control token", a.json()["count"] == 1, a)
    refused("no content", server.post("/tokenize", {}), 400, "content")
    refused("no flag", server.post("/tokenize", {
        "content": "", "add_special": 1}), 400, "add_special")
    for tokens in None, "1", [-1], [1.5], ["1"], [10**9], {"a": 1}:
        refused("tokens: %s" % tokens, server.post("/detokenize", {
            "tokens": tokens}), 400, "tokens")


def check_bodies(server):
    """What is wrong with a body is said, and the connection stays."""
    c = server.connect()
    for path, body, word in (
            (CHAT_PATH, b"", "expected"), (CHAT_PATH, b"[]", "JSON object"),
            (CHAT_PATH, b'{"a":1} x', "column"), (CHAT_PATH, b"{}", "messages"),
            (CHAT_PATH, b'\xef\xbb\xbf{}', ""), (CHAT_PATH, b'{"a":1e999}', ""),
            (CHAT_PATH, b'{"messages":[{"role":"user","content":"\xff"}]}', ""),
            (CHAT_PATH, b"[" * 100, ""),
            (CHAT_PATH, plain(), "messages"), (PLAIN_PATH, chat(), "prompt"),
            (CHAT_PATH, chat(n=0), '\\"n\\"'), (CHAT_PATH, chat(n=10**9), "n"),
            (CHAT_PATH, chat(temperature=-1), "temperature"),
            (CHAT_PATH, chat(stream="yes"), "stream"),
            (CHAT_PATH, chat(stop=[""]), "stop"),
            (CHAT_PATH, chat(seed=1.5), "from -9000000000000000000 to"),
            (CHAT_PATH, chat(nonsense=1), "nonsense"),
            (CHAT_PATH, chat(logit_bias={"99999999": 1}), "logit_bias"),
            (CHAT_PATH, chat(logit_bias={" 5": 1}), "logit_bias"),
            (CHAT_PATH, chat(stream=True, stream_options={"include_usage": 1}),
             "include_usage"),
            (CHAT_PATH, {"messages": [{"role": "king", "content": ""}]}, ""),
            (CHAT_PATH, {"messages": []}, "empty"),
            (PLAIN_PATH, plain(prompt=["a"] * 129), "128"),
            (PLAIN_PATH, plain(prompt=["a"] * 100000), "128"),
            (PLAIN_PATH, plain(prompt=["a"] * 65, n=2), "128"),
            (PLAIN_PATH, plain(suffix="the end"), "suffix"),
            (PLAIN_PATH, plain(prompt="a b c " * 4000), "context")):
        c.ask("POST", path, body)
        a = c.answer()
        refused("%.80s" % body, a, 400, word)
        holds("it stays", a.fields["connection"] == "keep-alive", a)
    holds("its code", a.json()["error"]["code"] == "context_length_exceeded", a)
    c.ask("POST", CHAT_PATH, chat(max_tokens=-3))
    holds("the member", c.answer().json()["error"]["param"] == "max_tokens")
    c.close()


# --------------------------------------------------------------------- answers

def command_line(body):
    """What ./run --json says to it."""
    options = ["--messages", path_in("body.json", json.dumps(body))]
    if "prompt" in body:
        options = ["--raw", body["prompt"], "-n", str(body["max_tokens"]),
                   "--temp", str(body["temperature"]), "--seed",
                   str(body.get("seed", 0))]
    said = subprocess.run([run, model, "--json", "-t", "1", *options],
                          capture_output=True, stdin=subprocess.DEVNULL)
    choice = json.loads(said.stdout)["choices"][0]
    return choice.get("text", choice.get("message", {}).get("content"))


def together(server, bodies):
    """The texts of all, asked at the same time."""
    connections = [server.connect() for _ in bodies]
    for c, body in zip(connections, bodies):
        c.ask("POST", CHAT_PATH if "messages" in body else PLAIN_PATH, body)
    answers = [c.answer() for c in connections]
    for c in connections:
        c.close()
    return [a.text() if a.status == 200 else a for a in answers]


def check_bytes(server):
    """The same as the command line's, alone and among others."""
    others = [plain(prompt="Number %d" % i, max_tokens=40, temperature=1,
                    seed=i) for i in range(8)]
    for body in (chat(max_tokens=40), chat(max_tokens=40, temperature=0.9,
                                           seed=42, top_p=0.9),
                 plain(max_tokens=40),
                 plain(max_tokens=40, temperature=0.7, seed=7)):
        said = command_line(body)
        alone, = together(server, [body])
        holds("as the command line", alone == said, (alone, said))
        first, *among = together(server, [body, *others, body])
        holds("among others", first == said and among[-1] == said,
              (first, among[-1], said))
    several = together(server, [plain(prompt="Number 3", max_tokens=40,
                                      temperature=1, seed=3)])
    holds("those, too", several[0] == among[3], (several, among))


def check_answers(server):
    a = server.post(CHAT_PATH, chat())
    holds("a chat", a.status == 200 and fits(a.json(), CHAT), a)
    a = server.post(CHAT_PATH, chat(logprobs=True, top_logprobs=2, n=3,
                                    temperature=1, seed=5))
    d = a.json()
    holds("with log probabilities, three times", fits(d, CHAT) and
          [x["index"] for x in d["choices"]] == [0, 1, 2] and
          all(x["logprobs"] for x in d["choices"]), a)
    b = server.post(CHAT_PATH, chat(n=1, temperature=1, seed=6))
    holds("the second has the next seed", b.text() ==
          d["choices"][1]["message"]["content"], (a, b))
    body = chat(temperature=1, seed=5, logit_bias={"5": 2}, stop=["e "],
                response_format={"type": "json_object"})
    several = server.post(CHAT_PATH, {**body, "n": 3}).json()["choices"]
    alone = [server.post(CHAT_PATH, {**body, "seed": 5 + i}).text()
             for i in range(3)]
    holds("choices share what is asked for", alone ==
          [x["message"]["content"] for x in several], (alone, several))
    a = server.post(CHAT_PATH, {
        "messages": [{"role": "user", "content": [
            {"type": "text", "text": QUESTION[0]["content"]}]}],
        "max_completion_tokens": 16, "temperature": 0})
    holds("parts of a content", a.text() ==
          server.post(CHAT_PATH, chat()).text(), a)
    a = server.post(PLAIN_PATH, plain(prompt=["Once", "A cat"], n=2, echo=True,
                                      logprobs=1))
    d = a.json()
    holds("prompts", fits(d, PLAIN) and [x["text"][:4] for x in d["choices"]]
          == ["Once", "Once", "A ca", "A ca"], a)
    ids = server.post("/tokenize", {"content": "Once upon a time",
                                    "add_special": True}).json()["tokens"]
    a, b = (server.post(PLAIN_PATH, plain(prompt=p))
            for p in (ids, "Once upon a time"))
    holds("tokens as a prompt", a.text() == b.text(), (a, b))
    a = server.post(PLAIN_PATH, plain(stop=[b.text()[5]]))
    holds("stop", a.text() == b.text().split(b.text()[5])[0] and
          a.json()["choices"][0]["finish_reason"] == "stop", (a, b))
    holds("cached", b.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
          > 0, b)


def check_streams(server):
    for path, body, shape in ((CHAT_PATH, chat(max_tokens=60), CHAT_CHUNK),
                              (PLAIN_PATH, plain(max_tokens=60), PLAIN_CHUNK)):
        whole = server.post(path, body).json()
        a = server.post(path, {**body, "stream": True, "logprobs": 1,
                               "stream_options": {"include_usage": True}}
                        if path == PLAIN_PATH else
                        {**body, "stream": True, "logprobs": True,
                         "stream_options": {"include_usage": True}})
        events = a.events()
        *events, last = events
        holds("the type of a stream", a.fields["content-type"] ==
              "text/event-stream" and "content-length" not in a.fields, a)
        holds("its events", len(events) > 5 and
              all(fits(x, shape) for x in [*events, last]), a)
        holds("one id", len({x["id"] for x in [*events, last]}) == 1, a)
        ends = [x["choices"][0]["finish_reason"] for x in events]
        holds("one end", [x for x in ends if x] ==
              [whole["choices"][0]["finish_reason"]] and ends[-1], ends)
        text = "".join(x["choices"][0].get("text") or
                       x["choices"][0].get("delta", {}).get("content", "")
                       for x in events)
        holds("the same text", text == (
            whole["choices"][0].get("text") or
            whole["choices"][0]["message"]["content"]), (text, whole))
        holds("usage at its end", last["choices"] == [] and
              last["usage"]["completion_tokens"] ==
              whole["usage"]["completion_tokens"] and
              all(x["usage"] is None for x in events), last)
        body["prompt_logprobs"] = 1
        whole = server.post(path, body).json()
        told = [x["choices"][0]["prompt_logprobs"]
                for x in server.post(path, {**body, "stream": True}).events()
                if "prompt_logprobs" in x["choices"][0]]
        holds("the prompt's log probabilities, once", len(told[0]) > 1 and
              told == [whole["choices"][0]["prompt_logprobs"]], told)
    roles = [x["choices"][0]["delta"].get("role") for x in
             server.post(CHAT_PATH, chat(stream=True)).events()]
    holds("a role first, and no usage unasked", roles[0] == "assistant" and
          set(roles[1:]) == {None}, roles)
    a = server.post(CHAT_PATH, chat(stream=True, n=3, temperature=1, seed=3))
    b = server.post(CHAT_PATH, chat(n=3, temperature=1, seed=3)).json()
    texts = ["", "", ""]
    for x in a.events():
        texts[x["choices"][0]["index"]] += \
            x["choices"][0]["delta"].get("content", "")
    holds("three in a stream", texts == [x["message"]["content"]
                                         for x in b["choices"]], (texts, b))
    c = server.connect()
    data = json.dumps(chat(stream=True)).encode()
    c.send(b"POST %s HTTP/1.0\r\nContent-Type: application/json\r\n"
           b"Content-Length: %d\r\n\r\n%s" %
           (CHAT_PATH.encode(), len(data), data))
    status, fields = c.head()
    while c.more():
        pass
    holds("a stream of HTTP/1.0", status == 200 and c.got.endswith(
        b"data: [DONE]\n\n") and "transfer-encoding" not in fields, c.got)


def check_parrot():
    """Calls, thoughts, and characters of many tokens."""
    snake = r"\xf0\x9f\x90\x8d"
    cut = "\t".join(re.findall(r"\\x..", snake))
    said = ("<|tool_call_start|>\t[weather(city=\"%s\", days=3)]\t"
            "<|tool_call_end|>\tWait.\n<think>\tHm, %s.\t</think>\tSo %s!\n" %
            (cut, cut, cut))
    path = os.path.join(folder, "parrot.gguf")
    subprocess.run([parrot, path, "think=1"], input=said.encode(), check=True)
    server = Server(run, path, "-t", "1")
    tools = [{"type": "function", "function": {
        "name": "weather", "parameters": {"type": "object"}}}]
    hello = {"messages": [{"role": "user", "content": "hello"}],
             "temperature": 0, "tools": tools}
    a = server.post(CHAT_PATH, hello).json()
    message = a["choices"][0]["message"]
    call = message["tool_calls"][0]["function"]
    holds("a call", fits(a, CHAT) and call["name"] == "weather" and
          json.loads(call["arguments"]) == {"city": "\U0001f40d", "days": 3} and
          a["choices"][0]["finish_reason"] == "tool_calls", a)
    events = server.post(CHAT_PATH, {**hello, "stream": True}).events()
    deltas = [x["choices"][0]["delta"] for x in events]
    calls = [x["tool_calls"] for x in deltas if "tool_calls" in x]
    holds("a call in a stream", all(fits(x, CHAT_CHUNK) for x in events) and
          len(calls) == 1 and calls[0][0]["index"] == 0 and
          calls[0][0]["function"] == call, events)
    holds("and what is said beside it", "".join(
        x.get("content", "") for x in deltas) == message["content"], deltas)
    hello["messages"] = [{"role": "user", "content": "AB"}]
    a = server.post(CHAT_PATH, hello).json()
    message = a["choices"][0]["message"]
    holds("a thought", fits(a, CHAT) and message["content"] == "So \U0001f40d!"
          and message["reasoning_content"] == "Hm, \U0001f40d.", a)
    events = server.post(CHAT_PATH, {**hello, "stream": True}).events()
    for member in "content", "reasoning_content":
        holds("streamed " + member, "".join(
            x["choices"][0]["delta"].get(member, "") for x in events) ==
              message[member], events)
    holds("it stops", server.stop() == 0, server.said)


# ------------------------------------------------------------------- protocol

def check_protocol(server):
    get = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    c = server.connect()
    for _ in range(3):
        c.send(get)
        a = c.answer()
        holds("a connection is kept", a.status == 200 and
              a.fields["connection"] == "keep-alive", a)
    began = time.time()
    c.send(get * 20)
    holds("pipelined", all(c.answer().status == 200 for _ in range(20)) and
          time.time() - began < 3, time.time() - began)
    for i in range(3):
        c.ask("POST", PLAIN_PATH, plain(max_tokens=i + 1))
    counts = [c.answer().json()["usage"]["completion_tokens"] for _ in range(3)]
    holds("answers in their order", counts == [1, 2, 3], counts)
    c.ask("GET", "/health", connection="close")
    holds("closed", c.answer().fields["connection"] == "close" and c.is_over())
    c = server.connect()
    for byte in b"\r\n" + get:
        c.send(bytes([byte]))
    holds("byte by byte", c.answer().status == 200)
    body = json.dumps(plain()).encode()
    whole = server.post(PLAIN_PATH, body).text()
    for n in 1, 7, len(body):
        c.ask("POST", PLAIN_PATH, transfer_encoding="chunked",
              content_type="application/json")
        for at in range(0, len(body), n):
            part = body[at:at + n]
            c.send(b"%X;a=\"b\"\r\n%s\r\n" % (len(part), part))
        c.send(b"000\r\nX-Trailer: 1\r\n\r\n")
        a = c.answer()
        holds("a body in chunks of %d" % n, a.text() == whole, a)
    head = (b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/"
            b"json\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" %
            (PLAIN_PATH.encode(), len(body)))
    c.send(head)
    a = c.answer()
    holds("100 first", a.status == 100 and not a.fields, a)
    c.send(body)
    holds("then the answer", c.answer().text() == whole)
    c.send(head + body)
    holds("no 100 for a body that is there", c.answer().text() == whole)
    c.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
           b"Content-Length: 3\r\n\r\nabc" + get)
    holds("a body nobody wants", c.answer().status == 200 and
          c.answer().status == 200)
    c.close()
    said = raw(server, b"GET /health HTTP/1.0\r\n\r\n" + get)
    holds("HTTP/1.0 has one answer", said.count(b"HTTP/1.1 200 OK\r\n") == 1 and
          b"Connection: close" in said, said)
    c = server.connect()
    c.ask("GET", "/health")
    c.socket.shutdown(socket.SHUT_WR)
    holds("a half-closed one has its answer", c.answer().status == 200)
    c.close()


def check_smuggling(server):
    """What two programs could read in two ways is refused by one error, and
    nothing behind it is read."""
    chunk = "Transfer-Encoding: chunked"
    for what, status, *fields in (
            ("both lengths", 400, "Content-Length: 5", chunk),
            ("two lengths", 400, "Content-Length: 5", "Content-Length: 5"),
            ("other lengths", 400, "Content-Length: 5", "Content-Length: 6"),
            ("a list of lengths", 400, "Content-Length: 5, 5"),
            ("a signed length", 400, "Content-Length: +5"),
            ("a negative length", 400, "Content-Length: -5"),
            ("a hexadecimal length", 400, "Content-Length: 0x5"),
            ("an empty length", 400, "Content-Length:"),
            ("a length with a point", 400, "Content-Length: 5.0"),
            ("a space before the colon", 400, "Content-Length : 5"),
            ("a long length", 413, "Content-Length: 99999999999999999999999"),
            ("2^64 + 5", 413, "Content-Length: 18446744073709551621"),
            ("chunked twice", 400, chunk, chunk),
            ("a list of codings", 501, "Transfer-Encoding: gzip, chunked"),
            ("chunked, chunked", 501, "Transfer-Encoding: chunked, chunked"),
            ("identity", 501, "Transfer-Encoding: identity"),
            ("xchunked", 501, "Transfer-Encoding: xchunked"),
            ("a folded line", 400, "X-A: b", " c"),
            ("a field without a colon", 400, "X-A"),
            ("a field without a name", 400, ": b"),
            ("a NUL in a name", 400, "Content-Length\0: 5"),
            ("a NUL in a value", 400, "Content-Length: 5\0"),
            ("a bare CR", 400, "X-A: b\rContent-Length: 5"),
            ("a bare LF", 400, "X-A: b\nContent-Length: 5"),
            ("two hosts", 400, "Host: localhost"),
            ("no length", 411), ("too many fields", 431, *["X-A: b"] * 100),
            ("something else expected", 417, "Content-Length: 5",
             "Expect: 200-ok")):
        a = raw(server, "\r\n".join([
            "POST %s HTTP/1.1" % PLAIN_PATH, "Host: localhost",
            "Content-Type: application/json", *fields, "", "0", "",
            "GET /health HTTP/1.1", "Host: localhost", "", ""]).encode())
        holds(what, statuses(a) == [status] and b"Connection: close" in a, a)
    for body in (b"-1\r\n", b"+1\r\n", b"0x1\r\n", b" 1\r\n", b"\r\n", b"g\r\n",
                 b"1 \r\na\r\n", b"1\na\r\n", b"1\r\nab\r\n", b"1\r\nab", b"1\r\na\nb",
                 b"1;a\rb\r\na\r\n", b"1;a\nb\r\na\r\n", b"1;a\0\r\na\r\n",
                 b"00000000000000001\r\n", b"1" * 300,
                 b"0\r\n" + b"X: y\r\n" * 3000, b"0\r\nX: y\n\r\n\r\n",
                 b"0\r\nX: y\rZ: 1\r\n\r\n", b"ffffffffffffffff\r\n"):
        a = raw(server, b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                b"application/json\r\n%s\r\n\r\n" %
                (PLAIN_PATH.encode(), chunk.encode()) + body)
        holds("a chunk %.20r" % body, statuses(a) ==
              [413 if body[:2] == b"ff" else 400], a)
    for line, status in (
            (b"GET /health", 400), (b"GET  /health HTTP/1.1", 400),
            (b"GET /health HTTP/1.1 ", 400), (b"GET /health HTTP/2.0", 505),
            (b"GET /health HTTP/0.9", 505), (b"GET /health http/1.1", 400),
            (b"GET http://localhost/health HTTP/1.1", 400),
            (b"GET health HTTP/1.1", 400), (b"PRI * HTTP/2.0", 400),
            (b" GET /health HTTP/1.1", 400), (b"\nGET /health HTTP/1.1", 400),
            (b"GET\t/health HTTP/1.1", 400),
            (b"GET /hea\0lth HTTP/1.1", 400), (b"\x80 /health HTTP/1.1", 405),
            (b"OPTIONS * HTTP/1.1", 400), (b"A" * 30 + b" / HTTP/1.1", 400)):
        a = raw(server, line + b"\r\nHost: localhost\r\n\r\n")
        holds("%.60r" % line, statuses(a) == [status], a)


def check_limits(server):
    a = raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: " +
            b"b" * 20000)
    holds("a long field", a.startswith(b"HTTP/1.1 431 "), a)
    a = raw(server, b"GET /" + b"a" * 1000000)
    holds("a line without an end", a.startswith(b"HTTP/1.1 431 ") or not a, a)
    began = time.time()
    a = raw(server, b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
            b"application/json\r\nContent-Length: 9000000\r\n\r\n" %
            PLAIN_PATH.encode())
    holds("a long body, unread", a.startswith(b"HTTP/1.1 413 ") and
          time.time() - began < 2, a)
    for kind, status in ((None, 415), ("text/plain", 415),
                         ("application/jsonx", 415),
                         ("application/x-www-form-urlencoded", 415),
                         ("application/json; charset=utf-8", 200),
                         ("Application/JSON", 200)):
        a = server.post("/tokenize", {"content": "a"}, content_type=kind)
        holds("a body of %s" % kind, a.status == status, a)
    a = server.post("/tokenize", {"content": "long " * 200000})
    holds("1 MB", a.status == 200 and a.json()["count"] >= 200000, a)
    refused("2 MB", server.post("/tokenize", {"content": "long " * 400000}),
            413, "1048576 bytes")
    began = time.time()
    raw(server, b"\r\n" * 300000 + b"GET / HTTP/1.0\r\n\r\n")
    holds("empty lines before a request cost nothing",
          time.time() - began < 2, time.time() - began)
    began = time.time()
    raw(server, b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nConnection: "
        b"close\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked"
        b"\r\n\r\n" + b"1\r\na\r\n" * 20000 + b"0\r\n\r\n")
    holds("nor do chunks of one byte", time.time() - began < 2,
          time.time() - began)


def check_names(server):
    """The host asked for is this machine; pages of others are not answered."""
    port = server.place[1]
    for host, status in (
            ("localhost", 200), ("LOCALHOST:%d" % port, 200),
            ("127.0.0.1", 200),
            ("127.0.0.1:%d" % port, 200), ("127.1.2.3", 200), ("[::1]:80", 200),
            (None, 400), ("", 403), ("example.org", 403),
            ("localhost.example.org", 403), ("127.0.0.1.example.org", 403),
            ("[::1].example.org", 403), ("169.254.169.254", 403),
            ("127.example.org:80", 403)):
        a = server.ask("GET", "/health", host=host)
        holds("host %s" % host, a.status == status, a)
    for origin, status in (
            ("http://localhost", 200), ("http://localhost:1", 403),
            ("https://localhost", 403), ("http://example.org", 403),
            ("null", 403), ("", 403)):
        a = server.ask("GET", "/v1/models", origin=origin)
        holds("origin %s" % origin, a.status == status and
              (a.fields.get("access-control-allow-origin") is None), a)
    a = server.ask("OPTIONS", CHAT_PATH, origin="http://example.org")
    holds("a preflight is refused", a.status == 403, a)


def check_cors():
    server = Server(run, model, "-t", "1", "--cors", "http://example.org")
    a = server.ask("OPTIONS", CHAT_PATH, origin="http://example.org",
                   access_control_request_method="POST")
    holds("a preflight", a.status == 204 and
          a.fields["access-control-allow-origin"] == "http://example.org" and
          "POST" in a.fields["access-control-allow-methods"] and
          "uthorization" in a.fields["access-control-allow-headers"], a)
    a = server.ask("GET", "/v1/models", origin="http://example.org")
    holds("a page that may", a.status == 200 and a.fields["vary"] == "Origin"
          and "access-control-allow-origin" in a.fields, a)
    a = server.ask("GET", "/v1/models/none", origin="http://example.org")
    holds("it may read errors", "access-control-allow-origin" in a.fields, a)
    a = server.ask("GET", "/v1/models", origin="http://example.com")
    holds("a page that may not", a.status == 403 and
          "access-control-allow-origin" not in a.fields, a)
    holds("it stops", server.stop() == 0, server.said)


def check_keys():
    keys = path_in("keys", "first-key\r\n\nsecond\n")
    page = path_in("page.html", "<title>chat</title>")
    server = Server(run, model, "-t", "1", "--api-key-file", keys, "--page",
                    page, at="0.0.0.0:0")
    server.place = "127.0.0.1", server.place[1]
    for given, status in (
            ("Bearer first-key", 200), ("bearer second", 200), (None, 401),
            ("Bearer", 401), ("Bearer ", 401), ("first-key", 401),
            ("Basic first-key", 401), ("Bearer first-ke", 401),
            ("Bearer first-key2", 401), ("Bearer first-keyfirst-key", 401),
            ("Bearer second-key", 401), ("Bearer SECOND", 401)):
        a = server.ask("GET", "/v1/models", authorization=given)
        holds("key %s" % given, a.status == status, a)
    a = server.post(CHAT_PATH, chat())
    refused("a chat without a key", a, 401, "invalid_api_key")
    holds("it says how", a.fields["www-authenticate"] == "Bearer", a)
    holds("health needs none", server.ask("GET", "/health").status == 200)
    a = server.ask("GET", "/")
    holds("nor does a page", a.body == b"<title>chat</title>" and
          a.fields["content-type"] == "text/html; charset=utf-8", a)
    a = server.ask("GET", "/health", host="example.org")
    holds("a public one has any name", a.status == 200, a)
    holds("it stops", server.stop() == 0, server.said)
    holds("no key is told", b"first-key" not in server.said, server.said)


def check_places():
    path = os.path.join(folder, "socket")
    for number in signal.SIGKILL, signal.SIGTERM:
        server = Server(run, model, "-t", "1", at=path)
        a = server.post(CHAT_PATH, chat(), host="anything")
        holds("a socket of a path, which another left", fits(a.json(), CHAT), a)
        again = subprocess.run([run, model, "--serve", path],
                               capture_output=True)
        holds("one that is taken", again.returncode == 3 and
              b"in use" in again.stderr, again)
        holds("is not disturbed", server.ask("GET", "/health").status == 200)
        server.stop(number)
    holds("it stops", server.process.returncode == 0, server.said)
    if socket.has_ipv6:
        try:
            server = Server(run, model, "-t", "1", at="[::1]:0")
            a = server.ask("GET", "/health", host="[::1]:%d" % server.place[1])
            holds("IPv6", a.status == 200 and server.place[0] == "::1", a)
            holds("it stops", server.stop() == 0, server.said)
        except OSError:
            print("skipped: IPv6, which this machine has not")
    server = Server(run, model, "-t", "1", at="0")
    again = subprocess.run([run, model, "--serve", str(server.place[1])],
                           capture_output=True)
    holds("a place that is taken", again.returncode == 3 and
          b"in use" in again.stderr, again)
    holds("it stops", server.stop() == 0, server.said)


# ------------------------------------------------------------- many, and ends

def begin_long(server):
    """A stream that has begun."""
    c = server.connect()
    c.ask("POST", PLAIN_PATH, LONG)
    c.head()
    next(c.chunks())
    return c


def idles(server, seconds=10):
    end = time.time() + seconds
    while server.metric("slots_busy") + server.metric("queue") > 0:
        if time.time() > end:
            return False
        time.sleep(0.02)
    return True


def check_queue():
    server = Server(run, model, "-t", "1", "--parallel", "1", "--queue", "1",
                    "--lookup", "0")
    first = begin_long(server)
    second = server.connect()
    second.ask("POST", PLAIN_PATH, plain())
    while server.metric("queue") < 1:
        pass
    a = server.post(CHAT_PATH, chat())
    refused("a queue that is full", a, 429, "queue")
    holds("when to come again", int(a.fields["retry-after"]) > 0, a)
    refused("several at once", server.post(CHAT_PATH, chat(n=3)), 429)
    first.close()
    holds("who waits comes next", second.answer().status == 200)
    holds("who left has no place", idles(server))
    for leave in Connection.close, Connection.reset:
        c = begin_long(server)
        leave(c)
        holds("who leaves ends the answer", idles(server), leave)
    c = server.connect()
    c.ask("POST", PLAIN_PATH, {**LONG, "stream": False})
    while server.metric("slots_busy") < 1:
        pass
    c.close()
    holds("and one in a piece", idles(server))
    holds("429 is counted", server.metric('requests_total{status="429"}') == 2)
    holds("it stops", server.stop() == 0, server.said)


def check_stop(number):
    """What runs is finished, what waits too, and nobody new is let in."""
    server = Server(run, model, "-t", "1", "--parallel", "2")
    body = {**LONG, "max_tokens": 400, "seed": 1}
    expected = server.post(PLAIN_PATH, {**body, "stream": False}).text()
    connections = [server.connect() for _ in range(4)]
    for c in connections:
        c.ask("POST", PLAIN_PATH, body)
    idle = server.connect()
    idle.ask("GET", "/health")
    idle.answer()
    connections[0].head()
    server.process.send_signal(number)
    holds("one that idles is closed", idle.is_over())
    try:
        server.connect()
        holds("nobody new", False)
    except OSError:
        holds("nobody new", True)
    for c in connections:
        if c is not connections[0]:
            c.head()
        data = b"".join(c.chunks())
        text = "".join(json.loads(x[6:])["choices"][0]["text"]
                       for x in data.decode().split("\n\n")[:-2])
        holds("answers are finished", text == expected and
              data.endswith(b"data: [DONE]\n\n") and c.is_over(), data[-200:])
    holds("and it ends well", server.wait() == 0, server.said)
    holds("it says so", b"shutting down" in server.said, server.said)


def check_second_signal():
    server = Server(run, model, "-t", "1")
    c = begin_long(server)
    server.process.send_signal(15)
    time.sleep(0.1)
    server.process.send_signal(15)
    holds("a second signal does not wait", server.wait(5) == 0, server.said)
    while c.more():
        pass
    holds("an answer ends with an error", b'"error": {' in c.got and
          c.got.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"), c.got[-300:])


def check_few_files():
    """Connections wait when there are no more files, and nothing spins."""
    if not os.path.exists("/proc/self/stat"):
        print("skipped: few files, which needs /proc")
        return
    shell = "ulimit -n 24; exec %s \"$@\"" % run
    script = os.path.join(folder, "few")
    with open(script, "w") as f:
        f.write("#!/bin/sh\n" + shell + "\n")
    os.chmod(script, 0o755)
    server = Server(script, model, "-t", "1")
    many = [server.connect() for _ in range(60)]
    for c in many:
        c.ask("GET", "/health", connection="close")
    for c in many:
        holds("few files", c.answer().status == 200)
        c.close()
    many = [server.connect() for _ in range(40)]
    time.sleep(0.2)

    def ticks():
        with open("/proc/%d/stat" % server.process.pid) as f:
            return sum(map(int, f.read().rsplit(")", 1)[1].split()[11:13]))
    before = ticks()
    time.sleep(1)
    holds("it does not spin", ticks() - before < 5, ticks() - before)
    for c in many:
        c.close()
    holds("it stops", server.stop() == 0, server.said)


def check_clients(server):
    """Programs that others have written."""
    base = "http://127.0.0.1:%d" % server.place[1]
    c = http.client.HTTPConnection("127.0.0.1", server.place[1])
    for _ in range(2):
        c.request("POST", CHAT_PATH, json.dumps(chat()),
                  {"Content-Type": "application/json"})
        said = json.load(c.getresponse())
        holds("http.client", fits(said, CHAT), said)
    c.request("POST", CHAT_PATH, iter([json.dumps(chat()).encode()]),
              {"Content-Type": "application/json"}, encode_chunked=True)
    holds("its chunks", fits(json.load(c.getresponse()), CHAT))
    c.close()
    if not shutil.which("curl"):
        print("skipped: curl, which is not installed")
        return

    def curl(*options):
        return subprocess.run(["curl", "-sS", "--max-time", "20", *options],
                              capture_output=True).stdout

    body = path_in("curl.json", json.dumps(chat()))
    kind = "Content-Type: application/json"
    alone = said["choices"][0]["message"]["content"]
    for options in (["-d", "@" + body], ["-T", body, "-X", "POST"],
                    ["-d", "@" + body, "-H", "Expect: 100-continue"],
                    ["-d", "@" + body, "-H", "Transfer-Encoding: chunked"],
                    ["-d", "@" + body, "--http1.0"],
                    ["-d", "@" + body, "--http2"]):
        got = curl(*options, "-H", kind, base + CHAT_PATH)
        holds("curl %s" % options, alone in got.decode() and
              fits(json.loads(got), CHAT), got)
    got = curl("-N", "-d", json.dumps(chat(stream=True)), "-H", kind,
               base + CHAT_PATH)
    holds("curl -N", got.endswith(b"data: [DONE]\n\n"), got)
    got = curl("-I", base + "/health")
    holds("curl -I", got.startswith(b"HTTP/1.1 200 OK\r\n"), got)
    got = curl(base + "/health", base + "/health", "-w", "%{num_connects}")
    holds("curl keeps a connection", got == b'{"status": "ok"}1' * 1 +
          b'{"status": "ok"}0', got)


def check_patience(slow):
    """Heads that do not end, from the beginning of this test."""
    for what, c in slow.items():
        a = c.answer()
        holds(what, a.status == 408 and c.is_over(), a)


server = Server(run, model, "-t", "1")
slow = {}
for what, data in (("a head that never ends", b"GET /health HTTP/1.1\r\nHo"),
                   ("TLS", b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03")):
    slow[what] = server.connect()
    slow[what].send(data)
silent = server.connect()
checks = [check_endpoints, check_words, check_bodies, check_bytes,
          check_answers, check_streams, check_protocol, check_smuggling,
          check_limits, check_names, check_clients]


def attempt(check, *arguments):
    """One that breaks off has failed."""
    try:
        check(*arguments)
    except Exception as e:                # noqa: BLE001
        line = e.__traceback__.tb_next.tb_lineno
        holds("%s, line %d" % (check.__name__, line), False, e)


for check in checks:
    began = time.time()
    attempt(check, server)
    if os.environ.get("TIMES"):
        print("%s %.2f" % (check.__name__, time.time() - began), flush=True)
for check, *arguments in ((check_parrot,), (check_cors,), (check_keys,),
                          (check_places,), (check_queue,), (check_stop, 15),
                          (check_stop, 2), (check_second_signal,),
                          (check_few_files,)):
    began = time.time()
    attempt(check, *arguments)
    if os.environ.get("TIMES"):
        print("%s %.2f" % (check.__name__, time.time() - began), flush=True)
attempt(check_patience, slow)
holds("who says nothing waits", silent.socket.fileno() >= 0)
silent.close()
holds("it stops", server.stop() == 0, server.said)
holds("and has said nothing else", server.said.count(b"\n") == 2, server.said)
finish()
