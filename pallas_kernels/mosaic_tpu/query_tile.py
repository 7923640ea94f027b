"""A tile of queries on a TPU, which walks lists of keys: the forward pass, and the gradient of the queries."""

import jax

from pallas_kernels.mosaic_tpu.tile import Tile


class QueryTile(Tile):
    def _source_head(self, batch):
        plan = self.plan
        num_kv_heads = plan.head_tiles * plan.row_heads // plan.group
        return batch * num_kv_heads + jax.lax.div(self.head_tile * plan.row_heads, plan.group)
