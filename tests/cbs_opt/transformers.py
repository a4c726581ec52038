"""Small imitations of networks as users bring them: GPT-2, T5, ViT, and torch's own encoder and LSTM."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Conv1D(nn.Module):
    """As in the transformers package: a linear layer whose weight is (inputs, outputs)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.3)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Gpt2Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.c_attn, self.c_proj = Conv1D(3 * d, d), Conv1D(d, d)
        self.c_fc, self.c_out = Conv1D(4 * d, d), Conv1D(d, 4 * d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unsqueeze(1) for t in self.c_attn(self.ln_1(x)).chunk(3, dim=-1))
        x = x + self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x))))


class Gpt2(nn.Module):
    """Token classes from a decoder with a tied head."""

    def __init__(self, d: int = 8, vocabulary: int = 11, tied: bool = True) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, d), nn.Embedding(6, d)
        self.h = nn.ModuleList(Gpt2Block(d) for _ in range(2))
        self.ln_f = nn.LayerNorm(d)
        self.lm_head = nn.Linear(d, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[-1], device=tokens.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))[..., -1, :]


class T5Attention(nn.Module):
    def __init__(self, d: int, biased: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        if biased:
            self.relative_attention_bias = nn.Embedding(8, 1)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        bias = None
        if hasattr(self, "relative_attention_bias"):
            places = torch.arange(x.shape[-2])[:, None] - torch.arange(source.shape[-2])
            bias = self.relative_attention_bias(places.abs().clamp(max=7)).movedim(-1, 0)
        shares = (self.q(x) @ self.k(source).mT).unsqueeze(-3)
        shares = shares if bias is None else shares + bias
        return self.o(shares.squeeze(-3).softmax(-1) @ self.v(source))


class T5(nn.Module):
    """An encoder and a decoder that embed with one table."""

    def __init__(self, d: int = 6, vocabulary: int = 9) -> None:
        super().__init__()
        self.shared = nn.Embedding(vocabulary, d)
        self.encoder_tokens, self.decoder_tokens = nn.Embedding(vocabulary, d), nn.Embedding(vocabulary, d)
        self.encoder_tokens.weight = self.decoder_tokens.weight = self.shared.weight
        self.encoder, self.decoder, self.cross = T5Attention(d, True), T5Attention(d, True), T5Attention(d, False)
        self.wi, self.wo = nn.Linear(d, 2 * d, bias=False), nn.Linear(2 * d, d, bias=False)
        self.lm_head = nn.Linear(d, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x, y = self.encoder_tokens(tokens), self.decoder_tokens(tokens)
        x = x + self.encoder(x, x)
        x = x + self.wo(F.relu(self.wi(x)))
        y = y + self.decoder(y, y)
        return self.lm_head((y + self.cross(y, x))[..., -1, :])


class ViT(nn.Module):
    """A convolution over patches, a class token, places, and attention as one module."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, d, 4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, d))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, d))
        self.attention = nn.MultiheadAttention(d, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(d, 16), nn.GELU(), nn.Linear(16, d))
        self.head = nn.Linear(d, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head((x + self.mlp(x))[:, 0])


class Recurrent(nn.Module):
    """An LSTM in two layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Encoder(nn.Module):
    """torch's own transformer encoder."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Upsampling(nn.Module):
    """Grouped, depthwise, and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 6, 3, groups=2, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.line = nn.ConvTranspose1d(4, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.up(torch.tanh(self.depthwise(torch.tanh(self.grouped(x))))))
        return self.line(x.flatten(2)).mean(-1)
