"""A collector of traces on loopback: OTLP over HTTP, as any OpenTelemetry SDK sends it."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as WireSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status


@dataclass(frozen=True)
class Span:
    """Ids are hexadecimal, "" for no parent. Times are nanoseconds since 1970."""

    service: str
    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    state: str
    begins: int
    ends: int
    is_error: bool
    description: str
    attributes: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]]
    raw: bytes = field(repr=False)


class Collector:
    """`with Collector() as collector:` listens at `collector.url`; `find` waits until the spans it wants are there."""

    def __init__(self) -> None:
        self._arrived = threading.Condition()
        self._spans: list[Span] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                assert self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf"
                collector._take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def find(self, condition: Callable[[Span], bool], *, count: int = 1, within_s: float = 60) -> list[Span]:
        """The spans that meet the condition, in order of their beginning, once there are `count` of them."""

        def found() -> list[Span]:
            return [span for span in self._spans if condition(span)]

        with self._arrived:
            if not self._arrived.wait_for(lambda: len(found()) >= count, within_s):
                raise AssertionError(f"{len(found())} of {count} spans among {self._spans}")
            return sorted(found(), key=lambda span: span.begins)

    def trace(self, trace_id: str, *, count: int, within_s: float = 60) -> list[Span]:
        return self.find(lambda span: span.trace_id == trace_id, count=count, within_s=within_s)

    @property
    def spans(self) -> list[Span]:
        with self._arrived:
            return list(self._spans)

    def _take(self, request: ExportTraceServiceRequest) -> None:
        with self._arrived:
            for resource in request.resource_spans:
                service = _values(resource.resource.attributes)["service.name"]
                for scope in resource.scope_spans:
                    self._spans += [_span(service, span) for span in scope.spans]
            self._arrived.notify_all()


def _span(service: str, span: WireSpan) -> Span:
    return Span(
        service=service,
        name=span.name,
        kind=WireSpan.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        state=span.trace_state,
        begins=span.start_time_unix_nano,
        ends=span.end_time_unix_nano,
        is_error=span.status.code == Status.STATUS_CODE_ERROR,
        description=span.status.message,
        attributes=_values(span.attributes),
        events=[(event.name, _values(event.attributes)) for event in span.events],
        raw=span.SerializeToString(),
    )


def _values(pairs: Any) -> dict[str, Any]:
    def plain(value: AnyValue) -> Any:
        kind = value.WhichOneof("value")
        if kind == "array_value":
            return [plain(member) for member in value.array_value.values]
        return getattr(value, kind) if kind else None

    return {pair.key: plain(pair.value) for pair in pairs}
