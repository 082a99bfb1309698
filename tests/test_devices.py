"""A model over several devices: the scores of one, whatever the engine, and left as it was."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from fake_devices import fake_devices, moved
from test_engines import VOCABULARY, network_of
from tiny import batch_of, pairs_of
