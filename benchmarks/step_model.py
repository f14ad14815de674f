"""The model of the step benchmarks."""

from __future__ import annotations

from torch import Tensor, nn

VOCABULARY, WIDTH, HEADS = 4096, 384, 6


class CausalLM(nn.Module):
    """A pre-norm transformer with a tied head and as many layers as the parameters ask for.

    It computes in float32, whatever the dtype of its parameters and so of their gradients: a CPU without bf16
    instructions takes 15 times as long for a bf16 product, and would hide what this benchmark is for.
    """

    def __init__(self, parameters: int, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(length, WIDTH)
        one = sum(p.numel() for p in Layer().parameters())
        rest = (VOCABULARY + length) * WIDTH
        self.layers = nn.ModuleList(Layer() for _ in range(max(1, round((parameters - rest) / one))))
        self.norm = LayerNorm(WIDTH)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean loss per target token."""
        hidden = self.embed(input_ids).float() + self.position.weight[: input_ids.shape[1]].float()
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.norm(hidden) @ self.embed.weight.float().T
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Layer(nn.Module):
    """Causal attention, then an MLP of four times the width."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = LayerNorm(WIDTH), LayerNorm(WIDTH)
        self.qkv, self.out = Linear(WIDTH, 3 * WIDTH), Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(Linear(WIDTH, 4 * WIDTH), nn.GELU(), Linear(4 * WIDTH, WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        """`[N, T, WIDTH]` to the same."""
        shape = (*hidden.shape[:2], 3, HEADS, WIDTH // HEADS)
        query, key, value = self.qkv(self.attention_norm(hidden)).view(shape).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.mlp_norm(hidden))


class Linear(nn.Linear):
    """`nn.Linear` in float32."""

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.weight.float(), self.bias.float())


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` in float32."""

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.layer_norm(hidden, self.normalized_shape, self.weight.float(), self.bias.float())
