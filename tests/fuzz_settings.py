"""Every key of every project with odd values: `python tests/fuzz_settings.py [PROJECT...]`.

A setting has to end in one of three ways: the tiny run of the project's tests ends well and its
metrics.json holds no NaN; one line on stderr and status 2 (the setting) or 1 (the data, memory).
Anything else is printed: a traceback, an abort. What is refused costs nothing, as the settings are
read in this process; of the values that are accepted as other settings each is tried, or only the
smallest and the largest number and two texts (`--few`), in a fork of 6 GiB that draws no
pictures and ends after `--seconds`. What is still at work then is printed with the place, for a
reader to judge: a hang, or long work. Paths and texts are tried with a data set that reads them.
"""

import argparse
import faulthandler
import importlib
import json
import math
import os
import re
import resource
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from projects import ROOT, call, load_project
from tqdm import tqdm

ROOMS = ("data.py", "model.py", "plots.py", "run.py", "scenes.py", "train.py")
NUMBERS = [
    *("0", "-1", "1", "2", "3", "33", "1000", "1000000000", "1000000000000", "9" * 31, "1e30"),
    *("1e-300", "1e-30", "0.9999", "0.5", "1e3", "-0.5", "nan", "inf", "-inf", "0x10", "1_0"),
]
TEXTS = ["", " ", "none", "true", "a,b", "é", "\u0000x", "x" * 100_000, "[", "..", "/dev/null", "~"]
OWN = {  # what a user's own data are called, if not folder
    "bert_mlm": "csv",
    "carlini_wagner": "images",
    "semi_supervised_clustering": "csv",
}
LISTS = ["1", "1,1", "0,1", "1,2,3,4,5,6,7,8,9", ",", "1,", "1000000000,1", "nan,1"]


def values_for(kind: object) -> list[str]:
    text = str(kind)
    if "tuple" in text:
        return LISTS + NUMBERS + TEXTS[:6]
    return NUMBERS + TEXTS[:6] if "int" in text or "float" in text else TEXTS + NUMBERS[:6]


def flags_for(modules: object, project: str, key: str) -> dict[str, str]:
    """The tiny run's, with data of the user's own if the key is a path or a text."""
    tiny = importlib.import_module(f"test_{project}").TINY
    flags = {name[2:]: str(text) for name, text in zip(tiny[::2], tiny[1::2], strict=True)}
    if str(modules.train.Config.__annotations__[key]) in ("<class 'str'>", str(Path)):
        flags["dataset"] = OWN.get(project, "folder")
    return flags


def accepted(modules: object, base: dict, key: str, few: bool) -> tuple[list[str], int, list]:
    """Values of `key` that give settings unlike `base`'s, how many are refused, faults."""
    kinds = modules.run.get_type_hints(modules.train.Config, include_extras=True)

    def read(flags: dict[str, str]) -> object:
        return modules.run.read_config(modules.train.Config, kinds, None, flags)

    found, refused, faults = {read(base): ""}, 0, []
    for value in values_for(kinds[key]):
        try:
            found.setdefault(read(base | {key: value}), value)
        except ValueError as error:
            refused += 1
            if len(str(error)) > 1000:
                faults.append((value, f"FAULT a line of {len(str(error))} characters"))
        except Exception as error:
            faults.append((value, f"FAULT {type(error).__name__}: {error}"))
    del found[next(iter(found))]
    numbers = [v for config, v in found.items() if type(getattr(config, key)) in (int, float)]
    texts = [value for value in found.values() if value not in numbers]
    numbers.sort(key=float)
    if few:
        numbers, texts = numbers[:1] + numbers[1:][-1:], texts[:2]
    return numbers + texts, refused, faults


def attempt(modules: object, flags: list[str], seconds: int, folder: Path) -> None:
    """In the fork: the run, its errors in a file, its status that of the process."""
    limit = 6 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.stderr = (folder / "errors").open("w")
    os.dup2(sys.stderr.fileno(), 2)
    faulthandler.dump_traceback_later(seconds, exit=True)
    modules.train.try_plot = lambda *_, **__: None  # a picture that fails costs no run
    status = 0
    try:
        modules.run.run_main(lambda: call(modules.train, *flags), modules.data.DataError)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 3
    sys.stderr.flush()
    os._exit(status)


def outcome(status: int, folder: Path) -> str:
    """What is wrong, or one of: ends well, refused."""
    errors = (folder / "errors").read_text() if (folder / "errors").exists() else ""
    lines = [line for line in errors.splitlines() if line and not line.startswith("warning:")]
    if errors.startswith("Timeout (") or "\nTimeout (" in errors:
        places = re.findall(r'File ".*?([^/"]+/[^/"]+)", line (\d+)', errors.split("Timeout (")[1])
        own = [":".join(place) for place in places if place[0].split("/")[1] in ROOMS]
        return f"LONG in {' < '.join(own[:4])}"
    if os.WIFSIGNALED(status):
        return f"FAULT signal {os.WTERMSIG(status)}"
    code = os.WEXITSTATUS(status)
    if code in (1, 2):
        plain = len(lines) == 1 and len(lines[0]) < 1000
        return "refused" if plain else f"FAULT {len(lines)} lines: {errors[-300:]}"
    if code:
        return f"FAULT {lines[-1][:300] if lines else code}"
    for path in folder.glob("*/metrics.json"):
        text = path.read_text()
        if re.search(r"\b(NaN|Infinity)\b", text):
            return "FAULT NaN in metrics.json"
        headline = json.loads(text)["headline"].values()
        if not any(value is not None and math.isfinite(value) for value in headline):
            return "FAULT an empty headline"
    return "ends well"


def main() -> None:
    sys.path.insert(0, str(ROOT))  # as pytest's settings have it
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("projects", nargs="*")
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--keys", default="", help="comma-separated; all")
    parser.add_argument("--without", default="", help="comma-separated keys")
    parser.add_argument("--also", default="", help="as compare=false,epochs=1")
    given = parser.parse_args()
    also = dict(pair.split("=") for pair in given.also.split(",") if pair)
    for project in given.projects or sorted(
        path.parent.name for path in ROOT.glob("*/config.yaml")
    ):
        modules, counts = load_project(project), Counter()
        with tempfile.TemporaryDirectory() as name:  # here, so that no fork has to import anew
            tiny = flags_for(modules, project, "seed") | also | {"out_dir": name}
            call(modules.train, *(f"--{key}={text}" for key, text in tiny.items()))
        keys = given.keys.split(",") if given.keys else list(modules.train.Config.__annotations__)
        keys = [key for key in keys if key not in given.without.split(",")]
        tries = []
        for key in keys:
            base = flags_for(modules, project, key) | also
            values, refused, faults = accepted(modules, base, key, given.few)
            counts["refused"] += refused
            counts["FAULT"] += len(faults)
            tries += [(base, key, value) for value in values if key != "out_dir"]
            for value, fault in faults:
                print(f"{project} --{key} {value[:40]!r}: {fault}", flush=True)
        for base, key, value in tqdm(tries, project, disable=None):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                if not (child := os.fork()):
                    texts = base | {key: value, "out_dir": name}
                    flags = [f"--{name}={text}" for name, text in texts.items()]
                    attempt(modules, flags, given.seconds, folder)
                found = outcome(os.waitpid(child, 0)[1], folder)
            counts[found.split(" in ")[0].split()[0]] += 1
            if found.startswith(("FAULT", "LONG")):
                print(f"{project} --{key} {value[:40]!r}: {found}", flush=True)
        print(f"{project}: {dict(counts)}", flush=True)


if __name__ == "__main__":
    main()
