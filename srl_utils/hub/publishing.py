"""Push a run's output folder to the Hub: the upload, its retries, and a background process for it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, TypeVar

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_session,
    set_client_factory,
)
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from srl_utils.errors import HubRefusal, UserError
from srl_utils.hub.contents import CARD, Contents

MODEL, SPACE = "model", "space"
"""Kinds of repositories on the Hub."""
EXIT_PUSH_FAILED = 3
ATTEMPTS = 5
FIRST_WAIT, LONGEST_WAIT = 2.0, 120.0  # seconds
REQUEST_TIMEOUT = 60.0  # seconds without a byte from the server; huggingface_hub sets no limit
PUSH_TIME_LIMIT = 3600.0  # seconds for a whole push
# Errors that a retry cannot mend. A malformed repository id and a bad request are ValueErrors too.
PERMANENT = (ValueError, TypeError, FileNotFoundError, PermissionError, LocalTokenNotFoundError, OfflineModeIsEnabled)
RETRIED_STATUS = {408, 425, 429}
SHORT_COMMIT = re.compile(r"[0-9a-f]{7,39}")  # as git prints it; a branch named like a date may look the same

Result = TypeVar("Result")


class PushError(UserError, ConnectionError):
    """The Hub did not accept an upload, or could not be reached. The message says why, in one line."""


def create_repository(repo_id: str, *, token: str | None, private: bool, kind: str = MODEL) -> str:
    """Create the repository if it does not exist, and return its full id (`user/name`).

    A repository that was renamed is found by its old id; the new id is returned.

    Args:
        repo_id: `user/name`, or `name` alone for the owner of the token.
        token: a token of the Hub; None uses the token of the login.
        private: make the repository private, also if it exists and is public.
        kind: `model` or `space`.

    Raises:
        HubRefusal: a PermissionError, if the Hub refuses.
        UserError: a ValueError, if the repository is still public afterwards.
        PushError: if the Hub cannot be reached after `ATTEMPTS` attempts.
    """
    api = _api(token)
    with _refusals(f"cannot create or open '{repo_id}' on the Hub"):
        # None means the default of the organisation.
        sdk = "gradio" if kind == SPACE else None
        made = partial(api.create_repo, repo_id, private=private or None, exist_ok=True, repo_type=kind, space_sdk=sdk)
        created = with_retries(made).repo_id
        info = with_retries(lambda: api.repo_info(created, repo_type=kind))
    if private and info.private is not True:
        _make_private(api, info.id, kind)
    return info.id


def publisher(repo_id: str) -> tuple[str, bool]:
    """Return whose token this machine has, and whether the repository exists. Nothing is created or changed.

    Args:
        repo_id: `user/name`, or `organisation/name`.

    Raises:
        HubRefusal: a PermissionError, if there is no token, if it may only read, or if the repository is of somebody else.
        PushError: if the Hub cannot be reached after `ATTEMPTS` attempts.
    """
    api = _api(None)
    with _refusals(f"cannot publish to {repo_id}"):
        account = with_retries(api.whoami)
        there = with_retries(lambda: api.repo_exists(repo_id))
    owners = [account["name"], *(organisation["name"] for organisation in account["orgs"])]
    if repo_id.partition("/")[0] not in owners:
        raise HubRefusal(f"cannot publish to {repo_id} with the token of {', '.join(owners)}; choose another HUB_ID")
    if account["auth"]["accessToken"]["role"] == "read":
        raise HubRefusal(f"the token of {account['name']} may only read; make one that may write, and `hf auth login`")
    return account["name"], there


def _make_private(api: HfApi, repo_id: str, kind: str) -> None:
    """Make an existing repository private and check that it is; `create_repo` does not change it."""
    with _refusals(f"'{repo_id}' is public, cannot be made private, and nothing was uploaded"):
        with_retries(lambda: api.update_repo_settings(repo_id, private=True, repo_type=kind))
        private = with_retries(lambda: api.repo_info(repo_id, repo_type=kind)).private
    if private is not True:
        raise UserError(
            f"'{repo_id}' is still public after the Hub was asked to make it private, so nothing was uploaded; make it "
            "private in its settings on the Hub, or choose another repository"
        )
    print(f"{repo_id} was public and is private now", file=sys.stderr)


def open_branch(repo_id: str, revision: str, *, token: str | None) -> None:
    """Create the branch `revision` from `main` if it does not exist.

    Raises:
        UserError: if a tag or a commit has this name, or if the Hub refuses.
        PushError: if the Hub cannot be reached after `ATTEMPTS` attempts.
    """
    api = _api(token)
    with _refusals(f"cannot open the branch '{revision}' of '{repo_id}'"):
        refs = with_retries(lambda: api.list_repo_refs(repo_id))
        if revision in {known.name for known in refs.branches}:
            return
        if revision in {tag.name for tag in refs.tags}:
            raise UserError(f"'{revision}' is a tag of '{repo_id}'; give the name of a branch", parameter="revision")
        if SHORT_COMMIT.fullmatch(revision) and any(commit.startswith(revision) for commit in _commits(api, repo_id)):
            raise UserError(f"'{revision}' is a commit of '{repo_id}'; give the name of a branch", parameter="revision")
        with_retries(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))


def _commits(api: HfApi, repo_id: str) -> list[str]:
    """Return the ids of all commits on `main`."""
    return [commit.commit_id for commit in with_retries(lambda: api.list_repo_commits(repo_id))]


def push(what: Contents, repo_id: str, *, token: str | None, commit_message: str, branch: str | None = None) -> str:
    """Upload the contents and delete outdated files in one commit; return the commit's address.

    Raises:
        PushError: if the Hub refuses, or still fails after `ATTEMPTS` attempts.
    """
    api = _api(token)
    return _pushed(lambda: _commit(api, what, repo_id, commit_message, branch))


def push_space(files: Mapping[str, Path | bytes], repo_id: str, *, folders: Sequence[str], commit_message: str) -> str:
    """Upload the files of a Space in one commit; return the commit's address.

    Args:
        files: what the Space holds: its paths, and a file or its content for each.
        repo_id: full id of an existing Space.
        folders: those whose other files, of an earlier push, are deleted.
        commit_message: title of the commit.

    Raises:
        PushError: if the Hub refuses, or still fails after `ATTEMPTS` attempts.
    """
    api = _api(None)
    inside = tuple(f"{folder}/" for folder in folders)

    def commit() -> CommitInfo:
        present = api.list_repo_files(repo_id, repo_type=SPACE)
        outdated = [name for name in present if name not in files and name.startswith(inside)]
        deletions = [CommitOperationDelete(name, is_folder=False) for name in outdated]
        additions = [CommitOperationAdd(name, content) for name, content in files.items()]
        return api.create_commit(repo_id, [*deletions, *additions], commit_message=commit_message, repo_type=SPACE)

    return _pushed(commit)


def _pushed(commit: Callable[[], CommitInfo]) -> str:
    """Make a commit, with retries, and return its address."""
    try:
        return with_retries(commit).commit_url
    except Exception as error:  # no error of an upload may stop the caller, whose weights are on the disk
        raise PushError(_reason(error)) from error


def _commit(api: HfApi, what: Contents, repo_id: str, message: str, branch: str | None) -> CommitInfo:
    """Make the commit, in one attempt. `upload_folder` would split a large folder into several commits."""
    outdated = what.outdated(present := api.list_repo_files(repo_id, revision=branch))
    if CARD in set(present) - set(what.names) and what.describes_others(_download_card(api, repo_id, branch)):
        outdated.append(CARD)
    if outdated:
        print(f"deleted from {repo_id}, as they are of an earlier upload: {', '.join(outdated)}", file=sys.stderr)
    additions = [CommitOperationAdd(name, what.sent(name)) for name in what.names]
    deletions = [CommitOperationDelete(name, is_folder=False) for name in outdated]
    return api.create_commit(repo_id, [*deletions, *additions], commit_message=message, revision=branch)


def _download_card(api: HfApi, repo_id: str, branch: str | None) -> str:
    with TemporaryDirectory() as folder:
        path = api.hf_hub_download(repo_id, CARD, revision=branch, local_dir=folder)
        return Path(path).read_text(encoding="utf-8", errors="replace")


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Turn an error of the Hub within the context into a PushError if it may pass, else into a HubRefusal.

    Args:
        what: the beginning of the message.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # versions of huggingface_hub use different HTTP libraries
        reason = f"{what}: {_reason(error)}"
        if may_pass(error):
            raise PushError(reason) from None
        raise HubRefusal(f"{reason}; a token that may write comes from `hf auth login` or HF_TOKEN") from None


def _api(token: str | None) -> HfApi:
    _limit_requests()
    return HfApi(token=token)


def with_retries(action: Callable[[], Result], *, sleep: Callable[[float], None] = time.sleep) -> Result:
    """Return the result of `action`, called again after a failure that may pass.

    tenacity is not a dependency. huggingface_hub's own retries cover single requests for a few seconds, and neither
    creating a commit nor a wait that the server asks for.

    Args:
        action: the call to make.
        sleep: waits for a number of seconds.

    Raises:
        Exception: what `action` raises, if `may_pass` is false or after `ATTEMPTS` calls.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except Exception as error:
            if attempt == ATTEMPTS or not may_pass(error):
                raise
            wait = min(asked_wait(error) or FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT)
            print(f"attempt {attempt} of {ATTEMPTS} failed ({_reason(error)}); next in {wait:.0f} s", file=sys.stderr)
            sleep(wait)
    raise AssertionError("unreachable")


def may_pass(error: Exception) -> bool:
    """Return whether the same request may succeed later: after a server or network fault, but not after a refusal."""
    answer = _answer(error)
    if answer is not None:
        return answer.status_code >= 500 or answer.status_code in RETRIED_STATUS
    return not isinstance(error, PERMANENT)


def asked_wait(error: Exception) -> float | None:
    """Return the seconds of the server's Retry-After header; None without one."""
    answer = _answer(error)
    value = "" if answer is None else answer.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def push_command(folder: Path, repo_id: str, *, private: bool) -> list[str]:
    """Return the arguments for Python that publish `folder`; the token comes from the login or HF_TOKEN."""
    command = ["-m", "srl_utils.hub", "push", str(folder), "--repo_id", repo_id]
    return [*command, "--private"] if private else command


@dataclass
class Publisher:
    """Publishes a run from a separate process, so that a failing or silent Hub cannot stop the training.

    `HfApi.upload_folder(run_as_future=True)` uploads in a thread of the training process instead: it cannot be stopped,
    delays the end of the process, and makes several commits of a large folder.

    Attributes:
        repo_id: full id of an existing repository.
        output_dir: folder of the run.
        token: passed to the process in its environment, never on a command line; None uses the token of the login.
        private: create the repository as private if it has been deleted in the meantime.
    """

    repo_id: str
    output_dir: Path
    token: str | None = field(repr=False)
    private: bool
    _process: subprocess.Popen | None = field(default=None, init=False, repr=False)

    def publish_snapshot(self, save: Callable[[Path], None], commit_message: str) -> None:
        """Upload the folder that `save` writes in the background; skip it while the upload before still runs."""
        if self._process is not None and self._process.poll() is None:
            print(f"the push before is still under way; skipped: {commit_message}", file=sys.stderr)
            return
        shutil.rmtree(self._snapshot, ignore_errors=True)
        save(self._snapshot)
        with (self.output_dir / "hub.log").open("a", encoding="utf-8") as log:
            self._process = self._start(self._snapshot, commit_message, output=log)

    def publish_result(self) -> bool:
        """Wait for the upload that still runs, upload `output_dir`, and return whether that succeeded."""
        self._ended_well()
        self.close()
        self._process = self._start(self.output_dir, "End of training", output=None)
        return self._ended_well()

    def close(self) -> None:
        """Stop the upload that still runs. The Hub then has its whole commit or nothing of it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        shutil.rmtree(self._snapshot, ignore_errors=True)

    def command_to_finish(self) -> str:
        """Return the command that publishes `output_dir`."""
        return shlex.join(["python", *push_command(self.output_dir, self.repo_id, private=self.private)])

    def _ended_well(self) -> bool:
        """Wait for the process, at most `PUSH_TIME_LIMIT` seconds, and return whether it succeeded."""
        if self._process is None:
            return True
        try:
            return self._process.wait(PUSH_TIME_LIMIT) == 0
        except subprocess.TimeoutExpired:
            self._process.kill()
            return False

    @property
    def _snapshot(self) -> Path:
        return self.output_dir / ".snapshot"

    def _start(self, folder: Path, commit_message: str, *, output: IO[str] | None) -> subprocess.Popen:
        command = push_command(folder, self.repo_id, private=self.private)
        root = Path(__file__).resolve().parents[2]
        paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        if self.token is not None:
            environment["HF_TOKEN"] = self.token
        return subprocess.Popen(
            [sys.executable, *command, "--commit_message", commit_message],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,  # Ctrl-C goes to the training alone
        )


def _limit_requests() -> None:
    """Make each later request of this process fail after `REQUEST_TIMEOUT` seconds without a byte from the server."""
    session = get_session()
    hooks, redirects = session.event_hooks, session.follow_redirects
    # A time limit set on the session itself would be lost when huggingface_hub replaces the session.
    set_client_factory(lambda: type(session)(event_hooks=hooks, follow_redirects=redirects, timeout=REQUEST_TIMEOUT))


def _answer(error: BaseException | None) -> Any | None:
    """Return the server's response that caused `error`, or None; uploads of large files wrap it in a RuntimeError."""
    while error is not None:
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            return error.response
        error = error.__cause__
    return None


def _reason(error: BaseException) -> str:
    """Return the first line of `error`, followed by the server's message or the first line of its cause."""
    reason = next((line for line in map(str.strip, str(error).splitlines()) if line), type(error).__name__)
    if isinstance(error, HfHubHTTPError):
        said = " ".join((error.server_message or "").split())
        return reason if said in reason else f"{reason} ({said})"
    cause = "" if error.__cause__ is None else _reason(error.__cause__)
    return reason if cause in reason else f"{reason} ({cause})"
