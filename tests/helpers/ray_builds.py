"""`python -m tests.helpers.ray_builds CACHE NUM_PROMPTS STEP_S`: two workers with the fake engine on a local Ray.

Prints the merged result. The cluster is this program's own and ends with it.
"""

import json
import sys

from stillroom.program import StopRequest
from teacher_cache.workers.child import Job
from teacher_cache.workers.on_ray import ReplicaSize, run_on_ray


def main() -> None:
    cache, num_prompts, step_s = sys.argv[1:]
    arguments = ("-m", "tests.helpers.fake_builds", cache, "join", num_prompts, step_s, "impatient")
    with StopRequest(at_once=True):
        result = run_on_ray("ray", Job("fake", arguments, cache), ReplicaSize(1, 0), 2)
    print(json.dumps(result), flush=True)
    sys.exit(130 if result is None or result["stopped"] else 0)


if __name__ == "__main__":
    main()
