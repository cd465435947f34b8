"""An agent loop whose responses are the same in every run, and in a run that is resumed."""

import hashlib
from typing import Any

from verl.experimental.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop


class SeededAgentLoop(SingleTurnAgentLoop):
    """verl's single-turn agent; the row, the session and the training step seed each response.

    verl's own requests differ by their time of arrival alone.
    """

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        names = ("index", "session_id", "global_steps")
        origin = (self.rollout_config.seed, *(int(kwargs[name]) for name in names))
        digest = hashlib.sha256(repr(origin).encode()).digest()
        seeded = {**sampling_params, "seed": int.from_bytes(digest[:7], "big")}
        output: AgentLoopOutput = await super().run(seeded, **kwargs)
        return output
