"""Where a model answers over the network: `http(s)://HOST[:PORT]/v1#MODEL`, one text for a target and for a judge."""

import ipaddress
import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from ingot.errors import RecipeError

KEY_ENV = "OPENAI_API_KEY"
FORM = "write it as http://HOST:PORT/v1#MODEL or https://HOST/v1#MODEL"


@dataclass(frozen=True)
class Address:
    """`url`: where the API's paths start, without query, fragment and last slash. `model`: None where the server has
    one model only. `query`: sent with every request and shown nowhere, since some services take secrets there.
    """

    url: str
    model: str | None
    query: str = ""

    @property
    def host(self) -> str:
        """Host and port, as the address names them."""
        return urlsplit(self.url).netloc

    @property
    def loopback(self) -> bool:
        """Whether what is sent stays on this machine."""
        name = urlsplit(self.url).hostname or ""
        try:
            return name == "localhost" or ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    @property
    def plain(self) -> bool:
        """Whether others on the way can read what is sent."""
        return self.url.startswith("http:") and not self.loopback

    def __str__(self) -> str:
        return self.url if self.model is None else f"{self.url}#{self.model}"


def is_address(text: str) -> bool:
    """Whether `text` names a place on the network, rather than a folder or one of our own schemes."""
    return text.lower().startswith(("http://", "https://"))


def read_address(text: str, field: str) -> Address:
    """`text` as an address. Raises RecipeError about `field` for anything else; what may be a secret is not shown."""
    start, _, model = text.partition("#")
    shown = start.partition("?")[0]
    try:
        parts = urlsplit(start)
        parts.port  # noqa: B018  # raises ValueError for one that is no number
    except ValueError as error:
        raise RecipeError(field, shown.rpartition("@")[2], f"is no address ({error}); {FORM}") from error
    if not is_address(text) or not parts.hostname:
        raise RecipeError(field, shown.rpartition("@")[2], f"is no address; {FORM}")
    if "@" in parts.netloc:
        bare = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        fix = f"a name or key in an address would be stored with the results; put it into ${KEY_ENV}"
        raise RecipeError(field, bare, fix)
    url = f"{parts.scheme.lower()}://{parts.netloc}{parts.path.rstrip('/')}"
    for route in ("/chat/completions", "/completions"):
        url = url.removesuffix(route)
    return Address(url, model or None, parts.query)


def key_for(address: Address, key_env: str | None, allow_http: bool, field: str) -> str | None:
    """The key to send, from the environment: of `key_env`, or of OPENAI_API_KEY where that is set; None: none.

    Over plain http to another machine no key is sent at all. Raises RecipeError where `key_env` is not set, or could
    only be sent readable, and where texts would be sent readable without `allow_http`.
    """
    if address.plain:
        if not allow_http:
            fix = "plain http to another machine: anyone on the way reads the texts; use https, or allow it"
            raise RecipeError(field, str(address), f"{fix} (--allow-http, allow_http: true), which sends no key")
        if key_env is not None:
            fix = f"a key is never sent over plain http to another machine ({address.host}); use https"
            raise RecipeError("key_env", key_env, fix)
        return None
    key = os.environ.get(key_env or KEY_ENV) or None
    if key is None and key_env is not None:
        raise RecipeError("key_env", key_env, "this environment variable is not set; set it to the endpoint's key")
    if key is not None and not (key.isascii() and key.isprintable()):
        raise RecipeError("key_env", key_env or KEY_ENV, "this key holds characters that no header can carry")
    return key
