"""A model behind an OpenAI-compatible server."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from search_backends.chat.messages import (
    Message,
    Pictures,
    Reply,
    RequestedCall,
    ToolCalls,
    calls_in_text,
    is_broken,
    on_the_wire,
    read_call,
    text_part,
    whole,
    with_tools,
)
from search_backends.errors import InfrastructureError
from search_backends.http import ApiKey, BackendError, JsonClient

# vLLM, SGLang, llama.cpp and OpenAI say it in these words.
_TOO_LONG = re.compile(r"context.?(length|size|window)|max(imum)?[ _]model[ _]len|prompt is too long", re.IGNORECASE)
_HOPELESS = (401, 403, 404)
_LONGEST = 1 << 24  # bytes of an answer


class Refused(Exception):
    """The server will answer no request of this kind: a wrong key, address or model."""


def _arguments(call: RequestedCall, written: Any) -> str:
    """A call's arguments as they are sent back: the model's own text if a server can read it."""
    if isinstance(written, str) and written and not is_broken(call.arguments):
        return whole(written)
    return whole(json.dumps(call.arguments, ensure_ascii=False))


class ChatModel:
    """Answers conversations.

    Args:
        base_url: up to and including ``/v1``.
        model: its name at the server.
        tool_calls: ``native``, the server tells the model of the tools and reads its calls; ``template``, it tells the
            model of them, as in training, and the calls are read here; ``hermes``, both happen here. Calls that a
            native server left in the text are read too.
        request: further keys of every request, over the others; None takes one out.
        timeout_s: seconds for a request with all its attempts; one attempt gets half of it.
        concurrency: requests at a time.
        key: sent where there is one.

    Raises:
        ValueError: ``base_url`` is not an address.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        tool_calls: ToolCalls = "native",
        request: Mapping[str, Any] | None = None,
        timeout_s: float = 1200.0,
        concurrency: int = 64,
        key: ApiKey | None = None,
    ):
        self._base_url, self._model, self._key = base_url, model, key
        self._tool_calls = tool_calls
        self._request = {"model": model, **(request or {})}
        self._concurrency = concurrency
        self._client = self._connect(timeout_s=timeout_s, attempts=4)

    def _connect(self, *, timeout_s: float, attempts: int) -> JsonClient:
        return JsonClient(
            self._base_url,
            timeout_s=timeout_s,
            attempts=attempts,
            concurrency=self._concurrency,
            max_bytes=_LONGEST,
            headers={"Authorization": f"Bearer {self._key.value}"} if self._key else None,
            key=self._key,
            query_fault=_TOO_LONG,
        )

    async def close(self) -> None:
        await self._client.close()

    async def check(self) -> None:
        """Checks that the server runs and, if it says so, has the model.

        Raises:
            InfrastructureError: It is not there.
            Refused: It is, and has other models, or wants another key.
        """
        probe = self._connect(timeout_s=20, attempts=2)
        try:
            names = [str(entry["id"]) for entry in (await probe.get("models"))["data"]]
        except BackendError as error:
            if error.status is None:
                raise InfrastructureError(f"no model server answers at {self._base_url}: {error}") from None
            if error.status in (401, 403):
                raise Refused(f"the model server {error}") from None
            return  # not every server lists its models
        except (LookupError, TypeError):
            return
        finally:
            await probe.close()
        if names and self._model not in names:
            raise Refused(f"the model server at {self._base_url} has no model {self._model!r}, but {', '.join(names)}")

    async def reply(
        self, messages: Sequence[Message], pictures: Pictures, schemas: Sequence[Mapping[str, Any]]
    ) -> Reply:
        """The model's next turn.

        Args:
            messages: the conversation, see `dialogue`.
            pictures: its images.
            schemas: the tools, in OpenAI's format.

        Raises:
            ModelError: The conversation is longer than the model can read.
            InfrastructureError, Refused
        """
        request: dict[str, Any] = {"messages": list(messages)}
        if schemas and self._tool_calls == "hermes":
            request["messages"] = with_tools(request["messages"], schemas)
        elif schemas:
            request["tools"] = list(schemas)
            if self._tool_calls == "template":
                request["tool_choice"] = (
                    "none"  # vLLM shows the model the tools all the same, and leaves its text alone
                )
        request["messages"] = on_the_wire(request["messages"], pictures)
        request.update(self._request)
        answer = await self._post({key: value for key, value in request.items() if value is not None})
        try:
            choice = answer["choices"][0]
            said, usage = choice["message"], answer.get("usage") or {}
            text = whole("" if said.get("content") is None else said["content"])
            asked = said.get("tool_calls") or []
            calls = tuple(
                read_call(
                    call["function"].get("name"),
                    call["function"].get("arguments"),
                    # Some formats have the model write the id.
                    whole(str(call.get("id") or f"call_{number}")),
                )
                for number, call in enumerate(asked)
            )
            read, written = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise InfrastructureError(f"the model server's answer is no chat completion: {error!r}") from None
        message: Message = {"role": "assistant", "content": [text_part(text)]}
        if calls:
            # As the model wrote them; but servers refuse arguments that are not JSON, and names that are none.
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.tool or "unknown",
                        "arguments": "{}" if call.problem else _arguments(call, original["function"].get("arguments")),
                    },
                }
                for call, original in zip(calls, asked, strict=True)
            ]
        return Reply(
            text,
            calls or calls_in_text(text),
            message,
            str(choice.get("finish_reason")),
            read,
            written,
        )

    async def _post(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = await self._client.post("chat/completions", request)
        except BackendError as error:
            text = f"the model server {error}"
            if error.status in _HOPELESS:
                raise Refused(text) from None
            if error.status == 400 and "tool" in text and "tools" in request:
                text += "; --tool-calls hermes needs no help of the server's"
            raise InfrastructureError(text) from None
        if not isinstance(answer, dict):
            raise InfrastructureError(f"the model server answered with no JSON object: {str(answer)[:300]}")
        return answer
