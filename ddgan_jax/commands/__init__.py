"""The commands: train, evaluate, and what a trained model makes."""
