"""HTTP/2 from clients that only make work: each of them loses its connection, and nobody else notices."""

from __future__ import annotations

import asyncio
import gc
from contextlib import suppress

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.settings
import pytest
from cortex_core.serving.http2 import CREDIT, RESET_COSTS
from hypercorn.protocol.h2 import StreamBuffer
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from tests.cortex_core.serving.harness import Served, serving, until

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame(0).serialize()
HEADERS = [(":method", "GET"), (":path", "/"), (":scheme", "http"), (":authority", "x")]
UPGRADE = (
    b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: %b\r\n\r\n"
)
OK = b"HTTP/1.1 200 "


class Client:
    """A well-behaved client, by h2."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.events: list[h2.events.Event] = []

    @classmethod
    async def of(cls, served: Served) -> Client:
        return cls(*await served.connect())

    def flush(self) -> None:
        self.writer.write(self.h2.data_to_send())

    def ask(self) -> int:
        stream_id = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream_id, HEADERS, end_stream=True)
        self.flush()
        return stream_id

    async def until(self, kind: type[h2.events.Event], count: int = 1) -> list[h2.events.Event]:
        async with asyncio.timeout(20):
            while len(found := [event for event in self.events if isinstance(event, kind)]) < count:
                data = await self.reader.read(65536)
                assert data, f"ended after {self.events}"
                self.events += self.h2.receive_data(data)
                self.flush()
        return found


async def flood(served: Served, frames: list[Frame] | bytes, *, times: int) -> h2.errors.ErrorCodes:
    """Send the frames so many times, reading what comes, until the server ends it. Returns why it says that it does."""
    data = frames if isinstance(frames, bytes) else b"".join(frame.serialize() for frame in frames)
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    client.initiate_connection()
    reader, writer = await served.connect(PREFACE)
    codes: list[h2.errors.ErrorCodes] = []

    async def read() -> None:
        while got := await reader.read(65536):
            # Of a client that knows nothing of the frames that were sent by hand, only the last word matters.
            codes.extend(frame.error_code for frame in frames_of(got) if frame.type == 0x7)

    reading = asyncio.create_task(read())
    try:
        async with asyncio.timeout(60):
            for _ in range(times):
                if reading.done():
                    break
                writer.write(data)
                await writer.drain()
            await reading
    except OSError:
        await asyncio.wait({reading})
        if not reading.cancelled():
            reading.exception()
    return codes[-1] if codes else h2.errors.ErrorCodes.NO_ERROR


def frames_of(data: bytes) -> list[Frame]:
    frames = []
    while len(data) >= 9:
        frame, length = Frame.parse_frame_header(memoryview(data[:9]))
        frame.parse_body(memoryview(data[9 : 9 + length]))
        frames.append(frame)
        data = data[9 + length :]
    return frames


def encoded_headers() -> bytes:
    from hpack import Encoder

    return Encoder().encode(HEADERS)


def stream(number: int, *more: Frame) -> list[Frame]:
    headers = HeadersFrame(number, encoded_headers(), flags=["END_HEADERS", "END_STREAM"])
    return [headers, *more]


async def test_requests_over_http_2_are_answered(served: Served) -> None:
    client = await Client.of(served)
    for _ in range(50):
        client.ask()
    await client.until(h2.events.StreamEnded, 50)
    assert served.table.num_in("idle") == 1 and served.num_asked == 50


@pytest.mark.parametrize("settings", [b"AAMAAABk", b"!", b""])
async def test_H6_an_upgrade_to_http_2_is_not_heeded(served: Served, settings: bytes) -> None:
    """Whoever passes the wish on and sees it granted looks at nothing that follows."""
    reader, writer = await served.connect(UPGRADE % settings)
    assert (await reader.readuntil(b"\r\n")).startswith(OK)
    writer.write(PREFACE + b"".join(frame.serialize() for frame in stream(3)))
    writer.write_eof()
    answers = await reader.read()
    await until(lambda: served.table.num_open == 0)
    assert answers.rpartition(b"HTTP/1.1 ")[2].startswith(b"400 "), (
        "what follows is no HTTP/1, and nothing else is spoken"
    )


@pytest.mark.parametrize(
    "frames",
    [
        [PingFrame(0, b"12345678")] * 100,
        [SettingsFrame(0)] * 100,
        [PriorityFrame(1, depends_on=0, stream_weight=1)] * 100,
        [WindowUpdateFrame(0, window_increment=1)] * 100,
    ],
    ids=["ping", "settings", "priority", "window"],
)
async def test_O2_control_frames_without_end_end_the_connection(served: Served, frames: list[Frame]) -> None:
    assert await flood(served, frames, times=10_000) == h2.errors.ErrorCodes.ENHANCE_YOUR_CALM
    assert served.table.ended["flood"] == 1
    assert await served.ask() == OK


async def test_O2_streams_that_are_opened_and_reset_end_the_connection_before_many_are_begun(served: Served) -> None:
    served.gate.clear()
    numbers = range(1, 20_000, 2)
    data = b"".join(
        frame.serialize() for number in numbers for frame in stream(number, RstStreamFrame(number, error_code=8))
    )
    assert await flood(served, data, times=1) == h2.errors.ErrorCodes.ENHANCE_YOUR_CALM
    assert served.num_asked <= CREDIT / RESET_COSTS * 2 + 10
    await until(lambda: served.at_work == 0)
    served.gate.set()
    assert await served.ask() == OK


async def test_O2_streams_that_were_reset_leave_nothing_in_a_connection_that_goes_on(served: Served) -> None:
    """hypercorn keeps a buffer and a place in its tree of priorities for each, as long as the connection lasts."""
    client = await Client.of(served)
    served.gate.clear()
    for _ in range(40):
        stream_id = client.ask()
        client.h2.reset_stream(stream_id)
        client.flush()
    served.gate.set()
    client.ask()
    await client.until(h2.events.StreamEnded)
    await until(lambda: served.at_work == 0)

    def kept() -> int:
        gc.collect()
        return sum(isinstance(each, StreamBuffer) for each in gc.get_objects())

    await until(lambda: kept() == 0)


async def test_O2_a_connection_has_a_hundred_streams_at_most(served: Served) -> None:
    served.gate.clear()
    numbers = range(1, 401, 2)
    data = b"".join(frame.serialize() for number in numbers for frame in stream(number))
    await flood(served, data, times=1)
    assert served.num_asked <= 100
    await until(lambda: served.at_work == 0)


@pytest.mark.parametrize(
    "data",
    [
        HeadersFrame(1, b"\x82").serialize() + ContinuationFrame(1, b"").serialize() * 2000,
        HeadersFrame(1, b"\x40\x01a\x7f\xe1\xff\x03" + b"a" * 9000, flags=["END_HEADERS"]).serialize() * 20,
        b"".join(PriorityFrame(n, depends_on=0, stream_weight=1).serialize() for n in range(1, 2400, 2)),
        HeadersFrame(1, b"\x82\x87\x84\x41\x01x\x44\x02\xc3\xa9", flags=["END_HEADERS", "END_STREAM"]).serialize(),
        DataFrame(1, b"x").serialize(),
        SettingsFrame(0, settings={4: 2**31}).serialize(),
        WindowUpdateFrame(0, window_increment=2**31 - 1).serialize() * 3,
    ],
    ids=[
        "continuations",
        "large heads",
        "priorities of many",
        "no ascii",
        "data of nobody",
        "a window too large",
        "windows",
    ],
)
async def test_O2_what_is_no_http_2_ends_the_connection_without_a_traceback(
    served: Served, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    assert await flood(served, data, times=1) != h2.errors.ErrorCodes.NO_ERROR
    assert not [record for record in caplog.records if record.exc_info]
    assert await served.ask() == OK
    await until(lambda: served.table.num_open == 1)


async def test_O2_a_window_that_stays_shut_is_a_client_that_does_not_read() -> None:
    """Nothing in TCP shows it, and whoever answers would wait for ever."""
    async with serving(unread_s=1) as served:
        served.answer = b"x" * 1000
        deaf, slow = await Client.of(served), await Client.of(served)
        for client in (deaf, slow):
            client.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
            client.flush()
            stream_id = client.ask()
        async with asyncio.timeout(20):
            while served.table.ended["unread"] == 0:
                slow.h2.increment_flow_control_window(2, stream_id)
                slow.flush()
                deaf.h2.ping(b"12345678")  # that it is there, and asks for more, is no reading
                deaf.ask()
                await asyncio.sleep(0.2)
        slow.h2.increment_flow_control_window(1000, stream_id)
        slow.flush()
        await slow.until(h2.events.StreamEnded)
        assert served.table.ended["unread"] == 1
        assert not [event for event in deaf.events if isinstance(event, h2.events.DataReceived)]
        await until(lambda: served.at_work == 0 and served.table.num_open == 1)


async def test_O2_http_2_bodies_that_do_not_come_make_room() -> None:
    async with serving(limit=4) as served:
        served.gate.clear()
        slow = [await Client.of(served) for _ in range(4)]
        for client in slow:
            client.h2.send_headers(1, [(":method", "POST"), *HEADERS[1:]])
            client.flush()
        await until(lambda: served.table.num_in("receiving") == 4)
        slow[3].h2.end_stream(1)
        slow[3].flush()
        await until(lambda: served.table.num_in("receiving") == 3)
        asking = asyncio.create_task(served.ask())
        await until(lambda: served.num_asked == 5)
        served.gate.set()
        assert await asking == OK
        assert served.table.ended["body"] == 1
        await slow[3].until(h2.events.StreamEnded)


async def test_O2_an_answer_beside_an_http_2_body_that_does_not_come_is_no_work_once_it_is_given() -> None:
    async with serving() as served:
        client = await Client.of(served)
        client.ask()
        await client.until(h2.events.StreamEnded)
        await until(lambda: served.table.num_in("idle") == 1)
        served.gate.clear()
        served.held = "POST"
        client.events.clear()
        client.h2.send_headers(3, [(":method", "POST"), *HEADERS[1:]])
        client.ask()
        await client.until(h2.events.StreamEnded)
        await until(lambda: served.table.num_in("receiving") == 1)


@pytest.mark.parametrize("num_streams", [1, 30])
async def test_O2_a_client_that_goes_in_the_middle_of_answers_leaves_nothing(served: Served, num_streams: int) -> None:
    """hypercorn waits for ever for an answer to be sent to nobody, and the socket stays open as long."""
    served.answer = b"x" * 200_000
    client = await Client.of(served)
    for _ in range(num_streams):
        client.ask()
    await client.until(h2.events.DataReceived)
    client.writer.close()
    await until(lambda: served.at_work == 0 and served.table.num_open == 0)


async def test_the_rest_of_a_body_that_is_answered_already_is_let_pass(served: Served) -> None:
    """A client that is refused early goes on sending for a while; its other requests are not to suffer."""
    client = await Client.of(served)
    stream_id = client.h2.get_next_available_stream_id()
    client.h2.send_headers(stream_id, [(":method", "POST"), *HEADERS[1:]])
    client.flush()
    await client.until(h2.events.StreamEnded)
    for _ in range(8):
        client.h2.send_data(stream_id, b"x" * 8000)
    client.flush()
    client.ask()
    await client.until(h2.events.StreamEnded, 2)


async def test_O2_a_client_that_only_pings_is_idle() -> None:
    async with serving(idle_s=0.5, head_s=0.1) as served:
        reader, writer = await served.connect(PREFACE)

        async def ping() -> None:
            while True:
                writer.write(PingFrame(0, b"12345678").serialize())
                await asyncio.sleep(0.05)

        pinging = asyncio.create_task(ping())
        async with asyncio.timeout(20):
            with suppress(ConnectionResetError):  # by what it goes on sending
                while await reader.read(65536):
                    continue
        pinging.cancel()
        assert (served.table.ended["idle"], served.table.ended["head"]) == (1, 0)
