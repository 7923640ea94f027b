"""Compiled programs kept on disk, so that a second start does not compile again."""

import os
import pathlib

import jax


def keep_compilations() -> None:
    """Lets JAX keep what it compiles in `s2jax/xla` of the user's cache directory, and take it from there.

    Nothing changes where `JAX_COMPILATION_CACHE_DIR` names another directory, where `JAX_ENABLE_COMPILATION_CACHE=0`
    turns the cache off, or where the directory cannot be made.
    """
    if jax.config.jax_compilation_cache_dir is not None or not jax.config.jax_enable_compilation_cache:
        return
    directory = user_cache() / "xla"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_compilation_cache_max_size", 1 << 30)  # the least recently used go first


def user_cache() -> pathlib.Path:
    """The directory `s2jax` in the user's cache directory."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "s2jax"
