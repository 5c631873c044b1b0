"""Messages of a conversation, in the forms that different servers expect.

A message's content is a list of parts, ``{"type": "text", "text": ...}`` or ``{"type": "image",
"image": NAME}``. The name is derived from the image's content, so conversations can be stored
without their images.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from verl_tapo.calls.formats import FORMATS, read_text

Message = dict[str, Any]
ToolCalls = Literal["native", "template", "hermes"]


@dataclass(frozen=True)
class RequestedCall:
    """A call as the model asked for it."""

    tool: str
    arguments: dict[str, Any]
    problem: str | None = None
    """Why the call cannot be read, or None. An unreadable call is not executed."""
    id: str | None = None
    """The server's id if the server read the call; None if the call was found in the text."""


@dataclass(frozen=True)
class Reply:
    """A turn of the model's."""

    text: str
    calls: tuple[RequestedCall, ...]
    message: Message
    """The message to send back as part of the conversation."""
    finish: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class Pictures:
    """A conversation's images, in order; the model counts them from 1."""

    images: list[Image.Image] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    """The image files by name, such as ``HASH.png``."""

    def add_file(self, content: bytes) -> dict[str, str]:
        """Adds an encoded image; returns it as a part of a message.

        Raises:
            OSError: It cannot be decoded.
        """
        image = Image.open(io.BytesIO(content))
        if image.format not in ("PNG", "JPEG", "WEBP"):  # what every server reads
            return self.add(image.convert("RGB"))
        return self._add(image.convert("RGB"), content, image.format.lower())

    def add(self, image: Image.Image) -> dict[str, str]:
        """Adds an image without loss."""
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return self._add(image, buffer.getvalue(), "png")

    def _add(self, image: Image.Image, content: bytes, kind: str) -> dict[str, str]:
        name = f"{hashlib.sha256(content).hexdigest()[:24]}.{kind}"
        self.files[name] = content
        self.images.append(image)
        self.names.append(name)
        return {"type": "image", "image": name}

    def url(self, name: str) -> str:
        """A data URL."""
        return f"data:image/{name.rpartition('.')[2]};base64,{base64.b64encode(self.files[name]).decode()}"


def text_part(text: str) -> dict[str, str]:
    """A part of a message."""
    return {"type": "text", "text": text}


def whole(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair, which UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode()


def read_call(name: Any, arguments: Any, identity: str | None = None) -> RequestedCall:
    """Reads a call whose arguments are an object, or JSON of one."""
    if not isinstance(name, str) or not name:
        return RequestedCall("", {}, "it has no tool name", identity)
    name = whole(name)
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            return RequestedCall(name, {}, f"its arguments are not valid JSON ({error})", identity)
    if not isinstance(arguments, dict):
        return RequestedCall(name, {}, "its arguments are not a JSON object", identity)
    return RequestedCall(name, arguments, None, identity)


def is_broken(arguments: Mapping[str, Any]) -> bool:
    """Returns whether a call's arguments contain half a surrogate pair, which JSON lets a model
    write."""
    try:
        json.dumps(arguments, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def calls_in_text(text: str) -> tuple[RequestedCall, ...]:
    """The calls of a turn's text, read as in training with ``multi_turn.format=hermes``."""
    found = read_text(FORMATS["hermes"], text.encode())[0]
    return tuple(RequestedCall("" if call.error else call.tool, call.arguments, call.error) for call in found)


def tools_in_text(schemas: Sequence[Mapping[str, Any]]) -> str:
    """Describes the tools in a system message, for a server that does not do so itself."""
    lines = "\n".join(json.dumps(schema, ensure_ascii=False) for schema in schemas)
    return (
        "# Tools\n\nYou may call these tools, described one per line:\n"
        f"<tools>\n{lines}\n</tools>\n\n"
        "To call a tool, write a JSON object with its name and arguments between these tags:\n"
        '<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>'
    )


def with_tools(messages: list[Message], schemas: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages, their system message followed by what `tools_in_text` says."""
    text = tools_in_text(schemas)
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": [*messages[0]["content"], text_part(f"\n\n{text}")]}
        return [first, *messages[1:]]
    return [{"role": "system", "content": [text_part(text)]}, *messages]


def answers(calls: Sequence[RequestedCall], contents: Sequence[list[dict[str, str]]]) -> list[Message]:
    """The messages that answer a turn's calls; ``contents`` are the parts of the answer to each.

    Calls that the server read are answered by messages of the role ``tool``, which allows only text: images follow in
    one of the user's. Calls found in the text are answered in a user message; Qwen's templates render it to the same
    tokens as a tool answer.
    """
    if any(call.id is None for call in calls):
        parts: list[dict[str, str]] = []
        for content in contents:
            between = "\n" if parts else ""
            parts += [text_part(f"{between}<tool_response>\n"), *content, text_part("\n</tool_response>")]
        return [{"role": "user", "content": _joined(parts)}]
    messages: list[Message] = []
    shown: list[dict[str, str]] = []
    for call, content in zip(calls, contents, strict=True):
        texts = [part for part in content if part["type"] == "text"]
        shown += [part for part in content if part["type"] == "image"]
        messages.append({"role": "tool", "tool_call_id": call.id, "content": texts})
    if shown:
        messages.append({"role": "user", "content": shown})
    return messages


def _joined(parts: list[dict[str, str]]) -> list[dict[str, str]]:
    joined: list[dict[str, str]] = []
    for part in parts:
        if joined and part["type"] == joined[-1]["type"] == "text":
            joined[-1] = text_part(joined[-1]["text"] + part["text"])
        else:
            joined.append(part)
    return joined


def on_the_wire(messages: Sequence[Message], pictures: Pictures) -> list[Message]:
    """Messages as the API takes them: text alone as a string, images as data URLs."""
    written = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            if all(part["type"] == "text" for part in content):
                content = "".join(part["text"] for part in content)
            else:
                content = [
                    part
                    if part["type"] == "text"
                    else {"type": "image_url", "image_url": {"url": pictures.url(part["image"])}}
                    for part in content
                ]
        written.append({**message, "content": content})
    return written
