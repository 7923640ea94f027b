"""A pattern of one's own, in two ways: as a function, and as a family with a closed form.

    python -m examples.custom_pattern

Every query reads the blocks at distances 0, 1, 2, 4, 8, … As a function this is one line, and the compiler evaluates it
for every pair of tokens. The family says the same in `Band`s, one for each distance, and compiles a long context at
once. The compiler compares the two forms on a sample, and refuses a family that contradicts itself.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp

import s2jax
from s2jax import plotting
from s2jax.patterns import BlockPattern
from s2jax.patterns.bands import Band, all_columns

SIZE = 64


@dataclasses.dataclass(frozen=True, repr=False)
class PowersOfTwo(BlockPattern):
    block_size: int = SIZE
    causal: bool = True

    def mask_fn(self, head, query_position, key_position, heads):
        distance = query_position // self.block_size - key_position // self.block_size
        return (distance & (distance - 1) == 0) & (key_position <= query_position)

    def block_bands(self, heads, head, num_rows, num_columns):
        columns = all_columns(num_columns, self.block_size)
        distances = [0, *(1 << power for power in range(num_rows.bit_length()))]
        return tuple(Band(columns, distance, distance + 1, token_low=0) for distance in distances)


def powers_of_two(head, q, k):
    distance = q // SIZE - k // SIZE
    return distance & (distance - 1) == 0


family, function = PowersOfTwo(), s2jax.MaskMod(powers_of_two, block_size=SIZE)
print(plotting.plot_text(family, 1, 1, 1024))

query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 1024, 2, 32))
same = jnp.allclose(s2jax.attention(query, key, value, family), s2jax.attention(query, key, value, function))
print("the same attention:", bool(same))

start = time.perf_counter()
length = 1 << 20
schedule = s2jax.compile_schedule(family, num_heads=2, num_kv_heads=2, query_length=length, kv_length=length)
print(f"{length} tokens: density {family.density(2, 2, length):.4f}, compiled in {time.perf_counter() - start:.1f} s")
