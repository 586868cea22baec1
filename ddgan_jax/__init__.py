"""Denoising Diffusion GANs in JAX and Flax (Xiao, Kreis and Vahdat, ICLR 2022, arXiv 2112.07804)."""
