"""Convolutional models of other packages: how to build them with random weights, and their inputs."""

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Case = tuple[Callable[[], nn.Module], list[tuple[int, ...]], Any]
"""Builder of a model, the shapes of its inputs without batch dimension, and the explained output."""


def cases(
    names: str, build: Callable[[str], nn.Module], *shapes: tuple[int, ...], output: Any = None
) -> dict[str, Case]:
    """Returns one case for each name, with the same builder."""
    return {name: (lambda name=name: build(name), list(shapes), output) for name in names.split()}  # type: ignore[misc]


def attributes(
    module: str, names: str, *shapes: tuple[int, ...], output: Any = None, **options: Any
) -> dict[str, Case]:
    """Returns one case for each class or function of a module."""
    return cases(names, lambda name: getattr(importlib.import_module(module), name)(**options), *shapes, output=output)


def timm() -> dict[str, Case]:
    """Every family without attention, including some with gates."""

    def build(name: str) -> nn.Module:
        return importlib.import_module("timm").create_model(name)  # type: ignore[no-any-return]

    small = (
        "gernet_s repvgg_a0 mobileone_s0 gcresnext26ts seresnext26ts eca_resnext26ts regnetz_b16 convnext_atto "
        "convnextv2_atto convnext_femto_ols convnext_atto_rms cspdarknet53 cspresnet50 cs3darknet_focus_s cspnext_tiny "
        "darknetaa53 densenet121 dla34 dla60_res2net dpn48b dpn68 efficientnet_b0_gn efficientnetv2_rw_t "
        "ese_vovnet19b_dw fasternet_t0 fbnetc_100 fbnetv3_b focalnet_tiny_srf ghostnet_100 ghostnetv2_100 "
        "ghostnetv3_100 hardcorenas_a hgnet_tiny hgnetv2_b0 "
        "hrnet_w18_small inception_next_atto lcnet_050 lcnetv2_small legacy_seresnet18 mambaout_femto poolformer_s12 "
        "poolformerv2_s12 convformer_s18 mixnet_s mnasnet_small mobilenetv1_100 mobilenetv2_050 mobilenetv3_small_050 "
        "mobilenetv4_conv_small nf_regnet_b0 nf_resnet26 eca_nfnet_l0 dm_nfnet_f0 regnety_002 regnetv_040 rdnet_tiny "
        "repghostnet_050 repvit_m0_9 res2net50_14w_8s res2next50 resnest14d resnet10t resnetaa50d resnetblur50 "
        "resnetrs50 resnet50_gn resnetv2_50 resnetv2_50d_evos resnetv2_18d ecaresnet26t rexnet_100 semnasnet_075 "
        "skresnet18 spnasnet_100 starnet_s1 tf_efficientnet_b0 tf_mixnet_s tinynet_a vgg11_bn xception41 xception65p "
        "legacy_xception efficientnet_b0_g16_evos test_resnet test_byobnet test_nfnet test_convnext2"
    )
    large = "convmixer_1024_20_ks9_p14 mixer_s32_224 gmlp_s16_224 resmlp_12_224 tresnet_m fastvit_t8 selecsls42b"
    stems = "inception_v3 inception_v4 inception_resnet_v2"
    return {
        **cases(small, build, (3, 96, 96)),
        **cases(large, build, (3, 224, 224)),
        **cases(stems, build, (3, 128, 128)),
    }


def pytorchcv() -> dict[str, Case]:
    """Most families: classification, segmentation, pose estimation, speech."""

    def build(name: str) -> nn.Module:
        return importlib.import_module("pytorchcv.model_provider").get_model(name)  # type: ignore[no-any-return]

    images = (
        "bninception resnet10 preresnet10 resnext14_16x4d sepreresnet10 senet16 resnestabc14 ibn_resnet50 "
        "ibnb_resnet50 ibn_densenet121 airnet50_1x64d_r2 airnext50_32x4d_r2 bam_resnet18 cbam_resnet18 sknet50 scnet50 "
        "diaresnet10 diapreresnet10 diracnet18v2 sharesnet18 densenet121 condensenet74_c4_g4 sparsenet121 peleenet "
        "drnc26 dpn68 darknet_ref darknet_tiny darknet19 channelnet irevnet301 bagnet9 dla34 fishnet99 espnetv2_wd2 "
        "dicenet_wd5 hrnet_w18_small_v1 vovnet27s selecsls42b hardnet39ds xdensenet121_2 squeezenet_v1_1 "
        "squeezeresnet_v1_1 sqnxt23_w1 shufflenet_g1_w1 shufflenetv2_wd2 shufflenetv2b_wd2 menet108_8x1_g3 "
        "mobilenetb_wd2 fdmobilenet_wd2 mobilenetv3_small_wd2 igcv3_wd2 ghostnet darts proxylessnas_cpu fbnet_cb "
        "nasnet_4a1056 spnasnet efficientnet_edge_small_b mixnet_s isqrtcovresnet18 resnetabc14b "
        "resnetd50b octresnet10_ad2 tresnet_m"
    )
    cifar = (
        "nin_cifar10 resnet20_cifar10 wrn20_10_1bit_cifar10 ror3_56_cifar10 rir_cifar10 resdropresnet20_cifar10 "
        "shakeshakeresnet20_2x16d_cifar10 shakedropresnet20_cifar10 densenet40_k12_cifar10 diaresnet20_cifar10 "
        "pyramidnet110_a48_cifar10 fractalnet_cifar10"
    )
    dense = (
        "fcn8sd_resnetd50b_voc pspnet_resnetd50b_voc deeplabv3_resnetd50b_voc fastscnn_cityscapes cgnet_cityscapes "
        "dabnet_cityscapes sinet_cityscapes bisenet_resnet18_celebamaskhq fpenet_cityscapes ctxnet_cityscapes "
        "lednet_cityscapes esnet_cityscapes edanet_cityscapes enet_cityscapes erfnet_cityscapes linknet_cityscapes "
        "segnet_cityscapes unet_cityscapes sqnet_cityscapes"
    )
    return {
        **cases(images, build, (3, 224, 224)),
        **cases("zfnet resattnet56 msdnet22", build, (3, 224, 224)),
        **cases("inceptionresnetv1 inceptionv3", build, (3, 299, 299)),
        **cases("polynet", build, (3, 331, 331)),
        **cases(cifar, build, (3, 32, 32)),
        **cases(
            dense,
            lambda name: importlib.import_module("pytorchcv.model_provider").get_model(name, in_size=(128, 128)),
            (3, 128, 128),
            output=0,
        ),
        **cases(
            "simplepose_mobile_mobilenet_w1_coco",
            lambda name: importlib.import_module("pytorchcv.model_provider").get_model(
                name, in_size=(128, 96), return_heatmap=True
            ),
            (3, 128, 96),
        ),
        **cases(
            "lwopenpose2d_mobilenet_cmupan_coco",
            lambda name: importlib.import_module("pytorchcv.model_provider").get_model(
                name, in_size=(96, 96), return_heatmap=True
            ),
            (3, 96, 96),
        ),
    }


def segmentation_models_pytorch() -> dict[str, Case]:
    """Every decoder without attention, over encoders of several families."""

    def build(name: str) -> nn.Module:
        smp = importlib.import_module("segmentation_models_pytorch")
        decoder, encoder = name.split("/")
        options = {"aux_params": {"classes": 4}} if decoder == "Linknet" else {}
        return getattr(smp, decoder)(encoder, encoder_weights=None, classes=3, **options)  # type: ignore[no-any-return]

    return {
        **cases(
            "Unet/resnet18 Unet/timm-efficientnet-b0 UnetPlusPlus/mobilenet_v2 FPN/se_resnet50 PSPNet/resnet18 "
            "DeepLabV3/resnet18 DeepLabV3Plus/dpn68 UPerNet/resnet18 MAnet/resnet18 Unet/vgg11_bn "
            "FPN/densenet121 Unet/xception DeepLabV3Plus/mobileone_s0 FPN/inceptionv4 Segformer/resnet18",
            build,
            (3, 96, 96),
        ),
        **cases("Linknet/resnet18", build, (3, 96, 96), output=1),
        **cases("PAN/resnet18", build, (3, 256, 256)),
    }


def monai() -> dict[str, Case]:
    """Images and volumes: classification, segmentation, autoencoders, registration."""
    volume, image = {"spatial_dims": 3}, {"spatial_dims": 2}
    nets = "monai.networks.nets"
    levels = {"channels": (8, 16, 32), "strides": (2, 2)}
    dyn = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}
    return {
        **attributes(nets, "DenseNet121", (1, 32, 32, 32), in_channels=1, out_channels=3, **volume),
        **attributes(nets, "UNet", (1, 16, 16, 16), in_channels=1, out_channels=3, num_res_units=2, **levels, **volume),
        **attributes(nets, "AttentionUnet", (1, 32, 32), in_channels=1, out_channels=3, **levels, **image),
        **attributes(
            nets, "BasicUNet", (1, 32, 32, 32), in_channels=1, out_channels=3, features=(4, 4, 8, 8, 16, 4), **volume
        ),
        **attributes(nets, "BasicUNetPlusPlus", (1, 32, 32), output=0, in_channels=1, out_channels=3, **image),
        **attributes(nets, "SegResNet", (1, 16, 16, 16), in_channels=1, out_channels=3, **volume),
        **attributes(nets, "SegResNetDS", (1, 32, 32), in_channels=1, out_channels=3, **image),
        **attributes(nets, "VNet", (1, 32, 32, 32), in_channels=1, out_channels=3, **volume),
        **attributes(nets, "DynUNet", (1, 16, 16, 16), in_channels=1, out_channels=3, **dyn, **volume),
        **attributes(nets, "HighResNet", (1, 16, 16, 16), in_channels=1, out_channels=3, **volume),
        **attributes(nets, "AHNet", (1, 128, 128), in_channels=1, out_channels=3, **image),
        **attributes(
            nets,
            "AutoEncoder",
            (1, 32, 32),
            in_channels=1,
            out_channels=1,
            channels=(8, 16, 32),
            strides=(2, 2, 2),
            **image,
        ),
        **attributes(
            nets,
            "VarAutoEncoder",
            (1, 32, 32),
            output=0,
            in_shape=(1, 32, 32),
            out_channels=1,
            latent_size=8,
            channels=(8, 16, 32),
            strides=(2, 2, 2),
            **image,
        ),
        **attributes(nets, "Regressor", (1, 32, 32), in_shape=(1, 32, 32), out_shape=(3,), **levels),
        **attributes(nets, "Discriminator", (1, 32, 32), in_shape=(1, 32, 32), **levels),
        **attributes(nets, "PatchDiscriminator", (1, 64, 64), output=-1, in_channels=1, channels=8, **image),
        **attributes(
            nets,
            "EfficientNetBN",
            (1, 32, 32, 32),
            model_name="efficientnet-b0",
            in_channels=1,
            num_classes=3,
            pretrained=False,
            **volume,
        ),
        **attributes(nets, "SEResNet50", (1, 32, 32, 32), in_channels=1, num_classes=3, **volume),
        **attributes(nets, "resnet18", (1, 32, 32, 32), n_input_channels=1, num_classes=3, **volume),
        **attributes(
            nets,
            "LocalNet",
            (1, 16, 16, 16),
            in_channels=1,
            out_channels=3,
            num_channel_initial=4,
            extract_levels=(0, 1, 2),
            **volume,
        ),
        **attributes(
            nets, "GlobalNet", (1, 16, 16), image_size=(16, 16), in_channels=1, num_channel_initial=4, depth=2, **image
        ),
        **attributes(
            nets,
            "VoxelMorphUNet",
            (2, 32, 32),
            in_channels=2,
            unet_out_channels=32,
            channels=(16, 32, 32, 32, 32, 32),
            final_conv_channels=(16, 16),
            **image,
        ),
        **attributes(nets, "VoxelMorph", (1, 32, 32), (1, 32, 32), output=0, **image),
        **attributes(nets, "Quicknat", (1, 32, 32), num_classes=3, num_channels=1, num_filters=8),
        **attributes(nets, "MedNeXtS", (1, 32, 32), in_channels=1, out_channels=3, **image),
        **attributes(nets, "HoVerNet", (3, 256, 256), output="horizontal_vertical", mode="fast", out_classes=3),
        **attributes(
            nets,
            "FlexibleUNet",
            (1, 64, 64),
            in_channels=1,
            out_channels=3,
            backbone="efficientnet-b0",
            pretrained=False,
            **image,
        ),
        **attributes(
            nets,
            "VQVAE",
            (1, 16, 16),
            output=0,
            in_channels=1,
            out_channels=1,
            channels=(8, 16),
            num_res_channels=(8, 16),
            num_embeddings=8,
            embedding_dim=8,
            downsample_parameters=((2, 4, 1, 1), (2, 4, 1, 1)),
            upsample_parameters=((2, 4, 1, 1, 0), (2, 4, 1, 1, 0)),
            **image,
        ),
    }


def braindecode() -> dict[str, Case]:
    """EEG: 22 channels, two to thirty seconds."""
    nets, eeg = "braindecode.models", {"n_chans": 22, "n_outputs": 4, "n_times": 1000, "sfreq": 250.0}
    sleep = {"n_chans": 2, "n_outputs": 5, "n_times": 3000, "sfreq": 100.0}
    return {
        **attributes(
            nets,
            "EEGNet ShallowFBCSPNet Deep4Net EEGInceptionERP EEGInceptionMI EEGITNet EEGNeX EEGTCNet EEGSimpleConv "
            "SCCNet SincShallowNet TIDNet TSception FBCNet FBLightConvNet FBMSNet IFNet SPARCNet ContraWR SSTDPN",
            (22, 1000),
            **eeg,
        ),
        **attributes(nets, "BDTCN", (22, 1000), n_filters=8, n_blocks=3, kernel_size=4, **eeg),
        **attributes(nets, "SleepStagerChambon2018 SleepStagerBlanco2020 USleep", (2, 3000), **sleep),
        **attributes(nets, "SyncNet", (22, 1000), **eeg),
    }


def tsai() -> dict[str, Case]:
    """Time series."""

    def build(name: str) -> nn.Module:
        return getattr(importlib.import_module(f"tsai.models.{name}"), name)(3, 4)  # type: ignore[no-any-return]

    def sized(name: str) -> nn.Module:
        kind = getattr(importlib.import_module(f"tsai.models.{name}"), name)
        return kind(3, 4, seq_len=96)  # type: ignore[no-any-return]

    return {
        **cases(
            "InceptionTime InceptionTimePlus ResNet ResNetPlus FCN FCNPlus ResCNN XceptionTime XceptionTimePlus TCN",
            build,
            (3, 96),
        ),
        **cases("OmniScaleCNN XCM XCMPlus mWDN MLP gMLP", sized, (3, 96)),
        **attributes("tsai.models.XResNet1d", "xresnet1d18", (3, 96), c_in=3, c_out=4),
    }


def torchaudio() -> dict[str, Case]:
    """Speech."""
    return {
        **attributes("torchaudio.models", "Wav2Letter", (1, 2000), num_classes=10),
        **attributes(
            "torchaudio.models",
            "ConvTasNet",
            (1, 800),
            num_sources=2,
            enc_num_feats=32,
            msk_num_feats=16,
            msk_num_hidden_feats=32,
            msk_num_layers=3,
            msk_num_stacks=2,
        ),
        **attributes("torchaudio.models", "DeepSpeech", (1, 20, 16), n_feature=16, n_hidden=32, n_class=5),
    }


def asteroid() -> dict[str, Case]:
    """Source separation."""
    return {
        **attributes(
            "asteroid.models",
            "ConvTasNet",
            (1, 1600),
            n_src=2,
            n_filters=32,
            n_blocks=2,
            n_repeats=2,
            bn_chan=16,
            hid_chan=32,
            skip_chan=16,
        ),
        **attributes(
            "asteroid.models",
            "SuDORMRFNet SuDORMRFImprovedNet",
            (1, 1600),
            n_src=2,
            n_filters=32,
            num_blocks=2,
            bn_chan=16,
        ),
        **attributes("asteroid.models", "DeMask", (1, 1600)),
    }


def transformers() -> dict[str, Case]:
    """Convolutional models, from their configurations."""

    def build(name: str) -> nn.Module:
        package = importlib.import_module("transformers")
        kind, head = name.split("/")
        options: dict[str, Any] = {
            "DacConfig": {},
            "RegNet": {
                "embedding_size": 16,
                "hidden_sizes": [16, 32, 64, 128],
                "depths": [1, 1, 2, 1],
                "groups_width": 16,
            },
        }.get(kind, {})
        if kind == "ResNet":
            options = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1]}
        if kind == "UperNet":
            backbone = package.ConvNextConfig(
                out_features=["stage1", "stage2", "stage3", "stage4"],
                hidden_sizes=[16, 32, 64, 128],
                depths=[1, 1, 2, 1],
            )
            options = {"backbone_config": backbone, "auxiliary_in_channels": 64, "hidden_size": 64}
        return getattr(package, f"{kind}{head}")(getattr(package, f"{kind}Config")(**options))  # type: ignore[no-any-return]

    return {
        **cases(
            "ResNet/ForImageClassification RegNet/ForImageClassification ConvNext/ForImageClassification "
            "ConvNextV2/ForImageClassification MobileNetV1/ForImageClassification MobileNetV2/ForImageClassification "
            "MobileNetV2/ForSemanticSegmentation EfficientNet/ForImageClassification Bit/ForImageClassification "
            "PoolFormer/ForImageClassification FocalNet/ForImageClassification HGNetV2/ForImageClassification "
            "UperNet/ForSemanticSegmentation",
            build,
            (3, 96, 96),
        ),
        **cases(
            "SpeechT5HifiGan/",
            lambda name: importlib.import_module("transformers").SpeechT5HifiGan(
                importlib.import_module("transformers").SpeechT5HifiGanConfig(upsample_initial_channel=32)
            ),
            (12, 80),
        ),
        **cases(
            "DacModel/",
            lambda name: (
                importlib.import_module("transformers")
                .DacModel(
                    importlib.import_module("transformers").DacConfig(
                        encoder_hidden_size=8, decoder_hidden_size=64, hidden_size=32
                    )
                )
                .encoder
            ),
            (1, 4096),
        ),
    }


def diffusers() -> dict[str, Case]:
    """Parts of image generators without attention."""
    package = "diffusers"
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    unet = {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "add_attention": False,
        "layers_per_block": 1,
    }

    class AtStep(nn.Module):
        """A diffusion model at one time step."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x, 10).sample  # type: ignore[no-any-return]

    return {
        **attributes(
            package,
            "AutoencoderKL",
            (3, 32, 32),
            output="sample",
            block_out_channels=(8, 16),
            norm_num_groups=8,
            mid_block_add_attention=False,
            **blocks,
        ),
        **attributes(package, "AutoencoderTiny", (3, 32, 32), output="sample"),
        **attributes(
            package,
            "VQModel",
            (3, 32, 32),
            output="sample",
            block_out_channels=(8, 16),
            norm_num_groups=8,
            mid_block_add_attention=False,
            lookup_from_codebook=True,
            **blocks,
        ),
        **cases(
            "UNet2DModel",
            lambda name: AtStep(importlib.import_module(package).UNet2DModel(sample_size=32, **unet)),
            (3, 32, 32),
        ),
    }


def torchxrayvision() -> dict[str, Case]:
    """X-rays."""
    return {
        **attributes("torchxrayvision.models", "DenseNet", (1, 224, 224), weights=None),
    }


def ultralytics() -> dict[str, Case]:
    """Detectors and classifiers; for a detector, the features of its head."""

    def build(name: str) -> nn.Module:
        tasks = importlib.import_module("ultralytics.nn.tasks")
        kind = (
            tasks.ClassificationModel
            if "cls" in name
            else tasks.SegmentationModel
            if "seg" in name
            else tasks.DetectionModel
        )
        return kind(f"{name}.yaml", verbose=False)  # type: ignore[no-any-return]

    return {
        **cases("yolov8n-cls yolo11n-cls", build, (3, 96, 96), output=0),
        **cases("yolov5n yolov8n yolov3-tiny yolov9t", build, (3, 96, 96), output=0),
    }


def kornia() -> dict[str, Case]:
    """Descriptors, edge detection, face detection, super-resolution."""
    return {
        **attributes("kornia.feature", "HardNet HardNet8 HyNet SOSNet TFeat OriNet", (1, 32, 32), pretrained=False),
        **attributes("kornia.feature", "KeyNet", (1, 64, 64), pretrained=False),
        **attributes("kornia.feature", "XFeatModel", (3, 96, 96), output=0),
        **attributes("kornia.feature", "DeFMO", (6, 64, 64), pretrained=False),
        **attributes("kornia.models.dexined", "DexiNed", (3, 64, 64), pretrained=False),
        **attributes("kornia.models.yunet", "YuNet", (3, 96, 96), output="conf", phase="test", pretrained=False),
        **attributes("kornia.models.rrdbnet", "RRDBNet", (3, 32, 32), num_in_ch=3, num_out_ch=3, num_block=2),
        **attributes("kornia.models.small_sr", "SmallSRNet", (1, 32, 32), upscale_factor=2, pretrained=False),
    }


def pretrainedmodels() -> dict[str, Case]:
    """Models ported from other frameworks."""

    def build(name: str) -> nn.Module:
        return importlib.import_module("pretrainedmodels").__dict__[name](pretrained=None, num_classes=1000)  # type: ignore[no-any-return]

    return {
        **cases("nasnetamobile", build, (3, 224, 224)),
        **cases("inceptionresnetv2", build, (3, 299, 299)),
        **cases(
            "bninception se_resnet50 se_resnext50_32x4d dpn68 fbresnet152 xception cafferesnet101 resnext101_32x4d "
            "squeezenet1_0",
            build,
            (3, 224, 224),
        ),
    }


def resnest() -> dict[str, Case]:
    """Split attention over groups of channels."""
    return attributes("resnest.torch", "resnest50 resnest50_fast_1s1x64d", (3, 96, 96), pretrained=False)


def efficientnet_pytorch() -> dict[str, Case]:
    """An early port of EfficientNet, with its own SiLU."""
    return cases(
        "efficientnet-b0 efficientnet-b2",
        lambda name: importlib.import_module("efficientnet_pytorch").EfficientNet.from_name(name),
        (3, 96, 96),
    )


PACKAGES: dict[str, Callable[[], dict[str, Case]]] = {
    function.__name__: function
    for function in (
        *(timm, pytorchcv, segmentation_models_pytorch, monai, braindecode, tsai, torchaudio, asteroid),
        *(
            transformers,
            diffusers,
            torchxrayvision,
            ultralytics,
            kornia,
            pretrainedmodels,
            resnest,
            efficientnet_pytorch,
        ),
    )
}
