"""An adapter of one's own: each kernel changes by one outer product, of U [inputs] and V [outputs]."""

import jax.numpy as jnp
from flax import nnx

from stf_jax.models.layers import normal, parameter, zeros


class OuterProduct(nnx.Module):
    def __init__(self, rngs, layer):
        shape, names = layer.kernel.get_value().shape, layer.kernel.get_metadata()["axes"]
        stack, *axes = zip(shape, names, strict=True)
        count = len(layer.inputs)
        self.u = parameter(rngs, [stack, *axes[:count]], normal(0.1))
        self.v = parameter(rngs, [stack, *axes[count:]], zeros)

    def __call__(self, x):
        return jnp.tensordot(jnp.tensordot(x, self.u[...], self.u.ndim), self.v[...], 0)


class Outer:
    def build(self, rngs, layer):
        return OuterProduct(rngs, layer)

    def change(self, params):
        return params["u"].reshape(-1, 1) * params["v"].reshape(1, -1)


OUTER = Outer()
