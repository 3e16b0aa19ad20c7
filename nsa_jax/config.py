"""The sizes of Native Sparse Attention: block sizes, the number of selected blocks, and the window."""

import dataclasses

from nsa_jax import arguments


@dataclasses.dataclass(frozen=True)
class NSAConfig:
    """Sizes of the three branches of Native Sparse Attention (arXiv 2502.11089, section 3.3).

    It is frozen and hashable, so it can be a static argument of `jax.jit`. The defaults are the paper's. With
    `num_selected` or `window` 0 there is no such branch, and nothing of it is computed or cached.

    Example:
      >>> NSAConfig(window=256).num_selected
      16
      >>> NSAConfig(compress_block=40)
      Traceback (most recent call last):
      ValueError: NSAConfig.compress_block = 40: expected a multiple of compress_stride = 16

    Raises:
      ValueError: a size is no integer or too small, or `select_in_window` no bool; `compress_stride` does not divide
        `compress_block` or `select_block`; `compress_block` exceeds `select_block`, or the forced blocks do not fit in
        `num_selected`.
    """

    compress_block: int = 32  # l: tokens that one compressed token stands for
    compress_stride: int = 16  # d: tokens between the starts of neighbouring compressed tokens
    select_block: int = 64  # s: tokens in a selection block
    num_selected: int = 16  # n: blocks that a query reads, the forced ones included; 0: no selected branch
    num_init: int = 1  # blocks at the start of the sequence that are always read
    num_local: int = 2  # blocks up to and including the query's own that are always read
    window: int = 512  # w: tokens of the sliding window, the query's own included; 0: no window
    select_in_window: bool = True  # whether a block that the window holds whole is chosen without being forced

    def __post_init__(self) -> None:
        if not isinstance(self.select_in_window, bool):
            raise ValueError(f"NSAConfig.select_in_window = {self.select_in_window!r}: expected True or False")
        for name in (field.name for field in dataclasses.fields(self) if field.name != "select_in_window"):
            least = 0 if name in ("num_selected", "num_init", "num_local", "window") else 1
            value = arguments.size(f"NSAConfig.{name}", getattr(self, name), least=least)
            object.__setattr__(self, name, value)  # a Python int, so that equal configs have equal hashes
        for name in ("compress_block", "select_block"):
            if getattr(self, name) % self.compress_stride:
                raise ValueError(
                    f"NSAConfig.{name} = {getattr(self, name)}: expected a multiple of "
                    f"compress_stride = {self.compress_stride}"
                )
        if self.compress_block > self.select_block:
            raise ValueError(
                f"NSAConfig.compress_block = {self.compress_block}: expected at most select_block = {self.select_block}"
            )
        if self.num_selected and self.num_init + self.num_local > self.num_selected:
            raise ValueError(
                f"NSAConfig.num_selected = {self.num_selected}: expected 0, for no such branch, or at least "
                f"num_init + num_local = {self.num_init + self.num_local}"
            )


def check_config(config: object, *needed: str) -> None:
    """Raises ValueError for anything that is not an `NSAConfig`, and where a size that is needed is 0."""
    if not isinstance(config, NSAConfig):
        raise ValueError(f"config = {config!r}: expected an nsa_jax.NSAConfig")
    for name in needed:
        if getattr(config, name) == 0:
            raise ValueError(f"config.{name} = 0: expected at least 1; with 0 there is no such branch")


def num_compressed(T: int, config: NSAConfig) -> int:
    """Number of compressed tokens of a sequence of `T` tokens: max(0, (T - l) // d + 1).

    Example:
      >>> num_compressed(100, NSAConfig()), num_compressed(31, NSAConfig())
      (5, 0)
    """
    check_config(config)
    T = arguments.size("T", T, least=0)
    return max(0, (T - config.compress_block) // config.compress_stride + 1)


def num_blocks(T: int, config: NSAConfig) -> int:
    """Number of selection blocks of a sequence of `T` tokens: ceil(T / s).

    Example:
      >>> num_blocks(100, NSAConfig())
      2
    """
    check_config(config)
    T = arguments.size("T", T, least=0)
    return -(-T // config.select_block)
