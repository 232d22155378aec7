"""Mobile-Former laid out as the authors' code is: its module names, tokens in front, one tuple in and out.

Written from the formulas, for tests: of load_weights, whose checkpoints have these names, and of swap, which
recognises the bridges by what they hold. Sums are einsums; nothing here is fast.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvmodels.mobile_former import SIZES


class HardSigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x + 3).clamp(0, 6) / 6


class DropPath(nn.Module):
    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_prob:
            return x
        mask = torch.rand(x.shape[0], *[1] * (x.dim() - 1)) >= self.drop_prob
        return x * mask / (1 - self.drop_prob)


class Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return x[:, torch.arange(x.shape[1]).view(self.groups, -1).t().flatten()]


class Local2Global(nn.Module):
    def __init__(
        self, inp, token_dim, token_num, heads=2, dynamic=True, drop_path=0.0, block="attn", remove_proj_local=True
    ):
        super().__init__()
        self.num_heads, self.token_num, self.block, self.norm_pos = heads, token_num, block, "post"
        self.use_dynamic, self.remove_proj_local = dynamic, remove_proj_local
        if dynamic:
            self.alpha_scale = 2.0
            self.alpha = nn.Sequential(nn.Linear(token_dim, inp), HardSigmoid())
        self.scale = (inp // heads) ** -0.5
        self.q = nn.Linear(token_dim, inp)
        self.proj = nn.Linear(inp, token_dim)
        self.layer_norm = nn.LayerNorm(token_dim)
        self.drop_path = DropPath(drop_path)
        if not remove_proj_local:
            self.k, self.v = (nn.Conv2d(inp, inp, 1, bias=False) for _ in range(2))

    def forward(self, x):
        features, tokens = x
        key, value = (features, features) if self.remove_proj_local else (self.k(features), self.v(features))
        key, value = (m.unflatten(1, (self.num_heads, -1)).flatten(3) for m in (key, value))
        query = self.q(tokens).unflatten(-1, (self.num_heads, -1))
        scores = self.scale * torch.einsum("tbhd,bhdp->bhtp", query, key)
        seen = torch.einsum("bhtp,bhdp->tbhd", scores.softmax(-1), value).flatten(2)
        if self.use_dynamic:
            seen = seen * (self.alpha_scale * self.alpha(tokens))
        tokens = self.layer_norm(tokens + self.drop_path(self.proj(seen)))
        return tokens, scores.unflatten(-1, features.shape[-2:])


class GlobalBlock(nn.Module):
    def __init__(self, token_dim, token_num, heads=4, drop_path=0.0):
        super().__init__()
        self.heads = heads
        self.q, self.channel_mlp = (nn.Linear(token_dim, token_dim) for _ in range(2))
        self.layer_norm, self.ffn_norm = (nn.LayerNorm(token_dim) for _ in range(2))
        self.ffn = nn.Sequential(nn.Linear(token_dim, 2 * token_dim), nn.GELU(), nn.Linear(2 * token_dim, token_dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens):
        query, memory = (z.unflatten(-1, (self.heads, -1)) for z in (self.q(tokens), tokens))
        scores = torch.einsum("tbhd,sbhd->bhts", query, memory) * memory.shape[-1] ** -0.5
        seen = torch.einsum("bhts,sbhd->tbhd", scores.softmax(-1), memory).flatten(2)
        tokens = self.layer_norm(tokens + self.drop_path(self.channel_mlp(seen)))
        return self.ffn_norm(tokens + self.ffn(tokens))


class Global2Local(nn.Module):
    def __init__(
        self, inp, token_dim, token_num, heads=2, dynamic=False, drop_path=0.0, block="attn", remove_proj_local=True
    ):
        super().__init__()
        self.num_heads, self.token_num, self.block = heads, token_num, block
        self.use_dynamic, self.remove_proj_local = dynamic, remove_proj_local
        if dynamic:
            self.alpha_scale = 2.0
            self.alpha = nn.Sequential(nn.Linear(token_dim, inp), HardSigmoid())
        self.scale = (inp // heads) ** -0.5
        self.k, self.proj = (nn.Linear(token_dim, inp) for _ in range(2))
        self.drop_path = DropPath(drop_path)
        if not remove_proj_local:
            self.q, self.fuse = (nn.Conv2d(inp, inp, 1, bias=False) for _ in range(2))

    def forward(self, x):
        out, tokens = x
        value = self.proj(tokens)
        if self.use_dynamic:
            value = value * (self.alpha_scale * self.alpha(tokens))
        key, value = (z.unflatten(-1, (self.num_heads, -1)) for z in (self.k(tokens), value))
        query = (out if self.remove_proj_local else self.q(out)).unflatten(1, (self.num_heads, -1)).flatten(3)
        scores = self.scale * torch.einsum("bhdp,tbhd->bhpt", query, key)
        seen = torch.einsum("bhpt,tbhd->bhdp", scores.softmax(-1), value).reshape(out.shape)
        return out + self.drop_path(seen if self.remove_proj_local else self.fuse(seen))


class HyperFunc(nn.Module):
    def __init__(self, token_dim, channels, sel_token_id):
        super().__init__()
        self.sel_token_id = sel_token_id
        self.hyper = nn.Sequential(
            nn.Linear(token_dim, token_dim // 4), nn.ReLU(), nn.Linear(token_dim // 4, 2 * channels), HardSigmoid()
        )

    def forward(self, x):
        tokens, scores = x
        if self.sel_token_id == -1:  # every pixel its own mixture of the tokens
            return torch.einsum("tbc,bthw->bchw", self.hyper(tokens), scores)
        return self.hyper(tokens[self.sel_token_id])[..., None, None]


class DyReLU(nn.Module):
    def forward(self, x):
        x, theta = x
        first, second = ((theta - 0.5) * 2).chunk(2, 1)
        return torch.max((first + 1) * x, second * x)


def conv(inp, oup, kernel, stride=1, groups=1, shuffle=0):
    layer = nn.Conv2d(inp, oup, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(oup), Shuffle(shuffle) if shuffle else nn.Sequential())


class ConvBlock(nn.Module):
    def __init__(self, inp, oup, expansion, stride, group_num):
        super().__init__()
        wide, narrow = conv(inp, inp * expansion, 3, stride, inp), conv(inp * expansion, oup, 1, groups=group_num)
        shuffle = Shuffle(inp) if group_num > 1 else nn.Sequential()
        self.conv = nn.Sequential(*wide[:2], nn.ReLU6(), shuffle, *narrow[:2])
        self.identity = stride == 1 and inp == oup

    def forward(self, x):
        features, tokens = x
        return self.conv(features) + (features if self.identity else 0), tokens


class DnaBlock(nn.Module):
    def __init__(self, inp, oup, expansion, token_dim, token_num, group_num=1, hyper_token_id=0, **bridge):
        super().__init__()
        hidden, shuffle = inp * expansion, group_num if group_num > 1 else 0
        self.hyper_token_id, self.identity = hyper_token_id, inp == oup
        self.conv1 = conv(inp, hidden, 1, groups=group_num, shuffle=shuffle)
        self.conv2 = conv(hidden, hidden, 3, groups=hidden)
        self.conv3 = conv(hidden, oup, 1, groups=group_num, shuffle=shuffle)
        self.hyper1, self.hyper2 = (HyperFunc(token_dim, hidden, hyper_token_id) for _ in range(2))
        self.act = DyReLU()
        self.add_bridge(inp, oup, token_dim, token_num, **bridge)

    def add_bridge(self, inp, oup, token_dim, token_num, drop_path=0.0, **changes):
        common = {"token_dim": token_dim, "token_num": token_num, "drop_path": drop_path}
        self.drop_path = DropPath(drop_path)
        self.local_global = Local2Global(inp, **common, **changes)
        self.global_block = GlobalBlock(**common)
        self.global_local = Global2Local(oup, **common, **{**changes, "dynamic": False})

    def talk(self, x, size):
        tokens, scores = self.local_global(x)
        if self.hyper_token_id == -1:
            scores = F.adaptive_avg_pool2d(scores.mean(1), size).softmax(1)
        return self.global_block(tokens), scores

    def forward(self, x):
        features = x[0]
        tokens, scores = self.talk(x, features.shape[-2:])
        out = self.act((self.conv1(features), self.hyper1((tokens, scores))))
        out = self.act((self.conv2(out), self.hyper2((tokens, scores))))
        out = self.conv3(out)
        if self.identity:
            out = self.drop_path(out) + features
        return self.global_local((out, tokens)), tokens


class DnaBlock3(DnaBlock):
    def __init__(self, inp, oup, token_dim, token_num, group_num=1, hyper_token_id=0, **bridge):
        nn.Module.__init__(self)
        self.hyper_token_id = hyper_token_id
        grouped = group_num > 1
        self.conv1 = conv(inp, 6 * inp, 3, 2, inp, shuffle=inp if grouped else 0)
        self.conv2 = conv(6 * inp, oup, 1, groups=group_num)
        self.conv3 = conv(oup, 4 * oup, 3, groups=oup, shuffle=oup if grouped else 0)
        self.conv4 = conv(4 * oup, oup, 1, groups=group_num)
        self.hyper1 = HyperFunc(token_dim, 6 * inp, hyper_token_id)
        self.hyper3 = HyperFunc(token_dim, 4 * oup, hyper_token_id)
        self.act = DyReLU()
        self.add_bridge(inp, oup, token_dim, token_num, **bridge)

    def forward(self, x):
        out = self.conv1(x[0])
        tokens, scores = self.talk(x, out.shape[-2:])
        short = self.conv2(self.act((out, self.hyper1((tokens, scores)))))
        out = self.conv4(self.act((self.conv3(short), self.hyper3((tokens, scores)))))
        return self.global_local((self.drop_path(out) + short, tokens)), tokens


class MergeClassifier(nn.Module):
    def __init__(self, inp, oup, num_classes, group_num, token_dim):
        super().__init__()
        layer = conv(inp, 6 * inp, 1, groups=group_num)
        self.conv = nn.Sequential(Shuffle(group_num) if group_num > 1 else nn.Sequential(), *layer[:2])
        self.fc = nn.Sequential(nn.Linear(6 * inp + token_dim, oup), nn.BatchNorm1d(oup), nn.Hardswish())
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(oup, num_classes))

    def forward(self, x):
        features, tokens = x
        pooled = F.hardswish(F.relu6(self.conv(features)).flatten(2).mean(-1))
        return self.classifier(self.fc(torch.cat([pooled, tokens[0]], 1)))


class MobileFormer(nn.Module):
    """``MobileFormer("26m")``: one of the seven; ``bridge`` are settings of the blocks' bridges."""

    def __init__(self, name="26m", num_classes=1000, hyper_token_id=0, **bridge):
        super().__init__()
        size = SIZES[name]
        token_num, token_dim = size.tokens
        common = {"token_dim": token_dim, "token_num": token_num, "group_num": size.groups}
        common |= {"hyper_token_id": hyper_token_id, **bridge}
        self.tokens = nn.Embedding(token_num, token_dim)
        self.stem = nn.Sequential(*conv(3, size.stem, 3, 2)[:2], nn.ReLU6())
        width, expansion, stride = size.first
        blocks = [ConvBlock(size.stem, width, expansion, stride, size.groups)]
        for block in size.blocks.split():
            if "/" in block:
                oup = int(block.removesuffix("/2"))
                blocks.append(DnaBlock3(width, oup, **common))
            else:
                oup, expansion = map(int, block.removesuffix(")").split("("))
                blocks.append(DnaBlock(width, oup, expansion, **common))
            width = oup
        self.features = nn.Sequential(*blocks)
        self.local_global = Local2Global(width, token_dim, token_num)
        self.classifier = MergeClassifier(width, size.features, num_classes, size.groups, token_dim)

    def forward(self, x):
        tokens = self.tokens.weight[:, None].expand(-1, x.shape[0], -1)
        features, tokens = self.features((self.stem(x), tokens))
        tokens, _ = self.local_global((features, tokens))
        return self.classifier((features, tokens))
