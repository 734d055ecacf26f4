"""What a family of vision towers is: the models of one architecture, their names and their Hugging Face config.

A family is a :class:`TowerFamily` in a file of this folder, or in your own. A config names one of its shapes:
``model.vision=clip-l-14-336``, or ``model.vision=mylab.dino:SMALL`` for a :class:`VisionConfig` of your own, whose
``family`` is ``mylab.dino:DINO``.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stf_jax.models.tensor_names import TensorNames
from stf_jax.registry import Registry, load_object

if TYPE_CHECKING:  # importing it takes a second, and the families' files are read by programs that build no model
    from stf_jax.models.towers.vit import VisionTower

# Activations here and in transformers' configs.
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}

Channels = tuple[float, float, float]  # of red, green and blue


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Shape of a vision tower. ``mean`` and ``std`` are of RGB values in 0..1."""

    image_size: int  # pixels per side
    patch_size: int  # pixels per side
    width: int
    layers: int
    heads: int
    mlp: int
    activation: str  # quick_gelu | gelu | gelu_tanh
    class_token: bool
    pre_norm: bool
    patch_bias: bool
    norm_eps: float
    mean: Channels
    std: Channels
    family: str  # a name in TOWERS, or package.module:FAMILY

    @property
    def crops(self) -> bool:
        """Whether the tower's processor center-crops images, as CLIP's does; SigLIP's stretches them to a square."""
        return self.class_token

    @property
    def grid(self) -> int:
        """Patches per side. Remaining pixels at the right and bottom are not read, as in transformers."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class TowerFamily:
    """All that is particular to one family of vision towers.

    Attributes:
      module: ``package.module:Class`` of the tower, called as :class:`stf_jax.models.towers.vit.VisionTower` is.
      presets: published shapes by name.
      model_type: transformers' name of the architecture.
      fields: attribute of :class:`VisionConfig` → key of transformers' ``vision_config``.
      traits: attributes that are the same in the whole family.
      mean, std: of the family's image processor, where a checkpoint gives none.
      tensor_names: transformers' name and layout of each parameter, without a prefix.
      anchor: a parameter that every checkpoint has, by whose name the tower is found.
      extra: further keys of transformers' config, for exports.
      wrapper: attribute of transformers' model that holds the tower, with a dot; empty if the model is the tower.
      unused: norms in transformers' class above all blocks, which taps never reach.
      pretraining: tensors that only the tower's pretraining uses.
      config: the class of the shapes, if they have more attributes than :class:`VisionConfig`.
    """

    module: str
    presets: Mapping[str, VisionConfig]
    model_type: str
    fields: Mapping[str, str]
    traits: Mapping[str, Any]
    mean: Channels
    std: Channels
    tensor_names: TensorNames
    anchor: str = "patch_embed/kernel"
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    wrapper: str = ""
    unused: tuple[str, ...] = ()
    pretraining: tuple[str, ...] = ()
    config: type[VisionConfig] = VisionConfig


TOWERS: Registry[TowerFamily] = Registry("family of vision towers", "stf_jax.models.towers")


def find_tower_class(config: VisionConfig) -> "type[VisionTower]":
    """The class that computes a tower. Raises UserError for an unknown family."""
    return load_object(TOWERS.find(config.family).module, "vision tower")
