"""What a W&B server keeps of one run, on loopback: enough of its API for wandb's own client to log to and resume."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer:
    """`url`; `history`: rows as they were sent, the client's own keys begin with "_"; `config`; `ids`: of the
    runs that were begun or gone on with; `alerts`: titles. Uploaded files are let go."""

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.ids: set[str] = set()
        self.alerts: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    content = gzip.decompress(content)
                answer: dict[str, Any] = {}
                if self.path == "/graphql":
                    asked = json.loads(content)
                    answer = {"data": server._answer(asked.get("operationName"), asked.get("variables") or {})}
                elif self.path.endswith("/file_stream"):
                    server._keep(json.loads(content).get("files") or {})
                self._send(json.dumps(answer).encode())

            def do_PUT(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self._send(b"{}")

            def _send(self, text: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that was killed
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _keep(self, files: dict[str, Any]) -> None:
        chunk = files.get("wandb-history.jsonl")
        if chunk is not None:  # lines from `offset` on, as the service keeps them
            self.history[chunk["offset"] :] = [json.loads(line) for line in chunk["content"]]

    def _answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        name, entity = variables.get("name"), {"id": "e", "name": "me"}
        if operation == "Viewer":
            return {"viewer": {"id": "e", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if operation == "RunResumeStatus":
            bucket = None
            if self.config:
                tail = [json.dumps(row) for row in self.history[-1:]]
                bucket = {
                    "id": "r", "name": name, "displayName": name, "summaryMetrics": tail[0] if tail else "{}",
                    "logLineCount": 0, "historyLineCount": len(self.history), "eventsLineCount": 0,
                    "historyTail": json.dumps(tail), "eventsTail": "[]", "config": json.dumps(self.config),
                    "tags": [], "wandbConfig": '{"t": 1}',
                }  # fmt: skip
            return {"model": {"id": "m", "name": "p", "entity": entity, "bucket": bucket}}
        if operation == "UpsertBucket":
            self.ids.add(name)
            inserted = not self.config
            self.config = json.loads(variables.get("config") or "{}") or self.config
            bucket = {
                "id": "r", "name": name, "displayName": name, "config": json.dumps(self.config),
                "historyLineCount": len(self.history),
                "project": {"id": "m", "name": variables.get("project"), "entity": entity},
            }  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
        if operation == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/{file}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if operation == "NotifyScriptableRunAlert":
            self.alerts.append(variables["title"])
            return {"notifyScriptableRunAlert": {"success": True}}
        return {}
