"""Servers under load: the service, and one that calls PEFT for every request; for `benchmarks.serving`."""

import asyncio
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.serving import ADAPTER, ROWS, Work, slots_of
from tasks.config import ModelConfig, TaskConfig
from tasks.learner import Learner, build_learner

CLIENT = "from benchmarks.serving_load import client; client()"


def serve_bank(port: int, model: dict[str, Any], users: int, folder: str) -> None:
    """Serve embeddings by the service, until killed."""
    import uvicorn

    from server.service.adapters import NewAdapter
    from server.service.engine import Limits
    from server.service.http import create_app
    from server.service.identity import RateLimits
    from server.service.registry import Registry
    from server.service.service import Service

    torch.set_num_threads(1)
    learner = _learner(model)
    service = Service(
        Registry(None, Path(folder)), learner=learner, rates=RateLimits(rate=1e9, burst=10**9), warm=users,
        limits=Limits(rows=ROWS, waiting=4096, waiting_of_one=4096),
    )  # fmt: skip
    rows = slots_of(learner.layout.size, users)
    service.adapters.write(
        *[NewAdapter(f"user-{n}", row, learner.layout, "base", ADAPTER.rank, None) for n, row in enumerate(rows)]
    )
    (Path(folder) / "key").write_text(service.keys.issue("operator"))
    uvicorn.run(create_app(service), host="127.0.0.1", port=port, log_level="error", access_log=False)


def _learner(model: dict[str, Any]) -> Learner:
    task = TaskConfig(head="frozen", max_length=128)
    return build_learner(ModelConfig(**model), task, ADAPTER, labels=("no", "yes"), trains_frame=False)


def serve_peft(port: int, model: dict[str, Any], users: int, folder: str) -> None:
    """Serve embeddings by PEFT, one request after another as they come, until killed."""
    import threading

    import uvicorn
    from fastapi import FastAPI

    torch.set_num_threads(1)
    work = Work(ModelConfig(**model), causal=False)
    loaded, tokenizer, lock, app = work.peft, work.base.tokenizer, threading.Lock(), FastAPI()

    @app.post("/v1/users/{user}/predictions")
    def predictions(user: str, body: dict[str, Any]) -> dict[str, Any]:
        given = tokenizer(body["texts"], return_tensors="pt", truncation=True, max_length=128)
        with lock, torch.no_grad():
            loaded.set_adapter(f"user-{int(user.split('-')[1]) % ROWS}")
            states = loaded(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state
            found = torch.nn.functional.normalize(states.mean(1), dim=-1)
        return {"user": user, "texts": [{"embedding": row} for row in found.tolist()]}

    (Path(folder) / "key").write_text("none")
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", access_log=False)


@contextmanager
def running(kind: str, model: dict[str, Any], users: int) -> Iterator[tuple[int, str]]:
    """Run a server in a process of its own; yields its port and a key."""
    import socket

    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
        free.close()
        target = serve_bank if kind == "bank" else serve_peft
        process = multiprocessing.get_context("spawn").Process(target=target, args=(port, model, users, folder))
        process.start()
        try:
            _wait(port, process)
            yield port, (Path(folder) / "key").read_text()
        finally:
            process.terminate()
            process.join()


def _wait(port: int, process: Any) -> None:
    for _ in range(3000):
        if not process.is_alive():
            raise SystemExit("the server did not start")
        with suppress(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{port}/healthz")
            return
        time.sleep(0.1)
    raise SystemExit("the server did not answer")


async def _load(port: int, key: str, *, clients: int, users: int, text: str, seconds: float) -> list[float]:
    """Ask over kept connections, every client one request after another; returns the seconds of each request."""
    spent: list[float] = []
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", headers=headers, limits=limits, timeout=120
    ) as client:

        async def one(number: int, end: float) -> None:
            turn = number
            while time.perf_counter() < end:
                began = time.perf_counter()
                body = {"texts": [text], "kind": "embed"}
                answer = await client.post(f"/v1/users/user-{turn % users}/predictions", json=body)
                answer.raise_for_status()
                spent.append(time.perf_counter() - began)
                turn += clients

        for length in (min(2.0, seconds), seconds):
            spent.clear()
            end = time.perf_counter() + length
            await asyncio.gather(*[one(number, end) for number in range(clients)])
    return spent


def loaded(port: int, key: str, *, clients: int, users: int, text: str, seconds: float) -> dict[str, float]:
    """Load a server from a second process; returns requests a second, p50 and p99 in milliseconds."""
    asked = json.dumps({"port": port, "key": key, "clients": clients, "users": users, "text": text, "seconds": seconds})
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, asked],
        capture_output=True,
        text=True,
        check=True,
    )
    spent = sorted(json.loads(done.stdout.splitlines()[-1]))
    return {
        "rps": len(spent) / seconds,
        "p50_ms": 1000 * spent[len(spent) // 2],
        "p99_ms": 1000 * spent[min(len(spent) - 1, int(0.99 * len(spent)))],
    }


def text_of(tokens: int) -> str:
    """Return a text of about so many tokens, specials included."""
    return " ".join(["the", "cat", "sat", "on", "a", "warm", "red", "roof"][n % 8] for n in range(tokens - 2))


def under_load(model: dict[str, Any], *, clients: Sequence[int], seconds: float, users: int) -> dict[str, float]:
    """Load both servers in turn with texts of 8 and 32 tokens."""
    figures: dict[str, float] = {}
    for kind in ("bank", "peft"):
        with running(kind, model, users) as (port, key):
            for count in clients:
                for tokens in (8, 32):
                    found = loaded(port, key, clients=count, users=users, text=text_of(tokens), seconds=seconds)
                    figures |= {f"{kind}_{name}_c{count}_{tokens}tok": value for name, value in found.items()}
                    print(f"{kind}, {count} clients, {tokens} tokens: {found}", flush=True)
    return figures


def client() -> None:
    """Load a server as the first argument says, in JSON, and print the seconds of every request."""
    print(json.dumps(asyncio.run(_load(**json.loads(sys.argv[1])))))
