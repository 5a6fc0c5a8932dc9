"""Requests that the studio takes, by their Host and Origin."""

import asyncio
import socket

import pytest

from bcm_jax import errors
from bcm_jax.studio import host_guard


def answer(headers, host="127.0.0.1", patterns=(), kind="http"):
  """Type and status of the first message of the answer to a request."""
  sent = []

  async def application(scope, receive, send):
    await send({"type": "taken", "status": 200})

  async def send(message):
    sent.append(message)

  guard = host_guard.HostGuard(
      application, host_guard.HostNames(host, patterns)
  )
  raw = [(k.encode(), v.encode("latin-1")) for k, v in headers]
  asyncio.run(guard({"type": kind, "headers": raw}, None, send))
  return sent[0].get("status", sent[0].get("code"))


@pytest.mark.parametrize("host", [
    "127.0.0.1", "127.0.0.1:7860", "localhost", "localhost:9000", "LOCALHOST",
    "localhost.:80", "[::1]", "[::1]:7860",
])
def test_names_of_this_machine(host):
  assert answer([("host", host)]) == 200
  assert answer([("host", host), ("origin", f"http://{host}")]) == 200


@pytest.mark.parametrize("headers", [
    [("host", "evil.example")],
    [("host", "evil.example:7860"), ("origin", "http://evil.example:7860")],
    [("host", "127.0.0.1.evil.example")],
    [("host", "localhost.evil.example")],
    [("host", "evil.example#localhost")],
    [("host", "evil@localhost")],
    [("host", "localhost:7860:80")],
    [("host", "::1")],
    [("host", "[::1].evil.example")],
    [("host", "192.168.0.1")],
    [("host", "")],
    [],
    [("host", "localhost"), ("host", "evil.example")],
    *[
        [("host", "localhost:7860"), ("origin", origin)]
        for origin in (
            "http://evil.example", "https://evil.example:7860", "null", "",
            "http://localhost", "http://localhost:3000", "file://localhost",
            "http://localhost:7860.evil.example", "http://[::1]:1",
            "chrome-extension://abc", "http://localhost:7860/path",
        )
    ],
    [("host", "localhost:7860"), ("origin", "http://localhost:7860"),
     ("origin", "http://evil.example")],
])
def test_others(headers):
  assert answer(headers) == 403
  assert answer(headers, kind="websocket") == 1008


def test_ports_are_compared_by_their_defaults():
  for host, origin in (
      ("localhost", "http://localhost:80"), ("localhost:80", "http://localhost"),
      ("localhost:7860", "http://127.0.0.1:7860"),
      ("127.0.0.1:7860", "http://[::1]:7860"),
  ):
    assert answer([("host", host), ("origin", origin)]) == 200


def test_addresses_of_a_server_for_the_network():
  name = socket.gethostname()
  for host in ("192.168.0.7:7860", "[fe80::1]:7860", f"{name}:7860"):
    assert answer([("host", host)], "0.0.0.0") == 200
    assert answer([("host", host)], "::") == 200
    assert answer([("host", host)]) == 403
  assert answer([("host", "evil.example")], "0.0.0.0") == 403
  assert answer([("host", "192.168.0.7")], "192.168.0.7") == 200
  assert answer([("host", "192.168.0.8")], "192.168.0.7") == 403
  assert answer([
      ("host", "192.168.0.7:7860"), ("origin", "http://192.168.0.66:7860")
  ], "192.168.0.7") == 403


def test_hosts_behind_a_proxy():
  patterns = ["studio.example.com", "*.colab.example"]
  for name in ("studio.example.com", "Abc-7860.colab.example"):
    assert answer([("host", name)], patterns=patterns) == 200
    # The proxy may pass on its own name, or that of this server.
    for host in (name, f"{name}:7860", "127.0.0.1:7860"):
      headers = [("host", host), ("origin", f"https://{name}")]
      assert answer(headers, patterns=patterns) == 200
      assert answer(headers) == 403
  assert answer([("host", "colab.example")], patterns=patterns) == 403
  assert answer([("host", "anything.example")], patterns=["*"]) == 200


@pytest.mark.parametrize("pattern", [
    "https://studio.example.com", "studio.example.com:443", "a.org/x", "",
    "a b", "a,b",
])
def test_patterns_are_host_names(pattern):
  with pytest.raises(errors.UserError, match="--allow-host"):
    host_guard.HostNames("127.0.0.1", [pattern])
