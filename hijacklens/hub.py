"""The Hugging Face hub: the commit that a revision names, and why a repository cannot be read."""

from __future__ import annotations

from pathlib import Path

UNREACHABLE = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError"}
UNREACHABLE |= {"ConnectError", "ConnectTimeout", "ReadError", "ReadTimeout", "RemoteProtocolError"}
"""Names of the errors that libraries raise when the hub cannot be reached."""
ABSENT = {"RepositoryNotFoundError", "HFValidationError"}
"""Names of the errors for a repository that the hub does not have."""


def commit_of(name: str, revision: str | None, kind: str = "model") -> str | None:
    """Return the commit that a revision names; without a connection, the one in the local cache.

    Args:
        name: Hub id of the repository.
        revision: Branch, tag or commit; by default the branch `main`.
        kind: `model` or `dataset`.

    Raises:
        Exception: An error of the hub, which `hub_problem` explains.

    Note:
        Costs one request, and downloads `config.json` or the card of the data set. If the hub
        fails, its library tries for about 25 seconds, with a line for every attempt.
    """
    from huggingface_hub import constants, errors, hf_hub_download

    file = "config.json" if kind == "model" else "README.md"
    try:
        return Path(hf_hub_download(name, file, repo_type=kind, revision=revision)).parent.name
    except errors.LocalEntryNotFoundError:
        folder = Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}", "refs")
        if (known := folder / (revision or "main")).is_file():
            return known.read_text("utf-8")
        raise
    except errors.EntryNotFoundError as error:  # a repository without that file
        return getattr(error, "response").headers.get("X-Repo-Commit")  # noqa: B009


def hub_problem(error: BaseException, instead: str) -> str | None:
    """Return what is wrong between this machine and the hub and what to do; None if nothing is.

    `instead` says what needs no hub.
    """
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    kinds = {type(item).__name__ for item in chain}
    responses = [getattr(item, "response", None) for item in chain]
    status = next((answer.status_code for answer in responses if answer is not None), 0)
    if "GatedRepoError" in kinds:
        return (
            "it is gated. Accept its licence on its page of the hub, then log in with "
            "`hf auth login` or set HF_TOKEN to a token of that account."
        )
    if "RevisionNotFoundError" in kinds:
        return "it has no such revision. Its page of the hub lists its branches, tags and commits."
    if kinds & ABSENT:
        return (
            "the hub has none of that name that this account may read. Hub ids look like "
            f"owner/name, and a private one needs HF_TOKEN. {instead}"
        )
    if status in (401, 403):
        return (
            f"the hub refuses the access token (HTTP {status}). Log in with `hf auth login`, or "
            "set HF_TOKEN to a token that may read it."
        )
    if status == 429:
        return (
            "the hub has had too many requests from this address (HTTP 429). Wait some minutes; "
            "logging in (`hf auth login`) raises the limit."
        )
    if status >= 500:
        return f"the hub fails (HTTP {status}). Try again later. {instead}"
    if kinds & UNREACHABLE:
        return (
            "it is not in the local cache and the hub cannot be reached. Check the network (and "
            f"HF_HUB_OFFLINE). {instead}"
        )
    return None
