"""Chats at a terminal, key by key:  python3 test/terminal.py RUN MODEL FOLDER

Prints what was not as expected, and how many tests passed.  It types as a person
does, and looks at the messages that arrived and at what the terminal shows."""
import fcntl
import json
import os
import pty
import select
import signal
import struct
import sys
import termios
import time

from tally import finish, holds

run, model, folder = sys.argv[1:4]


class Terminal:
    """A program at a terminal of its own, 80 columns wide."""

    def __init__(self, command, columns=80, **environment):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            for number in signal.SIGINT, signal.SIGQUIT, signal.SIGHUP:
                signal.signal(number, signal.SIG_DFL)
            os.environ.update(TERM="xterm")
            os.environ.update(environment)
            os.execvp(command[0], command)
        self.resize(columns)
        self.shown = b""

    def resize(self, columns):
        size = struct.pack("HHHH", 24, columns, 0, 0)
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, size)

    def settings(self):
        return termios.tcgetattr(self.fd)[:4]

    def waits_for(self, text, seconds=30):
        """Everything until `text` is shown, and then forgotten."""
        end = time.time() + seconds
        while text not in self.shown and time.time() < end:
            if select.select([self.fd], [], [], 0.05)[0]:
                try:
                    self.shown += os.read(self.fd, 65536)
                except OSError:
                    break
        at = self.shown.find(text)
        if at < 0:
            return None
        before, self.shown = self.shown[:at], self.shown[at + len(text):]
        return before

    def types(self, keys):
        at = 0
        while at < len(keys):
            at += os.write(self.fd, keys[at:at + 1000])

    def ends(self):
        """Its exit status, after what it still shows."""
        end = time.time() + 30
        while time.time() < end:
            if select.select([self.fd], [], [], 0.02)[0]:
                try:
                    self.shown += os.read(self.fd, 65536)
                except OSError:
                    pass
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.fd)
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        return "does not end"


PASTE, NO_PASTE = b"\x1b[?2004h", b"\x1b[?2004l"


def chat(*options, **more):
    t = Terminal([run, "-q", "--temp", "0", "-n", "1", "-t", "1", *options, model],
                 **more)
    t.waits_for(PASTE)
    return t


def messages(path):
    if not os.path.exists(path):
        return "nothing was saved"
    said = json.load(open(path))["messages"]
    os.remove(path)
    return [m["content"] for m in said if m["role"] == "user"]


def leaves_with(what, t, lines, expected):
    """The lines are typed, and the chat has these messages when it is left."""
    path = os.path.join(folder, "typed.json")
    for line in [*lines, b"/save " + path.encode() + b"\r"]:
        t.types(line)
        t.waits_for(PASTE)
    t.types(b"\x04")
    status = t.ends()
    found = messages(path)
    holds(what, found == expected and status == 0, (found, status))


def arrives(what, lines, expected, *options):
    """Each of the lines is typed when the program waits for one."""
    leaves_with(what, chat("--save-dir", folder, *options), lines, expected)


UP, DOWN, RIGHT, LEFT = b"\x1b[A", b"\x1b[B", b"\x1b[C", b"\x1b[D"
arrives("a line", [b"hello\r"], ["hello"])
arrives("left and right", [b"hlo" + 2 * LEFT + b"e" + RIGHT + b"l\r"], ["hello"])
arrives("home and end", [b"ell\x1b[Hh\x1b[Fo\r"], ["hello"])
arrives("as others send them", [b"ell\x1bOHh\x1b[4~o\r"], ["hello"])
arrives("Ctrl-A and Ctrl-E", [b"ell\x01h\x05o\r"], ["hello"])
arrives("Ctrl-B, -F and -D", [b"hxlo\x02\x02\x02\x04e\x06l\r"], ["hello"])
arrives("delete", [b"xhello\x01\x1b[3~\r"], ["hello"])
arrives("backspace", [b"hxx\x7f\x08ello\r"], ["hello"])
arrives("at both ends", [LEFT + b"\x7fhello" + RIGHT + b"\x1b[3~\r"], ["hello"])
arrives("Ctrl-U", [b"abc\x15hello\r"], ["hello"])
arrives("Ctrl-K", [b"helloabc" + 3 * LEFT + b"\x0b\r"], ["hello"])
arrives("Ctrl-W", [b"hello abc  \x17\r"], ["hello "])
arrives("Ctrl-L", [b"hel\x0clo\r"], ["hello"])
arrives("keys that do nothing", [b"he\x1b[15~\x1b[1;5P\x1bx\x00l\x1b[Zlo\r"], ["hello"])
arrives("UTF-8", ["gr\xfc\xdfe\x7f".encode() + LEFT + b"\x7fu\r"], ["gru\xdf"])
arrives("wide characters", ["\u65e5\u672c\u8a9e".encode() + LEFT + b"\x7f\r"],
        ["\u65e5\u8a9e"])
arrives("a mark goes with its letter", ["ae\u0301x".encode() + LEFT + b"\x7f\r"],
        ["ax"])
arrives("what is not UTF-8 is refused", [b"gr\xfc\xdf\r", b"hello\r"], ["hello"])
arrives("up", [b"one\r", b"two\r", 2 * UP + b"\r"], ["one", "two", "one"])
arrives("down to the draft", [b"one\r", b"dra" + 3 * UP + DOWN + b"ft" + DOWN +
                              b"\r"], ["one", "draft"])
arrives("an older line is edited", [b"one\r", UP + b"\x7f\x7fff\r"],
        ["one", "off"])
arrives("several lines pasted", [b"\x1b[200~a\r\nb\rc\nd\t\x07e\x1b[201~f\r"],
        ["a\nb\nc\nd\tef"])
arrives("quotes pasted", [b'\x1b[200~"""\ra\r\nb\r"""\x1b[201~\r'], ["\na\nb"])
arrives("a paste between", [b"ac" + LEFT + b"\x1b[200~b\x1b[201~\r"], ["abc"])
arrives("Alt-Enter", [b"a\x1b\rb\r"], ["a\nb"])
arrives("quotes", [b'"""a\r', b'b"""\r'], ["a\nb"])
arrives("a backslash", [b"a\\\r", b"b\r"], ["a\nb"])
long = b"".join(b"tensor%04d " % i for i in range(900))
arrives("a long line", [long + b"\r"], [long.decode()], "-c", "16000")

# Ctrl-C: at an empty line, a line between, with text, and twice.
t = chat()
t.types(b"\x03")
holds("Ctrl-C warns", t.waits_for(b"once more") is not None, t.shown)
t.types(b"/stats\r")
t.waits_for(PASTE)
t.types(b"\x03")
holds("and is forgotten", t.waits_for(b"once more") is not None, t.shown)
t.types(b"abc")
t.waits_for(b"> abc")
t.types(b"\x03")
t.waits_for(b"\r> \x1b[K")
t.types(b"\x03")
holds("it clears a line first", t.waits_for(b"once more") is not None, t.shown)
t.types(b"\x03")
status = t.ends()
holds("and leaves when it comes twice", status == 130, status)

# It stops an answer, and nothing else that was typed before or after.
t = Terminal([run, "-v", "--ignore-eos", "--isa", "scalar", "--temp", "0", "-t",
              "1", model])
t.waits_for(PASTE)
for turn in range(2):
    t.types(b"What is LFM2?\r")
    t.waits_for(b"LFM2 is a family")
    t.types(b"\x03")
    holds("Ctrl-C stops an answer", t.waits_for(b"tok/s") is not None, t.shown)
    t.waits_for(PASTE)
t.types(b"\x03")
holds("and leaves the chat", t.waits_for(b"once more") is not None, t.shown)
t.types(b"\x04")
status = t.ends()
holds("Ctrl-D after a stopped answer", status == 0, status)
trace = os.path.join(folder, "trace")
t = Terminal([run, "-q", "-n", "2", "--trace", trace, model])
t.waits_for(PASTE)
t.types(b"hello\r")
t.waits_for(PASTE)
t.types(b"\x03")
t.waits_for(b"once more")
t.types(b"\x03")
status = t.ends()
lines = open(trace).read().splitlines()
holds("a trace is whole after two of them", status == 130 and len(lines) > 9 and
      all(json.loads(line) for line in lines), (status, len(lines)))

# What is shown fits into the row, and the cursor is where it belongs.
t = chat(columns=20)
t.types("abcdefghijklmnop\u65e5\u672c\u8a9e".encode())
row = "\r> ghijklmnop\u65e5\u672c\u8a9e\x1b[K\r\x1b[18C".encode()
holds("a narrow window", t.waits_for(row) is not None, t.shown)
t.types(b"\x01")
holds("from its beginning", t.waits_for(
    b"\r> abcdefghijklmnop\x1b[K\r\x1b[2C") is not None, t.shown)
t.resize(12)
holds("a smaller one", t.waits_for(b"\r> abcdefghi\x1b[K\r\x1b[2C") is not None,
      t.shown)
t.types(b"\r")
holds("is shown whole when it is done", t.waits_for(
    "\r> abcdefghijklmnop\u65e5\u672c\u8a9e\x1b[K\r\n".encode()) is not None,
    t.shown)
t.waits_for(PASTE)
t.types(b"\x04")
t.ends()

# The terminal is left as it was, however the program ends.
for name in "SIGTERM", "SIGHUP", "SIGQUIT":
    t = Terminal(["sh", "-c", "read line; exec \"$@\"", "sh", run, "-q", model])
    had = t.settings()
    t.types(b"\r")
    t.waits_for(PASTE)
    changed = t.settings() != had
    os.kill(t.pid, getattr(signal, name))
    left = t.waits_for(NO_PASTE) is not None
    same = t.settings() == had
    status = t.ends()
    holds(name, changed and left and same and
          status == 128 + getattr(signal, name), (changed, left, same, status))

# Ctrl-Z gives it back, fg takes it again.
t = Terminal(["sh", "-mc", '"$@"; echo stopped; stty -a; read x; fg; exit $?',
              "sh", run, "-q", "--save-dir", folder, "-n", "1", model])
t.waits_for(PASTE)
t.types(b"hel")
t.waits_for(b"> hel")
t.types(b"\x1a")
shown = t.waits_for(b"stopped") is not None and t.waits_for(b"echok")
holds("Ctrl-Z", shown and b" icanon" in shown and b" echo " in shown, shown)
t.types(b"\n")
holds("fg", t.waits_for(b"> hel\x1b[K") is not None, t.shown)
leaves_with("goes on", t, [b"lo\r"], ["hello"])

# A dumb terminal has none of this.
t = Terminal([run, "-q", "-n", "1", model], TERM="dumb")
holds("a dumb terminal", b"\x1b" not in t.waits_for(b"> ", 10), t.shown)
t.types(b"What is LFM2?\r")
t.waits_for(b"LFM2")
holds("answers", t.waits_for(b"> ") is not None, t.shown)
t.types(b"\x04")
status = t.ends()
holds("and ends", status == 0 and b"\x1b" not in t.shown, (status, t.shown))

# It cuts a long line, which is told.
t = Terminal([run, "-n", "1", model], TERM="dumb")
t.waits_for(b"> ")
t.types(b"a" * 5000 + b"\r")
holds("a line that a dumb terminal cuts", t.waits_for(b"may have cut it", 10)
      is not None, t.shown[-300:])
t.waits_for(b"> ")
t.types(b"\x04")
t.ends()

# A stop while the terminal takes no more: not an output that failed.
endless = os.path.join(folder, "endless.json")
with open(endless, "w") as f:
    json.dump({"messages": [{"role": "user", "content": "What is GGUF?"}],
               "max_tokens": 1900, "logit_bias": {"2": -100, "7": -100}}, f)
t = Terminal([run, "-q", "--messages", endless, model])
t.types(b"\x13")                            # Ctrl-S
time.sleep(1)
os.kill(t.pid, signal.SIGINT)
time.sleep(0.2)
t.types(b"\x11")
status = t.ends()
holds("a stop while output stands still", status == 130 and b"run:" not in t.shown,
      (status, t.shown[-300:]))

finish()
