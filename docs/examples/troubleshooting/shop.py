#!/usr/bin/python3
"""The web application that leaks: python3 shop.py PORT FOLDER, behind nginx.

It serves FOLDER/page.html with what the shop has for the visitor. So that the page need not be opened for each request, open files are kept, by the
path that was asked for. That is the mistake: with `?visitor=…` behind it no path comes twice, and nothing is ever closed.
"""

import http.server
import sys

PORT, FOLDER = int(sys.argv[1]), sys.argv[2]
pages = {}


def page(path):
    if path not in pages:
        pages[path] = open(FOLDER + "/page.html", "rb")
    pages[path].seek(0)
    return pages[path].read()


class Shop(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = page(self.path)
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


class Server(http.server.HTTPServer):
    request_queue_size = 128


Server(("127.0.0.1", PORT), Shop).serve_forever()
