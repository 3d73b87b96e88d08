"""Lets PEFT's LoftQ, which asks for a GPU by name, run on a CPU: import it before an adapter is made or loaded."""

import inspect

import torch
from peft.tuners.lora import layer
from peft.utils import loftq_utils

if not torch.cuda.is_available():
    source = inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"')
    exec(compile(source, loftq_utils.__file__, "exec"), vars(loftq_utils))
    layer.loftq_init = loftq_utils.loftq_init
