"""Model name -> Route, for one principal and one snapshot.

What comes in: what the client wrote in `model`: a base, `name`, `name@3` or `name:alias`. What
goes out: the pool and the name its replicas are asked for. Pure, but for the draw of a client
whom nothing keeps on one version of a weighted alias.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections.abc import Iterator
from difflib import get_close_matches
from fnmatch import fnmatchcase
from hashlib import blake2b
from math import log

from app.domain import LATEST, Adapter, Alias, Principal, Route, Sticky
from app.errors import ModelNotAllowed, ModelNotFound
from app.serving.snapshot import Snapshot

_NEIGHBOURS = 200
#: What of a fine-tuned model's name comes before its id, where no alias or version can begin.
_FINE_TUNED = re.compile(r"ft:[^:@]*:[^:@]*:")


def resolve(snapshot: Snapshot, model: str, principal: Principal, sticky_key: str = "") -> Route:
    """Find where a request for `model` goes.

    `sticky_key` is the session or user the request names, if it names one: it goes to the same
    version of a weighted alias every time.

    Raises:
        ModelNotFound: no base, adapter, version or alias has this name.
        ModelNotAllowed: the principal's allow-list leaves it out.
    """
    route = snapshot.routes.get(model)
    if route is None:
        route = _find(snapshot, model, principal, sticky_key)
    if route is None:
        raise ModelNotFound(_not_found(snapshot, model, principal))
    if principal.models is not None and not allowed(principal, model):
        raise ModelNotAllowed(
            f"The key {principal.name!r} may not use the model {model!r}. "
            "Ask an admin to add it to the key's allow-list."
        )
    return route


def allowed(principal: Principal, model: str) -> bool:
    """Whether the allow-list covers `model`; an adapter's glob covers its versions and aliases."""
    if principal.models is None:
        return True
    adapter = _split(model)[0]
    return any(fnmatchcase(model, glob) or fnmatchcase(adapter, glob) for glob in principal.models)


def _find(snapshot: Snapshot, model: str, principal: Principal, sticky_key: str) -> Route | None:
    if model in snapshot.bases:
        return _base_route(snapshot, model)
    name, separator, which = _split(model)
    adapter = snapshot.adapters.get(name)
    if adapter is None:
        return None
    if separator == "@":
        number = int(which) if which.isascii() and which.isdigit() and len(which) < 10 else 0
        return _remembered(snapshot, model, adapter, number)
    alias = adapter.aliases.get(which if separator else LATEST)
    if alias is None:
        return None
    if len(alias.targets) == 1:
        return _remembered(snapshot, model, adapter, alias.targets[0][0])
    client = _client(alias, principal, sticky_key)
    number = _kept(adapter.name, alias, client) if client else _draw(alias)
    return _remembered(snapshot, None, adapter, number)


def _base_route(snapshot: Snapshot, model: str) -> Route | None:
    pool_name = snapshot.base_pools.get(model)
    if pool_name is None:
        return None
    route = Route(model, pool_name, snapshot.pools[pool_name].served_name)
    snapshot.routes[model] = route
    return route


def _remembered(
    snapshot: Snapshot, model: str | None, adapter: Adapter, number: int
) -> Route | None:
    """The version's route, kept for the next request with the same name in this snapshot."""
    version = adapter.versions.get(number)
    if version is None:
        return None
    route = snapshot.routes.get(version.upstream_name)
    if route is None:
        route = Route(adapter.base_model, adapter.pool, version.upstream_name, version)
        snapshot.routes[version.upstream_name] = route
    if model is not None:
        snapshot.routes[model] = route
    return route


def _split(model: str) -> tuple[str, str, str]:
    """`name@3` -> name, @, 3; `name:alias` -> name, :, alias; `name` -> name and nothing.

    A fine-tuned model's name has colons of its own: `ft:base:suffix:id:alias`.
    """
    own = _FINE_TUNED.match(model)
    start = own.end() if own else 0
    for separator in "@:":
        at = model.find(separator, start)
        if at >= 0:
            return model[:at], separator, model[at + 1 :]
    return model, "", ""


def _client(alias: Alias, principal: Principal, sticky_key: str) -> str:
    """Whom the alias keeps on one version; nobody when empty."""
    if alias.sticky is Sticky.KEY:
        return principal.key_id
    return sticky_key if alias.sticky is Sticky.USER else ""


def _kept(adapter: str, alias: Alias, client: str) -> int:
    """The version that this client of the alias always gets.

    Weighted rendezvous hashing: each version bids for the client with an exponential variate of
    its weight, drawn from a hash of both, and the least bid wins, which happens in proportion to
    the weights. A bid depends on its own version only, so a weight that grows takes clients from
    the others and moves nobody between them.
    """
    whose = f"{adapter}\0{alias.name}\0{client}\0"

    def bid(target: tuple[int, int]) -> tuple[float, int]:
        number, weight = target
        hashed = blake2b(f"{whose}{number}".encode(errors="surrogatepass"), digest_size=8)
        # The upper 53 bits as a fraction above 0 and below 1, whose logarithm is finite.
        fraction = ((int.from_bytes(hashed.digest()) >> 11) + 0.5) / (1 << 53)
        return -log(fraction) / weight, number

    return min(alias.targets, key=bid)[0]


def _draw(alias: Alias) -> int:
    """Pick a version with the alias's weights."""
    numbers, weights = zip(*alias.targets, strict=True)
    return int(random.choices(numbers, weights)[0])


def _not_found(snapshot: Snapshot, model: str, principal: Principal) -> str:
    shown = model if len(model) <= 200 else f"{model[:200]}…"
    if parts := [name for name in _newest_aliases(snapshot, model) if allowed(principal, name)]:
        return f"The model {shown!r} is not finished. There is {' and '.join(map(repr, parts))}."
    near = near_matches(snapshot, model, principal)
    hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else "GET /v1/models lists them."
    return f"The model {shown!r} does not exist. {hint}"


def near_matches(snapshot: Snapshot, model: str, principal: Principal) -> list[str]:
    """Up to three names like `model` that the principal may use.

    Compares with the bases and with the names that sort next to it, not with every name:
    comparing strings 100,000 times would hold up every other request.
    """
    model = model[:200]
    name, separator, _ = _split(model)
    adapter = snapshot.adapters.get(name)
    if adapter is not None and separator:
        its = [n for n in names_of(adapter) if n.startswith(name + separator)][-_NEIGHBOURS:]
        return get_close_matches(model, [n for n in its if allowed(principal, n)], 3, 0.0)
    names = snapshot.sorted_names
    at = bisect_left(names, name)
    neighbours = names[max(0, at - _NEIGHBOURS) : at + _NEIGHBOURS]
    named = [each for each in neighbours if LATEST in snapshot.adapters[each].aliases]
    candidates = [*snapshot.bases, *named]
    matches = get_close_matches(name, candidates, 8, 0.6)
    return [match for match in matches if allowed(principal, match)][:3]


def _newest_aliases(snapshot: Snapshot, name: str) -> list[str]:
    """Up to three names, the newest first, of an adapter whose own name stands for nothing yet."""
    adapter = snapshot.adapters.get(name)
    if adapter is None or LATEST in adapter.aliases:
        return []
    by_age = sorted(adapter.aliases.values(), key=lambda alias: alias.targets, reverse=True)
    return [f"{name}:{alias.name}" for alias in by_age[:3]]


def names_of(adapter: Adapter) -> Iterator[str]:
    """Every model name of an adapter: itself, if it stands for a version, its versions, its
    aliases.
    """
    if LATEST in adapter.aliases:
        yield adapter.name
    for number in adapter.versions:
        yield f"{adapter.name}@{number}"
    for alias in adapter.aliases:
        yield f"{adapter.name}:{alias}"
