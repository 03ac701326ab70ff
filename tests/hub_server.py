"""A server on this machine that answers what `huggingface_hub` and `datasets` ask the Hub about data sets."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@contextmanager
def serve_hub(root: Path, commit: str) -> Iterator[str]:
    """Serve the folders ``root/owner/name`` as data sets whose every revision is `commit`. Gives the endpoint."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            parts = self._parts()
            repo = root / "/".join(parts[2:4])
            if parts[:2] == ["api", "datasets"] and parts[4] == "paths-info":
                asked = json.loads(body)["paths"] if body.startswith("{") else []
                self._json([self._entry(repo, repo / name) for name in asked if (repo / name).exists()])
            else:
                self._missing("EntryNotFound")

        def do_GET(self) -> None:
            parts = self._parts()
            api = parts[:2] == ["api", "datasets"]
            repo = root / "/".join(parts[2:4] if api else parts[1:3])
            if not repo.is_dir():
                self._missing("RepoNotFound")
            elif api and (len(parts) == 4 or parts[4] == "revision"):
                names = [file.relative_to(repo).as_posix() for file in sorted(repo.rglob("*")) if file.is_file()]
                self._json(
                    {"id": "/".join(parts[2:4]), "sha": commit, "siblings": [{"rfilename": name} for name in names]}
                )
            elif api and parts[4] == "tree":
                folder = repo / "/".join(parts[6:])
                deep = "recursive=true" in self.path.lower()
                if folder.is_dir():
                    self._json(
                        [self._entry(repo, path) for path in sorted(folder.rglob("*") if deep else folder.iterdir())]
                    )
                else:
                    self._missing("EntryNotFound")
            elif not api and parts[3] == "resolve":
                self._file(repo / "/".join(parts[5:]))
            else:
                self._missing("EntryNotFound")

        def _parts(self) -> list[str]:
            return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

        def _entry(self, repo: Path, path: Path) -> dict[str, object]:
            name = path.relative_to(repo).as_posix()
            if path.is_dir():
                return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
            return {"type": "file", "path": name, "oid": "0" * 40, "size": path.stat().st_size}

        def _file(self, path: Path) -> None:
            if not path.is_file():
                self._missing("EntryNotFound")
                return
            content = path.read_bytes()
            status, headers = 200, {"ETag": '"0"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            if asked := self.headers.get("Range"):
                first, _, last = asked.removeprefix("bytes=").partition("-")
                end = min(int(last or len(content) - 1), len(content) - 1)
                status, headers["Content-Range"] = 206, f"bytes {first}-{end}/{len(content)}"
                content = content[int(first) : end + 1]
            self._answer(status, content, headers)

        def _json(self, value: object) -> None:
            self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _missing(self, code: str) -> None:
            self._answer(404, b"", {"X-Error-Code": code, "X-Repo-Commit": commit})

        def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
