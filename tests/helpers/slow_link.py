"""A server that is far away: a TCP proxy on the loopback, in a process of its own, that holds back every byte for half
a round trip each way. Bandwidth stays; what is sent meanwhile follows without further delay.

    python -m tests.helpers.slow_link UPSTREAM_PORT ROUND_TRIP_S     prints the port that it listens on
"""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator

READ_BYTES = 1 << 18


@contextlib.contextmanager
def slow_link(upstream_port: int, round_trip_s: float) -> Iterator[int]:
    """The port of a proxy for `upstream_port`, both on the loopback, as long as the block lasts."""
    command = [sys.executable, "-m", "tests.helpers.slow_link", str(upstream_port), str(round_trip_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as proxy:
        try:
            assert proxy.stdout is not None
            yield int(proxy.stdout.readline())
        finally:
            proxy.terminate()


async def serve(upstream_port: int, round_trip_s: float) -> None:
    """Accepts connections for ever."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", upstream_port, limit=READ_BYTES)
        one_way_s = round_trip_s / 2
        await asyncio.gather(_carry(reader, back, one_way_s), _carry(there, writer, one_way_s))

    server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=READ_BYTES)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    """Each piece goes out `delay_s` after it came in, in order; the end as well."""
    clock = asyncio.get_running_loop()
    waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def deliver() -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                due_s, piece = await waiting.get()
                await asyncio.sleep(max(0.0, due_s - clock.time()))
                if not piece:
                    break
                writer.write(piece)
                await writer.drain()
        writer.close()

    delivering = asyncio.create_task(deliver())
    piece = b" "
    while piece:
        try:
            piece = await reader.read(READ_BYTES)
        except ConnectionError:
            piece = b""
        waiting.put_nowait((clock.time() + delay_s, piece))
    await delivering


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), float(sys.argv[2])))
