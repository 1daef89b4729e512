"""Teaches a small convolutional network to read handwritten digits, with warpstep.AdamW."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import warpstep


class CNN(nn.Module):
    """Two convolutions, each halving the picture, then two linear layers that name one of ten."""

    def __init__(self, channels: int = 1, pixels: int = 8, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(2 * width * (pixels // 4) ** 2, 4 * width), nn.ReLU()),
            nn.Linear(4 * width, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """A batch of images to ten numbers each; the largest says which digit it is."""
        return self.layers(images)


def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 images that scikit-learn brings, of 8 x 8 pixels from 0 to 1, and their labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    return images, torch.tensor(data.target)


def main(epochs: int = 10) -> None:
    """Trains on four fifths of the images and tests on the others after each epoch."""
    torch.manual_seed(0)
    images, labels = digits()
    train, test = torch.randperm(len(images)).split([1437, 360])

    model = CNN()
    optimizer = warpstep.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)

    for epoch in range(1, epochs + 1):
        for batch in train[torch.randperm(len(train))].split(32):
            loss = cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        with torch.no_grad():
            right = model(images[test]).argmax(dim=1) == labels[test]
        print(f"epoch {epoch:2}: {right.float().mean():.1%} of the test images are read rightly")


if __name__ == "__main__":
    main()
