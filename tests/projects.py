"""A project's programs, called in the process of the tests, where torch is imported already.

`load_project("unet_transfer").train` is the train.py of that folder, with the data.py, model.py,
plots.py and run.py that it imports itself, so that a test can watch or replace their functions.
"""

import contextlib
import functools
import importlib
import io
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

ROOT = Path(__file__).parent.parent


@functools.cache
def load_project(name: str, root: Path = ROOT) -> SimpleNamespace:
    """The modules of the project in `root / name` by their names."""
    rooms = [path.stem for path in sorted((root / name).glob("*.py"))]
    with own_modules(root / name, rooms):
        return SimpleNamespace(**{room: importlib.import_module(room) for room in rooms})


@contextlib.contextmanager
def own_modules(folder: Path, rooms: list[str]) -> Iterator[None]:
    """All projects call their modules alike: meanwhile those of `folder` bear these names."""
    others = {room: sys.modules.pop(room) for room in rooms if room in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for room in rooms:
            sys.modules.pop(room, None)
        sys.modules.update(others)


def call(module: ModuleType, *flags: object) -> str:
    """What `python module.py FLAGS` prints, without a process of its own; errors are raised."""
    output, argv = io.StringIO(), sys.argv
    sys.argv = [module.__file__, *map(str, flags)]
    try:
        with contextlib.redirect_stdout(output):
            module.main()
    finally:
        sys.argv = argv
    return output.getvalue()


def train(project: str, *flags: object) -> Path:
    """The folder of a run that ended well."""
    return Path(call(load_project(project).train, *flags).splitlines()[-1])


@functools.cache
def tiny_run(project: str) -> tuple[Path, str, str]:
    """The folder of one run with the flags TINY of the project's tests, what it printed, and its
    errors and warnings; all tests look at the same. A network is out of its reach.
    """

    def refuse(*_: object) -> None:
        raise AssertionError(f"{project} asks for the network")

    flags = importlib.import_module(f"test_{project}").TINY
    folder, errors = tempfile.mkdtemp(prefix=f"{project}-"), io.StringIO()
    with (
        mock.patch.object(socket.socket, "connect", refuse),
        mock.patch.object(socket, "getaddrinfo", refuse),
        contextlib.redirect_stderr(errors),
    ):
        output = call(load_project(project).train, *flags, "--out_dir", Path(folder, "my runs"))
    return Path(output.splitlines()[-1]), output, errors.getvalue()


def config_of(modules: SimpleNamespace, *flags: object) -> object:
    """The Config that a run with these flags and values in turn would have."""
    kinds = modules.run.get_type_hints(modules.train.Config, include_extras=True)
    names, texts = flags[::2], map(str, flags[1::2])
    given = {name.removeprefix("--"): text for name, text in zip(names, texts, strict=True)}
    return modules.run.read_config(modules.train.Config, kinds, None, given)


class Killed(BaseException):
    """Raised in the middle of a run instead of killing its process."""


def data_asked_for(modules: SimpleNamespace, *flags: object) -> dict:
    """What train.py asks data.load for under these flags; it goes no further."""
    asked = {}

    def load(**options: object) -> None:
        asked.update(options)
        raise Killed

    with mock.patch.object(modules.train, "load", load), contextlib.suppress(Killed):
        call(modules.train, *flags)
    return asked


def train_until(project: str, epochs: int, *flags: object) -> None:
    """A run that dies right after its checkpoint number `epochs`."""
    run = load_project(project).run
    keep, done = run.save_checkpoint, []

    def save_checkpoint(*parts: object) -> None:
        keep(*parts)
        done.append(1)
        if len(done) > epochs:  # the first one, of a new run, holds no epoch
            raise Killed

    run.save_checkpoint = save_checkpoint
    try:
        call(load_project(project).train, *flags)
    except Killed:
        return
    finally:
        run.save_checkpoint = keep
    raise AssertionError(f"the run ended before epoch {epochs}")
