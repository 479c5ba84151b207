"""The keys that the library keeps in parameter groups, in checkpoints and on wrapped optimizers."""

#: The number of the next step, and the group's bounds of the rate. Sharded optimizers and
#: checkpointers carry groups across, and nothing else. torch's OneCycleLR writes "max_lr".
STEP, BASE, MAX = "clr_step", "clr_base_lr", "clr_max_lr"

#: The policy as JSON, see :meth:`clr_optim.schedule.Schedule.to_json`.
SCHEDULE = "clr_schedule"

#: The schedules of the group's settings as JSON, by the setting's name, if any follows one.
SCHEDULES = "clr_schedules"

#: The bounds of the group's momentum, if momentum cycles.
BASE_MOMENTUM, MAX_MOMENTUM = "clr_base_momentum", "clr_max_momentum"

#: The statistics of ``skip_above``, if given, see :data:`clr_optim.gate.Statistics`.
SKIPS = "clr_skips"

#: The number of averages that a group's parameters have taken, and the position at that time.
AVERAGES = "clr_averages"

#: The average that these are of, as text, see :func:`clr_optim.averages.kind_of`.
AVERAGE_KIND = "clr_average_kind"

#: All keys of a group.
KEYS = (
    STEP, BASE, MAX, SCHEDULE, SCHEDULES, BASE_MOMENTUM, MAX_MOMENTUM, SKIPS, AVERAGES, AVERAGE_KIND
)  # fmt: skip

#: The name of a parameter's average in the state, beside torch's names.
AVERAGE = "clr_average"

#: The name of what rounding took from the float32 master of a bfloat16 parameter, likewise.
REST = "clr_rest"

#: The entry of a state dict that holds the keys of each group, if the layout drops unknown keys.
ENTRY = "clr_optim"

#: The attribute of a wrapped optimizer that holds the note of the last wrapper. Copies and pickles
#: leave the note out.
NOTE = "_clr_optim_note"
