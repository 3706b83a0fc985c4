"""The sharding rules of a composition's arrays, the default of every run.

Each rule is (regex over names, axes of the last dimensions); the first that
matches a name holds. A matrix that writes into a wide state is cut along it by
`tensor`, and one that reads the state along its input, so that the two meet
without communication. See `parallel.sharding`.
"""

_ROWS = ("data", "fsdp")
SHARDING = (
  (r"states", (_ROWS, "sequence", None)),
  (r"heads", (_ROWS, "tensor", "sequence", None)),
  (r"batch/.*", (_ROWS, "sequence")),
  (r"cache/.*/(key|value)", (_ROWS, "tensor", None, None)),
  (r"cache/.*/segments", (_ROWS, None)),
  (r".*norm/\w+|.*/bias", ()),
  (r".*/embedding(/\w+)?", ("tensor", "fsdp")),
  (r".*/position_embedding", (None, "fsdp")),
  (r".*/router/kernel", ("fsdp", None)),
  (r".*/projection/kernel", ("fsdp", None)),
  # Queries, keys, values and the wide side of MLPs, each expert's too; of
  # connections; the head.
  (r".*/(query|key|value|gate|up|head)/kernel(/\w+)?", ("fsdp", "tensor")),
  (r".*/(output|down)/kernel(/\w+)?", ("tensor", "fsdp")),
  (r".*/(query|key|value|gate|up)/lora_a", ("fsdp", None)),
  (r".*/(query|key|value|gate|up)/lora_b", (None, "tensor")),
  (r".*/(output|down)/lora_a", ("tensor", None)),
  (r".*/(output|down)/lora_b", (None, "fsdp")),
)
