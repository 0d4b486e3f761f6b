"""The pass-through blocks against the installed trl and peft.

python -m pytest tests/unit/train/test_settings.py
"""

import dataclasses
import re
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from trl import DPOConfig

from common.errors import InputError, RecipeError
from common.recipe import load_recipe
from train import settings
from train.adapter import build_adapter
from train.settings import (
    GONE,
    GONE_ADAPTER,
    OTHER_TRAINERS,
    OUR_DEFAULTS,
    OWNED,
    OWNED_ADAPTER,
    REFUSED_INITS,
    build_trainer_settings,
    check,
    check_adapter,
    check_trainer,
    differences_from_trl,
    share_batch,
)

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
TRAINER_FIELDS = {field.name for field in dataclasses.fields(DPOConfig)}
ADAPTER_FIELDS = {field.name for field in dataclasses.fields(LoraConfig)}


@pytest.fixture
def recipe():
    return load_recipe(ROOT / "recipes" / "patient.yaml")


def with_train(recipe, **changes):
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})


def build(recipe, **changes):
    arguments = {"world_size": 1, "use_cpu": True, "bf16": False, **changes}
    return build_trainer_settings(recipe, output_dir=Path("unused"), **arguments)


def test_names_that_are_gone_are_not_in_the_installed_version():
    assert not GONE.keys() & TRAINER_FIELDS
    assert not GONE_ADAPTER.keys() & ADAPTER_FIELDS


def test_names_that_are_ours_are_in_the_installed_version():
    assert OWNED.keys() <= TRAINER_FIELDS
    assert OWNED_ADAPTER.keys() <= ADAPTER_FIELDS
    assert OUR_DEFAULTS.keys() <= TRAINER_FIELDS


def test_the_known_losses_are_those_the_installed_trainer_computes():
    source = Path(find_spec("trl").origin).parent / "trainer" / "dpo_trainer.py"
    computed = set(re.findall(r'loss_type == "(\w+)"', source.read_text(encoding="utf-8")))
    for loss in computed:
        block = {"loss_type": [loss]}
        if loss == "exo_pair":
            block["label_smoothing"] = 1e-3
        assert check_trainer(block) == []
    [problem] = check_trainer({"loss_type": ["none_such"]})
    assert set(re.findall(r"\w+", problem.partition("(known: ")[2])) == computed


@pytest.mark.parametrize("key", sorted(GONE))
def test_a_name_that_is_gone_is_answered_with_its_successor(key):
    [problem] = check_trainer({key: 1})
    assert problem == (
        f"train.trainer.{key}: is not a setting of the installed version: {GONE[key]}"
    )


@pytest.mark.parametrize("key", sorted(OWNED))
def test_what_is_ours_to_set_is_an_error_with_the_way_to_set_it(key):
    [problem] = check_trainer({key: 1})
    assert problem.startswith(f"train.trainer.{key}: has no place here: {OWNED[key]}")


# Each case: the block, the key, and what the message must say.
BROKEN = [
    ({"lerning_rate": 1e-5}, "lerning_rate", 'did you mean "learning_rate"?'),
    ({"bogus_thing_xyz": 1}, "bogus_thing_xyz", "delete it"),
    ({"r": 8}, "r", "belongs into train.adapter"),
    ({"target_modules": "all-linear"}, "target_modules", "belongs into train.adapter"),
    ({"learning_rate": "fast"}, "learning_rate", "is fast, but a number belongs here"),
    ({"learning_rate": True}, "learning_rate", "is true, but a number belongs here"),
    ({"learning_rate": None}, "learning_rate", "is null, but a number belongs here"),
    ({"learning_rate": [1e-5]}, "learning_rate", "is [1.0e-05], but a number belongs here"),
    ({"learning_rate": "nan"}, "learning_rate", "but a number belongs here"),
    ({"learning_rate": 0}, "learning_rate", "must be greater than 0"),
    ({"beta": -0.1}, "beta", "must be greater than 0"),
    ({"max_steps": 1.5}, "max_steps", "is 1.5, but a whole number belongs here"),
    ({"max_steps": -1}, "max_steps", "delete it and use num_train_epochs"),
    ({"max_steps": 5, "num_train_epochs": 1}, "num_train_epochs", "has no effect beside max_steps"),
    ({"warmup_steps": -1}, "warmup_steps", "must be 0 or more"),
    ({"bf16": "yes"}, "bf16", "but true or false belongs here"),
    ({"bf16": True, "fp16": True}, "fp16", "keep one of the two"),
    ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type", 'did you mean "cosine"?'),
    ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type", "choose another"),
    ({"lr_scheduler_kwargs": 3}, "lr_scheduler_kwargs", "a mapping belongs here"),
    ({"optim": "adamw"}, "optim", "is not possible here"),
    ({"save_strategy": "often"}, "save_strategy", "is not possible here"),
    ({"save_strategy": False}, "save_strategy", "is false, but one of: "),
    ({"truncation_mode": "keep"}, "truncation_mode", "keep_start"),
    ({"f_divergence_type": "kl"}, "f_divergence_type", "reverse_kl"),
    ({"loss_type": []}, "loss_type", "is empty"),
    ({"loss_type": "sigmod"}, "loss_type", 'did you mean "sigmoid"?'),
    ({"loss_type": [1]}, "loss_type", "is 1, but one of: "),
    (
        {"loss_type": "orpo"},
        "loss_type",
        "orpo has no reference, and TRL keeps it as an experiment",
    ),
    ({"loss_type": "SimPO"}, "loss_type", "use sigmoid_norm"),
    ({"loss_type": ["kto", "sft"]}, "loss_type", "use apo_zero or bco_pair on the pairs"),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1]}, "loss_weights", "1 weights for 2"),
    ({"loss_weights": [1, 2]}, "loss_weights", "2 weights for 1"),
    ({"loss_weights": [0]}, "loss_weights", "one above 0"),
    ({"loss_weights": [-1]}, "loss_weights", "one above 0"),
    ({"loss_weights": ["much"]}, "loss_weights", "is much, but a number belongs here"),
    ({"label_smoothing": 0.1}, "label_smoothing", "has no effect without loss_type: "),
    ({"discopop_tau": 0.1}, "discopop_tau", "has no effect without loss_type: discopop"),
    ({"f_alpha_divergence_coef": 0.1}, "f_alpha_divergence_coef", "without f_divergence_type"),
    ({"loss_type": "exo_pair"}, "label_smoothing", "must be greater than 0 with exo_pair"),
    ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing", "[0, 0.5)"),
    ({"loss_type": "aot", "use_weighting": True}, "use_weighting", "cannot work with aot"),
    (
        {"loss_type": "apo_zero", "f_divergence_type": "forward_kl"},
        "f_divergence_type",
        "cannot work with apo_zero",
    ),
    ({"ld_alpha": 2}, "ld_alpha", "must lie between 0 and 1"),
    ({"sync_ref_model": True}, "sync_ref_model", "cannot work with an adapter"),
    ({"ref_model_sync_steps": 5}, "ref_model_sync_steps", "without sync_ref_model"),
    (
        {"precompute_ref_log_probs": False, "precompute_ref_batch_size": 4},
        "precompute_ref_batch_size",
        "has no effect",
    ),
    ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy", "fails with DPO"),
    ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor", "has no effect without"),
    (
        {"gradient_checkpointing": True, "activation_checkpointing": True},
        "gradient_checkpointing",
        "keep one of the two",
    ),
]


@pytest.mark.parametrize(("block", "key", "fragment"), BROKEN, ids=[str(b[0]) for b in BROKEN])
def test_a_wrong_trainer_setting_says_what_to_do(block, key, fragment):
    [problem] = check_trainer(block)
    assert problem.startswith(f"train.trainer.{key}: ")
    assert fragment in problem


def test_a_moving_reference_cannot_be_precomputed():
    [problem] = check_trainer({"sync_ref_model": True}, adapter=False)
    assert "set precompute_ref_log_probs: false with it" in problem
    sound = {"sync_ref_model": True, "precompute_ref_log_probs": False, "ref_model_sync_steps": 5}
    assert check_trainer(sound, adapter=False) == []


def test_all_problems_of_a_block_are_found_at_once():
    assert len(check_trainer({"warmup_ratio": 0.1, "seed": 1, "beta": 0, "bogus_xyz": 1})) == 4


ADAPTER_BROKEN = [
    ({"rnk": 8}, "rnk", "is not a setting"),
    ({"target_module": ["q_proj"]}, "target_module", 'did you mean "target_modules"?'),
    ({"lora_r": 8}, "lora_r", "use r"),
    ({"learning_rate": 1e-5}, "learning_rate", "belongs into train.trainer"),
    ({"task_type": "CAUSAL_LM"}, "task_type", "always CAUSAL_LM"),
    ({"r": "many"}, "r", "is many, but a whole number belongs here"),
    ({"r": 0}, "r", "must be 1 or more"),
    ({"lora_alpha": 0}, "lora_alpha", "must be 1 or more"),
    ({"use_dora": "true"}, "use_dora", "true or false belongs here"),
    ({"bias": "some"}, "bias", "is not possible here"),
    ({"bias": "all"}, "bias", "the reference has changed"),
    ({"lora_dropout": 0.05}, "lora_dropout", "disable_dropout: false"),
    *(
        ({"init_lora_weights": init}, "init_lora_weights", "the reference is not the abliterated")
        for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "PiSSA")
    ),
    ({"init_lora_weights": "eva"}, "init_lora_weights", "needs activations of the training data"),
    ({"init_lora_weights": "mica"}, "init_lora_weights", "what the edit removed is the first"),
    ({"init_lora_weights": False}, "init_lora_weights", "the first loss is not ln 2"),
    ({"init_lora_weights": 1}, "init_lora_weights", "is none of peft's; use one of: true"),
    ({"init_lora_weights": "x"}, "init_lora_weights", "is none of peft's; use one of: true"),
    ({"kasa_config": {}}, "kasa_config", "the reference is not the abliterated model"),
    ({"eva_config": {}}, "eva_config", "init_lora_weights refuses"),
    ({"use_qalora": True}, "use_qalora", "use train.load_in_4bit"),
    ({"target_modules": ["q_proj", "lm_head"]}, "target_modules", "names lm_head"),
    ({"target_modules": ["model.lm_head"]}, "target_modules", "names lm_head"),
    ({"target_modules": ".*(proj|head)"}, "target_modules", "names lm_head"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save", "names lm_head"),
]


@pytest.mark.parametrize(
    ("block", "key", "fragment"), ADAPTER_BROKEN, ids=[str(b[0]) for b in ADAPTER_BROKEN]
)
def test_a_wrong_adapter_setting_says_what_to_do(block, key, fragment):
    [problem] = check_adapter(block)
    assert problem.startswith(f"train.adapter.{key}: ")
    assert fragment in problem


@pytest.mark.parametrize(
    "block",
    [
        {"r": 16, "lora_alpha": 32},
        {"r": 8, "target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, 2]},
        {"target_modules": r".*\.(q|v)_proj", "init_lora_weights": "gaussian"},
        {"init_lora_weights": True, "rank_pattern": {"q_proj": 4}},
        {"init_lora_weights": "orthogonal"},
    ],
)
def test_a_sound_adapter_passes_and_peft_takes_it(block):
    assert check_adapter(block) == []
    LoraConfig(**block)


def test_every_initialisation_that_peft_lists_is_taken_or_refused_with_its_reason():
    [field] = [
        field for field in dataclasses.fields(LoraConfig) if field.name == "init_lora_weights"
    ]
    hint = get_type_hints(LoraConfig)[field.name]
    listed = {word for option in get_args(hint) for word in get_args(option)}
    # lora_ga is taken by peft though its list leaves it out.
    named = {word.partition("_niter")[0] for word in listed} | {"lora_ga", "false"}
    assert named - {"gaussian", "orthogonal"} == REFUSED_INITS.keys()


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
def test_an_initialisation_that_is_taken_changes_nothing(init, build_model):
    model = build_model("llama", dtype=torch.float32)
    ids = torch.tensor([[1, 40, 41, 42]])
    with torch.no_grad():
        before = model(ids).logits
        weights = [parameter.clone() for parameter in model.parameters()]
        adapted = get_peft_model(model, build_adapter({"r": 4, "init_lora_weights": init}))
        assert torch.allclose(adapted(ids).logits, before, atol=1e-5)
    base = [p for name, p in adapted.named_parameters() if "lora_" not in name]
    assert all(torch.equal(one, other) for one, other in zip(weights, base, strict=True))


def test_losses_of_other_trainers_are_none_of_this_one():
    assert not OTHER_TRAINERS.keys() & set(settings._words("loss_type"))


def test_dropout_of_an_adapter_needs_dropout_to_be_on():
    assert check_adapter({"lora_dropout": 0.05}, trainer={"disable_dropout": False}) == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_passes(path):
    train = load_recipe(path).train
    assert check(train.trainer, train.adapter) == []


def test_numbers_that_yaml_took_for_text_are_numbers(recipe):
    block = {"learning_rate": "5e-7", "max_steps": "1e2", "warmup_steps": "0.1", "beta": 1}
    args = build(with_train(recipe, trainer=block))
    assert (args.learning_rate, args.max_steps, args.warmup_steps) == (5e-7, 100, 0.1)
    assert isinstance(args.max_steps, int)
    assert isinstance(args.beta, float)


def test_our_defaults_stand_where_the_recipe_says_nothing(recipe):
    args = build(with_train(recipe, trainer={}))
    assert args.num_train_epochs == 1
    assert args.lr_scheduler_type == "cosine"
    assert args.warmup_steps == 0.1
    assert args.precompute_ref_log_probs is True
    assert args.gradient_checkpointing is False
    assert args.learning_rate == 1e-5
    assert (args.save_strategy, args.save_steps, args.save_total_limit) == ("steps", 0.1, 1)
    assert args.max_length == 1024
    assert args.bf16 is False
    assert args.fp16 is False
    assert args.dataloader_pin_memory is False
    assert args.report_to == []
    assert (args.seed, args.run_name) == (recipe.seed, recipe.name)


def test_full_training_keeps_trls_learning_rate(recipe):
    args = build(with_train(recipe, trainer={}, adapter=None))
    assert args.learning_rate == DPOConfig.learning_rate


def test_the_recipe_has_the_last_word(recipe):
    block = {"num_train_epochs": 2, "bf16": True, "lr_scheduler_type": "linear", "warmup_steps": 5}
    args = build(with_train(recipe, trainer=block))
    assert (args.num_train_epochs, args.bf16, args.warmup_steps) == (2, True, 5)
    assert args.lr_scheduler_type == "linear"


def test_checkpoints_are_as_the_recipe_says_where_it_says_anything(recipe):
    assert build(with_train(recipe, trainer={"save_steps": 7})).save_steps == 7
    for strategy in ("epoch", "no"):
        train = with_train(recipe, trainer={"save_strategy": strategy}).train
        assert not any(line.startswith("save_steps") for line in differences_from_trl(train))


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_has_two_names_and_neither_warns(recipe, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        args = build(with_train(recipe, trainer={name: True}))
        assert args.gradient_checkpointing is True
        assert build(with_train(recipe, trainer={})).gradient_checkpointing is False


def test_a_loss_can_be_one_word(recipe):
    args = build(with_train(recipe, trainer={"loss_type": "sigmoid_norm"}))
    assert args.loss_type == ["sigmoid_norm"]


def test_what_only_dpo_config_itself_refuses_is_a_recipe_error_too(recipe):
    recipe = with_train(recipe, trainer={"logging_steps": 2.5})
    with pytest.raises(RecipeError, match=r"train\.trainer: .*logging_steps"):
        build(recipe)


def test_a_wrong_block_is_never_built(recipe):
    with pytest.raises(RecipeError, match="warmup_ratio"):
        build(with_train(recipe, trainer={"warmup_ratio": 0.1}))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("per_device", [None, 1, 2, 8, 64])
def test_the_world_size_never_changes_the_global_batch(recipe, world_size, per_device):
    block = {} if per_device is None else {"per_device_train_batch_size": per_device}
    recipe = with_train(recipe, trainer=block, global_batch_size=32)
    args = build(recipe, world_size=world_size)
    product = args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size
    assert product == 32


@pytest.mark.parametrize(
    ("batch", "world", "given", "shares"),
    [(48, 8, None, (6, 1)), (32, 1, None, (8, 4)), (22, 2, None, (1, 11)), (5, 1, 8, (5, 1))],
)
def test_without_a_given_size_the_largest_divisor_up_to_eight_is_taken(batch, world, given, shares):
    assert share_batch(batch, world, given) == shares


def test_a_batch_that_cannot_be_shared_names_its_numbers():
    with pytest.raises(
        InputError, match=r"32 pairs cannot be shared by 3 processes.*multiple of 3"
    ):
        share_batch(32, 3)
    with pytest.raises(InputError, match=r"5 pairs do not divide the 16 .* 32 over 2 .* of 16"):
        share_batch(32, 2, 5)


def test_the_plan_lists_where_our_defaults_differ(recipe):
    lines = differences_from_trl(with_train(recipe, trainer={}).train)
    keys = [line.partition(":")[0] for line in lines]
    assert sorted(keys) == sorted([*OUR_DEFAULTS, "learning_rate", "bf16"])
    assert any(line.startswith("warmup_steps: 0.1 (TRL: 0): ") for line in lines)


def test_the_plan_leaves_out_what_the_recipe_decides(recipe):
    block = {"max_steps": 5, "bf16": True, "warmup_steps": 0, "gradient_checkpointing": True}
    lines = differences_from_trl(with_train(recipe, trainer=block, adapter=None).train)
    keys = {line.partition(":")[0] for line in lines}
    assert not keys & {"num_train_epochs", "bf16", "warmup_steps", "activation_checkpointing"}
    assert "learning_rate" not in keys


def test_every_documented_trainer_setting_of_the_recipes_survives_yaml():
    for path in RECIPES:
        block = yaml.safe_load(path.read_text())["train"]["trainer"]
        assert settings.check_trainer(block) == []
