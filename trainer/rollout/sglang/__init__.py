"""sglang-jax 0.0.2 in the trainer's process: the only package that imports sgl_jax."""
