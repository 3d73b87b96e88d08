//! The training step on an NVIDIA GPU.
//!
//! [`Device`] is one GPU with a stream of its own: driver, NVRTC and cuBLASLt are opened at run
//! time. [`Frozen`] holds the weights, in NF4 or plain; [`Lora`] the adapter, its gradient and its
//! optimiser; [`Step`] runs a micro-batch forward and backward without a host synchronisation in
//! between. Semantics are those of `model::Model::loss_and_grad`, which is the reference of the
//! tests.

mod adapter;
mod attention;
mod choice;
mod compile;
mod device;
mod dtype;
mod error;
mod gemm;
mod generate;
mod graph;
mod lane;
mod nvml;
mod optimizer;
mod profile;
mod sizes;
mod staging;
mod step;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]
mod tests;
mod versions;
mod weights;

pub use adapter::Lora;
pub use choice::open;
pub use device::{Buffer, Device};
pub use dtype::Dtype;
pub use error::CudaError;
pub use generate::Generator;
pub use optimizer::{AdamSettings, Optimizer};
pub use step::{Activations, Spare, Step};
pub use weights::{Frozen, Linear};
