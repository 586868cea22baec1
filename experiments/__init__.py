"""The paper's claims as commands; docs/results/README.md has what came out."""
