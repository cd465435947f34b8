"""Ray workers of verl on CPUs: a student, and a teacher in a worker group of its own."""

import functools
import os
import pathlib
from typing import Any

import torch.distributed as dist
from torch import Tensor
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine_workers import ActorRolloutRefWorker

from fused_sd.integrations.verl import plugin
from fused_sd.integrations.verl.self_distillation import WorkerGroupConfig
from fused_sd.integrations.verl.teacher_worker import TeacherWorker

HERE = pathlib.Path(__file__).parent
ENVIRONMENT = {
    "VERL_PLATFORM": "cpu",
    "VERL_USE_EXTERNAL_MODULES": "cpu_platform",
    "VERL_USE_EXTERNAL_PLUGINS": "none",
    "VERL_ENGINE_VENDOR": "fused_sd",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": os.pathsep.join([str(HERE.parents[2]), str(HERE)]),
}


def join_group() -> None:
    """Join the workers' process group, whose backend verl would name twice: cpu:gloo,cpu:gloo."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")  # as Ray's workers find it in their environment


class Teacher(TeacherWorker):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        join_group()
        super().__init__(*args, **kwargs)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def restart(self, model: dict[str, Any], group: WorkerGroupConfig, offload: bool) -> int:
        """Become another teacher, in the same processes."""
        TeacherWorker.__init__(self, model, group, offload)
        return self.init_model()


class Student(ActorRolloutRefWorker):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        join_group()
        super().__init__(*args, **kwargs)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        plugin.register_engine("fsdp", ("cpu",))
        super().init_model()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def learn_by(self, distillation: Any) -> None:
        """Take another loss, and ask for the teacher's head again."""
        settings = {"distillation_config": omega_conf_to_dataclass(distillation)}
        self.set_loss_fn(functools.partial(self.loss_fn, **settings))
        self.actor.engine._group = None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def weights(self) -> dict[str, Tensor]:
        module = self.actor.engine.module
        module.reshard()
        return {
            name: parameter.full_tensor().detach().clone()
            for name, parameter in module.named_parameters()
        }
