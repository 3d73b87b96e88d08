//! CPU kernels of training and generation, each with a slow twin in its tests.
//!
//! Every result is a function of the operands alone. Sums run in one fixed order (a chain of fused
//! multiply-adds over the inner dimension, or sixteen lanes joined as a tree), so the instruction
//! set, the number of threads, the blocking and the other rows of a batch never change a bit.

mod simd;

pub mod attention;
pub mod cross_entropy;
pub mod dropout;
pub mod elementwise;
pub mod gemm;
pub mod norm;
pub mod rope;

pub use simd::{Isa, isa};
