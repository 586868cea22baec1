"""The paper's claims as commands; results/README.md has what came out."""
