"""What can be folded into weights, and that it computes the same."""

import pytest
import torch
from _networks import convnet, images, mlp, vectors
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import nlm


def network(layer: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), layer, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))


def fitted(build, data) -> nlm.Tact:
    own, model = build(), build()
    for net in (own, model):
        net.eval()(data)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.mul_(1.5).add_(0.1)
    return nlm.Tact.fit(model, {"a": own}, {"a": [data]})


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.ConvTranspose2d(4, 6, 3),
        lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, bias=False),
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
        lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False),
        lambda: nn.SyncBatchNorm(4),
        lambda: nn.BatchNorm2d(4, affine=False),
    ],
)
def test_every_default_point_can_be_folded(layer):
    tact = fitted(lambda: network(layer()), images(40))
    assert "1" in tact.points
    x = images(8, 3)
    with torch.no_grad():
        torch.testing.assert_close(tact.fold("a")(x), tact(x, task="a"), rtol=1e-4, atol=1e-4)


def test_frozen_weights_stay_frozen():
    tact = fitted(mlp, vectors())
    tact.model[0].requires_grad_(False)
    plain = tact.fold("a")
    assert not plain[0].weight.requires_grad and not plain[0].bias.requires_grad
    assert plain[2].weight.requires_grad
    norm = fitted(lambda: network(nn.BatchNorm2d(4, affine=False)), images(40)).fold("a")[1]
    assert norm.affine and norm.weight is not None


class Gained(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


@pytest.mark.parametrize(
    "special", [lambda: weight_norm(nn.Linear(12, 12)), lambda: Gained(12, 12)]
)
def test_layers_of_another_kind_are_refused(special):
    tact = fitted(lambda: nn.Sequential(special(), nn.ReLU(), nn.Linear(12, 3)), vectors())
    with pytest.raises(
        ValueError, match=r"got points without such: .0. \(\w+ has no weight and bias"
    ):
        tact.fold("a")


def test_a_correction_is_not_corrected_again():
    tact = fitted(convnet, images(40))
    with pytest.raises(ValueError, match=r"nlm.Repair: a model is corrected once .* got a Tact"):
        nlm.Repair.fit(tact, {"a": convnet()}, {"a": [images()]})
    with pytest.raises(ValueError, match=r"a model is corrected once .* got a Tact"):
        nlm.Tact(tact, {}, {}, [])


def test_a_padded_encoder_computes_the_same_when_folded():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.embed, self.encoder = nn.Embedding(20, 16), nn.TransformerEncoder(layer, 2)
            self.head = nn.Linear(16, 4)

        def forward(self, x):
            return self.head(self.encoder(self.embed(x), src_key_padding_mask=x == 0).mean(1))

    torch.manual_seed(0)
    model, expert = Encoder().eval(), Encoder().eval()
    words = torch.randint(1, 20, (40, 6))
    words[::3, 4:] = 0
    tact = nlm.Tact.fit(model, {"a": expert}, {"a": [words]})
    with torch.no_grad():
        assert torch.allclose(tact.fold("a")(words), tact(words, task="a"), atol=1e-5)
