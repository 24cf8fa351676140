"""What must hold in all projects. A project is a folder with a config.yaml: none is named here.

A project's own tests give, as `TINY`, the flags of a run that takes seconds.
"""

import ast
import json
import os
import re
import resource
import runpy
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from projects import ROOT, call, load_project, tiny_run

PROJECTS = sorted(path.parent.name for path in ROOT.glob("*/config.yaml"))
ROOMS = ("data", "model", "plots", "run")
ROOM_FILES = [f"{room}.py" for room in (*ROOMS, "train", "predict")]
FILES = ("README.md", "MEASURED.md", "config.yaml", *ROOM_FILES, "results/reference/metrics.json")
COMMON_KEYS = ["dataset", "data_dir", "out_dir", "device", "seed"]
PARTS = [
    "Run",
    "Results",
    "Use what you trained",
    "Your own data",
    "Settings worth changing",
    "Method",
]
TYPE_SIZES = (
    'plt.rcParams.update({"figure.titlesize": 11, "axes.titlesize": 10, "legend.fontsize": 9})'
)
# Parts that each project fills in its own way; any other function of one name has one body.
STORY = {
    *("main", "load_data", "new_model", "fit", "train_one_epoch", "evaluate", "compare", "study"),
    *("save_model", "headline", "plot_results", "plot_curves", "plot_examples", "summarise"),
    *("load", "load_digits", "load_folder", "load_mnist", "split", "batches", "training_batches"),
    *("augment", "compose", "predict", "timing", "describe", "report"),
}
every_project = pytest.mark.parametrize("project", PROJECTS)


def functions(path: Path) -> list[ast.FunctionDef]:
    """Those of a file that are in no class."""
    return [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]


def imported(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.split(".")[0])
    return names


# --- the plan ---------------------------------------------------------------------------------


@every_project
def test_the_files_of_the_plan_are_there(project):
    missing = [name for name in FILES if not (ROOT / project / name).is_file()]
    assert not missing
    assert (ROOT / "tests" / f"test_{project}.py").is_file()


@every_project
def test_who_may_know_whom(project):
    for room in ROOMS:
        known = imported(ROOT / project / f"{room}.py")
        assert not known & {*ROOMS, "train", "predict", *PROJECTS}, room
    for program in ("train", "predict"):
        assert not imported(ROOT / project / f"{program}.py") & set(PROJECTS)
    for room in ("data", "model"):
        assert "yaml" not in imported(ROOT / project / f"{room}.py")
        assert not re.search(r"\bprint\(", (ROOT / project / f"{room}.py").read_text())


@every_project
def test_run_py_is_the_same_to_the_letter(project):
    first = (ROOT / PROJECTS[0] / "run.py").read_bytes()
    assert (ROOT / project / "run.py").read_bytes() == first


def test_a_function_of_one_name_has_one_body():
    bodies = defaultdict(dict)
    for project in PROJECTS:
        for path in sorted((ROOT / project).glob("*.py")):
            for node in functions(path):
                bodies[node.name].setdefault(ast.unparse(node), f"{project}/{path.name}")
    several = {name: list(places.values()) for name, places in bodies.items() if len(places) > 1}
    assert not {name: places for name, places in several.items() if name not in STORY}


@every_project
def test_no_function_is_left_without_a_caller(project):
    """Of run.py all are there, as it is one file for all."""
    paths = [path for path in (ROOT / project).glob("*.py") if path.name != "run.py"]
    names = [node.id for path in paths for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Name)]  # fmt: skip
    for path in paths:
        unused = [node.name for node in functions(path) if node.name not in names]
        assert not unused, path


@every_project
def test_every_key_has_a_comment_and_a_field(project):
    lines = (ROOT / project / "config.yaml").read_text().splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    keys = [re.fullmatch(r"(\w+):.*\S.* # \S.*", line) for line in lines]
    assert all(keys), [line for line, key in zip(lines, keys, strict=True) if not key]
    fields = list(load_project(project).train.Config.__dataclass_fields__)
    assert [key[1] for key in keys] == fields
    assert fields[: len(COMMON_KEYS)] == COMMON_KEYS
    programs = [path for path in (ROOT / project).glob("*.py") if path.name != "run.py"]
    text = "".join(path.read_text() for path in programs)
    unread = [key for key in fields if not re.search(rf"(config|self)\.{key}\b", text)]
    assert set(unread) <= {"data_dir", "out_dir", "device"}, "a key that nothing reads"


@every_project
def test_the_real_sets_have_files_of_settings_that_can_be_read(project):
    modules = load_project(project)
    kinds = modules.run.get_type_hints(modules.train.Config, include_extras=True)
    for path in (ROOT / project).glob("*.yaml"):
        flags = {"device": "cpu"}
        config = modules.run.read_config(modules.train.Config, kinds, path, flags)
        assert config.dataset
        base = modules.run.read_texts(ROOT / project / "config.yaml", kinds)
        if path.name != "config.yaml":
            own = modules.run.read_texts(path, kinds)
            same = [key for key, text in own.items() if text == base[key]]
            assert not same, f"{path}: as in config.yaml"
            assert path.read_text().startswith("# ")


@every_project
def test_train_py_tells_its_story_in_one_order(project):
    """Settings, main, its parts, and last what the run reports."""
    text = (ROOT / project / "train.py").read_text()
    tree = ast.parse(text)
    names = [node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    others = [name for name in names if not name[0].isupper()]
    assert names[0] == "Config"
    assert others[0] == "main"
    *_, report = text.split("\n# --- ")
    assert report.startswith("report -")
    assert all(f"def {name}(" in report for name in ("save_model", "headline", "plot_results"))
    assert text.endswith('if __name__ == "__main__":\n    run_main(main, DataError)\n')
    for program in ("train.py", "predict.py"):
        lines = (ROOT / project / program).read_text().splitlines()
        assert all(len(line) == 96 for line in lines if line.startswith("# ---"))


@every_project
def test_readmes_and_plots_have_one_look(project):
    readme = (ROOT / project / "README.md").read_text()
    assert re.findall(r"^## (.*)$", readme, re.MULTILINE) == PARTS
    assert "](MEASURED.md)" in readme.splitlines()[-1]
    top = readme.split("\n## ")[0]
    assert re.search(r"!\[.+?\]\(results/reference[\w-]*/[\w-]+\.png\)", top)
    prose = re.sub(r"```.*?```", "", readme, flags=re.DOTALL)
    words = " ".join(line for line in prose.splitlines() if not line.startswith("|")).split()
    assert len(words) <= 650
    assert f"python {project}/predict.py" in readme
    assert TYPE_SIZES in (ROOT / project / "plots.py").read_text().splitlines()
    for name in re.findall(r"\]\(([\w./-]+)\)", readme):
        assert (ROOT / project / name).exists(), name


# --- one tiny run of each ---------------------------------------------------------------------


@every_project
def test_a_run_writes_what_the_house_says(project):
    folder, output, errors = tiny_run(project)
    report = strict_json(folder / "metrics.json")
    keys = ["project", "dataset", "device", "seed", "seconds", "versions", "commit"]
    assert list(report) == [*keys, "headline", "metrics"]
    assert report["project"] == project
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "history.csv", "history.pt", "model.pt"} < names
    assert [name for name in names if name.endswith(".png")]
    assert not [name for name in names if name.endswith(".tmp")]
    assert "warning: no picture" not in errors
    use, last = output.splitlines()[-2:]
    command = shlex.split(use.removeprefix("use it: "))  # it can be copied, blanks and all
    assert command[:3] == ["python", f"{project}/predict.py", str(folder)]
    assert last == str(folder)


@every_project
def test_a_finished_run_is_left_as_it_is(project, capsys):
    folder, *_ = tiny_run(project)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(SystemExit) as end:
        call(load_project(project).train, "--resume", folder)
    assert end.value.code == 2
    assert "is finished" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@every_project
def test_a_lone_copy_shows_its_help(project, tmp_path):
    (tmp_path / project).mkdir()
    for path in (ROOT / project).glob("*.*"):
        if path.is_file():
            (tmp_path / project / path.name).write_bytes(path.read_bytes())
    modules = load_project(project, tmp_path)
    assert Path(modules.train.__file__).parent == tmp_path / project
    with pytest.raises(SystemExit) as end:
        call(modules.train, "--help")
    assert end.value.code == 0
    fields = modules.train.Config.__dataclass_fields__
    text = modules.run.make_parser(dict.fromkeys(fields, str), "").format_help()
    assert all(re.search(rf"--{key} VALUE\s+\S", text) for key in fields)


@every_project
def test_a_mistake_is_answered_at_once_in_one_line(project, tmp_path):
    """In a process of its own: what is slow to import is imported where it is used."""
    flags = ["--dataset", "no such set", "--out_dir", "out"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, ROOT / project / "train.py", *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"train.py: error: --dataset: expected .+\n", done.stderr)
    assert not os.listdir(tmp_path)
    assert seconds < 8  # of a slow machine; 3 on a fast one


def test_a_second_project_in_one_kernel_takes_its_own_modules(monkeypatch, capsys):
    """As with `%run train.py` in a notebook."""
    names = [*ROOMS, "train"]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    for project in PROJECTS[:2]:
        path = ROOT / project / "train.py"
        monkeypatch.setattr(sys, "argv", [str(path), "--seed", "-1"])
        monkeypatch.syspath_prepend(str(path.parent))
        with pytest.raises(SystemExit):
            runpy.run_path(str(path), run_name="__main__")
        assert f"{project}/config.yaml" not in capsys.readouterr().err
        assert not set(names) & sys.modules.keys()
        sys.path.remove(str(path.parent))


# --- the numbers in the READMEs are those of the recorded runs --------------------------------


def strict_json(path: Path) -> dict:
    def refuse(name: str) -> None:
        raise AssertionError(f"{path}: {name} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def table_rows(text: str) -> list[list[str]]:
    lines = [line.strip() for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def same_number(text: str, value: float) -> bool:
    """Whether `text` is `value`, rounded to the digits that `text` shows."""
    digits = len(text.partition(".")[2])
    return abs(float(text.replace(",", "")) - value) <= 0.5000001 * 10**-digits


@every_project
def test_the_readme_shows_the_recorded_numbers(project):
    rows = table_rows((ROOT / project / "README.md").read_text())
    (place,) = [place for place, row in enumerate(rows) if row[0] == "headline"]
    header, shown = rows[place], [row for row in rows[place:] if row[0].startswith("`")]
    assert 1 <= len(shown) <= 4
    folders = [re.search(r"\((results/reference[\w-]*)/?\)", cell)[1] for cell in header[1:]]
    recorded = sorted((ROOT / project / "results").glob("reference*"))
    assert sorted(folders) == [f"results/{path.name}" for path in recorded]
    for column, folder in enumerate(folders, start=1):
        headline = strict_json(ROOT / project / folder / "metrics.json")["headline"]
        for row in shown:
            value = headline.get(row[0].strip("`"))
            if row[column] == "-":
                assert value is None, f"{folder}: {row[0]} is {value}"
            else:
                assert same_number(row[column], value), f"{folder}: {row[0]} is {value}"


@every_project
def test_a_recording_is_what_its_yaml_gives_today(project):
    """But for where its data lay, and the device."""
    modules = load_project(project)
    kinds = modules.run.get_type_hints(modules.train.Config, include_extras=True)
    for folder in sorted((ROOT / project / "results").glob("reference*")):
        name = folder.name.removesuffix("-gpu").partition("-")[2]
        path = ROOT / project / f"{name}.yaml" if name else None
        flags = {"device": "cpu", "out_dir": "results", "data_dir": "data"}
        today = modules.run.read_config(modules.train.Config, kinds, path, flags)
        recorded = modules.run.read_config(
            modules.train.Config, kinds, folder / "config.yaml", flags
        )
        assert recorded == today, folder
        written = modules.run.read_texts(folder / "config.yaml", kinds)
        assert list(written) == list(kinds), f"{folder}: its config.yaml is not of today's form"


@every_project
def test_the_front_door_shows_the_recorded_numbers(project):
    front = (ROOT / "README.md").read_text()
    (row,) = [" ".join(row) for row in table_rows(front) if f"({project})" in row[0]]
    report = strict_json(ROOT / project / "results/reference/metrics.json")
    numbers = report["headline"] | {"minutes": report["seconds"] / 60}
    claims = re.findall(r"`(\w+)` ([\d.]+)", row)
    assert claims
    for name, text in claims:
        assert same_number(text, numbers[name]), f"{name} is {numbers[name]}"
    (picture,) = re.findall(rf"!\[.+?\]\(({project}/results/reference[\w-]*/\w+\.png)\)", front)
    assert (ROOT / picture).is_file()


@every_project
def test_what_is_recorded_is_small_and_whole(project):
    for folder in (ROOT / project / "results").glob("reference*"):
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        assert {"config.yaml", "metrics.json", "history.csv"} <= sizes.keys()
        assert sum(sizes.values()) < 2**20
        assert not [name for name in sizes if name.endswith((".pt", ".safetensors"))]
