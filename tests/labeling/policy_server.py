"""A server on loopback that speaks OpenAI's chat completions, with a policy of known mistakes: it adds two numbers.

Its answers have four steps. In step 2 it misreads a number with a chance of 1 / 4, from then on it is wrong; in step 3
it adds wrongly with a chance of 1 / 4. So the true chance of a correct end is known for every beginning.
"""

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any

SLIP = 0.25
CHANCE = {1: (1 - SLIP) ** 2, 2: 1 - SLIP, 3: 1.0}  # of a correct end, behind a correct step 1, 2, 3


def steps_of(question: str, prefix: str, rng: Random | None) -> str:
    """The rest of the answer; without a generator, the likeliest one."""
    a, b = map(int, re.search(r"(\d+) \+ (\d+)", question).groups())
    done = len(re.findall(r"Step \d:", prefix))
    read = re.search(r"numbers are (\d+) and (\d+)", prefix)
    x, y = map(int, read.groups()) if read else (a, b)
    if not read and rng and rng.random() < SLIP:
        x += 1
    total = re.search(r"= (\d+)\.", prefix)
    z = int(total[1]) if total else x + y + (1 if rng and rng.random() < SLIP else 0)
    steps = [f"Step 1: Add the numbers {a} and {b}, please.", f"Step 2: The numbers are {x} and {y}.",
             f"Step 3: {x} + {y} = {z}.", f"Step 4: So it is {z}.\nFinal answer: {z}"]  # fmt: skip
    return ("\n\n" if done else "") + "\n\n".join(steps[done:])


class PolicyServer:
    """Serves the policy while a `with` block runs.

    Attributes:
        continues: "continue_final_message", "trailing", "repeating": with what it was given in front, or "never": it
            begins anew.
        replies: statuses to answer the next calls with, before it works again.
        hook: is given each request, and returns None, or a status, the bytes of the reply and headers.
        bodies: the requests.
        headers: of the last request.
    """

    def __init__(self, continues: str = "continue_final_message", seed: int = 0):
        self.continues, self.rng = continues, Random(seed)
        self.replies: list[int] = []
        self.hook: Callable[[dict[str, Any]], tuple[int, bytes, dict[str, str]] | None] = lambda body: None
        self.bodies: list[dict[str, Any]] = []
        self.headers: dict[str, str] = {}
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet: the second would wait for the first one's receipt

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner._lock:
                    owner.headers = {name.lower(): value for name, value in self.headers.items()}
                    hooked = owner.hook(body)
                    status, content = (hooked[0], None) if hooked else owner.reply(body)
                data = hooked[1] if hooked else json.dumps(content).encode()
                self.send_response(status)
                for name, value in hooked[2].items() if hooked else ():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                if status == 429:
                    self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def reply(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if self.replies:
            status = self.replies.pop(0)
            if status:
                return status, {"error": {"message": "as the test wants it"}}
        if body["model"] != "adder":
            return 404, {"error": {"message": "no such model"}}
        if self.continues == "trailing" and "continue_final_message" in body:
            return 400, {"error": {"message": "unknown field continue_final_message"}}
        self.bodies.append(body)
        asked, *begun = body["messages"]
        content = asked["content"]
        question = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        prefix = begun[0]["content"] if begun else ""
        goes_on = self.continues in ("trailing", "repeating") or (
            self.continues == "continue_final_message"
            and body.get("continue_final_message") is True
            and body.get("add_generation_prompt") is False
        )
        if body["temperature"]:
            text = steps_of(question, prefix if goes_on else "", self.rng)
        else:
            whole, foreign = steps_of(question, "", None), prefix.startswith("(7041) ")
            text = whole[len(prefix) - 7 * foreign if goes_on else 0 :]
        if self.continues == "repeating":
            text = prefix + text
        return 200, {"choices": [{"message": {"content": text}, "finish_reason": "stop"}],
                     "usage": {"completion_tokens": len(text.split())}}  # fmt: skip

    def __enter__(self) -> "PolicyServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
