"""The one file that says what can be set, with default, range and the paper's value.

A scenario is a frozen tree of sections. YAML files in `scenarios/` hold only what differs from the defaults here;
`section.key=value` on the command line overrides both (see `load.py`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Encoding = Literal["untrained", "dda", "pretraining", "csft"]
"""The encoder that is meant: Table 3's rows (as it started, + DDA, + DDA + DMA, + C-SFT)."""
ENCODER_FOLDERS: dict[Encoding, str] = {
    "untrained": "pretraining/untrained",
    "dda": "pretraining/dda",
    "pretraining": "pretraining/encoder",
    "csft": "csft/encoder",
}
"""Where each of them is, below the run's root."""
Variant = Literal[
    "sim-base",
    "sim-mim",
    "sim-style",
    "din-base",
    "din-mim",
    "din-style",
    "dien-base",
    "dien-mim",
    "dien-style",
    "bst-base",
    "bst-mim",
    "bst-style",
    "twin-base",
    "twin-mim",
    "twin-style",
    "average-base",
    "average-mim",
    "average-style",
]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


class Run(Section):
    """Where stages leave their artifacts, and what one machine may use."""

    root: str | None = None
    """Folder or URI for the artifacts. Default: runs/<scenario> here; in a submitted job ~/mim_ray_runs/<scenario>."""
    center: str | None = None
    """Folder or URI of the representation center. Default: center below run.root. Runs may share one: the embeddings of
    a new encoder fill beside those that are served."""
    reuse: tuple[str, ...] = ()
    """Roots of other runs: a stage that one of them finished with the same settings and input is read there, not made again."""
    seed: Count = 0
    """Every random choice derives from it."""
    num_cpus: Positive | None = None
    """CPUs of the embedded Ray (ignored when joining a cluster). Default: all of this machine."""
    num_gpus: Count | None = None
    """GPUs of the embedded Ray. Default: what Ray finds."""
    object_store_mb: Annotated[int, Field(ge=80)] = 400
    """Shared memory of the embedded Ray, in MiB."""


class Feature(Section):
    """A column that the CTR models are told beside ids and content."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    """Of the column, and of the key in a ranking request's context."""
    kind: Literal["categorical", "dense", "multi"]
    """A string, a number, or a list of strings."""


class FeatureTransform(Section):
    """How one declared feature becomes numbers; what is learnt is learnt on train rows only."""

    min_count: Positive = 1
    """categorical, multi: a value met in fewer train rows counts as unknown."""
    num_buckets: Positive | None = None
    """categorical, multi: no vocabulary, values share so many embeddings by their hash. For unbounded sets of values."""
    max_values: Positive = 20
    """multi: only the first so many values of a row are looked at."""
    normalise: Literal["standard", "quantile"] = "standard"
    """dense: (x - mean) / standard deviation within +-10, or the place among train's quantiles, from -1 to 1, for long tails."""


class Data(Section):
    """The user's own tables."""

    root: str | None = None
    """Folder or URI with items and interactions (and, if there are, impressions and interest_pairs), each NAME.parquet
    (a file or a folder) or NAME (a Delta table or a folder of Parquet files). Without it the synthetic shop is built."""
    images_root: str | None = None
    """Folder or URI below which an item's image_uri may point, and from which a relative one is read. Default: data.root.
    Nothing else is read, nothing is fetched over HTTP."""
    max_image_bytes: Positive = 8_000_000
    """An encoded image larger than this is rejected before decoding."""
    max_image_pixels: Positive = 50_000_000
    """An image with more pixels than this is rejected before decoding."""
    max_title_chars: Positive = 2_000
    """A longer title is cut."""
    features: tuple[Feature, ...] = ()
    """Columns that the CTR models are told beside ids and content, as {name, kind}: of the impressions table, else of the
    log's events that become samples (docs/features.md)."""


class Synthetic(Section):
    """The seeded shop with known click probabilities."""

    num_items: Positive = 3_000
    num_users: Positive = 2_000
    num_impressions: Positive = 160_000
    num_weeks: Positive = 8
    num_categories: Positive = 8
    style_share: Ratio = 0.4
    """Share of the click logit's variance that is the user's taste for style (content can know it)."""
    individual_share: Ratio = 0.3
    """Share that is the user's own taste for items, which content cannot explain."""
    popularity_share: Ratio = 0.3
    """Share that is the item's popularity."""
    logit_std: PositiveFloat = 2.0
    """Standard deviation of the click logit."""
    base_ctr: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """Mean click probability over random users and items."""
    initial_items_ratio: Ratio = 0.4
    """Part of the catalogue that exists before the first event; the rest arrives evenly over the weeks."""
    num_image_searches: Count = 9_000
    """Image searches that end in a purchase of an item of the wanted style."""
    image_size: Annotated[int, Field(ge=16)] = 48
    """Side of the rendered pictures, in pixels."""
    missing_image_ratio: Ratio = 0.02
    missing_title_ratio: Ratio = 0.02
    title_style_ratio: Ratio = 0.5
    """Chance that a style factor is named in the title."""


class Samples(Section):
    """From raw events to interest_pairs and impressions."""

    positive_events: tuple[str, ...] = ("click", "purchase")
    """Events that show interest: they build the behaviors and, with impressions, the labels."""
    pair_events: tuple[str, ...] = ("purchase",)
    """Events whose item is the positive of an interest pair (paper: purchases)."""
    min_rating: float | None = None
    """An event that carries a rating is positive only from this rating on."""
    impression_event: str = "impression"
    """The event that says an item was shown. Without such events negatives are drawn."""
    click_window_s: PositiveFloat = 1_800.0
    """Without impression ids, a positive belongs to the user's last impression of the item within this time."""
    num_drawn_negatives: Positive = 4
    """Negatives drawn for each positive when the log has no impressions."""
    drawn_window_days: PositiveFloat = 28.0
    """Drawn negatives come from the events of this many days that end at the sample's time."""
    drawn_uniform_ratio: Ratio = 0.2
    """Part of the drawn negatives taken evenly from all items that existed then: the floor for items without events."""
    pair_window_days: PositiveFloat = 30.0
    """Built pairs join two consecutive positives of a user at most this far apart."""
    max_behaviors: Positive = 50
    """Newest behaviors kept per impression (paper's production: up to 1,000)."""
    time_resolution: Literal["exact", "day"] = "exact"
    """"day": timestamps are dates, so nothing of the same day may be seen."""
    validation_ratio: Ratio = 0.1
    """Share of impressions, by time, in validation (without a split column)."""
    test_ratio: Ratio = 0.2
    """Share of impressions, by time, in test (without a split column)."""
    validation_start: str | None = None
    """ISO time from which impressions are validation; overrides validation_ratio."""
    test_start: str | None = None
    """ISO time from which impressions are test; overrides test_ratio."""


class Vision(Section):
    """F_V, the image tower."""

    model: str = "eva02_base_patch14_224"
    """A timm model name (paper: EVA-02), or open_clip:NAME. docs/encoders.md lists Figure 5's."""
    weights: str | None = None
    """Local folder with safetensors, `hub` for the model's public weights, or hub:OWNER/NAME. None: random initialisation
    ("untrained")."""
    image_size: Annotated[int, Field(ge=16)] | None = None
    """Side of the square input, in pixels. Default: the model's own."""
    resize: Literal["shortest", "longest", "squash"] | None = None
    """How a picture becomes square: crop the longer side, pad the shorter with white, or squash, to the whole of
    image_size. Default: the model's own way, with its own margin."""
    model_args: dict[str, int | float | bool | str | list[int]] = {}
    """Arguments of the architecture that differ from the named model's, for small versions."""


class Text(Section):
    """F_L, the language tower."""

    model: str = "BAAI/bge-base-en-v1.5"
    """A transformers hub name or local folder (paper: BGE), a model type such as `bert` with model_args, or open_clip:NAME."""
    weights: str | None = None
    """Local folder with safetensors, `hub` to download `model`, or hub:OWNER/NAME. None: random initialisation
    ("untrained")."""
    max_tokens: Annotated[int, Field(ge=4)] = 64
    """Longer titles are cut."""
    vocabulary_size: Annotated[int, Field(ge=64)] = 8_000
    """Size of the WordPiece vocabulary trained on the catalogue where no weights bring a tokenizer."""
    model_args: dict[str, int | float | bool | str | list[int]] = {}
    """Arguments of the configuration that differ from the model type's, for small versions."""


class Encoders(Section):
    """Eqs. 2-4."""

    vision: Vision = Vision()
    text: Text = Text()
    width: Positive = 256
    """D: width of h^img, h^txt and h^MM."""
    fusion: Literal["tfn", "low_rank_tfn", "concat"] = "tfn"
    """Eq. 3's outer product, the same with low-rank weights for wide towers, or its ablation (Table 5)."""
    fusion_rank: Annotated[int, Field(ge=2)] = 16
    """Rank of low_rank_tfn."""
    fusion_hidden: Positive = 512
    """Hidden width of the MLP of Eq. 4."""


class Workers(Section):
    """Ray Train workers of a stage."""

    num_workers: Positive = 1
    """P. Gradients and negatives cross all of them."""
    cpus_per_worker: PositiveFloat = 1.0
    threads_per_worker: Positive | None = None
    """Torch threads. Default: this machine's cores divided by the workers."""
    use_gpu: bool = False
    """One GPU for each worker."""
    max_failures: Count = 3
    """Restarts of the worker group after a crash."""
    in_driver: bool = False
    """A single CPU worker runs inside the job's own process: no start-up time (about 10 s), but a crash ends the job."""


class Tuning(Section):
    """How a stage trains F_V and F_L; the saved architecture stays the same."""

    vision_tuning: Literal["full", "lora", "frozen"] = "full"
    """Train all of F_V, low-rank updates beside its layers (LoRA, peft), or nothing of it."""
    text_tuning: Literal["full", "lora", "frozen"] = "full"
    """The same for F_L."""
    lora_rank: Positive = 16
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Each layer of a tower takes this part of the learning rate of the layer above it. 1.0: all the same rate."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward pass: less memory, about a third more time."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the towers' matrix products; weights, embeddings and losses stay float32."""
    compile: bool = False
    """torch.compile the towers: faster steps on a GPU after a slow start."""


class Pretraining(Workers, Tuning):
    """Section 3.2: DDA for both towers, then DMA."""

    num_decoders: Count = 2
    """Ray Data tasks at once that read and decode pictures for each worker, on CPUs. 0: in a thread of the worker."""
    batch_size: Positive = 256
    """Per worker."""
    vision_dda_steps: Count = 2_000
    """Masked image modelling."""
    text_dda_steps: Count = 2_000
    """Masked language modelling; next-token prediction for GPT-like towers."""
    dma_steps: Count = 5_000
    """Symmetric image-text contrastive training."""
    vision_dda_learning_rate: PositiveFloat = 2e-4
    text_dda_learning_rate: PositiveFloat = 1e-4
    dma_learning_rate: PositiveFloat = 1e-3
    """DMA: of the projections, which start at random, and the temperature."""
    dma_tower_learning_rate: PositiveFloat = 1e-4
    """DMA: of F_V and F_L."""
    warmup_ratio: Ratio = 0.1
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    image_mask_ratio: Ratio = 0.6
    """Part of the patches hidden in masked image modelling."""
    text_mask_ratio: Ratio = 0.15
    temperature: PositiveFloat = 0.07
    """Start of DMA's learned temperature; 1/temperature is clamped at 100."""
    checkpoint_every_steps: Positive = 500
    """Steps between the checkpoints inside a phase from which crashed workers go on."""


class Csft(Workers, Tuning):
    """Section 3.3: C-SFT with space-time negatives."""

    num_decoders: Count = 2
    """Ray Data tasks at once that read and decode pictures for each worker, on CPUs. 0: in a thread of the worker."""
    batch_size: Positive = 1_024
    """N, pairs per worker (paper: 1,024)."""
    steps: Positive = 2_000
    num_past_batches: Count = 10
    """k: batches of the past whose items are negatives too (paper: 10)."""
    past_warmup_steps: Count = 100
    """Past batches join after this many steps: before, their embeddings drift too fast."""
    hard_negatives: bool = True
    """One other item of the positive's category per pair (part of ST-NSG). Where new items matter compare with false
    (docs/results.md). A catalogue without categories needs false."""
    hard_negative_power: Ratio = 0.5
    """Hard negatives are drawn in proportion to (an item's training pairs + 0.1) to this power. 0: evenly, which pushes items
    that few have bought away from all. 1: about as often as they are positives. 0.5 did well everywhere (docs/results.md)."""
    text_loss_weight: Annotated[float, Field(ge=0.0)] = 0.5
    """alpha of Eq. 6 (paper: 0.5)."""
    image_loss_weight: Annotated[float, Field(ge=0.0)] = 0.5
    """beta of Eq. 6 (paper: 0.5)."""
    temperature: PositiveFloat = 0.07
    """Divides the cosine at each loss level; the paper prints none (1.0)."""
    learn_temperature: bool = True
    """One learned temperature per loss level, 1/temperature clamped at 100."""
    mask_user_items: bool = True
    """Mask the same user's other purchases where they appear as negatives."""
    modality_dropout: Ratio = 0.05
    """Chance that an item trains without its image, and likewise its title, so that one modality alone is understood."""
    learning_rate: PositiveFloat = 3e-4
    """Of projections and fusion."""
    tower_learning_rate: PositiveFloat = 1e-4
    """Of F_V and F_L."""
    warmup_ratio: Ratio = 0.1
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    supervision: Literal["category", "click-binary", "purchase-binary", "click", "purchase", "any"] = "any"
    """Table 4: category is v1 (cross-entropy on item categories), click-binary v2 and purchase-binary v3 (binary
    cross-entropy on pairs of that signal), click v4 and purchase v5, which is MIM (contrastive). "any": contrastive on all
    pairs there are."""
    multi_level: bool = True
    """False: only q to h^MM, without the text and image levels of Eq. 6 (Table 5)."""
    space_time_negatives: bool = True
    """False: a query's negatives are the other positives of its own worker's batch (Table 5, without ST-NSG)."""
    log_q: bool = False
    """Take the log of an item's sampling frequency from its logits, so that popular items are not pushed away for being
    met more often (Yi et al. 2019)."""
    past_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Past batches are embedded by a slow copy of the encoder that keeps this part of itself at each step, as in MoCo
    (0.99 to 0.999); costs a second copy and a second forward pass. 0: off, by the encoder itself."""
    chunk_size: Positive | None = None
    """Pairs embedded at once, with cached gradients: batches larger than memory, at a second forward pass. None: all."""
    held_out_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Part of the pairs, by hash, that is never trained on and on which retrieval is measured."""
    max_held_out: Positive = 1_024
    """Held-out pairs measured at most."""
    max_gallery: Positive | None = None
    """Items among which retrieval looks for the purchased one; a larger catalogue is sampled. Default: all items."""
    checkpoint_every_steps: Positive = 500
    """Steps between the checkpoints from which crashed workers go on."""

    @property
    def pair_signal(self) -> Literal["purchase", "click", "any"]:
        """The signal of the pairs to train on. Table 4's v1 looks at items only, so it takes all pairs there are."""
        if self.supervision in ("category", "any"):
            return "any"
        return "click" if self.supervision.startswith("click") else "purchase"

    @property
    def draws_hard_negatives(self) -> bool:
        return self.hard_negatives and self.space_time_negatives


class Extraction(Section):
    """MFM's writer."""

    encoder: Encoding = "csft"
    """The stage whose encoder fills the table (Table 3's rows)."""
    num_actors: Positive | None = None
    """Encoder actors; a fixed pool. Default: as many as GPUs (or, without `gpus_per_actor`, CPUs) that Ray has at the start."""
    cpus_per_actor: PositiveFloat = 1.0
    gpus_per_actor: Annotated[float, Field(ge=0.0)] = 0.0
    num_decoders: Count | None = None
    """Tasks at once that read and decode pictures for each actor, on a CPU each. 0: the actor decodes itself. Default: 0
    without GPUs, else the CPUs that the actors leave."""
    batch_size: Positive = 256
    """Items encoded at once. On CPUs 8 to 32 is faster for large towers."""
    reuse_snapshot: bool = True
    """Copy the embedding of content that the current snapshot of this encoder version has (if it is float32)."""
    shard_rows: Positive = 1_024
    """Rows of a deterministic shard, the unit of exactly-once."""
    commit_every_s: PositiveFloat = 5.0
    """Finished shards become visible at least this often."""
    snapshot_dtype: Literal["float32", "float16", "int8"] = "float32"
    """What serving and training read; docs/representation_center.md tells what float16 and int8 cost."""
    snapshot_keep: Positive = 3
    """States of a snapshot that stay for a roll-back, the current one included."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the towers' matrix products."""
    compile: bool = False
    """torch.compile the towers: faster batches on a GPU after a slow start."""


class Refresh(Section):
    """Rounds of jobs/refresh.py; encoder, actors and shards are those of `extraction`."""

    warm_rows: Positive = 4_096
    """A round with at most so many items to encode uses actors that stay alive between rounds; a larger one the pipeline."""
    max_deleted_ratio: Ratio = 0.5
    """A round that would delete more of the known items (and more than 100) stops: half a catalogue is rather a mistake."""
    snapshot_every_s: Annotated[float, Field(ge=0.0)] = 600.0
    """With --every, a changed table gets a new snapshot at most this often (it copies the vectors of all items); what follows the
    table sees changes at once. 0: after each round that finds it changed. A single round always builds one."""


class Ciubm(Workers):
    """Section 3.4: the CTR model."""

    variants: Annotated[tuple[Variant, ...], Field(min_length=1)] = ("sim-base", "sim-mim", "din-base", "din-mim")
    """Models to train and compare. First the user behavior model of Eq. 1 (paper's default: SIM), then the vectors behind
    Eqs. 7-9: none (base), the MM embeddings (mim), or the synthetic shop's true styles (style)."""
    id_module: bool = True
    """h_B^ID in Eq. 9 (Table 5)."""
    content_module: bool = True
    """h_B^MM, Eq. 7 (Table 5)."""
    fusion_module: bool = True
    """h_B^Fusion, Eq. 8 (Table 5)."""
    similarity_histogram: bool = True
    """Beside Eq. 9: a histogram of the behaviors' cosines to the target (SimTier, MUSE). False: the strict paper form."""
    target_content: bool = False
    """Feed the target's own MM vector (an ablation; the paper does not)."""
    similarity_summary: bool = False
    """Beside Eq. 9: mean, largest and recency-weighted mean cosine of the behaviors to the target."""
    content_norm: Literal["sum", "mean", "log"] = "mean"
    """Eqs. 7-8 as written (sum), divided by the number of behaviors, or by the logarithm of it. The mean was the best on
    validation of every data set (docs/ciubm.md)."""
    content_projection: Count = 32
    """MM vectors in Eq. 9 that are more than twice as wide are mapped to this width (learnt, linear) before the deep network,
    whose first layer they are most of otherwise. 0: never, as the paper writes it."""
    content_attention: bool = False
    """SA-TA (MUSE): the attention of DIN, SIM and TWIN is told of the cosines to the target."""
    missing_content: bool = False
    """Tell items without content from unlike ones: content_norm counts the others only, and two inputs say what is missing."""
    query_interest: bool = False
    """Search: Eq. 7 with the query in the target's place, and the query's cosines. Needs samples with queries."""
    query_vector: bool = False
    """Search: feed the query's own vector, to base and +MIM alike. Needs samples with queries."""
    id_dim: Positive = 16
    """Width of each ID embedding."""
    hidden: tuple[Positive, ...] = (128, 64)
    """Widths of the deep CTR network."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    max_behaviors: Positive = 50
    """Newest behaviors used, at most samples.max_behaviors."""
    num_searched: Positive = 20
    """SIM and TWIN: behaviors that the search keeps, of TWIN for each head."""
    num_short: Positive = 10
    """SIM: newest behaviors of the short-term part."""
    sim_search: Literal["hard", "soft"] = "hard"
    """SIM: behaviors of the target's category, newest first, or the learnt search with a loss of its own."""
    sim_short: Literal["din", "dien"] = "din"
    """SIM: model of the short-term part (paper: DIEN)."""
    auxiliary_weight: Annotated[float, Field(ge=0.0)] = 1.0
    """DIEN and SIM's soft search: weight of their own loss (papers: 1)."""
    features: dict[str, FeatureTransform] = {}
    """Settings of the declared features by name, where they differ: min_count, num_buckets, max_values, normalise."""
    time_gaps: bool = False
    """BST, SIM and TWIN are told how long ago each behavior was. Needs impressions with behavior_times."""
    use_user_id: bool = True
    """An embedding per known user."""
    vocabulary: Literal["explicit", "hashed"] = "explicit"
    """explicit: a row per item and user that train has met. hashed: items and users share ciubm.hash_rows rows of each table
    by the hash of their ids, whoever they are; no list of users is kept."""
    hash_rows: Positive = 1_000_000
    """Of the hashed item table and of the hashed user table."""
    min_item_count: Positive = 1
    """Items met less often in train share the unknown item's embedding (explicit vocabulary)."""
    id_dropout: Ratio = 0.05
    """Chance that a target trains as an unknown item, so that new items have a trained embedding."""
    batch_size: Positive = 1_024
    """Rows per worker and step. Paper: 1,024."""
    num_epochs: Positive = 1
    learning_rate: PositiveFloat = 5e-3
    """Adam of the network (paper: 0.005)."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Of the network's matrices (AdamW)."""
    table_engine: Literal["torch", "torchrec"] = "torch"
    """ID tables: whole on every worker (torch), or their rows shared out among the workers (torchrec, an optional extra for
    tables that outgrow a worker; docs/id_tables.md)."""
    table_optimizer: Literal["adam", "rowwise_adagrad"] = "adam"
    """Of the ID tables: lazy Adam or row-wise Adagrad (one accumulator per row; the one that torchrec has)."""
    table_learning_rate: PositiveFloat | None = None
    """Of the ID tables. Default: learning_rate."""
    table_weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Of the rows that a batch meets."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the network's matrix products; weights, tables and the loss stay float32."""
    validate_every_steps: Count = 0
    """Steps between evaluations on validation, beside those after each epoch. The best state is the one that is kept."""
    patience: Count = 0
    """Evaluations in a row without a better validation AUC after which training stops. 0: all epochs run."""
    checkpoint_every_steps: Positive = 1_000
    """Steps between the checkpoints from which crashed workers and restarted jobs go on."""
    seeds: tuple[int, ...] = (0,)
    """One model per seed; reports give the mean."""
    continue_from: str | None = None
    """Folder or URI of an earlier model (ctr/<variant>), or of the folder that holds it (ctr): go on from it, on the train
    rows that are later than its own. Vocabularies and tables grow."""

    @property
    def num_hash_rows(self) -> int | None:
        """Rows that ids share, None with explicit vocabularies."""
        return self.hash_rows if self.vocabulary == "hashed" else None


class Evaluation(Section):
    """How CTR models are judged."""

    num_bootstrap: Positive = 200
    """Resamples of users behind each 95 % interval."""
    min_bucket_rows: Positive = 50
    """No AUC from fewer rows of either label."""


class Arm(Section):
    """A part of the users of an experiment, and what ranks for them."""

    weight: PositiveFloat = 1.0
    """Its share of the users is this over the sum of all arms' weights."""
    variant: Variant | None = None
    """The run's CTR model of this name, beside everything else of what is served. Default: what is served."""
    release: Positive | None = None
    """A release of the representation center by its number, with its model and embeddings. Not together with variant."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Arm:
        if self.variant is not None and self.release is not None:
            raise ValueError("an arm has a variant or a release, not both")
        return self


class Serving(Section):
    """Serve apps."""

    variant: Variant | None = None
    """The CTR model that ranks, one of ciubm.variants. Default: the first of them that uses MM embeddings."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0 picks a free port."""
    num_replicas: Positive = 1
    cpus_per_replica: PositiveFloat = 0.5
    gpus_per_replica: Annotated[float, Field(ge=0.0)] = 0.0
    """Of the new-item encoder; ranking uses none."""
    max_candidates: Positive = 2_000
    """More in one request is a 4xx."""
    max_body_bytes: Positive = 12_000_000
    """A larger request is refused before it is parsed."""
    body_timeout_s: PositiveFloat = 10.0
    """A body that has not arrived by then is not waited for."""
    max_json_values: Positive = 100_000
    """A body with more strings, numbers, lists and objects is refused before it is parsed."""
    query_deadline_ms: Positive = 1_000
    """A query that the new-item encoder has not read by then is left out of the ranking, which says so."""
    max_queued_requests: Positive | None = None
    """Rankings that wait, beside the 6 that a replica has in work; on Serve's fast path in each replica, else in each proxy.
    Beyond that 503 at once, with Retry-After. Default: 2 on the fast path, where what is accepted in an overload is then about
    as fast as always; else 200."""
    max_queued_new_items: Positive = 200
    """The same of requests to /v1/items."""
    decode_timeout_s: PositiveFloat = 10.0
    """Pictures of one request that take longer to decode, all together, are refused, and their decoder is ended."""
    image_url_prefixes: tuple[str, ...] = ()
    """What an item's image_url may begin with: https://images.example.com/shop/. Default: no URL is fetched."""
    image_url_timeout_s: PositiveFloat = 10.0
    """For fetching the pictures of one request, all together."""
    keys_file: str | None = None
    """API keys, a local file on every node (python -m mim_ray.serving.keys new). With keys, every caller needs one. More may
    be in the environment variable MIM_RAY_API_KEYS."""
    require_keys: bool = False
    """Refuse to start without keys. Always so where others than this machine can reach the app."""
    similar_items: bool = True
    """Answer /v1/similar and /v1/search/image; each machine then keeps an index of the snapshot."""
    exact_search_rows: Positive = 50_000
    """Snapshots of at most so many items are searched exactly, larger ones through an index."""
    search_recall: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    """Share of the true ten nearest items that the index must find, measured when it is built."""
    window_s: PositiveFloat = 10.0
    """New items are folded into the Delta table this often (paper 3.5, RIM)."""
    follow_release_s: PositiveFloat = 2.0
    """How often a replica looks whether another release was promoted."""
    fold_events_s: PositiveFloat = 300.0
    """Posted events, and exposures, are folded into Parquet files this often."""
    live_behaviors_days: PositiveFloat = 7.0
    """A ranking replica that starts reads this many days of posted events back. Longer than the time between two runs of
    jobs/build_samples.py."""
    max_live_behaviors: Positive = 1_000_000
    """Behaviors from posted events that a replica keeps in memory, about 350 bytes each; those of users without recent events
    go first."""
    experiment: str = "default"
    """Name of the A/B test: which arm a user is in follows from it and the user's id. A new name deals the users out anew."""
    arms: dict[Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")], Arm] = {}
    """Arms by name, such as {control: {variant: din-base}, mim: {variant: din-mim}}. The first one is compared with."""
    log_exposures: bool | None = None
    """Keep what was shown in the center's exposures. Default: where there are arms."""
    exposed_items: Positive = 50
    """Of each answer, this many items from the top count as shown. Callers who show fewer send top_k."""


class Maintenance(Section):
    """jobs/maintain.py: the files of the embedding log."""

    retention_h: Annotated[float, Field(ge=1.0)] = 168.0
    """Files that compaction replaced, and leftovers of dead processes, are deleted when they are older. Longer than the
    longest job that writes or reads the log."""
    deleted_retention_days: Annotated[float, Field(ge=0.0)] | None = 30.0
    """Deleted items stay in the log at least this long, then the deletion and all rows of the item go. null: forever."""
    purge_every_h: Annotated[float, Field(ge=0.0)] = 24.0
    """They may stay longer by this: dropping them rewrites the log, which happens no more often."""


class ParameterMachines(Section):
    """CMD (paper 3.5): actors that hold the embedding tables and dense parameters of a release."""

    state: str | None = None
    """URI of the file that running parameter machines were started with. The new-item encoder pushes to them."""
    shards: Positive = 2
    """S: the keys are split over this many machines, by hash."""
    replicas: Positive = 2
    """R: machines that hold the same shard. With 2, lookups go on while one of them is restarted."""
    cpus_per_machine: Annotated[float, Field(ge=0.0)] = 0.1
    """What Ray reserves for each machine."""
    folder: str | None = None
    """Local folder of the rows that came after a snapshot, on every node. Default: machines/ in the cache folder
    (MIM_RAY_CACHE, or ~/.cache/mim_ray)."""
    follow_every_s: PositiveFloat = 0.1
    """How often a machine looks for new window messages; pushed ones come at once. On object storage each look is a request."""
    freshness_s: PositiveFloat = 5.0
    """A machine that has not looked successfully for longer than this does not answer: no path returns an old row."""
    deadline_ms: Positive = 1_000
    """A lookup that no machine has answered by then fails, or degrades."""
    hedge_ms: Positive = 50
    """A machine that has not answered within this time is not waited for any more where its shard has another one."""
    degrade: bool = False
    """At the deadline answer unknown (zeros) for the keys of a shard that is away, with a flag, instead of an error."""


class Scenario(Section):
    """Everything a run can be told."""

    name: str = "default"
    description: str = ""
    run: Run = Run()
    data: Data = Data()
    synthetic: Synthetic = Synthetic()
    samples: Samples = Samples()
    encoders: Encoders = Encoders()
    pretraining: Pretraining = Pretraining()
    csft: Csft = Csft()
    extraction: Extraction = Extraction()
    refresh: Refresh = Refresh()
    ciubm: Ciubm = Ciubm()
    evaluation: Evaluation = Evaluation()
    serving: Serving = Serving()
    maintenance: Maintenance = Maintenance()
    machines: ParameterMachines = ParameterMachines()
