"""The paper's claims as commands; README.md in this folder says which."""
