"""The Ray actor that generates: veRL's rollout server, on transformers."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.model import convert_weight_keys, get_hf_auto_model_class
from verl.utils.tokenizer import normalize_token_ids
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.replica import TokenOutput
from verl.workers.rollout.utils import get_max_position_embeddings, get_vision_placeholder_token_ids

from verl_tapo.cpu.decoding import Decoder, Request
from verl_tapo.cpu.inputs import model_inputs
from verl_tapo.cpu.sampling import Sampling, request_seed

T = TypeVar("T")
_VISION_TOKENS = ("vision_start_token_id", "vision_end_token_id")  # of the model's configuration


def build_model(model_config: Any, rollout_config: Any) -> Any:
    """The model as the actor has it; with weights of its own until the first `TransformersServer.update_weights`."""
    config = model_config.hf_config
    auto_class = get_hf_auto_model_class(config)
    dtype = PrecisionType.to_dtype(rollout_config.dtype)
    trust = model_config.trust_remote_code
    if rollout_config.load_format == "dummy":
        return auto_class.from_config(config, dtype=dtype, trust_remote_code=trust)
    return auto_class.from_pretrained(model_config.local_path, config=config, dtype=dtype, trust_remote_code=trust)


def end_tokens(model_config: Any) -> frozenset[int]:
    """Token ids that end a turn."""
    found: set[int] = set()
    for source in (model_config.generation_config, model_config.tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    return frozenset(found)


class TransformersServer:
    """One copy of the model, which generates for everyone who asks.

    All that touches the model runs in one thread, so that weights never change within a step.

    Args:
        config: veRL's rollout configuration.
        model_config: veRL's model configuration.
        replica_rank: this server's number, from 0.
    """

    def __init__(self, config: Any, model_config: Any, replica_rank: int) -> None:
        self.config: RolloutConfig = omega_conf_to_dataclass(config)
        self.model_config: HFModelConfig = omega_conf_to_dataclass(model_config, dataclass_type=HFModelConfig)
        self.replica_rank = replica_rank
        self.global_steps: int | None = None
        context = get_max_position_embeddings(self.model_config.hf_config)
        self.max_model_len = min(self.config.max_model_len or context, context)
        self._end_tokens = end_tokens(self.model_config)
        self._siblings: Counter[int] = Counter()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        model = build_model(self.model_config, self.config)
        self._loaded = self.config.load_format != "dummy"
        own = {name: name for name in model.state_dict()}
        self._names: dict[str, str] = {sent: name for sent, name in convert_weight_keys(own, model).items()}
        self._missing: set[str] = set()
        forbidden = set(get_vision_placeholder_token_ids(self.model_config.processor))
        if forbidden:
            forbidden |= {getattr(self.model_config.hf_config, name, None) for name in _VISION_TOKENS} - {None}
        self._decoder = Decoder(
            model,
            max_rows=1 if self.config.full_determinism else self.config.max_num_seqs,
            max_prefill_tokens=self.config.max_num_batched_tokens,
            forbidden=sorted(forbidden),
        )
        self._futures: dict[int, asyncio.Future[Request]] = {}  # by id of the request
        self._driver: asyncio.Task[None] | None = None
        self._open = asyncio.Event()
        self._open.set()
        self._rejecting = False

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    # -- generation -----------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        request_id: str,
        image_data: list[Any] | None = None,
        video_data: list[Any] | None = None,
        audio_data: list[Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> TokenOutput:
        """Generates one response; arguments and result as veRL's vLLM server has them.

        ``sampling_params["seed"]`` distinguishes requests of the same prompt. With it, a response
        depends only on ``rollout.seed``, the step, the prompt and that number. Without it, the
        order of arrival decides which request gets which of the prompt's responses.

        Raises:
            ValueError: for a prompt without room for a token, videos, audio, or sampling parameters not known here.
            RuntimeError: before the first weights have arrived.
        """
        if video_data or audio_data:
            raise ValueError("the transformers rollout takes images, but neither videos nor audio")
        if not self._loaded:
            raise RuntimeError("no weights have arrived yet: veRL sends them before the first rollout")
        prompt: list[int] = normalize_token_ids(prompt_ids)
        params = dict(sampling_params)
        sampling = Sampling.from_verl(self._defaults(params), self._room(prompt, params), self._end_tokens)
        processor = self.model_config.processor
        positions, vision = await self._in_thread(model_inputs, prompt, image_data, processor, mm_processor_kwargs)
        while not self._open.is_set():
            if self._rejecting:
                return self._output([], None, "aborted")
            await self._open.wait()
        request = Request(prompt, sampling, self._noise(prompt, vision, params.get("seed")), positions, vision)
        future = self._futures[id(request)] = asyncio.get_running_loop().create_future()
        self._decoder.submit(request)
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive())
        await future
        return self._output(request.tokens, request.log_probs if params.get("logprobs") else None, request.stop_reason)

    def _defaults(self, params: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        defaults = {
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "repetition_penalty": config.repetition_penalty,
            "ignore_eos": config.ignore_eos,
        }
        return {**defaults, **{name: value for name, value in params.items() if not name.startswith("max_")}}

    def _room(self, prompt: list[int], params: dict[str, Any]) -> int:
        """Tokens that may be generated: as veRL's vLLM server counts them."""
        config = self.config
        room: int = self.max_model_len - len(prompt)
        if room < 1:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, and the model's context {self.max_model_len}: no room to answer "
                "(rollout.max_model_len, max_position_embeddings)"
            )
        budget: int = min(config.response_length, config.prompt_length + config.response_length - len(prompt))
        asked = params.get("max_tokens", params.get("max_new_tokens"))
        return max(1, min(budget if asked is None else int(asked), room))

    def _noise(self, prompt: list[int], vision: dict[str, torch.Tensor], sibling: int | None) -> random.Random:
        pixels = vision["pixel_values"].numpy().tobytes() if vision else b""
        step = -1 if self.global_steps is None else self.global_steps
        identity = request_seed(self.config.seed, step, prompt, pixels)
        if sibling is None:  # counted for each server, so the server is part of the count
            sibling = self._siblings[identity]
            self._siblings[identity] += 1
            return random.Random(request_seed(identity, self.replica_rank, sibling, b"arrival"))
        return random.Random(request_seed(identity, sibling))

    async def _drive(self) -> None:
        while self._decoder.busy:
            try:
                done = await self._in_thread(self._decoder.step)
            except Exception as error:
                await self._in_thread(self._decoder.abort)
                for future in self._futures.values():
                    if not future.done():
                        future.set_exception(error)
                self._futures.clear()
                return
            self._resolve(done)

    def _resolve(self, done: list[Request]) -> None:
        for request in done:
            future = self._futures.pop(id(request), None)
            if future is not None and not future.done():  # the one who asked may have gone
                future.set_result(request)

    def _output(self, tokens: list[int], log_probs: list[float] | None, reason: str | None) -> TokenOutput:
        return TokenOutput(
            token_ids=tokens,
            log_probs=log_probs,
            stop_reason=reason,
            num_preempted=0,
            extra_fields={"global_steps": self.global_steps},
        )

    # -- weights --------------------------------------------------------------------------------------------------

    async def begin_update(self) -> None:
        """Announces new weights."""
        self._missing = set(self._names)

    async def update_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Takes over some of the actor's weights.

        Raises:
            KeyError: for a name the model does not have.
        """
        await self._in_thread(self._copy, weights)

    @torch.no_grad()
    def _copy(self, weights: dict[str, torch.Tensor]) -> None:
        state = self._decoder.model.state_dict()
        for name, value in weights.items():
            state[self._names[name]].copy_(value)
            self._missing.discard(name)
        self._decoder.forget()

    async def end_update(self, global_steps: int | None) -> None:
        """Closes an update.

        Args:
            global_steps: the actor's step.

        Raises:
            RuntimeError: if weights are missing.
        """
        state = self._decoder.model.state_dict()
        arrived = {state[name].data_ptr() for sent, name in self._names.items() if sent not in self._missing}
        missing = [name for name in sorted(self._missing) if state[self._names[name]].data_ptr() not in arrived]  # tied
        if missing:
            raise RuntimeError(f"{len(missing)} weights did not arrive from the actor: {', '.join(missing[:5])}")
        self._loaded = True
        self.global_steps = global_steps
        self._siblings.clear()

    # -- what veRL calls between steps ----------------------------------------------------------------------------

    async def set_global_steps(self, global_steps: int) -> None:
        """Sets the step number, as veRL's servers do."""
        self.global_steps = global_steps

    async def abort_all_requests(self, reject_request: bool = False) -> dict[str, Any]:
        """Ends all requests as they are, and holds new ones back until `resume_generation`.

        Args:
            reject_request: new ones end at once, empty, instead.
        """
        self._open.clear()
        self._rejecting = reject_request
        dropped = await self._in_thread(self._decoder.abort)
        self._resolve(dropped)
        return {"aborted_count": len(dropped)}

    async def resume_generation(self) -> None:
        """Lets requests in again."""
        self._rejecting = False
        self._open.set()

    async def clear_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """Drops keys and values that are kept for later prompts."""
        await self._in_thread(self._decoder.forget)

    sleep = release_kv_cache = clear_kv_cache

    async def nothing(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the weights stay in place."""

    wake_up = resume_kv_cache = nothing
    start_profile = stop_profile = wait_for_requests_to_drain = nothing
