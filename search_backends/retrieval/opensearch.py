"""An index of OpenSearch, or of what speaks its REST interface, behind the service's wire format.

    python -m search_backends.retrieval.opensearch http://HOST:9200 INDEX --fields title^2,contents --port 8080

User, password: OPENSEARCH_USER, OPENSEARCH_PASSWORD. Fields: `contents` or `text`, `title`, `url`. Tried on a stand-in.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from fastapi import HTTPException

from search_backends.retrieval.documents import encode_document
from search_backends.retrieval.manifest import IndexProblem, run_main
from search_backends.retrieval.serve import RETRY_AFTER, Service, Settings, body, run


class OpenSearch(Service):
    """Passages of one index. ``fields``: those that are searched, with their weights (``title^2``)."""

    has_images = False

    def __init__(self, address: str, index: str, fields: Sequence[str]) -> None:
        super().__init__(Settings(Path(index)))
        user, kind = os.environ.get("OPENSEARCH_USER"), {"Content-Type": "application/x-ndjson"}
        auth = (user, os.environ.get("OPENSEARCH_PASSWORD", "")) if user else None
        self._client = httpx.AsyncClient(base_url=address, auth=auth, headers=kind, timeout=30.0, trust_env=False)
        self._name, self._fields, self._why = index, list(fields), ""

    async def load(self) -> None:
        """Sees whether the index is there; ``problem`` says why not."""
        if await self.describe() is None:
            self.problem = IndexProblem(f"{self._name}: {self._why}")

    async def describe(self) -> dict[str, Any] | None:
        """See `Service.describe`. The identity follows the index, its number of documents and the fields."""
        try:
            settings = await self._ask("GET", f"/{self._name}/_settings")
            count = (await self._ask("GET", f"/{self._name}/_count"))["count"]
        except HTTPException as error:
            self._why = error.detail
            return None
        uuids = sorted(of["settings"]["index"]["uuid"] for of in settings.values())
        identity = hashlib.sha256(json.dumps([uuids, count, self._fields]).encode()).hexdigest()[:16]
        return {"identity": f"opensearch-{identity}", "searches": ["opensearch"], "passages": count, "images": 0}

    async def find_texts(self, queries: Sequence[str], topk: int, scores: bool) -> bytes:
        """See `Service.find_texts`. All shards' statistics count, and the same copies of them are asked."""
        head = {"index": self._name, "search_type": "dfs_query_then_fetch", "preference": "retrieval"}
        asked = [{"size": topk, "query": {"multi_match": {"query": each, "fields": self._fields}}} for each in queries]
        content = "".join(f"{json.dumps(head)}\n{json.dumps(each)}\n" for each in asked)
        answer = await self._ask("POST", "/_msearch", content)
        found = []
        for each in answer["responses"]:
            if "error" in each or each["timed_out"] or each["_shards"]["failed"]:
                raise _refused(each["status"] if "error" in each else 503, each.get("error", "not all shards answered"))
            found.append([(_document(hit), hit["_score"]) for hit in each["hits"]["hits"]])
        return body(found, scores)

    async def _ask(self, method: str, path: str, content: str | None = None) -> Any:
        try:
            response = await self._client.request(method, path, content=content)
        except httpx.HTTPError as error:
            raise _refused(503, repr(error)) from error
        if response.is_error:
            raise _refused(response.status_code, response.text)
        return response.json()


def _refused(status: int, why: object) -> HTTPException:
    code = 503 if status == 429 or status >= 500 else 500
    return HTTPException(code, f"OpenSearch ({status}): {str(why)[:300]}", RETRY_AFTER if code == 503 else None)


def _document(hit: Mapping[str, Any]) -> bytes:
    title, url, text = (str(hit["_source"].get(name) or "") for name in ("title", "url", "text"))
    return encode_document(str(hit["_id"]), title, str(hit["_source"].get("contents", text)), url)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser("search_backends.retrieval.opensearch", description=__doc__)
    parser.add_argument("address")
    parser.add_argument("index")
    parser.add_argument("--fields", default="title^2,contents", help="that are searched (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    args = parser.parse_args(argv)
    own = OpenSearch(args.address, args.index, args.fields.split(","))
    return run_main(parser.prog, lambda: run(own, args.host, args.port, f"asking {args.index}"))


if __name__ == "__main__":
    raise SystemExit(main())
