"""A cloud named in ``clouds.yaml``: connecting to it, asking it things, and what its answers mean.

Requests go through openstacksdk's connection (credentials, custom CA, regions, API discovery, renewed tokens), but
images are read and written as the Image API's own JSON: openstacksdk's image objects drop properties that they do not
know.
"""

from __future__ import annotations

import datetime
import email.utils
import html
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Self
from urllib.parse import urlsplit

import openstack.config
import openstack.connection
import openstack.exceptions
import tenacity
from keystoneauth1 import exceptions as keystone
from keystoneauth1.adapter import Adapter

from bakehouse.errors import BakehouseError
from bakehouse.yamlfile import did_you_mean

CONNECT_SECONDS = 20
ANSWER_SECONDS = 120
"""How long an answer may take; a Glance on a slow database takes tens of seconds to list."""

RETRY_SECONDS = 120.0
"""How long a service may be away before a request fails: a restart behind a load balancer takes less."""

LONGEST_PAUSE_SECONDS = 10.0

LONGEST_RETRY_AFTER_SECONDS = 60.0
"""How long a service may tell us to stay away (Retry-After, RFC 9110) and be obeyed."""

PAGE = 1000
"""Entries of a list that are asked for at a time."""

CREATED = (200, 201, 202)
"""What services answer to a request that makes something: Nova 202 for a server, 200 for a group, Neutron 201."""

PASSING = {429, 500, 502, 503, 504}
"""HTTP status codes that may pass by themselves (RFC 9110)."""


class CloudError(BakehouseError):
    """A cloud refused something.

    Args:
        message: one sentence.
        hint: what to do.
        status: the HTTP status code; 0 where no answer came.
        reason: what the service itself said.
        retry_after: seconds that it asks us to wait before we try again.
    """

    def __init__(
        self, message: str, *, hint: str = "", status: int = 0, reason: str = "", retry_after: float = 0.0
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.reason = reason
        self.retry_after = retry_after


@dataclass
class Answer:
    """What a service answered."""

    status: int
    headers: Mapping[str, str]
    text: str

    def json(self) -> Any:
        """Return the body, which is JSON."""
        return json.loads(self.text)


@dataclass
class Cloud:
    """A connection to a cloud, with a checked credential. A context manager."""

    name: str
    """As in clouds.yaml."""
    region: str
    """Empty where the cloud has but one without a name."""
    project: str
    """The id of the credential's project."""
    connection: openstack.connection.Connection
    skew: datetime.timedelta = datetime.timedelta(0)
    """How far the cloud's clock is ahead of this host's."""
    patience: float = RETRY_SECONDS
    """Seconds that a service may be away."""
    user: str = ""
    """The id of the credential's user."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    @property
    def clock(self) -> datetime.datetime:
        """What time it is in the cloud: ages are counted to it, whatever this host's clock says."""
        return datetime.datetime.now(datetime.UTC) + self.skew

    @property
    def place(self) -> str:
        """The cloud's name and region, for messages."""
        return f"{self.name} ({self.region})" if self.region else self.name

    @contextmanager
    def hurried(self, seconds: float) -> Iterator[None]:
        """Do not wait long for a service that is away: for clearing up after somebody pressed Ctrl-C."""
        before, self.patience = self.patience, seconds
        try:
            yield
        finally:
            self.patience = before

    def request(
        self,
        method: str,
        path: str,
        *,
        service: str = "image",
        region: str = "",
        ok: tuple[int, ...] = (200, 201, 204),
        what: str = "",
        retry: bool = True,
        **options: Any,
    ) -> Answer:
        """Send a request; one that fails for a passing reason is sent again, with growing, jittered pauses.

        Args:
            method: of HTTP.
            path: below the service's versioned endpoint.
            service: its type in the catalogue.
            region: another one than that of the connection.
            ok: status codes that are no errors.
            what: what is being done, for errors, such as "listing images".
            retry: send it again; for requests that may arrive twice.
            options: for requests: json, data, headers, timeout.

        Raises:
            CloudError: the service refused it, or was away for too long.
        """
        attempt: Callable[[], Answer] = lambda: self._once(  # noqa: E731
            method, path, service, region, ok, what, options
        )
        return _retrying(self.patience)(attempt) if retry else attempt()

    def pages(
        self, path: str, key: str, *, service: str, what: str, query: str = "", **options: Any
    ) -> Iterator[dict[str, Any]]:
        """Yield all of a list, which services give page by page.

        Args:
            path: below the service's endpoint, without a query.
            key: of the list in the answer.
            service: its type in the catalogue.
            what: what is being done, for errors.
            query: what is asked for, with an ampersand at its end.
            options: as for request().

        Raises:
            CloudError: the service does not answer.
        """
        query += f"limit={PAGE}"
        while query:
            page = self.request("GET", f"{path}?{query}", service=service, what=what, **options).json()
            yield from page[key]
            links = [link["href"] for link in page.get(f"{key}_links", []) if link.get("rel") == "next"]
            query = urlsplit(links[0]).query if links else ""

    def create(
        self, path: str, body: Mapping[str, Any], find: Callable[[], Any], *, service: str, what: str, **options: Any
    ) -> Any:
        """Create something once, also where the answer to it is lost.

        A request whose answer got lost may have done its work. So before it is sent again it is looked for what it was
        to make, and likewise where a service says that it is there already.

        Args:
            path: below the service's endpoint.
            body: of the request.
            find: returns what it made, as the service tells it; None where it is not there.
            service: its type in the catalogue.
            what: what is being done, for errors.
            options: as for request().

        Returns:
            What the service says of it: the answer, or what was found.

        Raises:
            CloudError: the service refused it, or was away for too long.
        """

        def attempt() -> Any:
            try:
                answer = self.request(
                    "POST", path, service=service, ok=CREATED, what=what, retry=False, json=dict(body), **options
                )
            except CloudError as error:
                if not is_passing(error) and error.status != HTTPStatus.CONFLICT:
                    raise
                found = find()
                if found is None:
                    raise
                return found
            return answer.json()

        return _retrying(self.patience)(attempt)

    def _once(
        self,
        method: str,
        path: str,
        service: str,
        region: str,
        ok: tuple[int, ...],
        what: str,
        options: Mapping[str, Any],
    ) -> Answer:
        doing = what or f"{method} {path}"
        timeout = (CONNECT_SECONDS, ANSWER_SECONDS)
        asked = datetime.datetime.now(datetime.UTC)
        headers = {"Accept": "application/json", **options.get("headers", {})}
        try:
            answer = self._adapter(service, region).request(
                path,
                method,
                raise_exc=False,
                # We do that, and tell what we do.
                status_code_retries=0,
                connect_retries=0,
                **{"timeout": timeout, **options, "headers": headers},
            )
            text = answer.text
        except Exception as error:
            explained = explain(error, self.name, doing)
            if explained is None:
                raise
            raise explained from error
        self._set_clock(answer.headers, asked)
        if answer.status_code in ok:
            return Answer(answer.status_code, answer.headers, text)
        raise self.refusal(answer.status_code, text, doing, _retry_after(answer))

    def refusal(self, status: int, text: str, doing: str, retry_after: float = 0.0) -> CloudError:
        """Return the error for an answer that says no."""
        reason = reason_of(text)
        said = f"{self.place}: {doing}: {reason or 'refused'} (HTTP {status})"
        hint = _hint(status, reason, self.name)
        return CloudError(said, hint=hint, status=status, reason=reason, retry_after=retry_after)

    def _adapter(self, service: str, region: str) -> Any:
        if region and region != self.region:
            return Adapter(
                session=self.connection.session,
                service_type=service,
                region_name=region,
                interface=self.connection.config.get_interface(),
                min_version="2",
                max_version="2.latest",
            )
        own = {
            "image": self.connection.image,
            "compute": self.connection.compute,
            "network": self.connection.network,
            "block-storage": self.connection.block_storage,
        }
        return own[service]

    def endpoints(self, service: str) -> dict[str, str]:
        """Return a service's addresses by region: of all regions in the catalogue, which the credential sees.

        Raises:
            CloudError: the token has expired and cannot be renewed.
        """
        with _explained(self.name, f"looking for its {service} service"):
            found = _access(self.connection).service_catalog.get_endpoints_data(
                service_type=service, interface=self.connection.config.get_interface() or "public"
            )
        return {one.region_name or "": one.url for several in found.values() for one in several}

    def has(self, service: str) -> bool:
        """Say whether the catalogue has a service in this region."""
        try:
            with _explained(self.name, f"looking for its {service} service"):
                endpoint = self.connection.session.get_endpoint(
                    service_type=service,
                    region_name=self.region or None,
                    interface=self.connection.config.get_interface(),
                )
        except CloudError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            return False
        return endpoint is not None

    def _set_clock(self, headers: Mapping[str, str], asked: datetime.datetime) -> None:
        # Servers with a clock say the time (RFC 9110), but for a bare uWSGI: then the token's time counts.
        try:
            said = email.utils.parsedate_to_datetime(headers["Date"]).astimezone(datetime.UTC)
        except (KeyError, TypeError, ValueError):
            return
        self.skew = _skew(said, asked, self.skew)


def is_passing(error: BaseException) -> bool:
    """Say whether an error may pass by itself."""
    return isinstance(error, CloudError) and (error.status == 0 or error.status in PASSING)


def _retrying(patience: float, say: Callable[[str], None] = lambda _text: None) -> tenacity.Retrying:
    """Return what tries again where an error may pass, with growing, jittered pauses, for so many seconds."""
    growing = tenacity.wait_random_exponential(multiplier=0.3, max=LONGEST_PAUSE_SECONDS)

    def pause(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.retry_after if isinstance(error, CloudError) else 0.0
        return max(growing(state), asked)

    def tell(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if state.attempt_number == 1 and isinstance(error, CloudError):
            say(f"{error.message}; trying again for up to {patience:.0f} s")

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_passing),
        wait=pause,
        stop=tenacity.stop_before_delay(patience),
        before_sleep=tell,
        reraise=True,
    )


def _retry_after(answer: Any) -> float:
    """Return the seconds that an answer asks us to wait; 0 where it does not, or names a date."""
    said = getattr(answer, "headers", {}).get("Retry-After", "")
    return min(float(said), LONGEST_RETRY_AFTER_SECONDS) if said.isdigit() else 0.0


def connect(
    name: str = "", *, region: str = "", default: str = "", say: Callable[[str], None] = lambda _text: None
) -> Cloud:
    """Connect to a cloud and check the credential. A cloud that is away is tried again, a refusal is final.

    Args:
        name: as in clouds.yaml; ``OS_CLOUD`` by default, then the default, then what ``OS_AUTH_URL`` and its kin say.
        region: one of several that the cloud has.
        default: the site's own cloud.
        say: takes a line where the cloud is away at first.

    Raises:
        BakehouseError: no cloud is named, it is not in clouds.yaml, it cannot be reached, or refuses the credential.
    """
    config = _configuration()
    known = sorted(set(config.get_cloud_names()) - {"envvars", "defaults"})
    chosen = name or os.environ.get("OS_CLOUD", "") or default
    if not chosen and not os.environ.get("OS_AUTH_URL"):
        listed = f"clouds.yaml has {', '.join(known)}" if known else "`invoke openstack.up` makes one to try"
        raise BakehouseError(
            "no cloud is named", hint=f"--cloud NAME, or OS_CLOUD, or 'cloud' in bakehouse.yaml; {listed}"
        )
    if chosen and chosen not in config.get_cloud_names():
        raise BakehouseError(
            f"there is no cloud '{chosen}' in clouds.yaml{did_you_mean(chosen, known)}",
            hint=f"it has {', '.join(known)}" if known else "docs/publish.md says where clouds.yaml is looked for",
        )
    return _retrying(RETRY_SECONDS, say)(lambda: _connect_once(config, chosen, region))


def _connect_once(config: openstack.config.OpenStackConfig, chosen: str, region: str) -> Cloud:
    with _explained(chosen or "the cloud of OS_AUTH_URL", "connecting"):
        found = config.get_one(cloud=chosen or None, region_name=region or None)
        connection = openstack.connection.Connection(config=found, app_name="bakehouse")
        try:
            asked = datetime.datetime.now(datetime.UTC)
            access = _access(connection)
            place = found.get_region_name() or ""
            cloud = Cloud(
                chosen or "envvars",
                place,
                access.project_id or "",
                connection,
                _skew(access.issued, asked),
                user=access.user_id or "",
            )
            _must_be_usable(cloud)
        except BaseException:
            connection.close()
            raise
    return cloud


def _access(connection: openstack.connection.Connection) -> Any:
    """Return the token and what it is for."""
    plugin: Any = connection.session.auth
    return plugin.get_access(connection.session)


def _skew(
    said: datetime.datetime, asked: datetime.datetime, known: datetime.timedelta = datetime.timedelta(0)
) -> datetime.timedelta:
    """Return how far a clock is ahead of ours that said a time, in whole seconds, at a moment between then and now.

    What is known of it already holds, as far as that can be.
    """
    least = said - datetime.datetime.now(datetime.UTC)
    most = said + datetime.timedelta(seconds=1) - asked
    return min(max(known, least), most)


def _must_be_usable(cloud: Cloud) -> None:
    if not cloud.project:
        raise BakehouseError(
            f"the credential for {cloud.name} is not for a project",
            hint="name project_name and project_domain_name in clouds.yaml, or use an application credential",
        )
    if not cloud.has("image"):
        raise BakehouseError(
            f"{cloud.place} has no image service (Glance)",
            hint="check 'region_name' and 'interface' in clouds.yaml, or give --region",
        )


def _configuration() -> openstack.config.OpenStackConfig:
    try:
        return openstack.config.OpenStackConfig()
    except (openstack.exceptions.ConfigException, OSError) as error:
        raise BakehouseError(f"clouds.yaml cannot be read: {_first_line(error)}", hint="check its YAML") from error
    except Exception as error:
        # openstacksdk hands on whatever YAML's reader raises.
        if type(error).__module__.startswith("yaml"):
            raise BakehouseError(f"clouds.yaml is not YAML: {' '.join(str(error).split())}") from error
        raise


@contextmanager
def _explained(cloud: str, doing: str) -> Iterator[None]:
    try:
        yield
    except BakehouseError:
        raise
    except Exception as error:
        explained = explain(error, cloud, doing)
        if explained is None:
            raise
        raise explained from error


def explain(error: Exception, cloud: str, doing: str) -> CloudError | None:
    """Return what an exception of the libraries below means for a user; None for one that is a fault of ours."""
    text = _first_line(error)
    for kinds, message, hint, status in _MEANINGS:
        if isinstance(error, kinds):
            return CloudError(message.format(cloud=cloud, doing=doing, text=text), hint=hint, status=status)
    if isinstance(error, keystone.HttpError | openstack.exceptions.HttpException):
        status = getattr(error, "http_status", None) or getattr(error, "status_code", None) or 0
        after = _retry_after(error.response)
        return CloudError(
            f"{cloud}: {doing}: {text}", hint=_hint(status, text, cloud), status=status, retry_after=after
        )
    if isinstance(error, keystone.ClientException | openstack.exceptions.SDKException):
        return CloudError(
            f"{cloud}: {doing}: {text}", hint="check its entry in clouds.yaml", status=HTTPStatus.BAD_REQUEST
        )
    return None


_MEANINGS: tuple[tuple[tuple[type[Exception], ...], str, str, int], ...] = (
    (
        (keystone.Unauthorized,),
        "{cloud} refuses the credential: {text}",
        "check its entry in clouds.yaml: an application credential may have expired or been revoked",
        HTTPStatus.UNAUTHORIZED,
    ),
    (
        (keystone.SSLError,),
        "{cloud}: {doing}: its certificate cannot be checked: {text}",
        "name the authority's file as 'cacert' in clouds.yaml",
        HTTPStatus.BAD_REQUEST,
    ),
    (
        (keystone.EndpointNotFound, keystone.CatalogException),
        "{cloud}: {doing}: the service is not in its catalogue: {text}",
        "check 'region_name' and 'interface' in clouds.yaml",
        HTTPStatus.NOT_FOUND,
    ),
    (
        (keystone.ConnectTimeout,),
        "{cloud} does not answer in time: {doing}: {text}",
        "try again; if it stays so, the cloud's operator has logs",
        HTTPStatus.GATEWAY_TIMEOUT,
    ),
    (
        (keystone.ConnectFailure, keystone.RetriableConnectionFailure, keystone.DiscoveryFailure),
        "{cloud} cannot be reached: {doing}: {text}",
        "is it up, and is 'auth_url' in clouds.yaml right?",
        0,
    ),
    (
        # What openstacksdk makes of a service that does not answer when it is asked for its versions.
        (openstack.exceptions.NotSupported,),
        "{cloud}: {doing}: the service does not say which versions it has: {text}",
        "it is probably down: does its address in the catalogue answer?",
        0,
    ),
)
"""Exceptions of the libraries below, what they mean, what to do, and the nearest HTTP status; 0: it may pass."""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def reason_of(text: str) -> str:
    """Return what a service said, out of the JSON or HTML in which it says it."""
    try:
        body = json.loads(text)
    except ValueError:
        body = text
    while isinstance(body, dict):
        # {"message": ...}, {"error": {"message": ...}} or {"forbidden": {"message": ...}}
        body = body.get("message") or next((item for item in body.values() if isinstance(item, dict)), "")
    plain = re.sub(r"<head>.*?</head>|<h1>.*?</h1>", " ", str(body), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", plain)).split())[:500]


def _hint(status: int, reason: str, cloud: str) -> str:
    about = reason.lower()
    if "properties" in about and ("limit" in about or "quota" in about):
        return "the image has as many as Glance takes: `openstack image unset --property NAME IMAGE` makes room for one"
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE or "quota" in about or "limit" in about:
        if "storage media" in about or "disk space" in about:
            return "Glance's own store is full: its operator must make room; `invoke prune` removes old images"
        return f"remove what is not needed (`invoke prune --keep 3 --cloud {cloud}`), or ask for a larger quota"
    hints = {
        401: "check the cloud's entry in clouds.yaml: an application credential may have expired or been revoked",
        403: "the credential's roles do not allow it; publishing as 'public' takes an administrator in most clouds",
        404: "somebody may have removed it meanwhile: try again",
        409: "somebody changed it meanwhile: try again",
        429: "the cloud asks for fewer requests: try again later",
    }
    return hints.get(status, "try again; if it stays so, the cloud's operator has logs" if status in PASSING else "")
