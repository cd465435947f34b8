"""What stands in for CUDA where TRL hands weights to vLLM on a machine without a GPU.

TRL's rollouts, requests and log-probabilities are its own.  Two things are replaced:

* colocated, vLLM has packed its weights for the CPU and kept no plain copy, so that TRL's
  ``load_weights`` has nothing to write into.  vLLM's own reload unpacks before and packs after;
* with a server, TRL sends weights through NCCL.  Here they go through a file, which the engine in
  ``weights_by_file`` reads; the requests that announce them are TRL's.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)


def load_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let TRL's colocated mode load weights into an engine on the CPU."""
    load = VLLMGeneration.sync_weights

    def sync_weights(generation: VLLMGeneration) -> None:
        worker = generation.llm.llm_engine.model_executor.driver_worker
        runner = worker.model_runner
        with set_current_vllm_config(runner.vllm_config):
            initialize_layerwise_reload(runner.model)
            load(generation)
            finalize_layerwise_reload(runner.model, runner.model_config)

    monkeypatch.setattr(VLLMGeneration, "sync_weights", sync_weights)


def send_by_file(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let TRL's client send weights to a server through ``folder``."""

    def init_communicator(client: VLLMClient, device: torch.device | str | int = 0) -> None:
        assert client.get_server_info()["weight_transfer_config"]["backend"] == "file"
        client._post(f"{client.base_url}/init_weight_transfer_engine", json={"init_info": {}})

    def update_named_params(
        client: VLLMClient,
        metadata: Iterable[tuple[str, str, list[int]]],
        named_params: Iterator[tuple[str, torch.Tensor]],
    ) -> None:
        path = folder / "weights.safetensors"
        save_file({name: weight.detach().clone() for name, weight in named_params}, path)
        client._start_weight_update()
        update = {"update_info": {"path": str(path)}}
        client._post(f"{client.base_url}/update_weights", json=update)
        client._finish_weight_update()

    monkeypatch.setattr(VLLMClient, "init_communicator", init_communicator)
    monkeypatch.setattr(VLLMClient, "update_named_params", update_named_params)
