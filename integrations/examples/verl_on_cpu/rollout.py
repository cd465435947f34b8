"""A rollout engine for verl that generates with transformers, on CPUs.

verl's trainer starts a ``TransformersReplica`` for each group of rollout workers; its agent loops
ask the replica's server for responses; and the training workers send the server their weights with
a ``WeightSender``, once before the first step and after each.
"""

import asyncio
import os
import secrets
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import ray
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput
from verl.workers.rollout.utils import ensure_async_iterator

from fused_sd.checks import fail
from fused_sd.integrations.examples.verl_on_cpu.generation import Request, Sampling, complete

BUCKET_BYTES = 64 << 20
"""Weights go to the server in messages of about this size."""

SAMPLING = tuple(one.name for one in fields(Sampling))
READ = {*SAMPLING, "logprobs", "max_new_tokens", "max_tokens", "seed"}
"""The sampling parameters that the server reads; it refuses others."""


class TransformersServer:
    """Generates in a process of its own; a Ray actor with asynchronous methods.

    Requests that wait together are generated together, at most ``rollout.max_num_seqs``.
    """

    def __init__(self, config: RolloutConfig, model_config: Any, replica_rank: int) -> None:
        self.config, self.replica_rank = config, replica_rank
        model = omega_conf_to_dataclass(model_config, dataclass_type=HFModelConfig)
        dtype = getattr(torch, config.dtype)
        self.model = AutoModelForCausalLM.from_pretrained(model.local_path, dtype=dtype).eval()
        self.tokenizer = model.tokenizer
        self.global_steps: int | None = None
        self._waiting: list[tuple[Request, asyncio.Future[Any]]] = []
        self._working = asyncio.Lock()

    async def address(self) -> str:
        return f"transformers-{self.replica_rank}"

    async def generate(
        self,
        request_id: str,
        *,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        **media: Any,
    ) -> TokenOutput:
        """Sample one response; verl's arguments."""
        seen = [name for name, value in media.items() if value and name.endswith("_data")]
        if seen:
            fail("the prompt", "be text for this rollout engine", ", ".join(seen), "use vLLM")
        request = self._request(list(prompt_ids), dict(sampling_params))
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((request, done))
        async with self._working:
            if not done.done():
                await self._generate_waiting()
        tokens, log_probs = await done
        return TokenOutput(
            token_ids=tokens,
            log_probs=log_probs if sampling_params.get("logprobs") else None,
            stop_reason="completed",
            extra_fields={"global_steps": self.global_steps},
        )

    def _request(self, prompt_ids: list[int], asked: dict[str, Any]) -> Request:
        unknown = sorted(set(asked) - READ)
        if unknown:
            known = ", ".join(sorted(READ))
            fail("sampling_params", f"be among {known}", unknown, "leave them out, or use vLLM")
        room = self.config.prompt_length + self.config.response_length - len(prompt_ids)
        limit = asked.get("max_tokens") or asked.get("max_new_tokens")
        limit = limit or min(self.config.response_length, room)
        sampling = Sampling(**{name: asked[name] for name in SAMPLING if name in asked})
        seed = asked.get("seed")
        return Request(
            prompt_ids, max(1, limit), sampling, secrets.randbits(56) if seed is None else seed
        )

    async def _generate_waiting(self) -> None:
        await asyncio.sleep(0.01)  # for requests that are on their way
        sampling = self._waiting[0][0].sampling
        alike = [entry for entry in self._waiting if entry[0].sampling == sampling]
        taken = alike[: self.config.max_num_seqs]
        self._waiting = [entry for entry in self._waiting if entry not in taken]
        requests = [request for request, _ in taken]
        ends = [] if self.config.ignore_eos else self._ends()
        pad = self.tokenizer.pad_token_id
        try:
            found = await asyncio.to_thread(complete, self.model, requests, pad=pad, ends=ends)
        except Exception as error:
            for _, done in taken:
                done.set_exception(error)
            return
        for (_, done), completion in zip(taken, found, strict=True):
            done.set_result(completion)

    def _ends(self) -> list[int]:
        named = self.model.generation_config.eos_token_id
        named = named if isinstance(named, list) else [named]
        return [token for token in {*named, self.tokenizer.eos_token_id} if token is not None]

    async def load(self, weights: dict[str, Tensor]) -> None:
        """Copy weights, by their names in the model."""
        own = self.model.state_dict()
        unknown = sorted(set(weights) - set(own))
        if unknown:
            fail("weights", "be those of the model", unknown[:3], "compare the model classes")
        for name, value in weights.items():
            own[name].copy_(value)

    async def set_global_steps(self, global_steps: int | None) -> None:
        """Tell the training step that the weights belong to."""
        self.global_steps = global_steps

    async def wake_up(self, **_: Any) -> None: ...

    async def sleep(self) -> None: ...

    async def clear_kv_cache(self) -> None: ...


class TransformersReplica(RolloutReplica):
    """Starts one ``TransformersServer`` for its rollout workers."""

    async def launch_servers(self) -> None:
        server = ray.remote(TransformersServer).options(
            name=server_name(self.replica_rank), num_cpus=0, max_concurrency=self.max_concurrency
        )
        handle = server.remote(self.config, self.model_config, self.replica_rank)
        self.servers, self._server_handle = [handle], handle
        self._server_address = await handle.address.remote()


class WeightSender(BaseRollout):
    """Sends the weights of a training worker to the server of its replica.

    All workers of a replica gather the weights, and the first one sends them.
    """

    def __init__(self, *args: Any, replica_rank: int = -1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        size = config.tensor_model_parallel_size * config.data_parallel_size
        size *= config.pipeline_model_parallel_size
        rank = int(os.environ["RANK"])
        self.replica_rank = rank // size if replica_rank == -1 else replica_rank
        self.is_leader_rank = rank % size == 0

    async def update_weights(
        self,
        weights: Iterable[tuple[str, Tensor]],
        global_steps: int | None = None,
        wire_format: str = "named_tensors",
        peft_config: Any = None,
        **_: Any,
    ) -> None:
        if peft_config is not None:
            rule, remedy = (
                "be merged into the weights",
                "set actor_rollout_ref.model.lora.merge=True",
            )
            fail("the LoRA adapter", rule, "one of its own", remedy)
        server = ray.get_actor(server_name(self.replica_rank)) if self.is_leader_rank else None
        bucket: dict[str, Tensor] = {}
        async for name, value in ensure_async_iterator(weights):  # a collective: on every rank
            if server is None:
                continue
            bucket[name] = value.detach()
            if sum(one.nbytes for one in bucket.values()) > BUCKET_BYTES:
                await server.load.remote(bucket)
                bucket = {}
        if server is not None:
            await server.load.remote(bucket)
            await server.set_global_steps.remote(global_steps)

    async def resume(self, tags: list[str]) -> None: ...

    async def release(self) -> None: ...


def server_name(replica_rank: int) -> str:
    """Return the name under which Ray knows a replica's server."""
    return f"transformers_server_{replica_rank}"
