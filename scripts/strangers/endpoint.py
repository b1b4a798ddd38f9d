"""Attacks at the HTTP endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import os

from strangers.parts import held, many
from strangers.target import Target, attack


@attack("idle connections to the endpoint, opened again when they are closed")
async def http_idle(target: Target) -> None:
    await many(target, lambda i: held(target.endpoint, b""))


@attack("requests to the endpoint that never end")
async def http_slow(target: Target) -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"X-Slow: 1\r\n")
            await writer.drain()
            await asyncio.sleep(0.2)

    await many(target, lambda i: held(target.endpoint, b"GET /status HTTP/1.1\r\nHost: localhost\r\n", drip))


@attack("requests to the endpoint with headers and bodies of megabytes, packed ones too")
async def http_huge(target: Target) -> None:
    head = b"POST /status HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: gzip\r\n"
    bodies = (
        head + b"Content-Length: 1000000000\r\n\r\n" + os.urandom(1 << 20),
        b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * (1 << 16),
    )
    await many(target, lambda i: held(target.endpoint, bodies[i % 3]))


@attack("300 scrapes of /metrics a second, each on a connection of its own")
async def http_scrapes(target: Target) -> None:
    async def one() -> None:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(10):
                reader, writer = await asyncio.open_connection(*target.endpoint)
                writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                await reader.read(-1)
                writer.close()

    target.begin()
    async with asyncio.TaskGroup() as tasks:
        while True:
            tasks.create_task(one())
            await asyncio.sleep(1 / 300)
