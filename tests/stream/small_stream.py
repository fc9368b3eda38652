"""The data module of the tests of streams: batches of 64 rows from 60 texts."""

from functools import partial

from tests.support.texts import texts
from tests.support.training import data

TEXTS = texts(60, 900)
small_stream = partial(
    data, dataset=TEXTS, hook="mlp_out", inference_batch_size=4, batch_size=64, buffer_size=512, val_rows=200
)
