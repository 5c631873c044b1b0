"""The common base of providers: checked settings and checked answers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeAlias, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from search_backends.errors import InfrastructureError, ModelError
from search_backends.http import ApiKey, JsonClient, checked_address


class Settings(BaseModel):
    """A provider's settings, given beside ``provider`` in its configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _checked(url: str) -> str:
    checked_address(url)
    return url


Address: TypeAlias = Annotated[str, AfterValidator(_checked)]
"""The address of a service, http or https."""


class HttpSettings(Settings):
    """Settings of a provider behind HTTP."""

    timeout_s: float = Field(40.0, gt=0)
    """Seconds for a call, including attempts and pauses."""
    attempts: int = Field(6, ge=1)
    concurrency: int = Field(32, ge=1)
    """Requests at a time, in one event loop."""
    max_bytes: int = Field(8 << 20, ge=1024)
    """The maximal size of an answer."""

    def client(
        self,
        address: str,
        *,
        headers: Mapping[str, str] | None = None,
        key: ApiKey | None = None,
        query_fault: str | None = None,
    ) -> JsonClient:
        """Returns a client of the service at ``address``, see `JsonClient`. ``query_fault`` is a
        pattern; case is ignored."""
        return JsonClient(
            address,
            timeout_s=self.timeout_s,
            attempts=self.attempts,
            concurrency=self.concurrency,
            max_bytes=self.max_bytes,
            headers=headers,
            key=key,
            query_fault=re.compile(query_fault, re.IGNORECASE) if query_fault else None,
        )


class Answer(BaseModel):
    """A provider's answer or a part of one: the fields that we use, with their documented types."""

    model_config: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="ignore", frozen=True)


SettingsT = TypeVar("SettingsT", bound=Settings)
AnswerT = TypeVar("AnswerT", bound=Answer)


def settings_of(kind: type[SettingsT], provider: str, config: Mapping[str, Any]) -> SettingsT:
    """The settings in ``config``.

    Raises:
        ValueError: One is missing, unknown or out of range.
    """
    try:
        return kind(**config)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        known = ", ".join(kind.model_fields)
        raise ValueError(f"the provider {provider}: {where}: {problem['msg']} (it takes {known})") from None


def answer_of(kind: type[AnswerT], provider: str, value: Any) -> AnswerT:
    """A provider's answer ``value``, checked.

    Raises:
        InfrastructureError: It is not of the documented form.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"])) or "the answer"
        raise InfrastructureError(f"{provider}: not the documented form: {where}: {problem['msg']}") from None


class ImageAddresses:
    """The web addresses of the prompts' images, for services that search only by address.

    Args:
        provider: for messages.
        file: JSON, ``{key: address}``; the keys are those of `ImageProvider.search`.

    Raises:
        ValueError: There is no such file, or it is something else.
    """

    def __init__(self, provider: str, file: str) -> None:
        try:
            addresses = json.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"the provider {provider}: image_urls: {error}") from None
        if not isinstance(addresses, dict) or not all(isinstance(address, str) for address in addresses.values()):
            raise ValueError(f"the provider {provider}: image_urls: {file} must hold a JSON object of addresses")
        self._provider, self._addresses = provider, addresses

    def find(self, key: str | None) -> str:
        """The address of the image ``key``.

        Raises:
            ModelError: It is not an image of the prompt.
            InfrastructureError: The file does not know it.
        """
        address: str | None = self._addresses.get(require_key(key))
        if address is None:
            raise InfrastructureError(f"{self._provider}: image_urls has no address of the image {key}")
        return address


def require_key(key: str | None) -> str:
    """Returns ``key`` if the image has one, as only the prompt's own images do.

    Raises:
        ModelError
    """
    if key is None:
        raise ModelError("only the images of the question can be searched, not those that tools returned")
    return key
