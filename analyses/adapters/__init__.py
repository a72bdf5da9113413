"""hijacklens inside other tools of evaluation, each an optional extra."""
