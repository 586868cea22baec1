"""The paper's claims as commands; docs/claims.md has their results."""
