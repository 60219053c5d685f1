"""The real client against a server on localhost: what is published, and what a failing push never does."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from helpers.hub_server import Cut, Fault, HubServer, Pointer, Repository, Silence, Status
from helpers.runs import ROOT, build_tiny_vae, smallest_training
from helpers.warm_python import warm_python
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from safetensors.torch import load_file

from srl_utils.hub import publishing
from srl_utils.hub.card import WEIGHTS_HEADING, recorded_weights
from srl_utils.hub.publishing import Publisher, asked_wait, may_pass, push_command, with_retries
from srl_utils.training.checkpoints import save_drop_in

WEIGHTS = "diffusion_pytorch_model.safetensors"
HALF = "diffusion_pytorch_model.fp16.safetensors"
SECRET = HubServer.valid_token
# Two quick attempts, and a second is silence enough.
HURRIED = json.dumps({"ATTEMPTS": 2, "FIRST_WAIT": 0.01, "REQUEST_TIMEOUT": 0.5})

Printed = tuple[int, str]


@dataclass(frozen=True)
class Machine:
    """A computer that knows the test's server and no other, with a Python that starts at once."""

    hub: HubServer
    python: Path
    home: Path

    def run(self, *command: object, cwd: Path = ROOT, **environment: str | None) -> Printed:
        """The exit code of a command line and all that it printed; the variables None are taken away."""
        path = os.pathsep.join([str(self.python.parent), os.environ["PATH"]])
        variables = {
            **os.environ,
            **self.hub.environment(self.home),
            "PATH": path,
            "LONGEST_SLEEP": "0.02",
            **environment,
        }
        ended = subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            env={name: value for name, value in variables.items() if value is not None},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        return ended.returncode, ended.stdout

    def push(self, folder: Path, *flags: str, **environment: str | None) -> Printed:
        return self.run(self.python, "-m", "srl_utils.hub", "push", folder, *flags, **environment)

    def train(self, *flags: str, **environment: str | None) -> Printed:
        return self.run(self.python, "train_srl_vae.py", *flags, **environment)

    def python_code(self, code: str, *arguments: object, **environment: str | None) -> Printed:
        return self.run(self.python, "-c", code, *arguments, **environment)


@pytest.fixture(scope="module")
def machine_and_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    home = tmp_path_factory.mktemp("home")
    with HubServer() as server, warm_python(server.environment(home)) as python:
        yield Machine(server, python, home)


@pytest.fixture
def machine(machine_and_hub: Machine) -> Machine:
    return machine_and_hub


@pytest.fixture
def hub(machine_and_hub: Machine) -> HubServer:
    """The machine's server, as new."""
    machine_and_hub.hub.reset()
    return machine_and_hub.hub


@pytest.fixture(scope="module")
def drop_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training leaves in its folder; `PUBLISHED` is what others are to have of it."""
    folder = tmp_path_factory.mktemp("runs") / "my run"
    (folder / "samples").mkdir(parents=True)
    save_drop_in(build_tiny_vae(seed=1), folder, variants=["fp16"])
    for name in PUBLISHED - {"config.json", WEIGHTS, HALF}:
        (folder / name).write_text(f"---\ntags: [{name}]\n---\n")
    for name in PRIVATE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not for others")
    return folder


PUBLISHED = {
    "config.json", WEIGHTS, HALF, "README.md", "metrics.jsonl", "results.json",
    "samples/comparison.png", "samples/step-000000.png",
}  # fmt: skip
PRIVATE = {
    "samples/holiday.png", "samples/step-backup/step-000000.png", "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model_backup.safetensors", ".lock", "checkpoint-5/optimizer.bin", "checkpoint-5/vae/config.json", "logs/run/events.out", "hub.log",
    ".snapshot/config.json", ".config.json.partial", "samples/notes.txt", "pytorch_model.bin", "training_args.json",
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_holds(repository: Repository, folder: Path, names: set[str]) -> None:
    """The repository's main branch is these files of `folder` and what the Hub itself put there."""
    files = dict(repository.branches["main"].files)
    assert set(files) - {".gitattributes"} == names
    assert all(files[name] == (folder / name).read_bytes() for name in names)


# --- when to try again ------------------------------------------------------------------------------------


def refusal(status: int, headers: dict[str, str] | None = None) -> HfHubHTTPError:
    response = SimpleNamespace(status_code=status, headers=headers or {}, request=None)
    return HfHubHTTPError("refused", response=response)


def wrapped(error: Exception) -> RuntimeError:
    """As the client raises what happened to a large file."""
    outer = RuntimeError("Error while uploading 'x' to the Hub.")
    outer.__cause__ = error
    return outer


def failing(*errors: Exception) -> Callable[[], str]:
    """Raises each of `errors` in turn, then returns."""
    left = list(errors)

    def action() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return action


@pytest.mark.parametrize(
    ("errors", "waits"),
    [
        ([], []),
        ([ConnectionError()], [2]),
        ([refusal(503)] * 4, [2, 4, 8, 16]),
        ([refusal(429, {"Retry-After": "7"}), refusal(500)], [7, 4]),
        ([wrapped(refusal(429, {"Retry-After": "7"}))], [7]),
        ([refusal(429, {"Retry-After": "86400"})], [120]),
        ([refusal(429, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"})], [2]),
    ],
)
def test_waits_between_attempts(errors: list[Exception], waits: list[float]) -> None:
    """Oracle: closed form, 2 s doubled each time, or what the server asks for, up to two minutes."""
    waited: list[float] = []
    assert with_retries(failing(*errors), sleep=waited.append) == "done"
    assert waited == waits


def test_the_last_attempt_is_the_fifth() -> None:
    """Oracle: the documented number; what the fifth raised is what the caller sees."""
    waited: list[float] = []
    errors = [ConnectionError(str(number)) for number in range(1, 9)]
    with pytest.raises(ConnectionError, match=r"^5$"):
        with_retries(failing(*errors), sleep=waited.append)
    assert waited == [2, 4, 8, 16]


@pytest.mark.parametrize(
    ("error", "expected"),
    [(refusal(status), True) for status in (408, 425, 429, 500, 502, 503, 504)]
    + [(refusal(status), False) for status in (400, 401, 402, 403, 404, 409, 412, 413)]
    + [(wrapped(refusal(500)), True), (wrapped(refusal(403)), False)]
    + [(ConnectionError(), True), (TimeoutError(), True), (RuntimeError("xet"), True)]
    + [(ValueError(), False), (FileNotFoundError(), False)]
    + [(LocalTokenNotFoundError(), False), (OfflineModeIsEnabled(), False)],
    ids=repr,
)  # fmt: skip
def test_what_may_pass(error: Exception, expected: bool) -> None:
    """Oracle: HTTP's meaning of the codes; a refused request is made once, and no wait precedes its end."""
    assert may_pass(error) == expected
    waited: list[float] = []
    if not expected:
        with pytest.raises(type(error)):
            with_retries(failing(error), sleep=waited.append)
        assert not waited


def test_seconds_are_read_from_retry_after_alone() -> None:
    """Oracle: RFC 9110; a date, which also is allowed there, and no answer at all ask for nothing we heed."""
    assert asked_wait(refusal(429, {"Retry-After": "30"})) == 30
    assert asked_wait(refusal(429, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"})) is None
    assert asked_wait(refusal(429)) is None
    assert asked_wait(ConnectionError()) is None


# --- the process beside the training ----------------------------------------------------------------------


@pytest.fixture
def impostor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """In place of Python a script that notes its arguments and HF_TOKEN, and sleeps for a minute."""
    script = tmp_path / "impostor"
    script.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" >> {tmp_path}/seen\necho "$HF_TOKEN" >> {tmp_path}/token\nexec sleep 60\n'
    )
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    return tmp_path


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_snapshot_at_a_time_and_no_token_in_sight(impostor: Path, capfd: pytest.CaptureFixture) -> None:
    """Oracle: the command line of the process, which all users of a machine can read, against its environment."""
    publisher = Publisher("user/model", impostor, token=SECRET, private=True)
    publisher.publish_snapshot(Path.mkdir, "Step 1")
    wait_for((impostor / "token").exists)
    publisher.publish_snapshot(Path.mkdir, "Step 2")
    assert "skipped: Step 2" in capfd.readouterr().err
    seen = (impostor / "seen").read_text()
    assert seen.splitlines() == [
        *push_command(impostor / ".snapshot", "user/model", private=True), "--commit_message", "Step 1"
    ]  # fmt: skip
    wait_for(lambda: (impostor / "token").read_text() == f"{SECRET}\n")
    assert SECRET not in seen + repr(publisher)
    started = time.monotonic()
    publisher.close()
    assert time.monotonic() - started < 10
    assert not (impostor / ".snapshot").exists()
    publisher.publish_snapshot(Path.mkdir, "Step 3")
    wait_for(lambda: "Step 3" in (impostor / "seen").read_text())
    publisher.close()


def test_a_push_without_end_is_ended(impostor: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the clock; a transfer without a time-out of its own does not keep the training from ending."""
    monkeypatch.setattr(publishing, "PUSH_TIME_LIMIT", 0.2)
    started = time.monotonic()
    assert not Publisher("user/model", impostor, token=None, private=False).publish_result()
    assert time.monotonic() - started < 10


def test_the_command_is_one_for_the_shell() -> None:
    """Oracle: shlex; what a user pastes arrives as it was meant."""
    publisher = Publisher("user/model", Path("my runs/it's"), token=SECRET, private=True)
    assert shlex.split(publisher.command_to_finish()) == [
        "python", "-m", "srl_utils.hub", "push", "my runs/it's", "--repo_id", "user/model", "--private"
    ]  # fmt: skip


# --- pushing a folder -------------------------------------------------------------------------------------


def test_exactly_the_drop_in_is_pushed(machine: Machine, hub: HubServer, drop_in: Path) -> None:
    """Oracle: the files' bytes on the server. The second push finds the repository there (409) and no file to send."""
    code, printed = machine.push(drop_in, "--repo_id", "model")
    assert code == 0, printed
    assert f"pushed to {hub.url}/user/model" in printed
    repository = hub.repositories["user/model"]
    assert_holds(repository, drop_in, PUBLISHED)
    assert [commit.title for commit in repository.commits] == ["initial commit", "End of training"]
    assert not repository.private
    assert hub.stages.count("lfs-upload") == 4  # two of weights, two pictures
    code, printed = machine.push(drop_in, "--repo_id", "user/model", "--private")
    assert code == 0, printed
    assert "user/model was public and is private now" in printed
    assert repository.private
    assert_holds(repository, drop_in, PUBLISHED)
    assert hub.stages.count("lfs-upload") == 4


def test_a_dry_run_asks_the_server_nothing(machine: Machine, hub: HubServer, drop_in: Path) -> None:
    """Oracle: the server's log, and the files that the push itself publishes."""
    code, printed = machine.push(drop_in, "--repo_id", "user/model", "--dry_run")
    assert code == 0, printed
    (line,) = [line for line in printed.splitlines() if line.startswith("would push to user/model: ")]
    assert set(line.partition(": ")[2].split(", ")) == PUBLISHED
    assert not hub.stages and not hub.repositories


def test_a_private_repository_is_private(machine: Machine, hub: HubServer, drop_in: Path) -> None:
    """Oracle: the server's own flag, and a stranger's request, which finds nothing."""
    assert machine.push(drop_in, "--repo_id", "user/model", "--private")[0] == 0
    assert hub.repositories["user/model"].private
    code, printed = machine.python_code(LOAD, "user/model", HF_TOKEN=None)
    assert code == 1
    assert "user/model" in printed


UPLOADS = {"preupload", "lfs-batch", "lfs-upload", "xet-token", "commit"}


def add_public(hub: HubServer, repo_id: str = "user/model", **files: bytes) -> Repository:
    """A repository that is there before the push, with the card of its owner."""
    hub.repositories[repo_id] = Repository()
    hub.repositories[repo_id].commit("main", "mine", {".gitattributes": b"*.png filter=lfs -text\n", **files})
    return hub.repositories[repo_id]


def test_a_public_repository_is_made_private_first(machine: Machine, hub: HubServer, drop_in: Path) -> None:
    """Oracle: the server's list of requests: the settings come before anything of the folder."""
    repository = add_public(hub)
    code, printed = machine.push(drop_in, "--repo_id", "user/model", "--private")
    assert code == 0, printed
    assert repository.private
    assert_holds(repository, drop_in, PUBLISHED)
    first = min(number for number, stage in enumerate(hub.stages) if stage in UPLOADS)
    assert hub.stages[:first] == ["create", "info", "settings", "info", "tree", *hub.stages[5:first]]


REFUSED = {
    "not allowed": (Status(403), 2, "403"),
    "no such request": (Status(404), 2, "404"),
    "said and not done": (Status(200, body={"private": True}), 2, "still public"),
    "the server is down": (Status(503), 3, "503"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_made_private_gets_nothing(machine: Machine, hub: HubServer, drop_in: Path, case: str) -> None:
    """Oracle: the server: no upload was even announced, and one line says so."""
    fault, expected, reason = REFUSED[case]
    repository = add_public(hub)
    hub.fail("settings", fault, times=None)
    code, printed = machine.push(drop_in, "--repo_id", "user/model", "--private", PUBLISHING=HURRIED)
    assert code == expected, printed
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert reason in line
    assert "nothing was uploaded" in line
    assert "Traceback" not in printed
    assert not UPLOADS & set(hub.stages)
    assert [commit.title for commit in repository.commits] == ["mine"]


def test_a_new_repository_that_is_not_private_gets_nothing(machine: Machine, hub: HubServer, drop_in: Path) -> None:
    """Oracle: the server, which takes the wish for a private repository and makes a public one."""
    url = f"{hub.url}/user/model"
    hub.fail("create", Status(200, body={"url": url, "name": "user/model"}))
    hub.fail("settings", Status(403), times=None)
    add_public(hub)
    assert machine.push(drop_in, "--repo_id", "user/model", "--private")[0] == 2
    assert not UPLOADS & set(hub.stages)


@pytest.mark.parametrize(("private", "default"), [(True, False), (False, True)], ids=["existing", "by default"])
def test_a_private_repository_stays_private(
    machine: Machine, hub: HubServer, drop_in: Path, private: bool, default: bool
) -> None:
    """Oracle: the server's flag. Without --private an existing one is as it was, a new one as its owner's default."""
    hub.private_by_default = default
    if private:
        add_public(hub).private = True
    assert machine.push(drop_in, "--repo_id", "user/model")[0] == 0
    assert hub.repositories["user/model"].private
    assert "settings" not in hub.stages


def test_a_repository_under_a_former_name(machine: Machine, hub: HubServer, drop_in: Path) -> None:
    """Oracle: the server, which redirects; privacy and files are those of the repository behind the name."""
    repository = add_public(hub, "user/new-name")
    hub.renamed["user/model"] = "user/new-name"
    code, printed = machine.push(drop_in, "--repo_id", "user/model", "--private")
    assert code == 0, printed
    assert f"pushed to {hub.url}/user/new-name" in printed
    assert repository.private
    assert_holds(repository, drop_in, PUBLISHED)


# --- what an earlier upload has left ----------------------------------------------------------------------


OUTDATED = {
    "diffusion_pytorch_model.bf16.safetensors", "diffusion_pytorch_model.non_ema.safetensors",
    "diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.bin", "samples/step-000900.png",
}  # fmt: skip
OF_OTHERS = {
    "LICENSE", "NOTES.md", "samples/mine.png", "vae/diffusion_pytorch_model.bf16.safetensors", "pytorch_model.bin",
    "diffusion_flax_model.msgpack", "figures/results.json",
}  # fmt: skip


def test_outdated_files_are_deleted_in_the_same_commit(machine: Machine, hub: HubServer, drop_in: Path) -> None:
    """Oracle: the server's files after each commit; what a training never writes stays."""
    repository = add_public(hub, **dict.fromkeys(OUTDATED | OF_OTHERS, b"of before"))
    code, printed = machine.push(drop_in, "--repo_id", "user/model")
    assert code == 0, printed
    assert [commit.title for commit in repository.commits] == ["mine", "End of training"]
    assert set(repository.commits[-1].files) - {".gitattributes"} == PUBLISHED | OF_OTHERS
    assert all(name in printed for name in OUTDATED)
    code, printed = machine.push(drop_in, "--repo_id", "user/model")
    assert code == 0, printed
    assert "deleted" not in printed


def bare(drop_in: Path, folder: Path) -> Path:
    """Configuration and full weights alone."""
    for name in ("config.json", WEIGHTS):
        (folder / name).write_bytes((drop_in / name).read_bytes())
    return folder


@pytest.mark.parametrize("of_a_training", [True, False], ids=["a training's card", "a card by hand"])
def test_a_folder_without_a_card(
    machine: Machine, hub: HubServer, drop_in: Path, tmp_path: Path, of_a_training: bool
) -> None:
    """Oracle: the server. The card of other weights goes with them; one that says nothing of weights stays."""
    card = card_of({WEIGHTS: "0" * 64}) if of_a_training else "# Mine\n"
    repository = add_public(hub, **{"README.md": card.encode(), HALF: b"half", "results.json": b"[]"})
    assert machine.push(bare(drop_in, tmp_path), "--repo_id", "user/model")[0] == 0
    kept = set() if of_a_training else {"README.md"}
    assert set(repository.branches["main"].files) - {".gitattributes"} == {"config.json", WEIGHTS, *kept}


def test_a_folder_that_is_not_there(machine: Machine, hub: HubServer, tmp_path: Path) -> None:
    """Oracle: one line that says so, and not that the Hub lacks such a model; the server has no repository."""
    code, printed = machine.push(tmp_path / "none", "--repo_id", "user/model")
    assert code == 2 and "error: there is no folder" in printed and "Hub" not in printed
    assert not hub.repositories


def test_a_config_that_names_a_folder(machine: Machine, hub: HubServer, drop_in: Path, tmp_path: Path) -> None:
    """Oracle: the server's config: that of the folder, but for the machine's path, of which the last part is left."""
    config = json.loads((bare(drop_in, tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_name_or_path": "/home/alice/secret/base"}))
    assert machine.push(tmp_path, "--repo_id", "user/model")[0] == 0
    sent = json.loads(hub.repositories["user/model"].branches["main"].files["config.json"])
    assert sent == {**config, "_name_or_path": "base"}


def card_of(weights: dict[str, str]) -> str:
    lines = [f"- `{name}`: `{checksum}`" for name, checksum in weights.items()]
    ending = ":\n\n" + "\n".join(lines) + "\n" if lines else ": none yet\n"
    return f"---\ntags: [srl-vae]\n---\n# Model\n\n{WEIGHTS_HEADING}{ending}"


def test_a_card_of_other_weights_is_refused(machine: Machine, hub: HubServer, drop_in: Path, tmp_path: Path) -> None:
    """Oracle: SHA-256. The card of an unfinished training, of other or of missing weights ends a push before it begins."""
    bare(drop_in, tmp_path)
    own = hashlib.sha256((drop_in / WEIGHTS).read_bytes()).hexdigest()
    for weights in ({}, {WEIGHTS: "0" * 64}, {WEIGHTS: own, HALF: own}):
        (tmp_path / "README.md").write_text(card_of(weights))
        code, printed = machine.push(tmp_path, "--repo_id", "user/model")
        assert code == 2, printed
        (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert "README.md" in line
    assert not hub.stages


def test_weights_that_the_card_does_not_describe_stay_at_home(
    machine: Machine, hub: HubServer, drop_in: Path, tmp_path: Path
) -> None:
    """Oracle: the server. The full weights are the card's, the half-precision ones are of another run."""
    bare(drop_in, tmp_path)
    (tmp_path / HALF).write_bytes(b"of another run")
    own = hashlib.sha256((drop_in / WEIGHTS).read_bytes()).hexdigest()
    (tmp_path / "README.md").write_text(card_of({WEIGHTS: own}) + "\nA paragraph by hand.\n")
    code, printed = machine.push(tmp_path, "--repo_id", "user/model")
    assert code == 0, printed
    assert f"not published, as README.md does not describe them: {HALF}" in printed
    assert_holds(hub.repositories["user/model"], tmp_path, {"config.json", WEIGHTS, "README.md"})


# --- pushing to a branch ----------------------------------------------------------------------------------


def test_a_branch_is_created_and_found(machine: Machine, hub: HubServer, drop_in: Path, tmp_path: Path) -> None:
    """Oracle: the server's branches; main is as it was, and the address of the branch is printed."""
    repository = add_public(hub, **{"NOTES.md": b"keep", HALF: b"of before"})
    before = repository.branches["main"]
    for folder in (drop_in, bare(drop_in, tmp_path)):
        code, printed = machine.push(folder, "--repo_id", "user/model", "--revision", "eps/16", "--private")
        assert code == 0, printed
        assert f"on the branch {hub.url}/user/model/tree/eps/16" in printed
    assert repository.branches["main"] is before
    assert repository.private
    assert set(repository.branches["eps/16"].files) - {".gitattributes"} == {
        "NOTES.md", "config.json", WEIGHTS, "README.md"
    }  # fmt: skip
    assert hub.stages.count("branch") == 1


@pytest.mark.parametrize("case", ["tag", "commit", "short commit", "older commit", "head", "reference", "no name"])
def test_a_revision_that_is_no_branch_is_refused(machine: Machine, hub: HubServer, drop_in: Path, case: str) -> None:
    """Oracle: the server: nothing is uploaded, and one line names the revision."""
    repository = add_public(hub)
    older = repository.branches["main"]
    commit = repository.commit("main", "Second", older.files)
    repository.tags["v1"] = commit
    names = {
        "tag": "v1", "commit": commit.oid, "short commit": commit.oid[:8], "older commit": older.oid[:7], "head": "HEAD",
        "reference": "refs/pr/1", "no name": "a b",
    }  # fmt: skip
    code, printed = machine.push(drop_in, "--repo_id", "user/model", "--revision", names[case])
    assert code == 2, printed
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert names[case] in line
    assert not UPLOADS & set(hub.stages)
    assert set(repository.branches) == {"main"}


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_nothing_broken_is_pushed(machine: Machine, hub: HubServer, drop_in: Path, tmp_path: Path, name: str) -> None:
    """Oracle: the server, which is not even asked."""
    for file in ("config.json", WEIGHTS):
        (tmp_path / file).write_bytes((drop_in / file).read_bytes())
    (tmp_path / name).write_bytes((drop_in / name).read_bytes()[:-40])
    code, printed = machine.push(tmp_path, "--repo_id", "user/model")
    assert code == 2, printed
    assert printed.startswith("error: ")
    assert "Traceback" not in printed
    assert not hub.stages


def test_by_xet_with_the_real_python(machine: Machine, hub: HubServer, drop_in: Path) -> None:
    """Oracle: SHA-256 and size in the commit, and at least as many bytes in the store as the weights have."""
    code, printed = machine.run(
        sys.executable, "-m", "srl_utils.hub", "push", drop_in, "--repo_id", "user/model",
        **hub.environment(machine.home, xet=True),
    )  # fmt: skip
    assert code == 0, printed
    files = hub.repositories["user/model"].branches["main"].files
    assert set(files) - {".gitattributes"} == PUBLISHED
    weights = (drop_in / WEIGHTS).read_bytes()
    assert files[WEIGHTS] == Pointer(hashlib.sha256(weights).hexdigest(), len(weights))
    assert "xet-token" in hub.stages
    assert "lfs-upload" not in hub.stages
    assert sum(path.stat().st_size for path in hub.xet_store.rglob("*") if path.is_file()) >= len(weights)


@dataclass(frozen=True)
class Trouble:
    """A fault, and how a push ends that meets no other answer."""

    stage: str
    fault: Fault
    reason: str
    exit_code: int = 3
    may_pass: bool = False


def outage(stage: str, fault: Fault, reason: str) -> Trouble:
    return Trouble(stage, fault, reason, may_pass=True)


TROUBLES = {
    "401 at the beginning": Trouble("create", Status(401), "401.*hf auth login", exit_code=2),
    "403 at the beginning": Trouble("create", Status(403), "403.*hf auth login", exit_code=2),
    "401 during preupload": Trouble("preupload", Status(401), "401"),
    "403 at the commit": Trouble("commit", Status(403), "403"),
    "commit rejected": Trouble("commit", Status(400), "injected fault"),
    "commit outrun": Trouble("commit", Status(412), "412"),
    "503 at the beginning": outage("create", Status(503), "503"),
    "429 at the commit": outage("commit", Status(429, {"Retry-After": "1"}), "429"),
    "500 during preupload": outage("preupload", Status(500), "500"),
    "cut in mid-file": outage("lfs-upload", Cut(), "disconnected|closed|reset"),
    "silence at the beginning": outage("create", Silence(), "timed out"),
    "silence at the commit": outage("commit", Silence(), "timed out"),
}


@pytest.mark.parametrize("case", TROUBLES)
def test_a_push_that_fails(machine: Machine, hub: HubServer, drop_in: Path, case: str) -> None:
    """Oracle: the documented exit codes and one line with the reason; the same command succeeds on a sound server."""
    trouble = TROUBLES[case]
    before = contents(drop_in)
    hub.fail(trouble.stage, trouble.fault, times=None)
    code, printed = machine.push(drop_in, "--repo_id", "user/model", PUBLISHING=HURRIED)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert code == trouble.exit_code, printed
    assert len(errors) == 1
    assert re.search(trouble.reason, errors[0]), errors
    assert "Traceback" not in printed
    assert printed.count("attempt 1 of 2 failed") == trouble.may_pass
    assert (hub.stages.count(trouble.stage) > 1) == trouble.may_pass
    assert contents(drop_in) == before
    hub.heal()
    assert machine.push(drop_in, "--repo_id", "user/model")[0] == 0
    assert_holds(hub.repositories["user/model"], drop_in, PUBLISHED)


PASSING = {name: trouble for name, trouble in TROUBLES.items() if trouble.may_pass}
PASSING["answer lost"] = outage("commit", Cut(after_work=True), "the second attempt finds that the first was heard")


@pytest.mark.parametrize("case", PASSING)
def test_a_push_outlives_an_outage(machine: Machine, hub: HubServer, drop_in: Path, case: str) -> None:
    """Oracle: the files on the server, and one commit with them, although the first attempt failed."""
    hub.fail(PASSING[case].stage, PASSING[case].fault)
    code, printed = machine.push(drop_in, "--repo_id", "user/model", PUBLISHING=HURRIED)
    assert code == 0, printed
    repository = hub.repositories["user/model"]
    assert_holds(repository, drop_in, PUBLISHED)
    assert [commit.title for commit in repository.commits] == ["initial commit", "End of training"]


def test_the_server_says_when_to_come_back(machine: Machine, hub: HubServer, drop_in: Path) -> None:
    """Oracle: the clock; by itself the push would come back after 10 ms."""
    hub.fail("commit", Status(429, {"Retry-After": "3"}))
    started = time.monotonic()
    code, printed = machine.push(drop_in, "--repo_id", "user/model", PUBLISHING=HURRIED, LONGEST_SLEEP="inf")
    assert code == 0, printed
    assert 3 <= time.monotonic() - started < 20


@pytest.mark.parametrize("token", [None, "hf_wrong"], ids=["none", "wrong"])
def test_without_a_good_token(machine: Machine, hub: HubServer, drop_in: Path, token: str | None) -> None:
    """Oracle: the server's own check of tokens; one line says where a good one comes from, and repeats no bad one."""
    code, printed = machine.push(drop_in, "--repo_id", "user/model", HF_TOKEN=token)
    assert code == 2, printed
    assert len(re.findall(r"^error: .*401.*hf auth login", printed, flags=re.MULTILINE)) == 1
    assert "hf_wrong" not in printed
    assert not hub.repositories


# --- loading what was pushed ------------------------------------------------------------------------------


LOAD = "import sys; from diffusers import AutoencoderKL; AutoencoderKL.from_pretrained(sys.argv[1])"
COMPARE = """
import sys, torch
from diffusers import AutoencoderKL
folder, *revisions = sys.argv[1:]
for settings in ({}, {"variant": "fp16"}, *({"revision": revision} for revision in revisions)):
    ours, theirs = (AutoencoderKL.from_pretrained(place, **settings) for place in ("user/model", folder))
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
"""
USE = """
import sys, torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from helpers.small_pipelines import build_pipeline, run_pipeline, sd_parts, without
from srl_utils.pipelines import swap_vae

def built_with(place):
    pipe = StableDiffusionPipeline(
        **{**without("text_encoder"), **sd_parts(), "vae": AutoencoderKL.from_pretrained(place)}
    )
    return run_pipeline(pipe, "sd")

def swapped_to(place):
    pipe = build_pipeline("sd img2img")
    swap_vae(pipe, place)
    return run_pipeline(pipe, "sd img2img")

before = run_pipeline(build_pipeline("sd img2img"), "sd img2img")
for use in (built_with, swapped_to):
    assert torch.equal(use("user/model"), use(sys.argv[1]))
assert not torch.equal(swapped_to("user/model"), before)
"""


def test_the_pushed_vae_loads(machine: Machine, hub: HubServer, drop_in: Path) -> None:
    """Oracle: the folder that was pushed, weight by weight, in full and in half precision, by name and by commit."""
    assert machine.push(drop_in, "--repo_id", "user/model")[0] == 0
    code, printed = machine.python_code(COMPARE, drop_in, "main", hub.repositories["user/model"].commits[-1].oid)
    assert code == 0, printed
    assert "download" in hub.stages


def test_pipelines_use_the_pushed_vae(machine: Machine, hub: HubServer, drop_in: Path) -> None:
    """Oracle: the same pipelines with the VAE from the folder, to the last bit; before, the picture was another."""
    pytest.importorskip("transformers", reason="diffusers has no StableDiffusionPipeline without it")
    assert machine.push(drop_in, "--repo_id", "user/model")[0] == 0
    code, printed = machine.python_code(USE, drop_in)
    assert code == 0, printed


# --- whole trainings --------------------------------------------------------------------------------------


# Four small steps take less time than a push, and a snapshot does not wait for the one before.
WAIT_FOR_PUSHES = """
import runpy
from srl_utils.hub.publishing import Publisher

honest = Publisher.publish_snapshot

def publish_and_wait(publisher, *arguments):
    honest(publisher, *arguments)
    publisher._process.wait()

Publisher.publish_snapshot = publish_and_wait
runpy.run_path("train_srl_vae.py", run_name="__main__")
"""


@dataclass(frozen=True)
class Run:
    """A training that was published with everything on, what it left, and where."""

    out: Path
    printed: str
    repository: Repository


@pytest.fixture(scope="module")
def published(
    machine_and_hub: Machine, photographs: Path, vae_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    hub, out = machine_and_hub.hub, tmp_path_factory.mktemp("published") / "out"
    hub.reset()
    hub.add_repository("user/base", vae_folder)
    files = hub.repositories["user/base"].branches["main"].files
    files["README.md"] = b"---\nlicense: apache-2.0\n---\n# Base\n"
    code, printed = machine_and_hub.python_code(
        WAIT_FOR_PUSHES, *smallest_training(vae_folder, photographs, out),
        "--pretrained_model_name_or_path", "user/base", "--push_to_hub", "--hub_model_id", "model",
        "--hub_token", SECRET, "--hub_private_repo", "--hub_strategy", "checkpoint", "--validation_steps", "1",
        "--checkpointing_steps", "1", "--save_variant", "fp16", "bf16", "--report_to", "tensorboard", HF_TOKEN=None,
    )  # fmt: skip
    assert code == 0, printed
    return Run(out, printed, hub.repositories["user/model"])


def test_every_validation_is_a_commit(published: Run) -> None:
    """Oracle: `metrics.jsonl`, whose validations the titles tell; the last is part of the end."""
    rows = [json.loads(line) for line in (published.out / "metrics.jsonl").read_text().splitlines()]
    measured = [
        f"Step {row['step']}: clean {row['validation/clean/psnr']:.2f} dB, "
        f"pgd-10 {row['validation/pgd-10/psnr']:.2f} dB"
        for row in rows
        if "validation/clean/psnr" in row and 0 < row["step"] < 4
    ]
    assert len(measured) == 3
    assert [commit.title for commit in published.repository.commits] == ["initial commit", *measured, "End of training"]


def test_every_card_describes_the_weights_beside_it(published: Run) -> None:
    """Oracle: SHA-256 of the files of each commit, halves included."""
    for commit in published.repository.commits[1:]:
        weights = {name: content for name, content in commit.files.items() if name.endswith(".safetensors")}
        expected = {name: hashlib.sha256(content).hexdigest() for name, content in weights.items()}
        assert recorded_weights(commit.files["README.md"].decode()) == expected


def test_every_commit_is_that_step_and_loads(published: Run, machine: Machine, hub: HubServer) -> None:
    """Oracle: the checkpoints of the same steps, byte for byte; a card and the results so far come along."""
    _, *steps, end = published.repository.commits
    assert len(steps) == 3
    for number, commit in enumerate(steps, start=1):
        assert set(commit.files) - {".gitattributes"} == PUBLISHED - {HALF} - {n for n in PUBLISHED if "samples" in n}
        assert commit.files[WEIGHTS] == (published.out / f"checkpoint-{number}/vae" / WEIGHTS).read_bytes()
        assert f"{number} steps of 4 images" in commit.files["README.md"].decode()
        judged = {row["vae"] for row in json.loads(commit.files["results.json"])}
        assert judged == {"original", "fine-tuned"}
        assert len(commit.files["metrics.jsonl"].splitlines()) == 2 * number + 1  # steps, validations, one before all
    assert end.files[WEIGHTS] == (published.out / "checkpoint-4/vae" / WEIGHTS).read_bytes()
    hub.repositories["user/model"] = published.repository
    code, printed = machine.python_code(
        "import sys; from diffusers import AutoencoderKL\n"
        "for revision in sys.argv[1:]: AutoencoderKL.from_pretrained('user/model', revision=revision)",
        *(commit.oid for commit in (*steps, end)),
    )
    assert code == 0, printed


def test_the_end_is_the_drop_in_alone(published: Run) -> None:
    """Oracle: the output folder, file by file; checkpoints, logs and what was put aside stay at home."""
    names = (PUBLISHED | {HALF.replace("fp16", "bf16")}) | {f"samples/step-{step:06d}.png" for step in range(5)}
    assert_holds(published.repository, published.out, names)
    left = {path.name for path in published.out.iterdir()} - {name.split("/")[0] for name in names}
    assert left == {".lock", "logs", "hub.log", "training_args.json", *(f"checkpoint-{step}" for step in range(1, 5))}
    assert published.repository.private


def test_the_token_is_nowhere(published: Run) -> None:
    """Oracle: a search for it in all that was written, printed or uploaded; without it there had been no push."""
    assert SECRET not in published.printed
    assert "hub_token" not in json.loads((published.out / "training_args.json").read_text())["arguments"]
    everything = [contents(published.out), *(commit.files for commit in published.repository.commits)]
    assert {name for files in everything for name, content in files.items() if SECRET.encode() in content} == set()


def test_the_published_card(published: Run) -> None:
    """Oracle: `results.json`, which the model-index repeats, and the base's own card, for the licence."""
    card = ModelCard(published.repository.branches["main"].files["README.md"].decode())
    assert (card.data.base_model, card.data.license) == ("user/base", "apache-2.0")
    rows = json.loads((published.out / "results.json").read_text())
    judged = [(row["metric"], round(row["value"], 4)) for row in rows if row["vae"] == "fine-tuned"]
    assert sorted((one.metric_type, one.metric_value) for one in card.data.eval_results) == sorted(judged)
    assert len(card.data.to_dict()["model-index"][0]["results"]) == 4
    assert 'from_pretrained("user/model")' in card.text
    assert "](samples/comparison.png)" in card.text
    assert str(published.out.parent) not in card.text


@pytest.mark.parametrize(("variant", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_variants_are_the_weights_at_half_precision(published: Run, variant: str, dtype: torch.dtype) -> None:
    """Oracle: torch's rounding of the full weights; and a measurement of the saved file, told in table and card."""
    full = load_file(published.out / WEIGHTS)
    half = load_file(published.out / HALF.replace("fp16", variant))
    assert full.keys() == half.keys()
    assert all(torch.equal(half[name], tensor.to(dtype)) for name, tensor in full.items())
    assert AutoencoderKL.from_pretrained(published.out, variant=variant, torch_dtype=dtype).dtype == dtype
    clean = {
        row["vae"]: row["value"]
        for row in json.loads((published.out / "results.json").read_text())
        if (row["attack"], row["metric"]) == ("clean", "psnr")
    }
    difference = clean[f"fine-tuned-{variant}"] - clean["fine-tuned"]
    assert 0 < abs(difference) < 0.1
    assert f"The {variant} variant's clean PSNR differs by {difference:+.3f} dB." in published.printed
    assert f"- `{variant}`: {difference:+.3f} dB PSNR" in (published.out / "README.md").read_text()


@pytest.fixture(scope="module")
def undisturbed(
    machine_and_hub: Machine, photographs: Path, vae_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The output folder of the smallest training without a Hub."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    code, printed = machine_and_hub.train(*smallest_training(vae_folder, photographs, out))
    assert code == 0, printed
    return out


def test_training_again_leaves_nothing_of_the_run_before(
    machine: Machine, hub: HubServer, flags: list[str], tmp_path: Path, undisturbed: Path
) -> None:
    """Oracle: the run in a fresh folder, file by file, locally and on the server, which was public before."""
    again = [*flags, "--push_to_hub", "--hub_model_id", "user/model"]
    code, printed = machine.train(
        *again, "--max_train_steps", "6", "--validation_steps", "1", "--save_variant", "fp16", "bf16", "--seed", "5"
    )
    assert code == 0, printed
    assert HALF in hub.repositories["user/model"].branches["main"].files
    (tmp_path / "out/hub.log").write_text("of before")
    code, printed = machine.train(
        *again, "--hub_private_repo", "--hub_strategy", "checkpoint", "--validation_steps", "2"
    )
    assert code == 0, printed
    ours, theirs = contents(tmp_path / "out"), contents(undisturbed)
    assert set(ours) - {"hub.log", "samples/step-000002.png"} == set(theirs)
    assert ours[WEIGHTS] == theirs[WEIGHTS]
    assert b"of before" not in ours.get("hub.log", b"")
    repository = hub.repositories["user/model"]
    assert repository.private
    assert_holds(repository, tmp_path / "out", set(ours) - {".lock", "hub.log", "training_args.json"})


def test_a_training_that_cannot_be_private_does_not_begin(
    machine: Machine, hub: HubServer, flags: list[str], tmp_path: Path
) -> None:
    """Oracle: the server and the disk: refused in the first seconds, before anything is written or uploaded."""
    add_public(hub)
    hub.fail("settings", Status(403), times=None)
    code, printed = machine.train(*flags, "--push_to_hub", "--hub_model_id", "user/model", "--hub_private_repo")
    assert code == 2, printed
    assert re.search(r"^error: .*public.*403", printed, flags=re.MULTILINE)
    assert not UPLOADS & set(hub.stages)
    assert not (tmp_path / "out").exists()


LATE = [
    "403 at the commit", "silence at the commit",
    *(pytest.param(case, marks=pytest.mark.slow) for case in (
        "commit rejected", "429 at the commit", "500 during preupload", "cut in mid-file",
    )),
]  # fmt: skip


@pytest.mark.parametrize("case", LATE)
def test_a_failing_push_costs_no_training(
    machine: Machine, hub: HubServer, flags: list[str], tmp_path: Path, undisturbed: Path, case: str
) -> None:
    """Oracle: the training without a Hub, to the last bit; the command it ends with is typed into a shell and works."""
    hub.fail(TROUBLES[case].stage, TROUBLES[case].fault, times=None)
    code, printed = machine.train(
        *flags, "--push_to_hub", "--hub_model_id", "user/model", "--hub_strategy", "checkpoint",
        "--validation_steps", "2", "--hub_private_repo", PUBLISHING=HURRIED,
    )  # fmt: skip
    assert code == 3, printed
    assert "Traceback" not in printed
    out = tmp_path / "out"
    ours, theirs = contents(out), contents(undisturbed)
    assert ours[WEIGHTS] == theirs[WEIGHTS]
    assert json.loads(ours["results.json"]) == json.loads(theirs["results.json"])
    assert set(ours) == {*theirs, "samples/step-000002.png", "hub.log"}
    AutoencoderKL.from_pretrained(out)
    (command,) = re.findall(r"To finish it: (.*)", printed)
    hub.heal()
    hub.repositories.clear()
    code, printed = machine.run("sh", "-c", command)
    assert code == 0, printed
    assert_holds(hub.repositories["user/model"], out, set(ours) - {".lock", "hub.log", "training_args.json"})
    assert hub.repositories["user/model"].private


WATCH_DATA = """
import runpy, srl_utils.images.datasets

honest = srl_utils.images.datasets.open_data

def open_data(*arguments, **settings):
    print("the data are opened")
    return honest(*arguments, **settings)

srl_utils.images.datasets.open_data = open_data
runpy.run_path("train_srl_vae.py", run_name="__main__")
"""


def test_a_bad_token_is_known_at_once(machine: Machine, hub: HubServer, flags: list[str], tmp_path: Path) -> None:
    """Oracle: the run with a good token, which opens its data and finds the repository there (409) at no harm."""
    flags = [*flags, "--push_to_hub", "--hub_model_id", "user/model", "--max_train_steps", "1"]
    started = time.monotonic()
    code, printed = machine.python_code(WATCH_DATA, *flags, "--hub_token", "hf_wrong")
    assert time.monotonic() - started < 10
    assert code == 2, printed
    assert re.search(r"^error: .*401.*hf auth login", printed, flags=re.MULTILINE)
    assert "hf_wrong" not in printed
    assert "the data are opened" not in printed
    assert not (tmp_path / "out").exists()
    hub.repositories["user/model"] = Repository()
    hub.repositories["user/model"].commit("main", "mine", {"NOTES.md": b"keep"})
    code, printed = machine.python_code(WATCH_DATA, *flags)
    assert code == 0, printed
    assert "the data are opened" in printed
    assert [commit.title for commit in hub.repositories["user/model"].commits] == ["mine", "End of training"]
    assert hub.repositories["user/model"].branches["main"].files["NOTES.md"] == b"keep"


def test_a_dry_run_asks_the_hub_nothing(machine: Machine, hub: HubServer, flags: list[str]) -> None:
    """Oracle: the server's list of requests."""
    code, printed = machine.train(*flags, "--push_to_hub", "--dry_run")
    assert code == 0, printed
    assert not hub.stages
