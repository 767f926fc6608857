"""One webhook: a JSON document is sent to an address, once more and again where it is not taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import tenacity

from bakehouse.errors import BakehouseError

TIMEOUT_SECONDS = 30
PATIENCE_SECONDS = 120.0
LONGEST_PAUSE_SECONDS = 20.0
REFUSED = range(400, 500)
PASSING = {408, 425, 429}
"""Refusals that may pass by themselves (RFC 9110, RFC 8470, RFC 6585)."""


class _PassingError(Exception):
    """It was not taken, for a reason that may pass."""


def send(url: str, data: dict[str, Any], token_file: Path | None = None, *, patience: float = PATIENCE_SECONDS) -> None:
    """Send a document to an address by POST.

    Args:
        url: the address.
        data: the document.
        token_file: file with the token that it is sent with, as ``Authorization: Bearer``.
        patience: seconds for which it is tried.

    Raises:
        BakehouseError: it was refused, or not taken for so long. The address is told by its host only: its path may be
            a secret.
    """
    headers = {"Content-Type": "application/json", "User-Agent": "bakehouse"}
    if token_file:
        headers["Authorization"] = f"Bearer {_token(token_file)}"
    where = urlsplit(url).hostname or "?"

    @tenacity.retry(
        retry=tenacity.retry_if_exception_type(_PassingError),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=LONGEST_PAUSE_SECONDS),
        stop=tenacity.stop_after_delay(patience),
        reraise=True,
    )
    def post() -> None:
        try:
            # A redirection would hand the token on to somebody else.
            answer = requests.post(
                url, data=json.dumps(data, default=str), headers=headers, timeout=TIMEOUT_SECONDS, allow_redirects=False
            )
        except requests.RequestException as error:
            raise _PassingError(type(error).__name__) from error
        if answer.ok and not answer.is_redirect:
            return
        if answer.is_redirect:
            raise BakehouseError(f"the webhook at {where} sends elsewhere", hint="name the address that it sends to")
        said = f"status {answer.status_code}"
        if answer.status_code in REFUSED and answer.status_code not in PASSING:
            raise BakehouseError(f"the webhook at {where} refused the summary: {said}", hint="its token, its address")
        raise _PassingError(said)

    try:
        post()
    except _PassingError as error:
        raise BakehouseError(
            f"the webhook at {where} did not take the summary for {patience:.0f} s: {error}",
            hint="`invoke nightly.show --json` prints the summary",
        ) from error


def _token(path: Path) -> str:
    try:
        token = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise BakehouseError(
            f"the webhook's token {path} cannot be read: {error.strerror}", hint="webhook_token_file in bakehouse.yaml"
        ) from error
    if not token or "\n" in token:
        raise BakehouseError(f"{path} does not hold a token: one line", hint="webhook_token_file in bakehouse.yaml")
    return token
