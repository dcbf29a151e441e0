"""A server of ./run --serve, and clients that see every byte of its answers:
for check_serve.py, load.py and replicas.py."""
import atexit
import json
import re
import signal
import socket
import subprocess


class Server:
    """One that listens, at a free port if no other place is named."""

    def __init__(self, run, model, *options, at="127.0.0.1:0"):
        self.process = subprocess.Popen(
            [run, model, "--serve", at, *options], stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE)
        atexit.register(self.process.kill)
        self.said = b""
        for line in self.process.stderr:
            self.said += line
            if b"listening on " in line:
                break
        found = re.search(rb"listening on http://(.*):(\d+)$",
                          self.said.strip())
        self.place = at
        if found:
            self.place = found[1].decode().strip("[]"), int(found[2])

    def connect(self, seconds=30):
        return Connection(self.place, seconds)

    def ask(self, *request, **more):
        """One request on a connection of its own."""
        c = self.connect()
        c.ask(*request, **more)
        answer = c.answer(request[0])
        c.close()
        return answer

    def post(self, path, body, **more):
        return self.ask("POST", path, body, **more)

    def metric(self, name):
        said = self.ask("GET", "/metrics").body.decode()
        return float(re.search(r"^lfm2_%s (\S+)$" % re.escape(name), said,
                               re.M)[1])

    def memory(self, which="VmHWM"):
        """In MiB, at most so far."""
        with open("/proc/%d/status" % self.process.pid) as f:
            return int(re.search(which + r":\s+(\d+)", f.read())[1]) / 1024

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.wait()

    def wait(self, seconds=60):
        try:
            rest = self.process.communicate(timeout=seconds)[1]
        except subprocess.TimeoutExpired:
            self.process.kill()
            rest = self.process.communicate()[1]
        self.said += rest
        return self.process.returncode


class Answer:
    def __init__(self, status, fields, body, pieces):
        self.status, self.fields, self.body = status, fields, body
        self.pieces = pieces              # None, or those of a chunked body

    def __repr__(self):
        return "%d %r %r" % (self.status, self.fields, self.body[:300])

    def json(self):
        return json.loads(self.body.decode())

    def text(self):
        choice = self.json()["choices"][0]
        return choice["text"] if "text" in choice else \
            choice["message"]["content"]

    def events(self):
        """What the data lines of a stream say; one that is not whole UTF-8 of
        whole JSON is an error, and so is anything else but a comment."""
        said = []
        for event in self.body.decode().split("\n\n")[:-1]:
            if event.startswith("data: ") and "\n" not in event:
                said.append(event[6:])
            elif not event.startswith(":"):
                raise ValueError("an event %r" % event)
        if not self.body.endswith(b"\n\n") or said[-1] != "[DONE]":
            raise ValueError("a stream ends with %r" % self.body[-80:])
        for piece in self.pieces or []:
            piece.decode()
        return [json.loads(data) for data in said[:-1]]


class Connection:
    def __init__(self, place, seconds=30):
        if isinstance(place, str):
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(seconds)
            self.socket.connect(place)
        else:
            self.socket = socket.create_connection(place, seconds)
        self.host = "localhost"
        self.got = bytearray()

    def send(self, data):
        self.socket.sendall(data)

    def ask(self, method, path, body=None, **fields):
        """`fields` are more of them, with _ for -; None: without this one."""
        fields = {k.replace("_", "-").lower(): v for k, v in fields.items()}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            fields = {"content-type": "application/json",
                      "content-length": len(body), **fields}
        fields = {"host": self.host, **fields}
        head = "%s %s HTTP/1.1\r\n" % (method, path)
        head += "".join("%s: %s\r\n" % f for f in fields.items()
                        if f[1] is not None)
        self.send(head.encode() + b"\r\n" + (body or b""))

    def more(self):
        data = self.socket.recv(1 << 20)
        self.got += data
        return data

    def take(self, n):
        while len(self.got) < n:
            if not self.more():
                raise EOFError("the answer ends early: %r" %
                               bytes(self.got[:300]))
        taken = bytes(self.got[:n])
        del self.got[:n]
        return taken

    def line(self):
        while b"\r\n" not in self.got:
            if not self.more():
                raise EOFError("the answer ends early: %r" %
                               bytes(self.got[:300]))
        return self.take(self.got.index(b"\r\n") + 2)[:-2]

    def head(self):
        status = re.fullmatch(rb"HTTP/1\.1 (\d{3}) [A-Z][A-Za-z ]+",
                              self.line())
        if not status:
            raise ValueError("no status")
        fields = {}
        while line := self.line():
            name, value = line.decode("ascii").split(": ", 1)
            if name.lower() in fields:
                raise ValueError("two of %s" % name)
            fields[name.lower()] = value
        return int(status[1]), fields

    def answer(self, method="GET"):
        status, fields = self.head()
        if method == "HEAD" or status in (100, 204):
            return Answer(status, fields, b"", None)
        if fields.get("transfer-encoding") != "chunked":
            n = int(fields["content-length"])
            return Answer(status, fields, self.take(n), None)
        pieces = list(self.chunks())
        return Answer(status, fields, b"".join(pieces), pieces)

    def chunks(self):
        while n := int(self.line(), 16):
            yield self.take(n)
            if self.take(2) != b"\r\n":
                raise ValueError("a chunk without its end")
        if self.line():
            raise ValueError("a trailer")

    def is_over(self):
        """The server has closed it, and sent nothing more."""
        try:
            return not self.got and not self.more()
        except ConnectionResetError:
            return True

    def close(self):
        self.socket.close()

    def reset(self):
        """Leave without a goodbye."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                               b"\1\0\0\0\0\0\0\0")
        self.socket.close()


def fits(found, shape):
    """Is it of this shape?  A type; a list of one shape; a tuple of some, of
    which one has to fit; an object with these members and no others, but that
    those whose name ends in ? may be missing; or else a value."""
    if isinstance(shape, type):
        return type(found) is shape or (shape is float and type(found) is int)
    if isinstance(shape, tuple):
        return any(fits(found, one) for one in shape)
    if isinstance(shape, list):
        return isinstance(found, list) and \
            all(fits(one, shape[0]) for one in found)
    if not isinstance(shape, dict):
        return found == shape
    names = {name.rstrip("?"): name for name in shape}
    return isinstance(found, dict) and \
        all(name in names for name in found) and \
        all(name in found for name in shape if not name.endswith("?")) and \
        all(fits(found[name], shape[names[name]]) for name in found)


TOKEN = {"token": str, "id": int, "logprob": float, "bytes": [int]}
LOGPROBS = {"content": [{**TOKEN, "top_logprobs": [TOKEN]}]}
COLUMNS = {"tokens": [str], "token_logprobs": [(float, None)],
           "top_logprobs": [(dict, None)], "text_offset": [int]}
CALL = {"id": str, "type": "function",
        "function": {"name": str, "arguments": str}}
FINISH = ("stop", "length", "tool_calls")
USAGE = {"prompt_tokens": int, "completion_tokens": int, "total_tokens": int,
         "prompt_tokens_details": {"cached_tokens": int},
         "completion_tokens_details": {"reasoning_tokens": int}}
HEAD = {"id": str, "created": int, "model": str}
CHAT = {**HEAD, "object": "chat.completion", "usage": USAGE, "choices": [{
    "index": int, "finish_reason": FINISH, "logprobs?": (LOGPROBS, None),
    "message": {"role": "assistant", "content": (str, None),
                "reasoning_content?": str, "tool_calls?": [CALL]}}]}
PLAIN = {**HEAD, "object": "text_completion", "usage": USAGE, "choices": [{
    "index": int, "finish_reason": ("stop", "length"), "text": str,
    "logprobs?": (COLUMNS, None)}]}
CHAT_CHUNK = {**HEAD, "object": "chat.completion.chunk",
              "usage?": (USAGE, None), "choices": [{
                  "index": int, "finish_reason": (*FINISH, None),
                  "logprobs?": (LOGPROBS, None),
                  "delta": {"role?": "assistant", "content?": str,
                            "reasoning_content?": str,
                            "tool_calls?": [{"index": int, **CALL}]}}]}
PLAIN_CHUNK = {**HEAD, "object": "text_completion", "usage?": (USAGE, None),
               "choices": [{"index": int, "text": str,
                            "finish_reason": ("stop", "length", None),
                            "logprobs?": (COLUMNS, None)}]}
ERROR = {"error": {"message": str, "type": str, "param": (str, None),
                   "code": (str, None)}}
