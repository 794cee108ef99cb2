"""A light client that loads a server over kept connections; for `benchmarks.serving_load`.

It is run as a program of its own (`main`, with JSON as its argument) and imports next to nothing: what the
client spends on the machine that it shares with the server is not the server's to answer for.
"""

import asyncio
import json
import sys
import time
from typing import Any


async def load(
    port: int, key: str, *, clients: int, users: int, text: str, seconds: float, warmup: float
) -> dict[str, Any]:
    """Ask on so many connections, one request after another on each; returns the seconds of every request, of all of
    it until the last answer, and of the warm-up before it: what was asked in time may be answered long after."""
    body = json.dumps({"texts": [text], "kind": "embed"}).encode()
    took: list[float] = []
    for length in (warmup, seconds):
        spent: list[float] = []
        began = time.perf_counter()
        asks = [_one(port, key, body, number, clients, users, began + length, spent) for number in range(clients)]
        await asyncio.gather(*asks)
        took.append(time.perf_counter() - began)
    return {"spent": spent, "seconds": took[1], "warmup": took[0]}


async def _one(  # noqa: PLR0917 - a row of plain numbers
    port: int, key: str, body: bytes, number: int, clients: int, users: int, end: float, spent: list[float]
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    turn = number
    while time.perf_counter() < end:
        began = time.perf_counter()
        writer.write(_head(turn % users, key, len(body)) + body)
        head = await reader.readuntil(b"\r\n\r\n")
        answer = await reader.readexactly(_length(head))
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"{head.decode()}{answer.decode()}")
        spent.append(time.perf_counter() - began)
        turn += clients
    writer.close()


def _head(user: int, key: str, length: int) -> bytes:
    return (
        f"POST /v1/users/user-{user}/predictions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def _length(head: bytes) -> int:
    lines = (line.split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
    return next(int(value) for name, value in lines if name.lower() == b"content-length")


def main() -> None:
    """Load a server as the first argument says, and print what it found."""
    print(json.dumps(asyncio.run(load(**json.loads(sys.argv[1])))))
