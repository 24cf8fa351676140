"""Runs of several projects in the processes that torchrun starts, which costs one start for all.

Its argument is a list of runs in JSON: project, flags, and what is to be otherwise in it.
"""

import json
import os
import signal
import sys
from types import ModuleType

from projects import call, load_project
from torch import nn

BATCH_NORM = nn.BatchNorm2d


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(1, channels)


def die(run: ModuleType, epochs: int) -> None:
    """The second process dies in its epoch of that number."""
    agreed, count = run.first_of_all, [0]

    def first_of_all(value: object) -> object:
        count[0] += isinstance(value, dict) and value["stage"] == "finetune-seed0"
        if run.RANK == 1 and count[0] == epochs:
            os.kill(os.getpid(), signal.SIGKILL)
        return agreed(value)

    run.first_of_all = first_of_all


if __name__ == "__main__":
    for job in json.loads(sys.argv[1]):
        project = load_project(job["project"])
        nn.BatchNorm2d = group_norm if job.get("groups") else BATCH_NORM
        if "die" in job:
            die(project.run, job["die"])
        if "die" in job:
            project.run.run_main(lambda p=project, j=job: call(p.train, *j["flags"]))
        else:
            call(project.train, *job["flags"])
    project.run.leave()
