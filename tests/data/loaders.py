"""Loaders of classified images, with the source's statistics unless told otherwise."""

from anyres.data import EvalLoader, ImageTest, ImageViews, TrainLoader


def train_loader(source, schedule, augmentation, batch_size, **options):
    return TrainLoader(source, schedule, ImageViews(augmentation, source.mean, source.std), batch_size, **options)


def eval_loader(source, size, batch_size, workers=0, *, rank=0, world=1, **settings):
    own = {"mean": source.mean, "std": source.std, "crop_pct": source.crop_pct}
    return EvalLoader(source, ImageTest(size, **{**own, **settings}), batch_size, workers, rank=rank, world=world)
