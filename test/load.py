"""A server under load:  python3 test/load.py RUN MODEL FOLDER"""
import json
import multiprocessing
import os
import random
import resource
import selectors
import socket
import subprocess
import sys
import time

from serve_client import Connection, Server
from tally import finish, holds

run, model, folder = sys.argv[1:4]
CLIENTS, STRANGERS, SECONDS = 1024, 200, 10
files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))


def questions(n):
    """n bodies of short requests, one half sampled."""
    with open("test/questions.txt", encoding="utf-8") as f:
        asked = [line.split("\t")[0] for line in f if "\t" in line]
    return [{"messages": [{"role": "user", "content": asked[i % len(asked)]}],
             "max_tokens": 12, "temperature": i % 2, "seed": i}
            for i in range(n)]


def command_line(bodies):
    """What --batch answers to them."""
    path = os.path.join(folder, "bodies.jsonl")
    with open(path, "w") as f:
        f.writelines(json.dumps(body) + "\n" for body in bodies)
    said = subprocess.run([run, model, "--batch", "-f", path, "-q"],
                          capture_output=True).stdout.decode()
    answers = [json.loads(line) for line in said.splitlines()]
    answers.sort(key=lambda x: int(x["custom_id"].split("-")[1]))
    return [x["response"]["body"]["choices"][0]["message"]["content"]
            for x in answers]


def percentile(times, p):
    return sorted(times)[min(len(times) - 1, int(len(times) * p))]


def many(server, bodies, expected):
    """All at once; the answers in their order of arrival."""
    began = time.time()
    clients = []
    for body in bodies:
        c = server.connect(120)
        clients.append(c)
    open_all = time.time() - began
    for c, body in zip(clients, bodies):
        c.ask("POST", "/v1/chat/completions", body)
    held = server.metric("connections")
    holds("they are held", held > len(bodies), held)
    waiting = selectors.DefaultSelector()
    for i, c in enumerate(clients):
        waiting.register(c.socket, selectors.EVENT_READ, i)
    wrong, times = [], []
    while len(times) < len(bodies):
        ready = waiting.select(60)
        if not ready:
            break
        for key, _ in ready:
            a = clients[key.data].answer()
            times.append(time.time() - began)
            if a.status != 200 or a.text() != expected[key.data]:
                wrong.append((key.data, a))
            waiting.unregister(key.fileobj)
    took = time.time() - began
    holds("all are answered", len(times) == len(bodies), len(times))
    holds("as the command line answers", not wrong, wrong[:1])
    print("%d connections open in %.2f s, answered in %.2f s: %.0f requests/s, "
          "half of them within %.2f s; peak memory %.1f MiB" %
          (len(bodies), open_all, took, len(times) / took,
           percentile(times, 0.5), server.memory()))
    for c in clients:
        c.close()


# ------------------------------------------------------------------- strangers

def chat(**more):
    return {"messages": [{"role": "user", "content": "What is LFM2?"}],
            "max_tokens": 12, "temperature": 0, **more}


def ask(c, body):
    c.ask("POST", "/v1/chat/completions", body)


def slow(server, c):
    """A byte now and then."""
    c.send(random.choice([b"G", b"POST /v1/chat/completions HTTP/1.1\r\nX: "]))
    while True:
        yield
        c.send(b"a")


def half_closed(server, c):
    ask(c, chat())
    c.socket.shutdown(1)
    while True:
        yield


def reset(server, c):
    """Some before it is read, some in the middle."""
    ask(c, chat(stream=True))
    if random.random() < 0.02:
        yield
    c.reset()


def unread(server, c):
    """Asks for a megabyte, and takes nothing."""
    c.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    c.socket.setblocking(False)
    c.send(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 300)
    while True:
        yield


def bother(server, kinds, ready):
    """All of these kinds by the hundred, until somebody ends it: whoever is
    thrown out comes again, but not at once."""
    acts, rounds = [], 0
    while True:
        began = time.time()
        for kind in kinds:
            n = sum(k is kind for k, _, _ in acts)
            for _ in range(min(STRANGERS - n, 40)):
                try:
                    c = Connection(server.place, 5)
                    acts.append((kind, kind(server, c), c))
                except OSError:
                    break
        for one in acts[:]:
            try:
                next(one[1])
            except (OSError, StopIteration):
                acts.remove(one)
                one[2].close()
        rounds += 1
        if rounds == 8:
            ready.set()
        time.sleep(max(0, 0.5 - (time.time() - began)))


def ordinary(server, expected, seconds):
    """The times that chats take, on a connection that is kept."""
    times = []
    c = server.connect(60)
    end = time.time() + seconds
    while time.time() < end:
        began = time.time()
        ask(c, chat())
        a = c.answer()
        times.append(time.time() - began)
        if a.status != 200 or a.text() != expected:
            holds("an ordinary answer", False, a)
            break
        time.sleep(0.02)
    c.close()
    holds("ordinary answers", len(times) > 20, len(times))
    print("    ordinary chats: %4d, half within %.1f ms, 95%% within %.1f ms, "
          "all within %.1f ms" % (len(times), 1e3 * percentile(times, 0.5),
                                  1e3 * percentile(times, 0.95),
                                  1e3 * max(times)), flush=True)
    return times


def check_strangers(server):
    expected = command_line([chat()])[0]
    print("alone:", flush=True)
    alone = percentile(ordinary(server, expected, SECONDS), 0.95)
    for kinds in ([slow], [half_closed], [reset], [unread],
                  [slow, half_closed, reset, unread]):
        print("beside %d each that are %s:" % (
            STRANGERS, ", ".join(k.__name__ for k in kinds)), flush=True)
        ready = multiprocessing.Event()
        others = multiprocessing.Process(target=bother,
                                         args=(server, kinds, ready))
        others.start()
        ready.wait(60)
        among = percentile(ordinary(server, expected, SECONDS), 0.95)
        others.kill()
        others.join()
        holds("it is not noticed", among < 5 * alone + 0.5, (alone, among))
    print("peak memory %.1f MiB, now %.1f" % (server.memory(),
                                              server.memory("VmRSS")))
    end = time.time() + 20
    while server.metric("connections") > 1 and time.time() < end:
        time.sleep(0.1)
    holds("all strangers are gone", server.metric("connections") == 1)


bodies = questions(CLIENTS)
expected = command_line(bodies)
server = Server(run, model, "-t", "1")
many(server, bodies, expected)
check_strangers(server)
holds("it ends well", server.stop() == 0, server.said)
finish()
