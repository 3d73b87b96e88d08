//! CPU kernels of training and generation, each with a slow twin in plain Burn operations.
