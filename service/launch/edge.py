"""Limits of the gateway that are the same in every deployment, with their reasons."""

from __future__ import annotations

from dataclasses import dataclass

# KB of the names and values of a request's headers, and their number. A token with many claims has
# 16 KB, and browsers send cookies for all ports of a host.
MAX_HEADERS_KB = 64
MAX_HEADERS = 256

# Bytes that the service must take. gRPC counts 32 more for each header, and Envoy adds some; a
# service with a lower limit than the gateway would refuse calls in its own way.
MAX_METADATA_BYTES = 2 * 1024 * MAX_HEADERS_KB

# Bytes of a reply's message: what the service sends, and what Envoy holds of a whole reply.
MAX_REPLY_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """What the gateway takes of a caller before it ends the request or the connection.

    Attributes:
        headers_kb: KB of a request's headers; more is a 431.
        num_headers: the number of a request's headers; more is a 431.
        parsed_headers_kb: KB that Envoy parses. With more, HTTP/2 has no status, only a reset.
        num_parsed_headers: the same for the number.
        request_s: the seconds in which a request must arrive. 2 MB take 16 s over 1 Mbit/s.
        unread_s: how long a caller may take to read the rest of an ended answer, which Envoy holds:
            of the largest one 18 KB/s are enough. Envoy does not count anew when some was read.
        idle_s: the seconds that a connection may have no request; Envoy's recommendation.
        ping_s: how often an HTTP/2 connection is pinged, and how long it may take to answer.
        server_ping_s: how often a connection to one of several servers is pinged.
        server_answer_s: how long it may take to answer. Calls that the server has not answered are
            then made again elsewhere.
        resolving_s: after which the addresses of names are asked for again.
        ejection_s: how long a replica that refuses connections gets no calls.
    """

    headers_kb: int = MAX_HEADERS_KB
    num_headers: int = MAX_HEADERS
    parsed_headers_kb: int = 8 * MAX_HEADERS_KB
    num_parsed_headers: int = 8 * MAX_HEADERS
    request_s: float = 60
    unread_s: float = 3600
    idle_s: float = 3600
    ping_s: float = 30
    server_ping_s: float = 5
    server_answer_s: float = 10
    resolving_s: float = 5
    ejection_s: float = 10
