"""Servers under load: the service, and one that calls PEFT for every request; for `benchmarks.serving`."""

import json
import multiprocessing
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import torch
from fastapi import Depends, FastAPI
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from benchmarks.serving import ADAPTER, ROWS, Work, slots_of
from server.service import bodies
from server.service.adapters import NewAdapter
from server.service.answers import Provenance
from server.service.engine import Limits
from server.service.http import create_app
from server.service.identity import RateLimits
from server.service.registry import Registry
from server.service.service import Service
from server.service.texts import TextAsked
from server.service.warm import Warm
from tasks.config import ModelConfig, TaskConfig
from tasks.learner import Learner, build_learner
from tasks.models import load_base

KINDS = ("bank", "peft")
CLIENT = "from benchmarks.serving_client import main; main()"


def bank(model: dict[str, Any], users: int, folder: Path) -> Service:
    """Return the service with so many users' adapters, all of them in memory once they were asked for."""
    learner = _learner(model)
    service = Service(
        Registry(None, folder), learner=learner, rates=RateLimits(rate=1e9, burst=10**9), warm=Warm(users),
        limits=Limits(rows=ROWS, waiting=4096, waiting_of_one=4096),
    )  # fmt: skip
    rows = slots_of(learner.layout.size, users)
    service.adapters.write(
        *[NewAdapter(f"user-{n}", row, learner.layout, "base", ADAPTER.rank, None) for n, row in enumerate(rows)]
    )
    return service


def _learner(model: dict[str, Any]) -> Learner:
    task = TaskConfig(head="frozen", max_length=128)
    return build_learner(ModelConfig(**model), task, ADAPTER, labels=("no", "yes"), trains_frame=False)


def peft_app(model: dict[str, Any], key: str) -> FastAPI:
    """Return what people write with FastAPI and PEFT: the same bodies and answers, a call of the model a request."""
    work = Work(lambda: load_base(ModelConfig(**model), causal=False))
    loaded, tokenizer, lock, app = work.peft, work.base.tokenizer, threading.Lock(), FastAPI()
    given_key = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer())]

    @app.post("/v1/users/{user}/predictions")
    def predictions(user: str, body: bodies.PredictionsBody, given: given_key) -> bodies.Predictions:
        if given is None or given.credentials != key:
            raise PermissionError
        tokens = tokenizer(body.texts, return_tensors="pt", truncation=True, max_length=128)
        name = f"user-{int(user.split('-')[1]) % ROWS}"
        with lock, torch.no_grad():
            loaded.set_adapter(name)
            states = loaded(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
            found = torch.nn.functional.normalize(states.mean(1), dim=-1).tolist()
        whose = bodies.Whose.of(Provenance.of(name, 1))
        answers = [bodies.TextPrediction(shares=None, embedding=row, whose=whose) for row in found]
        return bodies.Predictions(user=user, texts=answers)

    return app


def serve(kind: str, port: int, model: dict[str, Any], users: int, folder: str) -> None:
    """Serve embeddings by the service or by PEFT, until killed."""
    import uvicorn

    torch.set_num_threads(1)
    key = "peft"
    if kind == "bank":
        service = bank(model, users, Path(folder))
        app, key = create_app(service), service.keys.issue("operator")
    else:
        app = peft_app(model, key)
    (Path(folder) / "key").write_text(key)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", access_log=False)


@dataclass(frozen=True)
class Running:
    """A server in a process of its own."""

    port: int
    key: str
    process: psutil.Process

    def cpu(self) -> float:
        """Return the seconds of CPU that it has spent."""
        spent = self.process.cpu_times()
        return float(spent.user + spent.system)


@contextmanager
def running(kind: str, model: dict[str, Any], users: int) -> Iterator[Running]:
    """Run a server until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        process = multiprocessing.get_context("spawn").Process(target=serve, args=(kind, port, model, users, folder))
        process.start()
        try:
            _wait(port, process)
            yield Running(port, (Path(folder) / "key").read_text(), psutil.Process(process.pid))
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


@dataclass
class Load:
    """What one kind of load has found so far: seconds of every request, of the load, and of the server's CPU."""

    spent: list[float]
    seconds: float = 0.0
    cpu: float = 0.0

    def add(self, server: Running, *, seconds: float, **asked: Any) -> None:
        """Load a server from a second process for a while."""
        warmup = min(1.0, seconds)
        given = {"port": server.port, "key": server.key, "seconds": seconds, "warmup": warmup, **asked}
        before = server.cpu()
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, json.dumps(given)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        found = json.loads(done.stdout.splitlines()[-1])
        # The warm-up's share is taken out by time: both parts are the same load.
        self.cpu += (server.cpu() - before) * found["seconds"] / (found["seconds"] + found["warmup"])
        self.spent += found["spent"]
        self.seconds += found["seconds"]

    def figures(self) -> dict[str, float]:
        """Return requests a second, p50 and p99 in milliseconds, and milliseconds of CPU a request."""
        spent = sorted(self.spent)
        return {
            "rps": len(spent) / self.seconds,
            "p50_ms": 1000 * spent[len(spent) // 2],
            "p99_ms": 1000 * spent[min(len(spent) - 1, int(0.99 * len(spent)))],
            "cpu_ms": 1000 * self.cpu / len(spent),
        }


def text_of(tokens: int) -> str:
    """Return a text of about so many tokens, specials included."""
    return " ".join(["the", "cat", "sat", "on", "a", "warm", "red", "roof"][n % 8] for n in range(tokens - 2))


def under_load(model: dict[str, Any], *, clients: Sequence[int], seconds: float, users: int) -> dict[str, float]:
    """Load both servers, by turns, with texts of 8 and 32 tokens."""
    figures: dict[str, float] = {}
    with ExitStack() as stack:
        servers = {kind: stack.enter_context(running(kind, model, users)) for kind in KINDS}
        for count in clients:
            for tokens in (8, 32):
                loads = {kind: Load([]) for kind in KINDS}
                for kind in (*KINDS, *reversed(KINDS)):
                    loads[kind].add(
                        servers[kind], clients=count, users=users, text=text_of(tokens), seconds=seconds / 2
                    )
                for kind, load in loads.items():
                    found = load.figures()
                    figures |= {f"{kind}_{name}_c{count}_{tokens}tok": value for name, value in found.items()}
                    shown = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
                    print(f"{kind}, {count} clients, {tokens} tokens: {shown}", flush=True)
    return figures


def bare_engine(model: dict[str, Any], *, users: int, seconds: float) -> dict[str, float]:
    """Return what the engine answers a second where 32 texts of different users wait at any time, without HTTP."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        service = bank(model, min(users, ROWS), Path(folder))
        engine = service.engines["texts"]
        for tokens in (8, 32):
            done, began, cpu = 0, time.perf_counter(), time.process_time()
            while time.perf_counter() - began < seconds:
                asked = [TextAsked(f"user-{n}", text_of(tokens), "embed") for n in range(min(users, ROWS))]
                for future in [engine.submit(each.adapter, each) for each in asked]:
                    future.result()
                done += len(asked)
            figures[f"engine_rps_{tokens}tok"] = done / (time.perf_counter() - began)
            figures[f"engine_cpu_ms_{tokens}tok"] = 1000 * (time.process_time() - cpu) / done
        service.close()
    return figures
