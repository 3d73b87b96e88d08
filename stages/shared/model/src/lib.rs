//! The decoder, its LoRA adapter, the training micro-step and generation.
//!
//! Weights are frozen Burn tensors under their checkpoint names. On Burn's CPU backend (flex) the
//! micro-step and the decode step run on hand-written kernels over the tensors' own memory; their
//! slow twin in plain Burn operations, with Burn's autodiff, is the reference of the tests.

mod adapter;
mod choice;
mod decoder;
mod dora;
mod error;
mod forward;
mod generate;
mod init;
mod linear;
mod loftq;
mod matrix;
mod merge;
mod micro_step;
mod peft;
pub mod reference;
mod residue;
mod svd;

pub use checkpoint::ModelConfig;

pub use adapter::{Adapter, DropoutKey, Factor, LoraConfig, PROJECTIONS};
pub use choice::{DeviceChoice, DtypeChoice, hides_gpus, sees_gpu};
pub use decoder::Model;
pub use error::ModelError;
pub use generate::{GenerateOptions, Generated};
pub use init::Init;
pub use loftq::loftq_weight;
pub use matrix::Matrix;
pub use micro_step::{Loss, MicroBatch};

/// Version of the arithmetic: part of the version of every stage kind that computes with it.
///
/// 1: first.
pub const NUMERICS_VERSION: u32 = 1;
