"""Pushing a run's drop-in: what is uploaded, what is tried again, and a process that keeps it from the training."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils._http import default_client_factory

from srl_utils.errors import HubRefusal, UserError
from srl_utils.hub.contents import CARD, Contents

EXIT_PUSH_FAILED = 3
ATTEMPTS = 5
FIRST_WAIT, LONGEST_WAIT = 2.0, 120.0  # seconds
REQUEST_TIMEOUT = 60.0  # seconds without a byte from the server; the client by itself waits for ever
PUSH_TIME_LIMIT = 3600.0  # seconds for a whole push
# Trying again would not help these; `ValueError` is also what a malformed repository id or a bad request raises.
PERMANENT = (ValueError, TypeError, FileNotFoundError, PermissionError, LocalTokenNotFoundError, OfflineModeIsEnabled)
RETRIED_STATUS = {408, 425, 429}
SHORT_COMMIT = re.compile(r"[0-9a-f]{7,39}")  # as git shows one; a date, such as 20261126, looks the same

Result = TypeVar("Result")


class PushError(UserError, ConnectionError):
    """The Hub did not take it; the message says why, in one line. A ConnectionError and so an OSError."""


def create_repository(repo_id: str, *, token: str | None, private: bool) -> str:
    """Create the repository where it does not exist and return its full id (`user/name`), the present one if it moved.

    With `private` it is private when this returns, whatever it was before.

    Raises:
        HubRefusal: a PermissionError, if the Hub refuses: better in the first seconds than at the end.
        UserError: a ValueError, if the repository is not private afterwards.
        PushError: if it cannot be reached, in `ATTEMPTS` with growing waits.
    """
    api = _api(token)
    with _refusals(f"cannot create or open '{repo_id}' on the Hub"):
        # None leaves the choice to the organisation's setting.
        created = with_retries(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True)).repo_id
        info = with_retries(lambda: api.model_info(created))
    if private and info.private is not True:
        _make_private(api, info.id)
    return info.id


def _make_private(api: HfApi, repo_id: str) -> None:
    """Makes a repository private and reads that back, as `create_repo` ignores the wish where one exists."""
    with _refusals(f"'{repo_id}' is public, cannot be made private, and nothing was uploaded"):
        with_retries(lambda: api.update_repo_settings(repo_id, private=True))
        private = with_retries(lambda: api.model_info(repo_id)).private
    if private is not True:
        raise UserError(
            f"'{repo_id}' is still public after the Hub was asked to make it private, so nothing was uploaded; make it "
            "private in its settings on the Hub, or choose another repository"
        )
    print(f"{repo_id} was public and is private now", file=sys.stderr)


def open_branch(repo_id: str, branch: str, *, token: str | None) -> None:
    """Create the branch, from `main`, where it does not exist.

    Raises:
        UserError: if the name is that of a tag or of a commit, or if the Hub refuses.
        PushError: if it cannot be reached, in `ATTEMPTS` with growing waits.
    """
    api = _api(token)
    with _refusals(f"cannot open the branch '{branch}' of '{repo_id}'"):
        refs = with_retries(lambda: api.list_repo_refs(repo_id))
        if branch in {known.name for known in refs.branches}:
            return
        if branch in {tag.name for tag in refs.tags}:
            raise UserError(f"'{branch}' is a tag of '{repo_id}'; give the name of a branch", parameter="branch")
        if SHORT_COMMIT.fullmatch(branch) and any(commit.startswith(branch) for commit in _commits(api, repo_id)):
            raise UserError(f"'{branch}' is a commit of '{repo_id}'; give the name of a branch", parameter="branch")
        with_retries(lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))


def _commits(api: HfApi, repo_id: str) -> list[str]:
    """Return the ids of all commits on `main`."""
    return [commit.commit_id for commit in with_retries(lambda: api.list_repo_commits(repo_id))]


def push(what: Contents, repo_id: str, *, token: str | None, commit_message: str, branch: str | None = None) -> str:
    """Upload the contents, and delete what they make outdated, as one commit; return the commit's address.

    Raises:
        PushError: if the Hub refuses, or still fails after `ATTEMPTS` with growing waits.
    """
    api = _api(token)
    try:
        return with_retries(lambda: _commit(api, what, repo_id, commit_message, branch)).commit_url
    except Exception as error:  # whatever it is, the weights are on the disk and the caller must go on
        raise PushError(_reason(error)) from error


def _commit(api: HfApi, what: Contents, repo_id: str, message: str, branch: str | None) -> CommitInfo:
    """One attempt; `upload_folder` would make several commits of a large folder, and delete in the first."""
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
    """Within, an error of the Hub becomes a PushError if it may pass, else a UserError; `what` begins both."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the HTTP library behind huggingface_hub differs between its versions
        reason = f"{what}: {_reason(error)}"
        if may_pass(error):
            raise PushError(reason) from None
        raise HubRefusal(f"{reason}; a token that may write comes from `hf auth login` or HF_TOKEN") from None


def _api(token: str | None) -> HfApi:
    _limit_requests()
    return HfApi(token=token)


def with_retries(action: Callable[[], Result], *, sleep: Callable[[float], None] = time.sleep) -> Result:
    """The result of `action`, called up to `ATTEMPTS` times as long as what it raises may pass."""
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
    """Whether the same request may succeed later: not after a refusal, but after a full or broken server or line."""
    answer = _answer(error)
    if answer is not None:
        return answer.status_code >= 500 or answer.status_code in RETRIED_STATUS
    return not isinstance(error, PERMANENT)


def asked_wait(error: Exception) -> float | None:
    """The seconds of the server's Retry-After, where it sent one."""
    answer = _answer(error)
    value = "" if answer is None else answer.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def push_command(folder: Path, repo_id: str, *, private: bool) -> list[str]:
    """The arguments of Python that publish `folder`; the token comes from the login or HF_TOKEN."""
    command = ["-m", "srl_utils.hub", "push", str(folder), "--repo_id", repo_id]
    return [*command, "--private"] if private else command


@dataclass
class Publisher:
    """Publishes a run from processes of their own: nothing that the Hub does or fails to do reaches the training.

    Args:
        repo_id: the full id, created before.
        output_dir: of the run.
        token: handed over in the environment, never on a command line; None for the one of the login.
        private: whether the repository is created as a private one, should it have vanished.
    """

    repo_id: str
    output_dir: Path
    token: str | None = field(repr=False)
    private: bool
    _process: subprocess.Popen | None = field(default=None, init=False, repr=False)

    def publish_snapshot(self, save: Callable[[Path], None], commit_message: str) -> None:
        """Has `save` write a folder and uploads it in the background; skipped while the one before is under way."""
        if self._process is not None and self._process.poll() is None:
            print(f"the push before is still under way; skipped: {commit_message}", file=sys.stderr)
            return
        shutil.rmtree(self._snapshot, ignore_errors=True)
        save(self._snapshot)
        with (self.output_dir / "hub.log").open("a", encoding="utf-8") as log:
            self._process = self._start(self._snapshot, commit_message, output=log)

    def publish_result(self) -> bool:
        """Uploads `output_dir`, after what is under way; whether that succeeded."""
        self._ended_well()
        self.close()
        self._process = self._start(self.output_dir, "End of training", output=None)
        return self._ended_well()

    def close(self) -> None:
        """Ends what is under way: the Hub knows a commit whole or not at all."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        shutil.rmtree(self._snapshot, ignore_errors=True)

    def command_to_finish(self) -> str:
        """What the user types to publish `output_dir`."""
        return shlex.join(["python", *push_command(self.output_dir, self.repo_id, private=self.private)])

    def _ended_well(self) -> bool:
        """Waits for what is under way, but not for ever: some transfers have no time-out of their own."""
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
            start_new_session=True,  # Ctrl-C is for the training, which then decides
        )


def _limit_requests() -> None:
    """From now on no request of this process waits for a silent server for longer than `REQUEST_TIMEOUT`."""

    def client() -> Any:
        limited = default_client_factory()
        limited.timeout = REQUEST_TIMEOUT
        return limited

    set_client_factory(client)


def _answer(error: BaseException | None) -> Any | None:
    """The server's response behind `error`: uploads of large files wrap theirs in a RuntimeError."""
    while error is not None:
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            return error.response
        error = error.__cause__
    return None


def _reason(error: BaseException) -> str:
    """The first line of what `error` says, and of what the server said or what else lies behind it."""
    reason = next((line for line in map(str.strip, str(error).splitlines()) if line), type(error).__name__)
    if isinstance(error, HfHubHTTPError):
        said = " ".join((error.server_message or "").split())
        return reason if said in reason else f"{reason} ({said})"
    cause = "" if error.__cause__ is None else _reason(error.__cause__)
    return reason if cause in reason else f"{reason} ({cause})"
