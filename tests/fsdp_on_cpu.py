"""train_accelerate.py with FSDP2 over CPU processes: Accelerate shards on GPUs only, so it is told there are some.

accelerate launch --config_file accelerate_configs/fsdp2.yaml tests/fsdp_on_cpu.py ...
"""

import sys
from pathlib import Path

from accelerate import DistributedType, PartialState

if __name__ == "__main__":
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import train_accelerate

    train_accelerate.main()
