"""The rules for changed options of the training command when a training is resumed; no other module decides this.

docs/resume.md is the user's page on it.
"""

from __future__ import annotations

from typing import Dict, Literal

#: accepted: the training goes on with the new value. refused: an error names the option with both values. content: the
#: files behind the option are compared, and refused where their content differs. higher: a higher value extends the
#: training, a lower one is refused.
Rule = Literal["accepted", "refused", "content", "higher"]

#: Options that do not change what is learnt.
ACCEPTED = frozenset(
    (
        *("output_dir", "resume", "dry_run", "print_config", "log_level", "log_interval"),
        *("ngpu", "num_workers", "num_att_plot", "use_matplotlib", "use_tensorboard", "create_graph_in_tensorboard"),
        *("use_wandb", "wandb_project", "wandb_id", "wandb_entity", "wandb_name", "wandb_model_log_interval"),
        *("dist_backend", "dist_init_method", "dist_world_size", "dist_rank", "local_rank", "dist_master_addr"),
        *("dist_master_port", "dist_launcher", "multiprocessing_distributed", "unused_parameters"),
        *("gradient_as_bucket_view", "ddp_comm_hook", "sharded_ddp", "cudnn_enabled", "cudnn_benchmark"),
        *("cudnn_deterministic", "use_tf32", "detect_anomaly", "max_cache_size", "max_cache_fd"),
        *("valid_max_cache_size", "collect_stats", "write_collected_feats", "allow_variable_data_keys"),
        *("nbest_averaging_interval", "save_strategy"),
        *("kd_stage", "teacher_memory", "max_nonfinite", "blank_teacher"),
    )
)
#: Options that have a key of their own in the record of a training.
OWN: Dict[str, Rule] = {
    "config": "content",  # option by option, each by its own rule
    "kd_config": "content",  # the method: its KD stages, objectives and their options
    "target_cache": "content",  # its teacher, and the kinds of targets in it
    "nbest": "content",
    "seed": "refused",
    "teacher": "refused",  # the paths, and another model file at the same path
    "kd_stages": "refused",
    "max_epoch": "higher",
}


def rule_of(option: str) -> Rule:
    """The rule if ``option`` has another value than at the beginning of the training that is resumed."""
    return "accepted" if option in ACCEPTED else OWN.get(option, "refused")


def is_compared(option: str) -> bool:
    """Whether the value of ``option`` is stored among the options of a record, and compared directly."""
    return option not in ACCEPTED and option not in OWN
