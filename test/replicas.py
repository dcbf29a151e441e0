"""Two servers behind nginx:  python3 test/replicas.py RUN MODEL FOLDER"""
import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time

from serve_client import Connection, Server
from tally import finish, holds

run, model, folder = sys.argv[1:4]
CLIENTS = 12
OPTIONS = "-t", "1", "--parallel", "4"


def begin_nginx(ports, port):
    """With the configuration that others are given, at these ports."""
    with open("scripts/nginx.conf") as f:
        conf = f.read()
    for old, new in ((":8081", ":%d" % ports[0]), (":8082", ":%d" % ports[1]),
                     (":8080", ":%d" % port)):
        assert old + ";" in conf or old + " " in conf
        conf = conf.replace(old, new)
    kinds = "client_body", "proxy", "fastcgi", "uwsgi", "scgi"
    conf = conf.replace("http {\n", "http {\n" + "".join(
        "%s_temp_path %s/%s;\n" % (kind, folder, kind) for kind in kinds))
    path = os.path.join(folder, "nginx.conf")
    with open(path, "w") as f:
        f.write(conf)
    nginx = subprocess.Popen(
        ["nginx", "-c", path, "-p", folder, "-e", folder + "/nginx.log", "-g",
         "daemon off; pid %s/nginx.pid;" % folder])
    atexit.register(nginx.terminate)
    for _ in range(200):
        try:
            Connection(("127.0.0.1", port)).close()
            return nginx
        except OSError:
            time.sleep(0.05)
    raise OSError("nginx does not listen")


def free_port():
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def body(i):
    return {"prompt": "Story number %d" % (i % 8), "max_tokens": 60,
            "temperature": 1, "seed": i % 8, "stream": i % 2 == 1}


def one(place, i):
    """What becomes of a request: its text, or how it ended."""
    c = Connection(place, 60)
    said = ""
    try:
        c.ask("POST", "/v1/completions", body(i))
        if i % 2 == 0:
            a = c.answer()
            return a.text() if a.status == 200 else "status %d" % a.status
        status, _ = c.head()
        if status != 200:
            return "status %d" % status
        for piece in c.chunks():
            said += piece.decode()
        return "".join(json.loads(x[6:])["choices"][0]["text"]
                       for x in said.split("\n\n") if x.startswith("data: {"))
    except (EOFError, OSError):
        return "cut" if "data: {" in said else "lost"
    finally:
        c.close()


class Load:
    """Clients that ask one thing after the other."""

    def __init__(self, place, expected):
        self.place, self.expected = place, expected
        self.goes_on, self.ends, self.next = True, [], 0
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self.client)
                        for _ in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def client(self):
        while self.goes_on:
            with self.lock:
                i = self.next
                self.next += 1
            text = one(self.place, i)
            if text == self.expected[i % 8]:
                text = "right"
            self.ends.append(text)

    def stop(self):
        self.goes_on = False
        for thread in self.threads:
            thread.join()
        return {end: self.ends.count(end) for end in set(self.ends)}


servers = [Server(run, model, *OPTIONS) for _ in range(2)]
place = "127.0.0.1", free_port()
nginx = begin_nginx([s.place[1] for s in servers], place[1])
expected = [servers[0].post("/v1/completions", {**body(i), "stream": False})
            .text() for i in range(8)]

load = Load(place, expected)
time.sleep(3)
both = [s.metric("generated_tokens_total") for s in servers]
holds("both answer", min(both) > 0, both)
servers[1].process.send_signal(signal.SIGKILL)
servers[1].wait()
time.sleep(3)
ends = load.stop()
print("one is killed: %s" % ends)
cut = ends.pop("cut", 0)
holds("nothing is lost that had not begun", set(ends) == {"right"}, ends)
holds("streams are cut, those it had", cut <= 4, cut)

at = "127.0.0.1:%d" % servers[1].place[1]
load = Load(place, expected)
time.sleep(1)
servers[1] = Server(run, model, *OPTIONS, at=at)
time.sleep(8)
holds("a new one takes part", servers[1].metric("generated_tokens_total") > 0)
holds("the other is stopped", servers[0].stop() == 0, servers[0].said)
time.sleep(2)
ends = load.stop()
print("one begins, one is stopped: %s" % ends)
holds("nothing is lost, nothing is cut", set(ends) == {"right"}, ends)
holds("it ends well", servers[1].stop() == 0, servers[1].said)
c = Connection(place)
c.ask("GET", "/health")
a = c.answer()
holds("without any, an error", a.status == 502, a)
nginx.terminate()
nginx.wait()
finish()
