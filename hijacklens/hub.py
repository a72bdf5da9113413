"""The Hugging Face hub: the commit that a revision names, and why a repository cannot be read."""

from __future__ import annotations

from pathlib import Path

UNREACHABLE = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError"}
UNREACHABLE |= {"ConnectError", "ConnectTimeout"}
BROKEN_OFF = {"ReadError", "ReadTimeout", "RemoteProtocolError"}
ABSENT = {"RepositoryNotFoundError", "HFValidationError"}


def commit_of(name: str, revision: str | None, kind: str = "model") -> str | None:
    """Return the commit that a revision names; without a connection, the one in the local cache.

    Raises:
        Exception: An error of the hub, which `hub_problem` explains.

    Note:
        Downloads one small file. If the hub fails, its library tries for about 25 seconds.
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
    except errors.RemoteEntryNotFoundError as error:  # a repository without that file
        return error.response.headers.get("X-Repo-Commit", revision)


def hub_problem(error: BaseException, instead: str) -> str | None:
    """Return what the hub refuses and what to do, or `instead`; None if it is not the hub."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    kinds = {type(item).__name__ for item in chain}
    answers = [getattr(item, "response", None) for item in chain]
    status = next((answer.status_code for answer in answers if answer is not None), 0)
    reasons = (
        (
            "GatedRepoError" in kinds,
            "it is gated. Accept its licence on its page of the hub, then log in with "
            "`hf auth login` or set HF_TOKEN to a token of that account.",
        ),
        (
            "RevisionNotFoundError" in kinds,
            "it has no such revision. Its page of the hub lists its branches, tags and commits.",
        ),
        (
            kinds & ABSENT,
            "the hub has none of that name that this account may read. Hub ids look like "
            f"owner/name, and a private one needs HF_TOKEN. {instead}",
        ),
        (
            status in (401, 403),
            f"the hub refuses the access token (HTTP {status}). Log in with `hf auth login`, or "
            "set HF_TOKEN to a token that may read it.",
        ),
        (
            status == 429,
            "the hub has had too many requests from this address (HTTP 429). Wait some minutes; "
            "logging in (`hf auth login`) raises the limit.",
        ),
        (
            status >= 500 or kinds & BROKEN_OFF,
            f"the hub fails ({f'HTTP {status}' if status else 'the connection broke off'}). Try "
            f"again later; complete files are kept. {instead}",
        ),
        (
            kinds & UNREACHABLE,
            "it is not in the local cache and the hub cannot be reached. Check the network (and "
            f"HF_HUB_OFFLINE). {instead}",
        ),
    )
    return next((text for fits, text in reasons if fits), None)
