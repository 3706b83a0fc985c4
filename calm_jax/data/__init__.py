"""Examples to batches of NumPy arrays; nothing here needs JAX.

Text passes through each file once:

  examples    files, tfds and Hugging Face data sets to `TextExample`s, with
              `records` (one record of a file) and `templates` (its fields)
  documents   an example to token ids that fit a row, as `Segment`s
  rows        segments to a table of rows, and rows, in an order, to batches
  packing     the segments of some rows to one `core.batch.Batch`
  pipeline    all of this for a mixture: `text_source`; and iteration that
              resumes at any batch

`key_values`, `key_value_text` and `key_value_source` draw the examples of the
paper's key-value task (§4.1) instead of reading them.

Batch `i` of a source depends on its arguments and on `i` alone, so that a run
resumes at any step, and every host takes its rows of the same batch.
"""
