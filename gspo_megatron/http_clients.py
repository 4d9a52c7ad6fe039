"""Every HTTP client of the package. None trusts the environment: no proxy, no .netrc.

The roles of a run reach each other directly. A proxy of the site (`http_proxy`, `ALL_PROXY`) cannot reach them, and
would be sent the job's key. The libraries are imported where they are used: an environment need not have them all.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import aiohttp
    import httpx


def direct_client(**settings: Any) -> httpx.Client:
    """A blocking client; takes the arguments of `httpx.Client`."""
    import httpx

    return httpx.Client(trust_env=False, **settings)


def direct_session(headers: Mapping[str, str], **settings: Any) -> aiohttp.ClientSession:
    """An asynchronous client; takes the arguments of `aiohttp.ClientSession`. Needs a running event loop."""
    import aiohttp

    return aiohttp.ClientSession(headers=headers, trust_env=False, **settings)


def direct_opener() -> urllib.request.OpenerDirector:
    """A client of the standard library."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))
