#!/usr/bin/env python3
"""Serves build/page to this computer, for a browser:

    make page
    scripts/serve_page.py [PORT]

Any server of files will do.  This one sends the two headers besides with which
browsers let a page have shared memory, and so more than one thread.
"""
import functools
import http.server
import sys


class Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map = {
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        '.mjs': 'text/javascript', '.wasm': 'application/wasm'
    }

    def end_headers(self):
        self.send_header('Cross-Origin-Opener-Policy', 'same-origin')
        self.send_header('Cross-Origin-Embedder-Policy', 'require-corp')
        super().end_headers()


port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
with http.server.ThreadingHTTPServer(
        ('127.0.0.1', port),
        functools.partial(Handler, directory='build/page')) as server:
    print(f'http://127.0.0.1:{server.server_port}', flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
