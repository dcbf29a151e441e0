"""A file server with byte ranges, for check_download.sh.

    python3 test/serve.py FOLDER PORT-FILE

serves FOLDER on a free port of this machine and writes its number to PORT-FILE.
Files named *.gguf come with their SHA-256 in X-Linked-Etag, as the hub sends it;
except that 350M-Q8_0 gets a wrong one and 350M-F16 none.
"""
import hashlib
import http.server
import os
import re
import sys

folder, port_file = sys.argv[1:]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.reply(body=False)

    def do_GET(self):
        self.reply(body=True)

    def log_message(self, *args):
        pass

    def reply(self, body):
        path = os.path.join(folder, os.path.basename(self.path))
        if not os.path.isfile(path):
            self.send_error(404)
            return
        data = open(path, "rb").read()
        etag = hashlib.sha256(data).hexdigest()
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked.group(1)) if asked else 0
        if asked and start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if asked else 200)
        if "350M-Q8_0" in path:
            etag = etag[::-1]
        if path.endswith(".gguf") and "350M-F16" not in path:
            self.send_header("X-Linked-Etag", f'"{etag}"')
        if asked:
            self.send_header(
                "Content-Range",
                f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("X-Start", str(start))
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if body:
            self.wfile.write(data[start:])
            with open(port_file + ".log", "a") as log:
                log.write(f"{os.path.basename(path)} {start}\n")


server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
with open(port_file + ".new", "w") as f:
    f.write(str(server.server_port))
os.rename(port_file + ".new", port_file)
server.serve_forever()
