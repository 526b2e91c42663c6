"""Replaces a model's weights by this rank's part of them, as transformers' plan says.

Layers stay plain layers, only smaller, so that all later passes go on working; where ranks have to
exchange something, a layer of `layers.py` is put around them.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .cut import Cut
from .group import Group
from .layers import DividedEmbedding, GatheredLinear, SummedLinear
from .tp_plan import Style, styles_of

_REPEATED = ("k_proj", "v_proj")  # of which ranks may have the same heads


@torch.no_grad()
def divide(model: PreTrainedModel, group: Group) -> dict[str, Cut]:
    """Leaves of a model what this rank computes.

    Returns:
        Which part of each linear layer that is, by the layer's name; others are whole.

    Raises:
        ValueError: the model cannot be divided among so many ranks.
    """
    styles = styles_of(model)
    division = _Division(model, group)
    for name, style in styles.items():
        division.apply(name, style)
    return division.cuts


class _Division:
    """One model while it is divided. Weights that layers share are shared by their parts too.

    Attributes:
        cuts: this rank's parts of linear layers, by their names.
    """

    def __init__(self, model: PreTrainedModel, group: Group) -> None:
        self.cuts: dict[str, Cut] = {}
        self._model = model
        self._group = group
        parameters = model.named_parameters(remove_duplicate=False)
        uses = Counter(id(parameter) for _, parameter in parameters)
        self._shared = {key for key, count in uses.items() if count > 1}
        # By the weight and where it was cut; the weight is kept, since its id is the key.
        self._parts: dict[tuple[int, int, int, int], tuple[Tensor, nn.Parameter]] = {}

    def apply(self, name: str, style: Style) -> None:
        """Divides one layer or parameter.

        Raises:
            ValueError: it cannot be divided.
        """
        parent_name, _, attribute = name.rpartition(".")
        parent = self._model.get_submodule(parent_name)
        layer = getattr(parent, attribute)
        if isinstance(layer, nn.Parameter):
            setattr(parent, attribute, self._parameter(name, layer, style))
        elif style is Style.SUMMED:
            layer.register_forward_hook(lambda _, __, output: self._group.sum(output))
        elif style is Style.ROWS:
            setattr(parent, attribute, self._embedding(name, layer))
        elif style is not Style.WHOLE:
            setattr(parent, attribute, self._linear(name, parent, layer, style))

    def _linear(self, name: str, parent: nn.Module, layer: nn.Module, style: Style) -> nn.Module:
        if type(layer) is not nn.Linear:
            raise ValueError(f"{name} is of the kind {type(layer).__name__}, which is not divided")
        if style in (Style.INPUTS, Style.SPLIT_INPUTS):
            return self._by_inputs(name, layer, splits_input=style is Style.SPLIT_INPUTS)
        if style is Style.PAIRED_OUTPUTS:
            raise ValueError(f"{name} stacks two matrices in a linear layer, which is not divided")
        if style is Style.GATHERED_OUTPUTS:
            if layer.out_features % self._group.size:
                return layer  # every rank computes it whole
            first, count = self._share(name, layer.out_features)
            return GatheredLinear(self._by_outputs(name, layer, first, count), self._group)
        first, count = self._outputs(name, parent, layer)
        return self._by_outputs(name, layer, first, count)

    def _by_inputs(self, name: str, layer: nn.Linear, *, splits_input: bool) -> SummedLinear:
        first, count = self._share(name, layer.in_features)
        bias: nn.Parameter | None = layer.bias
        self.cuts[name] = Cut(1, first, count, layer.in_features)
        layer.weight = self._part(layer.weight, 1, first, count)
        layer.register_parameter("bias", None)
        layer.in_features = count
        return SummedLinear(layer, bias, self._group, splits_input=splits_input)

    def _by_outputs(self, name: str, layer: nn.Linear, first: int, count: int) -> nn.Linear:
        self.cuts[name] = Cut(0, first, count, layer.out_features)
        layer.weight = self._part(layer.weight, 0, first, count)
        if layer.bias is not None:
            layer.bias = self._part(layer.bias, 0, first, count)
        layer.out_features = count
        return layer

    def _embedding(self, name: str, layer: nn.Module) -> nn.Module:
        if not isinstance(layer, nn.Embedding):
            raise ValueError(f"{name} is of the kind {type(layer).__name__}, which is not divided")
        if layer.num_embeddings % self._group.size:
            return layer
        first, count = self._share(name, layer.num_embeddings)
        layer.weight = self._part(layer.weight, 0, first, count)
        layer.num_embeddings = count
        layer.padding_idx = None  # it is no row of this rank's, and of use in training alone
        return DividedEmbedding(layer, self._group)

    def _parameter(self, name: str, weight: nn.Parameter, style: Style) -> nn.Parameter:
        """A part of a parameter that belongs to no layer, such as those of all experts at once."""
        if style is Style.WHOLE:
            return weight
        if style is Style.INPUTS:
            first, count = self._share(name, weight.shape[-1])
            return self._part(weight, weight.dim() - 1, first, count)
        dim = max(0, weight.dim() - 2)
        if style is Style.OUTPUTS:
            first, count = self._share(name, weight.shape[dim])
            return self._part(weight, dim, first, count)
        if style is Style.PAIRED_OUTPUTS:
            halves = torch.unflatten(weight, dim, (2, -1))
            first, count = self._share(name, halves.shape[dim + 1])
            part = halves.narrow(dim + 1, first, count).flatten(dim, dim + 1)
            return nn.Parameter(part.clone(), requires_grad=False)
        raise ValueError(f"{name} would be divided {style.value}")

    def _outputs(self, name: str, parent: nn.Module, layer: nn.Linear) -> tuple[int, int]:
        """Which outputs are this rank's: whole heads, where the layer gives heads of attention.

        Where there are fewer heads of keys than ranks, several ranks have the same.
        """
        head_dim = getattr(parent, "head_dim", None)
        if not hasattr(parent, "layer_idx") or not isinstance(head_dim, int):
            return self._share(name, layer.out_features)
        heads, rest = divmod(layer.out_features, head_dim)
        rank, size = self._group.rank, self._group.size
        if rest or heads % size == 0:
            return self._share(name, layer.out_features)
        if name.rpartition(".")[2] in _REPEATED and size % heads == 0:
            groups = getattr(parent, "num_key_value_groups", None)
            if name.endswith(_REPEATED[0]) and isinstance(groups, int):
                # How many query heads share a key head: fewer than before, on each rank.
                setattr(parent, "num_key_value_groups", groups * heads // size)  # noqa: B010 - typed as a tensor
            return rank * heads // size * head_dim, head_dim
        raise ValueError(
            f"its {heads} heads of {name} cannot be divided among {size} ranks: `num_shard` has to "
            "divide the number of query heads, and to divide or be a multiple of that of key heads"
        )

    def _share(self, name: str, total: int) -> tuple[int, int]:
        """The first and the number of this rank's share."""
        count, rest = divmod(total, self._group.size)
        if rest:
            raise ValueError(f"{total} of {name} cannot be divided among {self._group.size} ranks")
        return self._group.rank * count, count

    def _part(self, weight: Tensor, dim: int, first: int, count: int) -> nn.Parameter:
        key = (id(weight), dim, first, count)
        if key in self._parts:
            return self._parts[key][1]
        part = weight.detach().narrow(dim, first, count).clone()  # frees the rest
        parameter = nn.Parameter(part, requires_grad=False)
        if id(weight) in self._shared:
            self._parts[key] = weight, parameter
        return parameter
