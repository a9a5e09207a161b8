"""One process of `distributed_utils.launch`: join the group, run the function, leave the result in a file.

Started as `python -m shared.training.distributed_worker FOLDER` with RANK and WORLD_SIZE set.
"""

import os
import sys
import traceback
from pathlib import Path

from shared.runtime.errors import CourseError
from shared.training import distributed_utils


def main(folder: Path) -> int:
    """Run what `folder/inputs.json` asks for; returns the exit status."""
    order = distributed_utils.read_value(folder / "inputs")
    try:
        distributed_utils.setup(f"file://{folder}/rendezvous", order["timeout"])
        result = distributed_utils.resolve_target(order["target"])(**order["inputs"])
        distributed_utils.write_value(folder / f"result-{os.environ['RANK']}", result)
        distributed_utils.cleanup()
    except CourseError as error:
        print(error, file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    status = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # after a failure gloo's threads may still wait for the other processes
