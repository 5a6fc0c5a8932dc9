"""Checks of the Host and Origin headers of requests.

Against pages of other sites in the same browser: by DNS rebinding they request
this server under their own name (Host), and forms post to it without asking
(Origin).
"""

from collections.abc import Sequence
import fnmatch
import ipaddress
import re
import socket
from typing import Any

from bcm_jax import errors

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Host header: a name or IPv4 address, or an IPv6 address in brackets; the port.
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([\w.-]+))(?::(\d{1,5}))?")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


class HostNames:
  """Set of accepted host names: loopback, the server's own, and patterns.

  A server on all addresses (0.0.0.0 or ::) also accepts this machine's name and
  every IP address, since DNS rebinding needs a name.
  """

  def __init__(self, host: str, patterns: Sequence[str] = ()):
    """Creates the set.

    Args:
      host: address to listen on.
      patterns: further names; '*' stands for any characters.

    Raises:
      UserError: a pattern with a scheme, port or path.
    """
    for pattern in patterns:
      if not re.fullmatch(r"[\w.*-]+", pattern):
        raise errors.UserError(
            f"--allow-host: got {pattern!r}, expected a host name without "
            "scheme and port; write for example studio.example.com or "
            "'*.example.com'"
        )
    self._patterns = [pattern.lower() for pattern in patterns]
    self._names = {*_LOOPBACK, host.lower()}
    self._any_address = host in ("0.0.0.0", "::")
    if self._any_address:
      self._names.add(socket.gethostname().lower())

  def matches_pattern(self, name: str) -> bool:
    """Returns whether a name matches one of the patterns."""
    return any(fnmatch.fnmatchcase(name, p) for p in self._patterns)

  def __contains__(self, name: str) -> bool:
    return (
        name in self._names or self.matches_pattern(name)
        or (self._any_address and _is_address(name))
    )


class HostGuard:
  """ASGI middleware that answers 403 to other hosts and other origins.

  Host must be an accepted name. Origin, which browsers send with requests from
  scripts and forms, must have the same port, or match a pattern: a proxy may
  change the port.
  """

  def __init__(self, app: Any, names: HostNames):
    self._app, self._names = app, names

  async def __call__(self, scope, receive, send) -> None:
    """Passes a request on, or refuses it."""
    if scope["type"] == "lifespan" or self._is_accepted(scope["headers"]):
      await self._app(scope, receive, send)
    elif scope["type"] == "websocket":
      await send({"type": "websocket.close", "code": 1008})
    else:
      body = (
          b"refused: another Host or Origin than that of the studio; if this "
          b"is your proxy, start the studio with --allow-host=NAME\n"
      )
      await send({
          "type": "http.response.start", "status": 403,
          "headers": [(b"content-type", b"text/plain; charset=utf-8"),
                      (b"content-length", str(len(body)).encode())],
      })
      await send({"type": "http.response.body", "body": body})

  def _is_accepted(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
    hosts, origins = (
        [v.decode("latin-1").lower() for k, v in headers if k.lower() == name]
        for name in (b"host", b"origin")
    )
    host = _split(hosts[0], "http") if len(hosts) == 1 else None
    if host is None or host[0] not in self._names:
      return False
    for origin in origins:
      scheme, _, rest = origin.partition("://")
      name, port = _split(rest, scheme) or ("", "")
      if name not in self._names or not (
          port == host[1] or self._names.matches_pattern(name)
      ):
        return False
    return True


def _split(text: str, scheme: str) -> tuple[str, str] | None:
  """Splits HOST:PORT; '' for the scheme's default port, None if invalid."""
  match = _HOST.fullmatch(text)
  if match is None or scheme not in _DEFAULT_PORTS:
    return None
  port = match[3] or ""
  if port == _DEFAULT_PORTS[scheme]:
    port = ""
  return (match[1] or match[2]).removesuffix("."), port


def _is_address(name: str) -> bool:
  try:
    ipaddress.ip_address(name)
  except ValueError:
    return False
  return True
