"""CIFAR-10 as in the paper (Xiao, Kreis and Vahdat, ICLR 2022, Appendix); every other config is a difference.

Variants: 'paper' (default), 'smoke' (tiny networks, made data, under a minute).
"""

from ml_collections import ConfigDict


def get_config(variant: str = "paper") -> ConfigDict:
    """The paper's setting: FID 3.75, IS 9.63, recall 0.57 with four network calls an image."""
    # --8<-- [start:fields]  (docs/configuration.md shows what is between these two lines)
    config = ConfigDict()
    config.seed = 0  # of weights, noise, and the order of the images
    config.objective = "adversarial"  # or for comparison 'gaussian': x_0 by squared error; 'one_shot': a GAN whose
    # discriminator sees diffused images

    config.data = ConfigDict()
    config.data.name = "cifar10"  # of tfds, or one of ours: the table in docs/data.md
    config.data.path = ""  # of 'image_folder' and 'lsun_church': a folder, a zip or an LMDB; also gs://
    config.data.max_bad_share = 0.01  # of such a folder: the share of files that may be skipped as damaged
    config.data.split = "train"  # or a part: 'train[:90%]'
    config.data.dir = ""  # of tfds and of prepared copies; '' is the default of tfds, ~/tensorflow_datasets
    config.data.image_size = 32  # 0: what the images have; of a folder, at most 256
    config.data.channels = 3  # likewise
    config.data.in_memory_mib = 2048  # larger sets are decoded as they are read
    config.data.flip = True  # mirror half of the images (released code)
    config.data.scale = 1.0  # of points: x_0 is so many times as large, against the same noise

    config.diffusion = ConfigDict()  # the fields of Schedule.create
    config.diffusion.num_steps = 4  # T (paper)
    config.diffusion.kind = "vp"
    config.diffusion.beta_min = 0.1  # (paper)
    config.diffusion.beta_max = 20.0  # (paper)

    config.model = ConfigDict()
    config.model.network = "unet"  # or 'mlp', for points
    config.model.dtype = "float32"  # or 'bfloat16': the compute type of convolutions and dense layers
    config.model.data_std = 0.0  # of points: their standard deviation, to normalise what networks see; 0: do not
    config.model.num_classes = 0  # above 0: networks that know the labels of the data (not in the paper)
    config.model.remat = False  # True: less memory for more work

    config.generator = ConfigDict()  # the fields of Generator
    config.generator.nf = 128  # initial channels (paper)
    config.generator.ch_mult = (1, 2, 2, 2)  # channel multipliers (paper)
    config.generator.num_res_blocks = 2  # (paper)
    config.generator.attn_resolutions = (16,)  # (paper)
    config.generator.nz = 100  # latent dimension (paper)
    config.generator.z_emb_dim = 256  # (paper)
    config.generator.n_mlp = 4  # latent mapping layers (paper)
    config.generator.dropout = 0.0  # released code

    config.discriminator = ConfigDict()  # the fields of Discriminator; its stages follow from the image size
    config.discriminator.ngf = 64  # released code
    config.discriminator.t_emb_dim = 256  # released code

    config.train = ConfigDict()
    config.train.init_from = ""  # a workdir or checkpoint whose networks a new run begins with, such as for other data
    config.train.num_steps = 351_000  # 1800 epochs (paper) of 195 steps; 0: chosen for the number of images
    config.train.batch_size = 256  # 4 GPUs x 64 (paper); global; 0: chosen for the number of images
    config.train.accumulate = 1  # parts that each device takes its batch in, one after the other, for less memory
    config.train.lr_g = 1.6e-4  # (paper)
    config.train.lr_d = 1.25e-4  # (paper)
    config.train.lr_decay = True  # cosine, to lr_min (paper)
    config.train.lr_decay_steps = 0  # and constant afterwards; 0: in num_steps (paper)
    config.train.lr_min = 1e-5  # released code
    config.train.lr_min_d = 0.0  # of the discriminator; 0: lr_min (released code)
    config.train.d_lead = 0.0  # above 0: G waits for D, its rate is whole where D's loss is so far below 2 ln 2
    config.train.steps_per_epoch = 195  # 50,000 // 256: the learning rate moves once an epoch (released code); 0: that
    config.train.adam_b1 = 0.5  # (paper)
    config.train.adam_b2 = 0.9  # (paper)
    config.train.r1_gamma = 0.02  # R1 coefficient (paper)
    config.train.r1_every = 15  # lazy regularization (paper)
    config.train.ema_decay = 0.9999  # (paper)

    config.loss = ConfigDict()
    config.loss.generator = "nonsaturating"  # (paper), or 'rpsw': sliced Wasserstein along random paths (Nguyen 2024)
    config.loss.mismatched = 0.0  # weight in D's loss of pairs of two images, which are not real; 0: none (paper)
    config.loss.moment = 0.0  # weight in G's loss of the error of its mean over z (Lee 2019); 0: none (paper)
    config.loss.projections = 1_000  # of 'rpsw', for each distance
    config.loss.kappa = 50.0  # of 'rpsw': their concentration about the paths

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 5_000  # steps; None: about a fiftieth of all
    config.checkpoint.keep = 3  # the last ones
    config.checkpoint.keep_period = 50_000  # and for good every one whose step this divides; 0: none

    config.log = ConfigDict()
    config.log.every = 100  # steps between two lines of metrics
    config.log.tensorboard = True
    config.log.samples_every = 5_000  # steps between two grids of samples; None: about a fiftieth of all

    config.sample = ConfigDict()
    config.sample.batch_size = 64  # images drawn at once on a device; halved where memory runs out
    config.sample.grid = 64  # images in a grid

    config.eval = ConfigDict()
    config.eval.features = "inception"  # or 'classifier', of this project, for small images; or 'points'
    config.eval.num_samples = 50_000  # (paper)
    config.eval.reference_samples = 0  # real images that the samples are compared with; 0: all
    config.eval.reference_statistics = ""  # mu and sigma of real images that others published, .npz, for FID
    config.eval.manifold_samples = 50_000  # at most so many of each set for precision and recall
    config.eval.k = 3  # their neighbours (Kynkaanniemi et al. 2019)
    config.eval.batch_size = 64  # images in a feature network at once, on a device
    config.eval.inception_weights = ""  # '' is pt_inception-2015-12-05-6726825d.pth in data.dir
    config.eval.vgg_weights = ""  # '' is vgg16-397923af.pth in data.dir
    config.eval.every = 0  # steps between two evaluations while training; 0: none
    config.eval.online_samples = 1_000  # that such an evaluation draws
    # --8<-- [end:fields]

    return apply_variant(config, variant)


def apply_variant(config: ConfigDict, variant: str, *own: str) -> ConfigDict:
    """The config as it is ('paper') or shrunk ('smoke'); `own` are the variants that its file makes itself."""
    if variant == "smoke":
        smoke(config)
    elif variant != "paper":
        raise ValueError(f"unknown variant {variant!r}: it is one of {', '.join(('paper', *own, 'smoke'))}")
    return config


def small(config: ConfigDict) -> None:
    """Networks for 32 px that two CPU cores train in hours, and a schedule for them."""
    config.generator.update(nf=16, ch_mult=(1, 2, 4), num_res_blocks=1, nz=64, z_emb_dim=128, n_mlp=3)
    # halving at once: twice the weights of the preset with ngf = 8, for the same work
    config.discriminator.update(ngf=16, start=1, stages=((2, True), (4, True), (8, True)), t_emb_dim=128)
    # D must stay ahead of G: with lr_g as large as lr_d, or R1 0.05, its gradients on the images soon vanish; with
    # the constant rates that were tried G overtook it in the end, or learned too slowly; so G waits for it
    config.train.update(lr_g=1e-4, lr_d=3e-4, d_lead=0.7, r1_gamma=0.5, r1_every=10)
    config.train.update(lr_min=3e-5, lr_min_d=1e-4, steps_per_epoch=1)
    config.train.update(num_steps=7_000, batch_size=32, ema_decay=0.999)
    config.checkpoint.update(every=500, keep_period=0)
    config.log.update(every=50, samples_every=500)


def smoke(config: ConfigDict) -> None:
    """Shrink any config so that it runs in under a minute on a CPU, on made data, through the same code."""
    config.data.update(name="synthetic", image_size=8, channels=config.data.channels or 3)
    config.generator.update(nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), nz=8, z_emb_dim=16, n_mlp=1)
    config.discriminator.update(ngf=8, t_emb_dim=16)
    config.train.update(num_steps=8, batch_size=16, steps_per_epoch=2, r1_every=3)
    config.checkpoint.update(every=4, keep=2, keep_period=0)
    config.log.update(every=2, samples_every=4)
    config.sample.update(batch_size=8, grid=16)
    config.eval.update(num_samples=64, manifold_samples=64, batch_size=16, online_samples=32)
