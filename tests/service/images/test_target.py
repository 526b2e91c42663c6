"""What of a URL is connected to and asked for."""

from __future__ import annotations

import pytest

from service.images.target import Target

HERE = Target("https", "a.b", 443, "/x/y.png?z=1")


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://a.b", Target("http", "a.b", 80, "/")),
        ("HTTPS://A.B/x/y.png?z=1#part", HERE),
        ("http://a.b:8080?q", Target("http", "a.b", 8080, "/?q")),
        ("http://[FD00::7]:81/x", Target("http", "fd00::7", 81, "/x")),
        ("http://a.b/%20ü?ö=%C3", Target("http", "a.b", 80, "/%20%C3%BC?%C3%B6=%C3")),
        ("http://a.b:0/", Target("http", "a.b", 0, "/")),
    ],
)
def test_urls_are_read(url: str, target: Target) -> None:
    assert Target.of(url) == target


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://a.b/x.png", "neither a data: URL nor"),
        ("file:///etc/passwd", "neither a data: URL nor"),
        ("//a.b/x.png", "neither a data: URL nor"),
        ("", "neither a data: URL nor"),
        ("http://me@a.b/", "the name of a user"),
        ("http://me:secret@a.b/", "the name of a user"),
        ("http://a.b@127.0.0.1/", "the name of a user"),
        ("http://a.b\\@127.0.0.1/", "a backslash"),
        ("http://a.b/ x", "a space"),
        ("http://a.b/\r\nhost: c", "a control character"),
        ("http://[::1/", "is not a URL"),
        ("http://a.b:x/", "is not a URL"),
        ("http://a.b:99999/", "is not a URL"),
        ("http://a.b/\ud800", "is not a URL"),
        ("http://a.b/" + "x" * 9000, "more than 8192 characters"),
    ],
)
def test_others_are_refused(url: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Target.of(url)


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("z.png", "https://a.b/x/z.png"),
        ("/z.png", "https://a.b/z.png"),
        ("//c.d:81/z", "https://c.d:81/z"),
        ("https://c.d/z", "https://c.d/z"),
    ],
)
def test_redirects_are_relative_to_where_they_come_from(location: str, url: str) -> None:
    assert HERE.redirected(location) == Target.of(url)


@pytest.mark.parametrize("location", ["http://a.b/x", "file:///etc/passwd", "https://[", "a b"])
def test_redirects_that_cannot_be_followed_are_refused(location: str) -> None:
    with pytest.raises(ValueError, match=r"^(is|has) "):
        HERE.redirected(location)


@pytest.mark.parametrize(
    ("url", "authority"),
    [("http://a.b/", "a.b"), ("https://a.b:80/", "a.b:80"), ("http://[::1]:81/", "[::1]:81")],
)
def test_the_authority_names_a_port_that_is_not_the_schemes(url: str, authority: str) -> None:
    assert Target.of(url).authority == authority
